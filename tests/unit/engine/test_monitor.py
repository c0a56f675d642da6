"""What a sampled step shows, against plain loops over numbers; and that it changes nothing."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.config import CacheConfig, EngineConfig, KernelConfig, MonitorConfig
from engine.figures import LayerFigures
from engine.kv_cache import CACHES, InterleavedInt8KvCache, KvShape
from engine.model_runner import ModelRunner
from engine.monitor import ROWS, Look, Monitor, entropies, input_figures, some
from engine.types import (
    Request,
    SamplingParams,
    ScheduledBatch,
    ScheduledSequence,
    Sequence,
    StoppingParams,
)

MINI = Path(__file__).parents[3] / "server" / "assets" / "venturi-mini"
NAN, INF = math.nan, math.inf
# The levels of FP8 e4m3: 2^-9 and its multiples up to 448.
FP8 = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).float()[:127]


def by_hand(x_MK: Tensor, rounding: str) -> dict[str, float]:
    """In float64, value by value."""
    found = {"rounded": 0, "zeroed": 0, "saturated": 0, "outlier": 0.0, "non_finite": 0}
    for row in x_MK.double().tolist():
        found["non_finite"] += sum(not math.isfinite(value) for value in row)
        absmax = max(abs(value) for value in row)
        if not all(map(math.isfinite, row)):
            continue
        if absmax:
            rms = math.sqrt(math.fsum((value / absmax) ** 2 for value in row) / len(row))
            found["outlier"] = max(found["outlier"], 1 / rms)
        if rounding == "float32":
            continue
        found["rounded"] += len(row)
        for value in row:
            share = abs(value) / absmax if absmax else 0.0
            if rounding == "int8":
                level, largest = round(127 * share), 127
            else:
                level, largest = float(FP8[(FP8.double() - 448 * share).abs().argmin()]), 448
            found["zeroed"] += level == 0 and value != 0
            found["saturated"] += level == largest
    return found


def spread(seed: int, *size: int) -> Tensor:
    """Over several orders of magnitude, and at no halfway point."""
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.randn(size, generator=generator) * 3
    return torch.randn(size, generator=generator) * exponent.exp()


def with_values(x_MK: Tensor, values: dict[tuple[int, int], float]) -> Tensor:
    for place, value in values.items():
        x_MK[place] = value
    return x_MK


CASES = {
    "random": spread(0, 16, 48),
    "odd": spread(1, 3, 37),
    "one value": spread(2, 1, 1),
    "one outlier": with_values(torch.full((2, 65), 0.3), {(1, 64): 1e4}),
    "zeros": torch.zeros(4, 5),
    "a zero row": with_values(spread(3, 3, 7), dict.fromkeys([(1, k) for k in range(7)], 0.0)),
    "nan and infinity": with_values(spread(4, 5, 33), {(0, 3): NAN, (2, 0): INF, (2, 1): -INF}),
    "nothing finite": torch.full((3, 4), NAN),
    "large": spread(5, 2, 19) * 1e30,
    "small": spread(6, 2, 19) * 1e-30,
}


@pytest.mark.parametrize("rounding", ["int8", "float8_e4m3", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_figures_of_inputs(name: str, rounding: str) -> None:
    x_MK = CASES[name]
    (found,) = input_figures(x_MK[None].clone(), rounding)
    wanted = by_hand(x_MK, rounding)
    assert {key: getattr(found, key) for key in wanted} == pytest.approx(wanted, rel=1e-5)
    assert found.kv_non_finite == 0


@pytest.mark.parametrize("rounding", ["int8", "float8_e4m3", "float32"])
def test_matrices_are_looked_at_apart(rounding: str) -> None:
    matrices = [spread(seed, 4, 11) for seed in range(3)]
    matrices[1][2, 5] = INF
    together = input_figures(torch.stack(matrices), rounding)
    assert together == [input_figures(one[None], rounding)[0] for one in matrices]
    assert [one.non_finite for one in together] == [0, 1, 0]


def test_an_outlier_pushes_the_others_to_zero() -> None:
    """What the figure is for: all that is below absmax / 254."""
    row = torch.ones(100)
    row[0] = 253.0
    assert input_figures(row.view(1, 1, -1), "int8")[0].zeroed == 0
    row[0] = 255.0
    (found,) = input_figures(row.view(1, 1, -1), "int8")
    assert (found.zeroed, found.saturated, found.rounded) == (99, 1, 100)
    assert found.outlier == pytest.approx(255 / math.sqrt((99 + 255**2) / 100))


def test_entropies() -> None:
    p_V = torch.tensor([0.5, 0.25, 0.25])
    logits = torch.stack([p_V.log() + 7, torch.zeros(3), torch.tensor([1e4, 0.0, -1e4])])
    wanted = (1.5 * math.log(2), math.log(3), 0.0)
    assert entropies(logits) == pytest.approx(wanted)
    logits[1, 0] = NAN
    assert entropies(logits) == pytest.approx((wanted[0], wanted[2]))
    assert entropies(torch.full((2, 5), INF)) == ()


def test_rows_are_spread_evenly_and_the_last_is_among_them() -> None:
    assert some(torch.arange(ROWS)).tolist() == list(range(ROWS))
    for count in (ROWS + 1, 100, 513):
        found = some(torch.arange(count)).tolist()
        assert len(set(found)) == ROWS
        assert (found[0], found[-1]) == (0, count - 1)


def test_one_step_in_so_many_is_looked_at_and_not_too_often() -> None:
    now = [0.0]
    monitor = Monitor(MonitorConfig(every_steps=3, gap_s=10.0), 1, lambda: now[0])

    def looked(steps: int) -> list[bool]:
        return [monitor.look() is not None for _ in range(steps)]

    assert looked(4) == [False, False, True, False]
    assert looked(9) == [False] * 9
    now[0] = 10.0
    assert looked(4) == [True, False, False, False]
    assert not any(Monitor(MonitorConfig(every_steps=0), 1).look() for _ in range(200))


def test_a_monitor_has_sane_settings() -> None:
    for wrong in ({"every_steps": -1}, {"gap_s": -1.0}, {"gap_s": NAN}, {"gap_s": INF}):
        with pytest.raises(ValueError, match="must not be negative"):
            MonitorConfig(**wrong)


@pytest.mark.parametrize("kind", [*CACHES.values(), InterleavedInt8KvCache])
def test_scales_are_those_of_what_was_written(kind: type) -> None:
    shape = KvShape(layers=3, kv_heads=2, head_dim=24, block_size=16)
    cache, slots = kind(shape, 4), torch.tensor([40, 3, 17])
    k, v = spread(0, 3, 2, 24), spread(1, 3, 2, 24)
    k[1, 0, 5], v[2, 1, 0] = INF, NAN
    for layer in range(3):
        cache.write(layer, k, v, slots)
    found = cache.written_scales(slots)
    if cache.dtype == "fp32":
        assert found is None
        return
    assert found.shape == (3, 3, 4)
    wanted = torch.cat([k, v], 1).abs().amax(2) / 127
    broken = ~wanted.isfinite()
    for layer in range(3):
        assert torch.equal(~found[layer].isfinite(), broken)
        assert torch.allclose(found[layer][~broken], wanted[~broken])
    look = Look(3)
    figures = look.figures(cache, slots, 0)
    assert [layer.kv_non_finite for layer in figures.layers] == [2, 2, 2]
    assert figures.rows == 3


def runner(folder: Path, every_steps: int, backend: str, kv_dtype: str) -> ModelRunner:
    return ModelRunner.from_config(
        EngineConfig(
            model_dir=folder,
            cache=CacheConfig(dtype=kv_dtype, blocks=8),
            kernels=KernelConfig(backend=backend, threads=1, int8_weights=True),
            monitor=MonitorConfig(every_steps=every_steps, gap_s=0.0),
        )
    )


def batches() -> list[ScheduledBatch]:
    """A prompt of 21 tokens in two chunks, beside one that decodes."""
    found = []
    sequences = []
    for name, prompt in (("a", list(range(3, 24))), ("b", [5, 6])):
        request = Request(
            id=name,
            prompt=prompt,
            sampling=SamplingParams(temperature=1.0, seed=3),
            stopping=StoppingParams(max_tokens=9),
            arrival=0.0,
        )
        blocks = [0, 1] if name == "a" else [2]
        sequences.append(Sequence(request, list(prompt), block_table=blocks))
    a, b = sequences
    for first, second in ((17, 1), (4, 1)):
        found.append(ScheduledBatch([ScheduledSequence(a, first), ScheduledSequence(b, second)]))
    return found


@pytest.mark.parametrize(
    ("backend", "kv_dtype"), [("cpu", "int8"), ("cpu", "fp32"), ("torch", "int8")]
)
def test_a_sampled_step_gives_the_same_bits(backend: str, kv_dtype: str) -> None:
    results = []
    for every_steps in (0, 1):
        one = runner(MINI, every_steps, backend, kv_dtype)
        outcome = []
        for batch in batches():
            outcome.append((one.run(batch), one.logits(batch)))
            for item in batch.items:
                item.sequence.computed += item.length
        results.append(outcome)
    for (plain, wanted), (seen, logits) in zip(*results, strict=True):
        assert seen.tokens == plain.tokens
        assert torch.equal(logits, wanted)
        assert plain.figures is None
        assert seen.figures is not None
        layers = seen.figures.layers
        assert len(layers) == 6
        assert all(layer.rounded and 0 < layer.zeroed < layer.rounded / 2 for layer in layers)
        assert all(layer.outlier > 1 for layer in layers)
        assert not any(layer.non_finite or layer.kv_non_finite for layer in layers)


def test_experts_are_looked_at() -> None:
    """Theirs are matrices of different numbers of rows."""
    look = Look(1)
    linear = type("L", (), {"execution": "int8 x int8"})()
    for rows in (3, 1):
        look.observe(0, linear, torch.ones(rows, 8))
    cache = CACHES["fp32"](KvShape(layers=1, kv_heads=1, head_dim=4, block_size=4), 1)
    figures = look.figures(cache, torch.tensor([0]), 2)
    assert figures.layers == (LayerFigures(rounded=32, saturated=32, outlier=1.0),)
    assert figures.non_finite_logits == 2
