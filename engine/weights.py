"""Reads a model's weights by the names and layouts of its spec, and knows what it has read."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor

from engine.errors import ModelLoadError
from engine.formats import float_quantized, int_quantized, pack_quantized, sparse
from engine.formats.awq import AwqScheme
from engine.formats.checkpoint import Checkpoint
from engine.formats.gptq import GptqScheme
from engine.formats.grouped import GroupedWeight
from engine.formats.int_quantized import Int8Weight
from engine.layers.linear import Linear, Split, make_fused, make_linear
from engine.layers.norm import Norm, identity, make_norm
from engine.layers.speed_gate import SpeedGate
from engine.layers.weight import SparseWeight, Weight, WeightOnly, quantize_int8, take_rows
from engine.models.spec import Matrix, NormSpec
from engine.types import LayerReport

# Constants that older checkpoints carry along: causal masks and rotary frequencies.
_MASK = ".weight_bitmask"
_BUFFERS = re.compile(r".*\.(rotary_emb\.inv_freq|(attn|attention)\.(bias|masked_bias))")


class WeightReader:
    """Makes layers of a checkpoint's tensors; ``linears`` and ``reports`` list what it made."""

    def __init__(
        self, checkpoint: Checkpoint, backend: str, changed: Mapping[str, Tensor] | None = None
    ) -> None:
        """``changed``: weights [N, K] and vectors, by tensor name, in place of those on disk.

        ``activations`` may be set to ``int8``, for packed weights that shall run so, and
        ``int8_weights``, for floating ones that shall be rounded to int8; ``scheme`` is that of
        weights which GPTQ or AWQ packed.
        """
        self._checkpoint = checkpoint
        self._backend = backend
        self._changed = changed or {}
        self._read: set[str] = set()
        self._counts: dict[str, int] = {}
        self.activations = "float"
        self.scheme: GptqScheme | AwqScheme | None = None
        self.int8_weights = False
        bytes_ = (math.prod(i.shape) for n, i in checkpoint.tensors.items() if n.endswith(_MASK))
        self.gate = SpeedGate(8 * sum(bytes_))
        self.linears: list[Linear] = []
        self.reports: list[LayerReport] = []

    @property
    def parameters(self) -> int:
        """Weights and biases read so far; scales do not count."""
        return sum(self._counts.values())

    def matrix(self, matrix: Matrix, sizes: tuple[int, ...], columns: int) -> Linear:
        """One layer of ``matrix``, whose parts have ``sizes`` out-features, in this order.

        The parts are modules of their own, or all of them one module.
        """
        counts = sizes if len(matrix.modules) > 1 else (sum(sizes),)
        modules = list(zip(matrix.modules, counts, strict=True))
        weights = [self._weight(name, rows, columns, matrix) for name, rows in modules]
        bias_N = None
        if matrix.bias:
            bias_N = torch.cat([self.vector(f"{name}.bias", rows) for name, rows in modules])
        if matrix.interleaved:
            order_N = _by_part(matrix.interleaved, sizes)
            weights = [take_rows(weight, order_N) for weight in weights]
            bias_N = None if bias_N is None else bias_N[order_N]
        linear = self.gate.choose(make_fused(weights, self._backend, bias_N))
        self.linears.append(linear)
        parts = linear.parts if isinstance(linear, Split) else (linear,) * len(modules)
        for (name, rows), part in zip(modules, parts, strict=True):
            share = 1.0 if isinstance(linear, Split) else rows / sum(counts)
            self._report(name, part, share)
        return linear

    def head(self, name: str, weight: Weight) -> Linear:
        """The layer that gives logits; whether it is quantised is the caller's choice."""
        linear = make_linear(weight, self._backend)
        self.linears.append(linear)
        self._report(name, linear)
        return linear

    def norm(self, name: str | None, size: int, spec: NormSpec) -> Norm:
        """The norm called ``name``, or none."""
        if name is None:
            return identity
        bias_K = self.vector(f"{name}.bias", size) if spec.bias else None
        return make_norm(spec, self.vector(f"{name}.weight", size), bias_K, self._backend)

    def vector(self, name: str, size: int) -> Tensor:
        """float32 [size]."""
        return self.floating(name, size).float()

    def floating(self, name: str, *shape: int) -> Tensor:
        """A tensor of this shape in its own dtype, which must be floating and all finite."""
        changed = self._changed.get(name)
        if changed is not None:
            return changed
        self._counts[name] = torch.Size(shape).numel()
        return self._checked(name, self._tensor(name, *shape))

    def check_all_read(self, unused: str) -> None:
        """Raises ``ModelLoadError`` where weights are left, but for the module ``unused``."""
        names = self._checkpoint.tensors.keys() - self._read - {f"{unused}.weight"}
        if left := sorted(name for name in names if not _BUFFERS.fullmatch(name)):
            raise ModelLoadError(
                f"{self._checkpoint.folder}: the weights have {len(left)} tensors that "
                f"config.json does not ask for, such as {left[0]}"
            )

    def _weight(self, name: str, rows: int, columns: int, matrix: Matrix) -> Weight:
        def in_order(*shape: int) -> tuple[int, ...]:
            return shape[::-1] if matrix.transposed else shape

        if (changed := self._changed.get(f"{name}.weight")) is not None:
            return changed
        self._counts[name] = rows * columns
        if f"{name}.weight_packed" in self._checkpoint.tensors:
            return self._packed(name, rows, columns)
        if f"{name}.qweight" in self._checkpoint.tensors:
            return self._by_scheme(name, rows, columns, bias=matrix.bias)
        if f"{name}.weight_bitmask" in self._checkpoint.tensors:
            return self._sparse(name, rows, columns)
        weight = self._tensor(f"{name}.weight", *in_order(rows, columns))
        if weight.dtype in (torch.int8, float_quantized.DTYPE):
            return self._by_bytes(name, weight, transposed=matrix.transposed)
        weight = self._checked(f"{name}.weight", weight).float()
        weight = weight.t() if matrix.transposed else weight
        return quantize_int8(weight) if self.int8_weights and not matrix.router else weight

    def _by_bytes(self, name: str, weight: Tensor, *, transposed: bool) -> Weight:
        """A byte for each weight, int8 or FP8; so are the activations."""
        unpack = int_quantized.unpack if weight.dtype == torch.int8 else float_quantized.unpack
        tensors = self._parts(name, ("weight_scale", "weight_zero_point")) | {"weight": weight}
        with self._broken(name):
            self._checked(f"{name}.weight_scale", tensors["weight_scale"])
            return unpack(tensors, transposed=transposed)

    def _packed(self, name: str, rows: int, columns: int) -> Weight:
        """A pack-quantized weight; activations stay float unless they are to be int8."""
        suffixes = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
        tensors = self._parts(name, suffixes)
        with self._broken(name):
            if tensors["weight_shape"].tolist() != [rows, columns]:
                raise ValueError(f"weight_shape is not {[rows, columns]}")
            weight = pack_quantized.unpack(tensors)
            self._checked(f"{name}.weight_scale", tensors["weight_scale"])
            if self.activations == "float":
                return WeightOnly(weight)
            if isinstance(weight, GroupedWeight) and weight.bits == 8:
                raise ValueError("8 bits in groups are served with float activations, not int8")
        return weight

    def _by_scheme(self, name: str, rows: int, columns: int, *, bias: bool) -> Weight:
        """A weight that GPTQ or AWQ packed: activations are float."""
        suffixes = ("qweight", "qzeros", "scales", "g_idx", *(() if bias else ("bias",)))
        tensors = self._parts(name, suffixes)
        with self._broken(name):
            if self.scheme is None:
                raise ValueError(
                    "qweight is packed, but neither config.json nor quantize_config.json says how: "
                    "copy the quantization_config too"
                )
            weight, order_K = self.scheme.unpack(tensors, columns)
            if (found := len(weight.q_NK)) != rows:
                raise ValueError(f"qweight has {found} out-features, config.json asks for {rows}")
            # Some packers give every layer a bias.
            if "bias" in tensors and bool(tensors["bias"].any()):
                raise ValueError("it has a bias that config.json does not ask for")
            self._checked(f"{name}.scales", tensors["scales"])
        return WeightOnly(weight, order_K)

    def _sparse(self, name: str, rows: int, columns: int) -> Weight:
        """A weight without its zeros; activations as for one with them."""
        tensors = self._parts(name, sparse.SUFFIXES)
        with self._broken(name):
            weight = sparse.unpack(tensors)
            if weight.q_NK.shape != (rows, columns):
                raise ValueError(f"weight_shape is not {[rows, columns]}")
            self._checked(f"{name}.weight_scale", tensors["weight_scale"])
        if self.activations == "float" and sparse.is_packed(tensors):
            return WeightOnly(weight)
        return SparseWeight(weight) if isinstance(weight, Int8Weight) else weight

    def _parts(self, name: str, suffixes: Sequence[str]) -> dict[str, Tensor]:
        """A module's tensors of these suffixes, where there are any."""
        names = {one: f"{name}.{one}" for one in suffixes}
        found = {one: full for one, full in names.items() if full in self._checkpoint.tensors}
        self._read.update(found.values())
        return {one: self._checkpoint.tensor(full) for one, full in found.items()}

    @contextmanager
    def _broken(self, name: str) -> Iterator[None]:
        """What a format finds wrong with a module's tensors becomes a ``ModelLoadError``."""
        try:
            yield
        except KeyError as error:
            what = f"{error.args[0]} is missing"
            raise ModelLoadError(f"{self._checkpoint.folder}: {name}: {what}") from error
        except ValueError as error:
            raise ModelLoadError(f"{self._checkpoint.folder}: {name}: {error}") from error

    def _tensor(self, name: str, *shape: int) -> Tensor:
        self._read.add(name)
        return self._checkpoint.shaped(name, *shape)

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            raise ModelLoadError(
                f"{self._checkpoint.folder}: {name} is {tensor.dtype}, which is not served"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ModelLoadError(f"{self._checkpoint.folder}: {name} has NaN or infinite values")
        return tensor

    def _report(self, name: str, linear: Linear, share: float = 1.0) -> None:
        report = LayerReport(
            name=name,
            storage=linear.storage,
            execution=linear.execution,
            bytes=round(linear.nbytes * share),
        )
        self.reports.append(report)


def _by_part(heads: int, sizes: tuple[int, ...]) -> Tensor:
    """Where each out-feature, part by part, lies in rows that go head by head."""
    rows = torch.arange(sum(sizes)).view(heads, -1)
    ends = list(accumulate(size // heads for size in sizes))
    parts = [rows[:, end - size // heads : end] for end, size in zip(ends, sizes, strict=True)]
    return torch.cat([part.flatten() for part in parts])
