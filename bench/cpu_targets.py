"""The project's targets for speed and memory on a CPU, and what a run found."""

from collections.abc import Iterator
from dataclasses import dataclass

from bench.cpu_engines import OURS, PEERS
from bench.cpu_models import SHAPES, matrix_weights
from bench.cpu_results import Measured, Results

_OPENVINO = {8: "OpenVINO GenAI int8", 4: "OpenVINO GenAI int4"}


@dataclass(frozen=True)
class Target:
    """A bound on a ratio; ``at_most`` turns it round. ``found`` None: not measured."""

    name: str
    wanted: float
    found: float | None
    at_most: bool = False

    @property
    def wanted_text(self) -> str:
        """With its sign."""
        return f"{'at most' if self.at_most else 'at least'} {self.wanted:.2f}"

    @property
    def found_text(self) -> str:
        """Or a dash."""
        return "-" if self.found is None else f"{self.found:.2f}"

    @property
    def verdict(self) -> str:
        """Met, or by how much not."""
        if self.found is None:
            return "not measured"
        share = self.found / self.wanted
        if share == 1 or (share < 1) == self.at_most:
            return "met"
        return f"not met: {abs(share - 1):.0%} {'above' if self.at_most else 'below'}"


def targets(results: Results) -> list[Target]:
    """All that concern the models and recipes of this run."""
    found: list[Target] = []
    for model, engines in results.models.items():
        for ours in OURS:
            if ours.name in engines:
                found += _speed(results, model, ours.name, ours.bits)
                found += _service(model, ours.name, engines[ours.name])
    return found


def _speed(results: Results, model: str, name: str, bits: int) -> Iterator[Target]:
    ours, weights = results.of(model, name), matrix_weights(SHAPES[model])
    label, big = f"{model}, {name}", model == "L"
    if bits == 8 and model in "ML":
        ceiling = ours.value("dram_gb_s") * 1e9 / weights
        share = ours.value("decode1_tps") / ceiling
        yield Target(f"{label}: decode at 1 over the DRAM ceiling at INT8", 0.8, share)
    for batch, wanted in (
        (1, 1.2 if big else 1.3),
        (8, 1.6 if big else 1.8),
        (32, 1.6 if big else 1.8),
    ):
        ratio = _over_best(results, model, ours, bits, f"decode{batch}_tps")
        yield Target(f"{label}: decode at {batch} over the best peer", wanted, ratio)
    openvino = results.models[model].get(_OPENVINO[bits])
    over = ours.value("prefill_tps") / openvino.value("prefill_tps") if openvino else None
    yield Target(f"{label}: prefill over OpenVINO (goal 1.15)", 1.0, over)
    if bits == 8:
        body = weights - SHAPES[model].vocabulary * SHAPES[model].hidden
        gop_s = 2 * body * ours.value("prefill_tps") / 1e9
        share = gop_s / ours.value("int8_gop_s")
        yield Target(f"{label}: prefill over the INT8 peak", 0.5, share)


def _over_best(
    results: Results, model: str, ours: Measured, bits: int, figure: str
) -> float | None:
    engines = results.models[model]
    rivals = [
        engines[peer.name].value(figure)
        for peer in PEERS
        if peer.bits == bits and figure in getattr(engines.get(peer.name), "figures", ())
    ]
    return ours.value(figure) / max(rivals) if rivals else None


def _service(model: str, name: str, ours: Measured) -> Iterator[Target]:
    label = f"{model}, {name}"
    if model in "ML":
        for batch in (1, 8, 32):
            share = ours.value(f"grpc{batch}_share")
            yield Target(f"{label}: gRPC over the engine, {batch} streams", 0.95, share)
    if model == "M" and name == "Venturi w8a8":
        bound = 1.25 * (ours.value("weight_bytes") + ours.value("kv_bytes")) + 600e6
        share = ours.value("pss_bytes") / bound
        yield Target(f"{label}: memory over 1.25 x (weights + KV) + 600 MB", 1.0, share, True)
