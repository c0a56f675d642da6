"""GPTQ, SparseGPT and the joint loop against a textbook that inverts the Hessian each time."""

import pytest
import torch
from torch import Tensor

from compress.methods import inputs as inputs_module
from compress.methods.columns import column_loop
from compress.methods.gptq import Gptq
from compress.methods.grid import Grid, make_grid
from compress.methods.hessian import Factor, factor
from compress.methods.inputs import InputAccumulator, LayerInputs
from compress.methods.magnitude import Magnitude
from compress.methods.masks import Sparsity, lowest
from compress.methods.rtn import Rtn
from compress.methods.scheme import Scheme
from compress.methods.sparsegpt import Joint, SparseGpt
from compress.methods.wanda import Wanda
from engine.formats.grouped import GroupedWeight

INT4 = Scheme(bits=4, group_size=32)
FP8 = Scheme(kind="float8")
SPARSITIES = [
    Sparsity(),
    Sparsity(share=0.25),
    Sparsity(structure="2:4"),
    Sparsity(structure="4:8"),
    Sparsity(share=0.75, structure="1:4"),
]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=generator(seed))


def correlated(columns: int, tokens: int = 2000, seed: int = 1) -> LayerInputs:
    """Inputs of a few common directions and of very different sizes."""
    mix = torch.randn(columns, columns, generator=generator(seed)) * 0.3
    sizes = torch.rand(columns, generator=generator(seed + 1)) * 3 + 0.1
    common = torch.randn(tokens, columns // 4 or 1, generator=generator(seed + 2))
    x = (common @ mix[: columns // 4 or 1]) + torch.randn(
        tokens, columns, generator=generator(seed + 3)
    )
    accumulator = InputAccumulator(columns)
    for part in (x * sizes).split(333):
        accumulator.add(part)
    return accumulator.result()


def identity(columns: int) -> LayerInputs:
    eye = torch.eye(columns)
    return LayerInputs(
        tokens=columns,
        hessian_KK=eye,
        absmean_K=torch.ones(columns),
        absmax_K=torch.ones(columns),
        sample_SK=eye,
    )


def textbook(weight_NK: Tensor, hessian_KK: Tensor, grid: Grid, order: list[int]) -> Tensor:
    """GPTQ as in the paper's derivation: remove one feature, invert what is left, in float64."""
    hessian, w = hessian_KK.double(), weight_NK.double().clone()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    scale_NK = grid.scale_NG.double().repeat_interleave(w.shape[1] // grid.scale_NG.shape[1], 1)
    q_NK = torch.zeros_like(w)
    left = list(order)
    while left:
        k = left[0]
        inverse = torch.linalg.inv(hessian[left][:, left])
        low, high = grid.scheme.q_min, grid.scheme.q_max
        q_NK[:, k] = (w[:, k] / scale_NK[:, k]).round().clamp(low, high)
        error = (w[:, k] - q_NK[:, k] * scale_NK[:, k]) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return q_NK.to(torch.int8)


@pytest.mark.parametrize("by_activation", [True, False])
@pytest.mark.parametrize("columns", [32, 160, 288])
def test_gptq_is_the_textbooks(columns: int, by_activation: bool) -> None:
    weight_NK, inputs = weights(24, columns), correlated(columns)
    result = Gptq(INT4, by_activation=by_activation).quantise(weight_NK, inputs)
    assert result.outcome.method == "gptq"
    order = inputs.ordered_factor(by_activation=by_activation).order_K.tolist()
    expected = textbook(weight_NK, inputs.hessian_KK, make_grid(weight_NK, INT4), order)
    # A last bit may turn a weight that lies half-way, and then those that follow in its row.
    assert (result.weight.q_NK != expected).float().mean() < 1e-2
    theirs = GroupedWeight(expected, result.weight.scale_NG).dequantize()
    scale = inputs.output_error(weight_NK)
    errors = result.outcome.errors
    assert errors["gptq"] == pytest.approx(
        inputs.output_error(theirs - weight_NK) / scale, rel=0.03
    )


def test_identity_hessian_gives_rtn() -> None:
    weight_NK = weights(16, 96)
    result = Gptq(INT4).quantise(weight_NK, identity(96))
    assert torch.equal(result.weight.q_NK, Rtn(INT4).quantise(weight_NK).weight.q_NK)


@pytest.mark.parametrize("scheme", [INT4, Scheme(bits=3, group_size=32), Scheme(bits=4)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_beats_rtn_on_correlated_inputs(scheme: Scheme, symmetric: bool) -> None:
    weight_NK, inputs = weights(48, 128), correlated(128)
    scheme = Scheme(bits=scheme.bits, group_size=scheme.group_size, symmetric=symmetric)
    errors = Gptq(scheme).quantise(weight_NK, inputs).outcome.errors
    assert errors["gptq"] < 0.7 * errors["rtn"]


def test_gptq_on_the_fp8_grid() -> None:
    weight_NK, inputs = weights(48, 128), correlated(128)
    result = Gptq(FP8).quantise(weight_NK, inputs)
    errors = result.outcome.errors
    assert errors["gptq"] < 0.7 * errors["rtn"]
    grid, found = make_grid(weight_NK, FP8), result.weight.dequantize()
    assert torch.equal(result.weight.scale_N, grid.scale_NG[:, 0])
    assert not torch.equal(found, grid.weight(grid.quantize(weight_NK)).dequantize())
    assert torch.equal(grid.weight(grid.quantize(found)).dequantize(), found), "on the grid"


def test_fp8_keeps_a_mask_and_what_the_joint_loop_dropped() -> None:
    weight_NK, inputs = weights(16, 160), correlated(160)
    mask_NK = lowest(weight_NK.abs(), Sparsity(structure="2:4"), per_row=True)
    assert not Gptq(FP8).quantise(weight_NK, inputs, mask_NK).weight.dequantize()[mask_NK].any()
    joint = Joint(Sparsity(structure="2:4"), FP8).quantise(weight_NK, inputs)
    zeros = joint.weight.dequantize() == 0
    assert (zeros.unflatten(1, (-1, 4)).sum(2) >= 2).all()


def test_rows_are_independent() -> None:
    weight_NK, inputs = weights(20, 160), correlated(160)
    whole = Gptq(INT4).quantise(weight_NK, inputs).weight.dequantize()
    part = Gptq(INT4).quantise(weight_NK[5:9], inputs).weight.dequantize()
    assert (whole[5:9] != part).float().mean() < 1e-2


def test_gptq_is_never_worse_than_rtn() -> None:
    # A Hessian that no longer belongs to its own factor makes the loop's corrections wrong.
    weight_NK, inputs = weights(16, 64), correlated(64)
    inputs.ordered_factor(by_activation=True).factor.upper_KK.mul_(-1).diagonal().abs_()  # type: ignore[union-attr]
    result = Gptq(INT4).quantise(weight_NK, inputs)
    assert result.outcome.errors["gptq"] > result.outcome.errors["rtn"]
    assert result.outcome.method == "rtn"
    assert torch.equal(result.weight.q_NK, Rtn(INT4).quantise(weight_NK).weight.q_NK)


def test_a_mask_stays_in_gptq() -> None:
    weight_NK, inputs = weights(16, 160), correlated(160)
    mask_NK = lowest(weight_NK.abs(), Sparsity(structure="2:4"), per_row=True)
    for symmetric in (True, False):
        scheme = Scheme(bits=4, group_size=32, symmetric=symmetric)
        result = Gptq(scheme).quantise(weight_NK, inputs, mask_NK)
        assert result.outcome.method == "gptq"
        assert not result.weight.dequantize()[mask_NK].any()


@pytest.mark.parametrize("sparsity", SPARSITIES, ids=lambda s: f"{s.structure}-{s.share}")
def test_masks_have_the_wanted_sparsity(sparsity: Sparsity) -> None:
    weight_NK, inputs = weights(24, 160), correlated(160)
    for method in (Magnitude(sparsity), Wanda(sparsity), SparseGpt(sparsity)):
        result = method.prune(weight_NK, inputs)
        assert torch.equal(result.weight_NK == 0, result.mask_NK)
        check_sparsity(result.mask_NK, sparsity)
    result = Joint(sparsity, INT4).quantise(weight_NK, inputs)
    assert result.outcome.method == "sparsegpt+gptq"
    check_sparsity(result.weight.dequantize() == 0, sparsity, exact=False)


@pytest.mark.parametrize("sparsity", SPARSITIES, ids=lambda s: f"{s.structure}-{s.share}")
@pytest.mark.parametrize("per_row", [True, False])
def test_of_equal_scores_the_first_are_dropped(sparsity: Sparsity, per_row: bool) -> None:
    score_NK = torch.randint(3, (6, 40), generator=generator(3)).float()
    found_NK = lowest(score_NK, sparsity, per_row=per_row)
    size = sparsity.pattern[1] if sparsity.pattern else 40 if per_row else 240
    for scores, dropped in zip(
        score_NK.reshape(-1, size).tolist(), found_NK.reshape(-1, size).tolist(), strict=True
    ):
        order = sorted(range(size), key=lambda place: (scores[place], place))
        first = set(order[: round(sparsity.share * size)])
        assert dropped == [place in first for place in range(size)]


def check_sparsity(zero_NK: Tensor, sparsity: Sparsity, *, exact: bool = True) -> None:
    if sparsity.pattern is None:
        share = float(zero_NK.float().mean())
        assert share == pytest.approx(sparsity.share, abs=1e-3) or (not exact and share > 0.24)
        return
    n, m = sparsity.pattern
    zeros = zero_NK.unflatten(1, (-1, m)).sum(2)
    assert (zeros == m - n).all() if exact else (zeros >= m - n).all()


def brute_force_two_of_four(weight_NK: Tensor, inputs: LayerInputs) -> Tensor:
    """SparseGPT by explicit inverses, in float64."""
    hessian, w = inputs.hessian_KK.double(), weight_NK.double().clone()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    columns = w.shape[1]
    for k in range(columns):
        inverse = torch.linalg.inv(hessian[k:, k:])
        if k % 4 == 0:
            diagonal = torch.stack(
                [torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(k, k + 4)]
            )
            score = w[:, k : k + 4] ** 2 / diagonal
            dropped = score.argsort(1)[:, :2]
        gone = (dropped == k % 4).any(1)
        error = torch.where(gone, w[:, k], 0) / inverse[0, 0]
        w[:, k:] -= error[:, None] * inverse[0]
    return w.float()


def test_sparsegpt_is_the_textbooks() -> None:
    weight_NK, inputs = weights(12, 32), correlated(32)
    result = SparseGpt(Sparsity(structure="2:4")).prune(weight_NK, inputs)
    assert result.outcome.method == "sparsegpt"
    expected = brute_force_two_of_four(weight_NK, inputs)
    assert torch.allclose(result.weight_NK, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
def test_pruners_in_their_order(structure: str) -> None:
    weight_NK, inputs = weights(48, 128), correlated(128)
    sparsity = Sparsity(structure=structure)
    wanda = Wanda(sparsity).prune(weight_NK, inputs).outcome.errors
    sparsegpt = SparseGpt(sparsity).prune(weight_NK, inputs).outcome.errors
    assert sparsegpt["sparsegpt"] < wanda["wanda"] < wanda["magnitude"]


def test_the_joint_loop_beats_one_after_the_other() -> None:
    weight_NK, inputs = weights(48, 128), correlated(128)
    sparsity = Sparsity(structure="2:4")
    pruned = SparseGpt(sparsity).prune(weight_NK, inputs)
    after = Rtn(INT4).quantise(pruned.weight_NK, None, pruned.mask_NK).weight.dequantize()
    joint = Joint(sparsity, INT4).quantise(weight_NK, inputs)
    assert joint.outcome.error is not None
    scale = inputs.output_error(weight_NK)
    assert joint.outcome.error < inputs.output_error(after - weight_NK) / scale


def test_the_loop_does_not_depend_on_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_NK, inputs = weights(9, 100), correlated(100)
    upper_KK = inputs.ordered_factor(by_activation=False).factor.upper_KK
    assert upper_KK is not None
    whole, blocks = weight_NK.t().contiguous(), weight_NK.t().contiguous()
    column_loop(whole, upper_KK, lambda _, w: w.round())
    monkeypatch.setattr("compress.methods.columns.BLOCK", 7)
    column_loop(blocks, upper_KK, lambda _, w: w.round())
    assert (whole != blocks).float().mean() < 1e-2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"structure": "4:2"}, "neither"),
        ({"structure": "2-4"}, "neither"),
        ({"structure": "1:4"}, "no sparsity of 0.5"),
        ({"share": 0.0}, "between 0 and 1"),
        ({"share": 1.0}, "between 0 and 1"),
    ],
)
def test_sparsities_that_are_none(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sparsity(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("features", [1, 96, 255, 256, 257, 600])
def test_factor_is_the_inverses(features: int) -> None:
    hessian = correlated(features).hessian_KK
    found = factor(hessian, tokens=2000)
    assert found.rung == "damping 0.01"
    assert found.upper_KK is not None
    assert torch.equal(found.upper_KK, found.upper_KK.triu())
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(features)
    product = found.upper_KK.t() @ found.upper_KK @ damped
    assert torch.allclose(product, torch.eye(features), atol=1e-3)


def lowered(least: float) -> Tensor:
    """A symmetric matrix of mean diagonal about 1, whose least eigenvalue is ``least``."""
    basis = torch.linalg.qr(weights(64, 64).double()).Q
    values = torch.linspace(1.0, 1.2, 64, dtype=torch.float64)
    values[0] = least
    return (basis * values @ basis.t()).float()


@pytest.mark.parametrize(
    ("hessian", "tokens", "rung"),
    [
        (lowered(0.5), 64, "damping 0.01"),
        (lowered(0.5), 63, "damping 0.1"),
        (lowered(-0.05), 64, "damping 0.1"),
        (lowered(-0.5), 64, "damping 1"),
        (lowered(-5.0), 64, "none"),
        (lowered(0.5).fill_(torch.nan), 64, "none"),
        (torch.zeros(8, 8), 8, "damping 0.01"),
    ],
)
def test_the_ladder(hessian: Tensor, tokens: int, rung: str) -> None:
    found = factor(hessian, tokens)
    assert found.rung == rung
    assert (found.upper_KK is None) == (rung == "none")


def test_the_upper_rungs(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.linalg.cholesky_ex
    for failures, rung in ((3, "diagonal floor"), (4, "float64")):
        calls: list[torch.dtype] = []

        def failing(
            matrix: Tensor, out: object, calls: list[torch.dtype] = calls, n: int = failures
        ) -> object:
            calls.append(matrix.dtype)
            return real(matrix if len(calls) > n else matrix.neg_(), out=out)

        monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)
        found = factor(lowered(0.5), 64)
        assert found.rung == rung
        assert found.upper_KK is not None
        assert found.upper_KK.dtype == torch.float32
        assert (calls[-1] == torch.float64) == (rung == "float64")


def test_without_a_factor_the_baseline_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs_module, "factor", lambda *_: Factor(None, "none"))
    weight_NK, inputs = weights(8, 64), correlated(64)
    rounded = Gptq(INT4).quantise(weight_NK, inputs).outcome
    pruned = SparseGpt(Sparsity()).prune(weight_NK, inputs).outcome
    joint = Joint(Sparsity(), INT4).quantise(weight_NK, inputs).outcome
    assert [rounded.method, pruned.method, joint.method] == ["rtn", "magnitude", "magnitude+rtn"]
    assert rounded.rung == pruned.rung == joint.rung == "none"


def test_dead_features_are_rounded_and_shift_nothing() -> None:
    inputs = correlated(64)
    hessian = inputs.hessian_KK.clone()
    hessian[10], hessian[:, 10] = 0, 0
    dead = LayerInputs(
        tokens=inputs.tokens,
        hessian_KK=hessian,
        absmean_K=inputs.absmean_K,
        absmax_K=inputs.absmax_K,
        sample_SK=inputs.sample_SK,
    )
    weight_NK = weights(16, 64)
    result = Gptq(INT4).quantise(weight_NK, dead)
    assert result.outcome.method == "gptq"
    rtn = Rtn(INT4).quantise(weight_NK).weight
    assert torch.equal(result.weight.q_NK[:, 10], rtn.q_NK[:, 10])
    other = weight_NK.clone()
    other[:, 10] *= 0.5
    again = Gptq(INT4).quantise(other, dead).weight
    assert torch.equal(again.q_NK[:, 32:], result.weight.q_NK[:, 32:])


def test_fewer_tokens_than_features() -> None:
    weight_NK, inputs = weights(16, 128), correlated(128, tokens=40)
    result = Gptq(INT4).quantise(weight_NK, inputs)
    assert result.outcome.rung == "damping 0.1"
    assert result.outcome.method == "gptq"
    assert result.outcome.errors["gptq"] < result.outcome.errors["rtn"]
