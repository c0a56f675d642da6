"""The linear layers of a checkpoint as [N, K], whatever way they lie, and what becomes of them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.block import LinearResult
from compress.layer_row import pack_linear
from compress.manifest import LayerRow
from compress.steps import DTYPES
from compress.store import LayerStore
from compress.treatment import Treatment
from engine.formats import float_quantized, int_quantized, pack_quantized, sparse
from engine.formats.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Linears:
    """``transposed`` modules store their weight as [K, N]."""

    checkpoint: Checkpoint
    transposed: frozenset[str]

    def read(self, name: str) -> Tensor:
        """The tensor ``name``, a linear's weight as [N, K]. Raises ``ModelLoadError``."""
        tensor = self.checkpoint.tensor(name)
        turn = name.removesuffix(".weight") in self.transposed
        return tensor.t().contiguous() if turn else tensor

    def dtype(self, module: str) -> torch.dtype:
        """Of the stored weight."""
        return DTYPES[self.checkpoint.info(f"{module}.weight").dtype]

    def pack(
        self, results: Mapping[str, LinearResult], treatments: Mapping[str, Treatment]
    ) -> tuple[dict[str, Tensor], list[LayerRow]]:
        """Tensors as they are written, by full name, and the rows of the manifest."""
        tensors: dict[str, Tensor] = {}
        rows = []
        for module, one in results.items():
            packed, row = pack_linear(
                module,
                treatments[module],
                one,
                transposed=module in self.transposed,
                dtype=self.dtype(module),
            )
            tensors |= packed
            rows.append(row)
        return tensors, rows

    def floating(
        self, store: LayerStore, index: int, only: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """What decoder layer ``index`` computes with: float32 [N, K] weights, and vectors.

        ``only``: the modules that are read; None reads all.
        """
        found: dict[str, Tensor] = {}
        for module, tensors in store.modules(index, only).items():
            if "weight_bitmask" in tensors:
                found[f"{module}.weight"] = sparse.unpack(tensors).dequantize()
            elif "weight_packed" in tensors:
                found[f"{module}.weight"] = pack_quantized.unpack(tensors).dequantize()
            elif "weight_scale" in tensors:
                is_int8 = tensors["weight"].dtype == torch.int8
                unpack = int_quantized.unpack if is_int8 else float_quantized.unpack
                weight = unpack(tensors, transposed=module in self.transposed)
                found[f"{module}.weight"] = weight.dequantize()
            else:
                for suffix, tensor in tensors.items():
                    turn = suffix == "weight" and module in self.transposed
                    found[f"{module}.{suffix}"] = tensor.t().float() if turn else tensor.float()
        return found
