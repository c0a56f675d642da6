"""The samplers of the backends against the reference, row by row."""

import random
from functools import partial

import pytest
import torch
from torch import Tensor

from engine.kernels import kernel, reference
from engine.kernels.cpu import library
from engine.types import SamplingParams
from engine.uniform import uniform_number

# Rounding may move what a draw inverts by so much.
TOLERANCE = 2e-5


def nearby(
    row: tuple[Tensor, SamplingParams, int, int], monkeypatch: pytest.MonkeyPatch, *, edited: bool
) -> set[int]:
    """What the reference draws at a row's number, and at its neighbours."""
    logits_V, params, position, choice = row
    found: set[int] = set()
    for shift in (-TOLERANCE, 0.0, TOLERANCE):
        number = min(max(uniform_number(params.seed, position, choice) + shift, 0.0), 1 - 1e-12)
        monkeypatch.setattr(reference, "uniform_number", lambda *key, number=number: number)
        found |= set(
            reference.sample(logits_V[None], [params], [position], [choice], edited=edited)
        )
    monkeypatch.undo()
    return found


def random_rows(vocabulary: int, seed: int) -> list[tuple[Tensor, SamplingParams, int, int]]:
    chance = random.Random(vocabulary * 100 + seed)
    generator = torch.Generator().manual_seed(chance.randrange(1 << 30))
    rows = []
    for _ in range(24):
        logits_V = torch.randn(vocabulary, generator=generator) * chance.choice([0.3, 3.0, 9.0])
        if seed % 3 == 0:
            logits_V = (logits_V * 2).round() / 2  # many equal ones
        params = SamplingParams(
            temperature=chance.choice([0.0, 0.01, 0.7, 1.0, 9.0, 1e9]),
            top_k=chance.choice([0, 0, 1, 5, 255, 256, 257, 400]),
            top_p=chance.choice([1.0, 1.0, 0.997, 0.91, 0.53, 1e-9]),
            min_p=chance.choice([0.0, 0.0, 1e-4, 0.047]),
            seed=chance.randrange(1 << 64),
        )
        rows.append((logits_V, params, chance.randrange(5000), chance.randrange(3)))
    return rows


def run(
    name: str, rows: list[tuple[Tensor, SamplingParams, int, int]], *, edited: bool
) -> list[int]:
    logits, params, positions, choices = zip(*rows, strict=True)
    found: list[int] = kernel("sample", name)(
        torch.stack(logits), params, positions, choices, edited=edited
    )
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("vocabulary", [1, 2, 15, 16, 17, 250, 256, 257, 513, 2049, 5003])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_backend_draws_what_the_reference_draws(
    backend: str, vocabulary: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = random_rows(vocabulary, seed)
    if edited := seed == 2:
        generator = torch.Generator().manual_seed(vocabulary)
        for logits_V, *_ in rows:
            logits_V[torch.rand(vocabulary, generator=generator) < 0.3] = -torch.inf
    for row, token in zip(rows, run(backend, rows, edited=edited), strict=True):
        assert token in nearby(row, monkeypatch, edited=edited), row


@pytest.mark.parametrize("vocabulary", [1, 31, 600, 5003])
def test_all_instruction_sets_and_numbers_of_rows_draw_the_same(
    vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = random_rows(vocabulary, 1)
    wanted = run("cpu", rows, edited=False)
    assert [run("cpu", [row], edited=False)[0] for row in rows] == wanted
    for name in library.supported():
        kernels = partial(library.kernels, name)
        monkeypatch.setattr("engine.kernels.cpu.sample.kernels", kernels)
        assert run("cpu", rows, edited=False) == wanted


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("vocabulary", [7, 17, 33])
@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-38, 1e-3, 1.0, 1e30, 1e39, 1e300])
def test_the_largest_floats_and_temperatures_are_drawn(
    backend: str, vocabulary: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = torch.finfo(torch.float32).max
    odd = torch.tensor([largest, -largest, largest, 0.0, 1e-40, -1e-40, largest * 0.9])
    for logits_V in (odd.repeat(5)[:vocabulary], torch.zeros(vocabulary)):
        rows = [
            (
                logits_V,
                SamplingParams(temperature=temperature, top_k=(0, 1, 5)[n % 3], top_p=0.93, seed=n),
                3,
                0,
            )
            for n in range(120)
        ]
        for row, token in zip(rows, run(backend, rows, edited=False), strict=True):
            assert token in nearby(row, monkeypatch, edited=False)


def test_any_number_of_threads_draws_and_reports_the_same() -> None:
    """Enough rows and columns for several."""
    rows = [(row[0].repeat(30)[:150_001], *row[1:]) for row in random_rows(5003, 1)[:9]]
    logits_RV, tokens = torch.stack([row[0] for row in rows]), [row * 7 for row in range(9)]
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            drawn = run("cpu", rows, edited=False)
            found.append((drawn, kernel("logprobs", "cpu")(logits_RV, tokens, 5)))
    finally:
        torch.set_num_threads(1)
    assert found[0] == found[1] == found[2]
