"""AWQ, SmoothQuant and what calibration keeps of inputs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.methods.awq import Awq
from compress.methods.base import best
from compress.methods.inputs import InputAccumulator, LayerInputs
from compress.methods.rtn import Rtn
from compress.methods.scheme import Scheme
from compress.methods.smoothquant import SmoothQuant
from compress.scaling import Scaled, ScalePlace, linear_places, norm_places
from engine.blocks import Blocks
from engine.formats.checkpoint import Checkpoint
from engine.kernels.reference import int8_linear

INT3 = Scheme(bits=3, group_size=32)


def rows(tokens: int, columns: int, *, outliers: float = 1.0) -> Tensor:
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(columns))
    x[:, ::16] *= outliers
    return x


def inputs_of(x_MK: Tensor) -> LayerInputs:
    accumulator = InputAccumulator(x_MK.shape[1])
    accumulator.add(x_MK)
    return accumulator.result()


def weight(columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(columns + 1)
    return torch.randn(40, columns, generator=generator).to(dtype)


@pytest.mark.parametrize("columns", [12, 256, 600])
@pytest.mark.parametrize("parts", [1, 7])
def test_accumulator(parts: int, columns: int) -> None:
    x_MK = rows(100, columns)
    accumulator = InputAccumulator(columns)
    for part in x_MK.split(-(-100 // parts)):
        accumulator.add(part, sample_rows=3)
    found = accumulator.result()
    assert found.tokens == 100
    assert torch.allclose(found.hessian_KK, x_MK.t() @ x_MK / 100, atol=1e-5)
    assert torch.allclose(found.absmean_K, x_MK.abs().mean(0))
    assert torch.equal(found.absmax_K, x_MK.abs().amax(0))
    assert torch.equal(found.hessian_KK, found.hessian_KK.t())
    assert found.sample_SK.shape == (3 * parts, columns)
    assert all((row == x_MK).all(1).any() for row in found.sample_SK)


def test_output_error_is_that_of_the_outputs() -> None:
    x_MK, difference_NK = rows(300, 20), weight(20)
    found = inputs_of(x_MK)
    exact = float((x_MK @ difference_NK.t()).square().sum() / 300)
    assert found.output_error(difference_NK) == pytest.approx(exact, rel=1e-4)
    weight_NK = 2 * weight(20)
    scale = float((x_MK @ weight_NK.t()).square().sum() / 300)
    assert found.relative_error(weight_NK, weight_NK + difference_NK) == pytest.approx(
        exact / scale, rel=1e-4
    )


def test_scaled_inputs_are_those_of_scaled_rows() -> None:
    x_MK, scale_K = rows(300, 20), torch.rand(20) + 0.5
    found, expected = inputs_of(x_MK).scaled(scale_K), inputs_of(x_MK / scale_K)
    for name in ("hessian_KK", "absmean_K", "absmax_K", "sample_SK"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), atol=1e-5), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_inputs_that_are_not_finite(value: float) -> None:
    x_MK = rows(30, 8)
    x_MK[3, 4] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        inputs_of(x_MK)


def test_inputs_that_never_came() -> None:
    with pytest.raises(ValueError, match="never reached"):
        InputAccumulator(8).result()
    with pytest.raises(ValueError, match="never reached"):
        inputs_of(torch.zeros(0, 8))


def scaled_error(weight_NK: Tensor, scale_K: Tensor, inputs: LayerInputs, scheme: Scheme) -> float:
    found = Rtn(scheme).quantise(weight_NK * scale_K).weight.dequantize() / scale_K
    return inputs.output_error(found - weight_NK)


def test_awq_finds_scales_where_few_features_matter() -> None:
    weight_NK, inputs = weight(128), inputs_of(rows(400, 128, outliers=12))
    scale_K = Awq(INT3).search([weight_NK], inputs)
    assert (scale_K > 0).all()
    assert scale_K[::16].mean() > 1.5 * scale_K.mean()
    before = scaled_error(weight_NK, torch.ones(128), inputs, INT3)
    assert scaled_error(weight_NK, scale_K, inputs, INT3) < 0.8 * before


def plain_scales(weights: list[Tensor], x_MK: Tensor, group: int) -> list[Tensor]:
    """All candidates, by the formula and one feature at a time, in float64."""
    x_K = x_MK.double().abs().mean(0)
    shares = []
    for weight_NK in weights:
        blocks = weight_NK.double().abs().split(group, dim=1)
        shares.append(torch.cat([one / one.max(1, keepdim=True).values for one in blocks], 1))
    w_K = torch.cat(shares).mean(0)
    found = [torch.ones_like(x_K)]
    for step in range(20):
        r = step / 19
        for raw_K in (x_K**r, x_K**r * w_K ** (r - 1)):
            found.append(raw_K / (raw_K.max() * raw_K.min()) ** 0.5)
    return found


@pytest.mark.parametrize(("columns", "group"), [(64, 32), (60, 12), (96, 96)])
def test_awq_takes_the_best_of_all_candidates(columns: int, group: int) -> None:
    scheme, x_MK = Scheme(bits=3, group_size=group), rows(300, columns, outliers=9)
    weights = [weight(columns), 3 * weight(columns)[:7].flip(1)]
    inputs = inputs_of(x_MK)

    def error(scale_K: Tensor) -> float:
        return sum(
            scaled_error(one, scale_K.float(), inputs, scheme) / inputs.output_error(one)
            for one in weights
        )

    best_K = min(plain_scales(weights, x_MK, group), key=error)
    assert error(best_K) < 0.95 * error(torch.ones(columns))
    found_K = Awq(scheme).search(weights, inputs)
    assert error(found_K) == pytest.approx(error(best_K), rel=1e-2)


def test_awq_scales_that_are_tied() -> None:
    place = ScalePlace(("o",), producer="v", heads=(2, 32))
    scheme, inputs = Scheme(bits=3, group_size=32), inputs_of(rows(400, 128, outliers=12))
    scale_K = Awq(scheme).search([weight(128)], inputs, place.tie)
    assert scale_K.max() > 1.5 * scale_K.min()
    by_row = scale_K.view(2, 2, 32)
    assert torch.equal(by_row[:, 0], by_row[:, 1])
    assert torch.equal(place.rows(scale_K), by_row[:, 0].flatten())


def test_awq_keeps_one_where_no_scale_helps() -> None:
    # Whole numbers from 0 to 15 lie on the grid: there is no error that a scale could lower.
    exact = torch.randint(16, (8, 64), generator=torch.Generator().manual_seed(2)).float()
    exact[:, 3::32], exact[:, 4::32] = 0, 15
    grid = Scheme(bits=4, group_size=32, symmetric=False)
    assert torch.equal(Rtn(grid).quantise(exact).weight.dequantize(), exact)
    found = Awq(grid).search([exact], inputs_of(rows(100, 64, outliers=5)))
    assert torch.equal(found, torch.ones(64))


def test_awq_clips_and_is_never_worse_than_rtn() -> None:
    weight_NK, inputs = weight(128), inputs_of(rows(400, 128, outliers=8))
    weight_NK[:, 5] *= 5
    result = Awq(INT3).quantise(weight_NK, inputs)
    assert result.outcome.method == "awq"
    assert result.outcome.errors["awq"] < 0.9 * result.outcome.errors["rtn"]
    plain = Awq(INT3, clip=False).quantise(weight_NK, inputs)
    assert plain.outcome.method == "rtn"
    assert torch.equal(plain.weight.q_NK, Rtn(INT3).quantise(weight_NK).weight.q_NK)


def quantised_error(weight_NK: Tensor, x_MK: Tensor, scale_K: Tensor) -> float:
    found = Rtn(Scheme()).quantise(weight_NK * scale_K).weight
    out_MN = int8_linear(x_MK / scale_K, found.q_NK, found.scale_N.float())  # type: ignore[union-attr]
    return float((out_MN - x_MK @ weight_NK.t()).square().sum())


def test_smoothquant_lowers_the_error_of_outliers() -> None:
    weight_NK, x_MK = weight(128), rows(400, 128, outliers=60)
    scale_K = SmoothQuant(0.5, Scheme()).search([weight_NK], inputs_of(x_MK))
    w_K, x_K = weight_NK.abs().amax(0), x_MK.abs().amax(0)
    assert torch.allclose(scale_K, (x_K / w_K).sqrt(), rtol=1e-4)
    plain = quantised_error(weight_NK, x_MK, torch.ones(128))
    assert quantised_error(weight_NK, x_MK, scale_K) < 0.5 * plain


def test_smoothquant_is_never_worse_than_one() -> None:
    weight_NK = weight(64)
    weight_NK[:, 3] *= 40
    found = SmoothQuant(1.0, Scheme(bits=3)).search([weight_NK], inputs_of(rows(200, 64)))
    assert torch.equal(found, torch.ones(64))


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_alphas_that_are_none(alpha: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        SmoothQuant(alpha, Scheme())


def test_best_leaves_what_is_not_finite() -> None:
    weight_NK, inputs = weight(16), inputs_of(rows(50, 16))
    broken = torch.full_like(weight_NK, torch.nan)
    outcome = best(weight_NK, {"new": broken, "old": weight_NK}, inputs, None)
    assert (outcome.method, outcome.error) == ("old", 0.0)
    outcome = best(weight_NK, {"new": broken, "old": broken}, inputs, None)
    assert outcome.method == "old"


def test_scales_that_are_folded_change_nothing() -> None:
    folder = Path(__file__).parents[3] / "server" / "assets" / "venturi-mini"
    blocks = Blocks.open(Checkpoint.open(folder))
    layer, names = blocks.spec.layers[0], blocks.spec.names[0]
    assert layer.heads > layer.kv_heads, "heads share values here"
    read, generator = blocks.checkpoint.tensor, torch.Generator().manual_seed(4)
    scaled = Scaled(read, layer)
    places = [*norm_places(names), *linear_places(layer, names)]
    assert len(places) == 4
    for place in places:
        columns = read(f"{place.readers[0]}.weight").shape[1]
        scale_K = torch.rand(columns, generator=generator) + 0.3
        scaled.fold(place, place.tie(scale_K))
    modules = [module for matrix in names.matrices() for module in matrix.modules]
    assert all(scaled.changed(module) for module in modules)
    changed = {f"{m}.weight": scaled.weight(m) for m in modules} | scaled.vectors
    hidden_BLK = torch.randn(2, 9, layer.hidden_size, generator=generator)
    expected = blocks.run(blocks.layer(0, {}), 0, hidden_BLK.clone())
    found = blocks.run(blocks.layer(0, changed), 0, hidden_BLK.clone())
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(expected, hidden_BLK, atol=1e-2)


def test_clipped_values_are_not_scaled(make_model: Callable[..., Path]) -> None:
    blocks = Blocks.open(Checkpoint.open(make_model(layers=1)))
    names = blocks.spec.names[0]
    places = linear_places(replace(blocks.spec.layers[0], qkv_clip=1.0), names)
    assert [place.readers for place in places] == [names.mlps[0].down.modules]
