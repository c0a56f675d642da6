"""The automatic recipe: a budget becomes a scheme for each layer."""
