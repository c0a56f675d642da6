"""The sampler: distributions, determinism, and rows that must not touch each other."""

import functools

import pytest
import torch
from torch import Tensor

from engine import sampler
from engine.endings import NOT_FINITE, NOTHING_LEFT
from engine.types import SamplingParams
from engine.uniform import uniform_number

# Upper 0.1 % points of chi-square by degrees of freedom; seeds are fixed, so nothing flickers.
CHI_SQUARE = {3: 16.27, 9: 27.88, 15: 37.70}
sample = sampler.sample


@pytest.fixture(params=["reference", "torch", "cpu"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is said here holds for each."""
    of_backend = functools.partial(sampler.sample, backend=request.param)
    monkeypatch.setitem(globals(), "sample", of_backend)


def rows(logits_V: Tensor, count: int) -> Tensor:
    return logits_V.expand(count, -1).clone()


def drawn(logits_V: Tensor, count: int = 4000, **params: float) -> Tensor:
    """How often each token comes, over ``count`` seeds."""
    chosen = [SamplingParams(seed=seed, **params) for seed in range(count)]  # type: ignore[arg-type]
    tokens = sample(rows(logits_V, count), chosen, [0] * count)
    return torch.bincount(torch.tensor(tokens), minlength=len(logits_V))


def assert_distributed(counts: Tensor, probabilities: Tensor) -> None:
    wanted = probabilities.double() * counts.sum()
    assert counts[wanted == 0].sum() == 0
    some = wanted > 0
    statistic = float(((counts - wanted).pow(2)[some] / wanted[some]).sum())
    assert statistic < CHI_SQUARE[int(some.sum()) - 1]


def random_logits(vocabulary: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def test_temperature_zero_takes_the_largest_logit_whatever_the_seed() -> None:
    logits = torch.stack([random_logits(50, seed) for seed in range(20)])
    params = [SamplingParams(top_k=3, top_p=0.1, seed=seed) for seed in range(20)]
    assert sample(logits, params, list(range(20))) == logits.argmax(1).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = random_logits(10)
    counts = drawn(logits, temperature=temperature)
    assert_distributed(counts, (logits / temperature).softmax(0))


def test_draws_over_positions_follow_the_softmax_too() -> None:
    logits, count = random_logits(10), 4000
    params = [SamplingParams(temperature=1.0, seed=11)] * count
    tokens = sample(rows(logits, count), params, list(range(count)))
    assert_distributed(torch.bincount(torch.tensor(tokens), minlength=10), logits.softmax(0))


def test_top_k_draws_from_the_k_likeliest_renormalised() -> None:
    logits = random_logits(40)
    kept = logits.topk(4).indices
    wanted = torch.zeros(40).index_copy(0, kept, logits[kept].softmax(0))
    assert_distributed(drawn(logits, temperature=1.0, top_k=4), wanted)


@pytest.mark.parametrize("top_k", [1, 40, 1000])
def test_top_k_of_one_is_greedy_and_of_all_is_off(top_k: int) -> None:
    logits = random_logits(40)
    counts = drawn(logits, 200, temperature=1.0, top_k=top_k)
    if top_k == 1:
        assert counts[logits.argmax()] == 200
    else:
        assert torch.equal(counts, drawn(logits, 200, temperature=1.0))


@pytest.mark.parametrize(
    ("top_p", "size"),
    [(1e-9, 1), (0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.91, 4), (1.0, 4)],
)
def test_top_p_draws_from_the_smallest_set_that_reaches_p(top_p: float, size: int) -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    counts = drawn(probabilities.log(), 3000, temperature=1.0, top_p=top_p)
    largest = probabilities.topk(size).indices
    assert set(counts.nonzero()[:, 0].tolist()) == set(largest.tolist())


def test_top_p_counts_what_top_k_left() -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    # Of the two likeliest the first has 4/7, which reaches 0.5 alone; without top-k it has 0.4.
    counts = drawn(probabilities.log(), 500, temperature=1.0, top_p=0.5, top_k=2)
    assert counts.tolist() == [0, 500, 0, 0]


@pytest.mark.parametrize(
    ("min_p", "size"), [(0.0, 4), (0.24, 4), (0.26, 3), (0.49, 3), (0.51, 2), (0.76, 1), (1.0, 1)]
)
def test_min_p_draws_what_is_likely_enough_beside_the_likeliest(min_p: float, size: int) -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    counts = drawn(probabilities.log(), 3000, temperature=1.0, min_p=min_p)
    largest = probabilities.topk(size).indices
    wanted = torch.zeros(4).index_copy(0, largest, probabilities[largest])
    if size > 3:
        assert_distributed(counts, wanted)
    assert set(counts.nonzero()[:, 0].tolist()) == set(largest.tolist())


def test_min_p_of_zero_changes_no_draw_of_the_neighbours() -> None:
    logits = torch.stack([random_logits(50, seed) for seed in range(8)])
    params = [SamplingParams(temperature=1.5, seed=seed) for seed in range(8)]
    mixed = [
        SamplingParams(temperature=1.5, seed=seed, min_p=0.3 * (seed % 2)) for seed in range(8)
    ]
    assert sample(logits, params, [0] * 8)[::2] == sample(logits, mixed, [0] * 8)[::2]


def test_tokens_without_probability_are_never_drawn() -> None:
    def edit(logits_RV: Tensor) -> None:
        logits_RV[:, 3:] = -torch.inf

    params = [SamplingParams(temperature=50.0, seed=seed) for seed in range(500)]
    tokens = sample(rows(random_logits(40), 500), params, [0] * 500, edit=edit)
    assert set(tokens) == {0, 1, 2}


def test_equal_logits_are_cut_to_exactly_k() -> None:
    counts = drawn(torch.zeros(16), 500, temperature=1.0, top_k=4)
    assert int((counts > 0).sum()) == 4


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-40, 5e-324])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_tiny_temperature_is_greedy(temperature: float, scale: float) -> None:
    logits = torch.tensor([0.0, 3.0, -5.0, 2.0]) * scale
    assert drawn(logits, 50, temperature=temperature).tolist() == [0, 50, 0, 0]


def test_a_tiny_temperature_leaves_the_neighbours_alone() -> None:
    logits = torch.stack([random_logits(20, seed) for seed in range(3)])
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in range(3)]
    cold = [params[0], SamplingParams(temperature=1e-40), params[2]]
    alone, found = sample(logits, params, [0] * 3), sample(logits, cold, [0] * 3)
    assert (found[0], found[2]) == (alone[0], alone[2])


def test_a_huge_temperature_is_uniform() -> None:
    counts = drawn(torch.linspace(-2, 2, 16), temperature=1e6)
    assert_distributed(counts, torch.full((16,), 1 / 16))


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([1e30, 1e30, -1e30, 0.0])
    counts = drawn(logits, 200, temperature=1.0)
    assert counts[2:].sum() == 0
    assert counts[:2].min() > 50


def test_a_row_depends_on_its_own_seed_and_logits_alone() -> None:
    logits = torch.stack([random_logits(100, seed) for seed in range(12)])
    params = [
        SamplingParams(temperature=0.0 if n % 3 == 0 else 0.5 + n, top_k=n, seed=n * 7919)
        for n in range(12)
    ]
    positions = list(range(12))
    together = sample(logits, params, positions)
    for n in range(12):
        assert sample(logits[n : n + 1], [params[n]], [n]) == [together[n]]
    order = list(range(11, -1, -1))
    assert sample(logits[order], [params[n] for n in order], order) == together[::-1]


def test_seeds_and_positions_make_different_draws() -> None:
    numbers = {uniform_number(seed, position) for seed in range(60) for position in range(60)}
    assert len(numbers) == 3600
    assert all(0.0 <= number < 1.0 for number in numbers)


def test_neighbouring_seeds_do_not_share_a_shifted_sequence() -> None:
    first = [uniform_number(1, position) for position in range(50)]
    for seed in range(2, 30):
        assert not set(first) & {uniform_number(seed, position) for position in range(50)}


def test_choices_draw_differently_and_the_first_as_if_there_were_no_others() -> None:
    params = [SamplingParams(temperature=1.0, seed=5)] * 60
    positions, logits = list(range(60)), rows(torch.zeros(1000), 60)
    first, *others = (sample(logits, params, positions, [choice] * 60) for choice in range(4))
    assert first == sample(logits, params, positions)
    for other in others:
        assert sum(a == b for a, b in zip(first, other, strict=True)) < 5
    numbers = {
        uniform_number(seed, position, choice)
        for seed in range(20)
        for position in range(20)
        for choice in range(20)
    }
    assert len(numbers) == 8000


@pytest.mark.parametrize("seed", [0, (1 << 63), (1 << 64) - 1])
def test_seeds_of_64_bits_draw(seed: int) -> None:
    params = [SamplingParams(temperature=1.0, seed=seed)] * 50
    tokens = sample(rows(torch.zeros(10), 50), params, list(range(50)))
    assert len(set(tokens)) > 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_is_named_and_leaves_the_others_alone(
    bad: float, temperature: float
) -> None:
    logits = torch.stack([random_logits(30, seed) for seed in range(4)])
    params = [SamplingParams(temperature=temperature, top_p=0.9, seed=n) for n in range(4)]
    wanted = sample(logits, params, [0] * 4)
    logits[1, 17], logits[3] = bad, bad
    found = sample(logits, params, [0] * 4)
    assert found == [wanted[0], NOT_FINITE, wanted[2], NOT_FINITE]


def test_a_vocabulary_of_one_token_has_no_choice() -> None:
    assert drawn(torch.tensor([-3.0]), 20, temperature=1.0, top_p=0.5, top_k=7).tolist() == [20]


def test_a_row_near_the_largest_float_is_drawn_with_edited_neighbours_and_without() -> None:
    logits = torch.full((2, 40), torch.finfo(torch.float32).max)
    params = [SamplingParams(temperature=1.0, seed=4)] * 2
    wanted = sample(logits.clone(), params, [0, 0])
    assert wanted == sample(logits, params, [0, 0], edit=lambda x: None)
    assert NOT_FINITE not in wanted


def test_an_edit_may_forbid_what_the_model_may_not() -> None:
    logits = rows(random_logits(20), 3)
    tokens = sample(logits, [SamplingParams()] * 3, [0] * 3, edit=lambda x: x[1:].fill_(-torch.inf))
    assert tokens == [int(random_logits(20).argmax()), NOTHING_LEFT, NOTHING_LEFT]
    logits[0, 3] = -torch.inf
    assert sample(logits, [SamplingParams()] * 3, [0] * 3, edit=lambda x: None)[0] == NOT_FINITE
