"""Parts of a decoder. Layers hold weights and call kernels; they know no checkpoint."""
