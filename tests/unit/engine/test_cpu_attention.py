"""Attention on INT8 pages: near its reference, and bit-equal however it is cut and placed."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels import reference
from engine.kernels.cpu.attention import AttentionOptions, paged_attention
from engine.kernels.cpu.library import supported
from engine.kv_cache import InterleavedInt8KvCache, KvShape

CONTEXTS = [1, 15, 16, 17, 255, 256, 257, 1000]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "window of one": {"window": 1},
    "window": {"window": 100},
    "window of a chunk": {"window": 256},
    "window beyond the context": {"window": 5000},
    "cap": {"cap": 2.5},
    "cap and window": {"cap": 0.5, "window": 33, "scale": 1.5},
    "slopes": {"slopes": True},
    "slopes and window": {"slopes": True, "window": 270},
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Heads:
    """Query heads ``H``, KV heads ``J``, head size ``D``."""

    H: int
    J: int
    D: int


@dataclass(frozen=True)
class Text:
    """A sequence's queries, keys and values, all float32 [S, heads, D]."""

    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def random(cls, heads: Heads, length: int, seed: int) -> "Text":
        q = randn(length, heads.H, heads.D, seed=3 * seed)
        k = randn(length, heads.J, heads.D, seed=3 * seed + 1)
        return cls(q, k, randn(length, heads.J, heads.D, seed=3 * seed + 2))


# The last ``rows`` tokens up to ``end`` of a sequence.
@dataclass(frozen=True)
class Part:
    text: int
    end: int
    rows: int


class Scene:
    """Texts in the pages of one cache, in shuffled blocks; what is unused holds garbage."""

    def __init__(
        self, heads: Heads, texts: Sequence[Text], block_size: int = 16, seed: int = 0
    ) -> None:
        self.heads, self.texts, self.block_size = heads, texts, block_size
        counts = [-(-len(text.k) // block_size) for text in texts]
        shape = KvShape(layers=2, kv_heads=heads.J, head_dim=heads.D, block_size=block_size)
        self.cache = InterleavedInt8KvCache(shape, sum(counts) + 3)
        self.cache.pages.random_(0, 256, generator=torch.Generator().manual_seed(seed))
        self.cache.scales.fill_(torch.nan)
        ids = list(range(sum(counts) + 3))
        random.Random(seed).shuffle(ids)
        self.tables: list[list[int]] = []
        for text, count in zip(texts, counts, strict=True):
            self.tables.append([ids.pop() for _ in range(count)])
            self.cache.write(1, text.k, text.v, self._slots(self.tables[-1], len(text.k)))

    def _slots(self, table: list[int], length: int) -> Tensor:
        size = self.block_size
        return torch.tensor([table[p // size] * size + p % size for p in range(length)])

    def attend(self, parts: Sequence[Part], **options: Any) -> list[Tensor]:
        """One call for all parts; the rows of each."""
        sequences: list[tuple[int, int, int, int]] = []
        ids: list[int] = []
        row = 0
        for part in parts:
            sequences.append((row, part.rows, part.end, len(ids)))
            ids += self.tables[part.text][: -(-part.end // self.block_size)]
            row += part.rows
        q_THD = torch.cat([self.rows_of(part) for part in parts])
        out = paged_attention(
            q_THD,
            self.cache.layers[1],
            torch.tensor(sequences, dtype=torch.int32),
            torch.tensor(ids, dtype=torch.int32),
            self._options(options),
        )
        assert out.shape == q_THD.shape
        return list(out.split([part.rows for part in parts]))

    def rows_of(self, part: Part) -> Tensor:
        return self.texts[part.text].q[part.end - part.rows : part.end]

    def _slopes(self) -> Tensor:
        return torch.linspace(0.0, 0.7, self.heads.H)

    def _options(self, options: dict[str, Any]) -> AttentionOptions:
        chosen = dict(options)
        if chosen.pop("slopes", False):
            chosen["slopes_H"] = self._slopes()
        return AttentionOptions(**{"scale": self.heads.D**-0.5, **chosen})

    def reference(self, part: Part, **options: Any) -> Tensor:
        chosen = dict(options)
        if chosen.pop("slopes", False):
            chosen["slopes_H"] = self._slopes().double()
        table, end = torch.tensor([self.tables[part.text]]), torch.tensor([part.end])
        k, v = (x[0, :, : part.end].transpose(0, 1) for x in self.cache.read(1, table, end))
        return reference.int8_attention(self.rows_of(part), k.double(), v.double(), **chosen)


def assert_near(found: Tensor, wanted: Tensor) -> None:
    """Within two of the 32,767 levels of a weight: one between two may be rounded either way."""
    limit = 6e-5 * float(wanted.abs().max())
    assert float((found - wanted).abs().max()) <= limit


def assert_equal(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("D", [1, 2, 8, 24, 64, 80, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 7])
def test_decode_is_near_the_reference(D: int, group: int) -> None:
    heads = Heads(3 * group, 3, D)
    texts = [Text.random(heads, length, seed=length) for length in CONTEXTS]
    scene = Scene(heads, texts)
    parts = [Part(n, length, 1) for n, length in enumerate(CONTEXTS)]
    for part, found in zip(parts, scene.attend(parts), strict=True):
        assert_near(found, scene.reference(part))


@pytest.mark.parametrize("D", [8, 64, 80])
@pytest.mark.parametrize("group", [1, 5, 16, 40])
@pytest.mark.parametrize("block_size", [16, 48, 64])
def test_prompts_and_decodes_in_one_call(D: int, group: int, block_size: int, threads: int) -> None:
    heads = Heads(2 * group, 2, D)
    lengths = [300, 1, 40, 257, 17]
    scene = Scene(heads, [Text.random(heads, n, seed=n) for n in lengths], block_size)
    parts = [Part(0, 300, 1), Part(1, 1, 1), Part(2, 40, 40), Part(3, 257, 9), Part(4, 17, 1)]
    for part, found in zip(parts, scene.attend(parts), strict=True):
        assert_near(found, scene.reference(part))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("group", [1, 3])
def test_options_are_near_the_reference(name: str, group: int, threads: int) -> None:
    heads, options = Heads(2 * group, 2, 24), OPTIONS[name]
    scene = Scene(heads, [Text.random(heads, n, seed=n) for n in (600, 70, 9)])
    parts = [Part(0, 600, 300), Part(1, 70, 1), Part(2, 9, 9), Part(0, 257, 2)]
    for part, found in zip(parts, scene.attend(parts, **options), strict=True):
        assert_near(found, scene.reference(part, **options))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_row_has_the_same_bits_however_its_prompt_is_cut(name: str, threads: int) -> None:
    heads, options = Heads(6, 2, 64), OPTIONS[name]
    length = 530
    scene = Scene(heads, [Text.random(heads, length, seed=1), Text.random(heads, 9, seed=2)])
    whole = scene.attend([Part(0, length, length)], **options)[0]
    for step in (1, 7, 256):
        ends = [*range(step, length, step), length]
        starts = [0, *ends[:-1]]
        parts = [Part(0, end, end - start) for start, end in zip(starts, ends, strict=True)]
        together = scene.attend([Part(1, 9, 1), *parts], **options)[1:]
        assert torch.equal(torch.cat(together), whole)
        if step > 1:
            alone = [scene.attend([part], **options)[0] for part in parts]
            assert torch.equal(torch.cat(alone), whole)


@pytest.mark.parametrize("heads", [Heads(4, 1, 64), Heads(7, 1, 80), Heads(8, 4, 16)])
def test_a_row_has_the_same_bits_alone_and_beside_others(heads: Heads, threads: int) -> None:
    lengths = [3000, 5, 700, 256]
    scene = Scene(heads, [Text.random(heads, n, seed=n) for n in lengths])
    parts = [Part(0, 3000, 1), Part(1, 5, 5), Part(2, 700, 130), Part(3, 256, 1)]
    together = scene.attend(parts)
    assert_equal(together, [scene.attend([part])[0] for part in parts])
    assert_equal(together, scene.attend(parts[::-1])[::-1])


def test_a_row_has_the_same_bits_in_other_pages_and_other_blocks() -> None:
    heads = Heads(6, 3, 40)
    texts = [Text.random(heads, n, seed=n) for n in (800, 33)]
    parts = [Part(0, 800, 1), Part(1, 33, 33), Part(0, 500, 40)]
    wanted = Scene(heads, texts).attend(parts)
    for seed, block_size in ((1, 16), (2, 32), (3, 48), (4, 256)):
        assert_equal(Scene(heads, texts, block_size, seed).attend(parts), wanted)


@pytest.mark.parametrize("name", ["plain", "window", "cap", "slopes"])
def test_any_number_of_threads_gives_the_same_bits(name: str) -> None:
    heads, options = Heads(5, 1, 64), OPTIONS[name]
    scene = Scene(heads, [Text.random(heads, n, seed=n) for n in (2000, 300)])
    before, found = torch.get_num_threads(), list[list[Tensor]]()
    try:
        for count in (1, 2, 3, 5, 16):
            torch.set_num_threads(count)
            parts = [Part(0, 2000, 1), Part(1, 300, 70)]
            alone = scene.attend([Part(0, 2000, 1)], **options)
            found.append(scene.attend(parts, **options) + alone)
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_equal(other, found[0])


def test_zero_vectors_give_the_mean_of_the_values() -> None:
    heads = Heads(4, 2, 16)
    text = Text.random(heads, 300, seed=1)
    for q, k in ((torch.zeros_like(text.q), text.k), (text.q, torch.zeros_like(text.k))):
        scene = Scene(heads, [Text(q, k, text.v)])
        found = scene.attend([Part(0, 300, 3)])[0]
        assert_near(found, scene.reference(Part(0, 300, 3)))
        mean_JD = text.v.mean(0)
        assert torch.allclose(found[-1].view(2, 2, 16), mean_JD[:, None], atol=5e-3)


def test_outliers_are_near_the_reference() -> None:
    heads = Heads(4, 2, 64)
    text = Text.random(heads, 290, seed=1)
    text.q[280:, 1, 3] = 1e4
    text.k[7, 0, 3] = -1e4
    text.k[270, 1, 9] = 1e4
    text.v[5, 1, 2] = 1e4
    scene = Scene(heads, [text])
    for scale in (1e-6, 1e-2):
        part = Part(0, 290, 30)
        assert_near(scene.attend([part], scale=scale)[0], scene.reference(part, scale=scale))


def test_huge_scores_choose_one_value() -> None:
    heads = Heads(2, 1, 32)
    text = Text.random(heads, 600, seed=3)
    text.k[:] = -text.k.abs()
    text.k[400] = 1e4
    scene = Scene(heads, [Text(text.q.abs() * 100, text.k, text.v)])
    found = scene.attend([Part(0, 600, 1)])[0]
    assert torch.allclose(found[0], text.v[400].expand(2, 32), atol=0.02)


@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_and_touches_no_other_sequence(
    part: str, bad: float, threads: int
) -> None:
    heads = Heads(4, 2, 24)
    texts = [Text.random(heads, n, seed=n) for n in (40, 300, 270)]
    parts = [Part(0, 40, 1), Part(1, 300, 280), Part(2, 270, 1)]
    wanted = Scene(heads, texts).attend(parts)
    getattr(texts[1], part)[50, 1, 4] = bad
    found = Scene(heads, texts).attend(parts)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[2], wanted[2])
    assert torch.equal(found[1][:30], wanted[1][:30])
    touched = ~torch.isfinite(found[1]).all(-1)
    if part == "q":
        assert touched.nonzero().tolist() == [[30, 1]]
    else:
        assert bool(touched[30:, 2:].all())
        assert torch.equal(found[1][:, :2], wanted[1][:, :2])


@pytest.mark.parametrize("name", ["plain", "window"])
def test_nothing_is_read_after_the_last_row(name: str) -> None:
    heads, options = Heads(4, 2, 24), OPTIONS[name]
    text = Text.random(heads, 300, seed=5)
    wanted = Scene(heads, [text]).attend([Part(0, 260, 20)], **options)
    text.k[260:], text.v[260:] = torch.nan, torch.inf
    assert_equal(Scene(heads, [text]).attend([Part(0, 260, 20)], **options), wanted)


@pytest.mark.parametrize("heads", [Heads(3, 3, 24), Heads(14, 2, 64), Heads(8, 1, 80)])
def test_all_instruction_sets_give_the_same_bits(
    heads: Heads, use_set: Callable[[str], None]
) -> None:
    lengths = [300, 33, 270]
    parts = [Part(0, 300, 20), Part(1, 33, 33), Part(2, 270, 1)]
    outcomes: dict[str, list[Tensor]] = {}
    for name in supported():
        use_set(name)
        scene = Scene(heads, [Text.random(heads, n, seed=n) for n in lengths])
        outcomes[name] = [scene.cache.pages, torch.nan_to_num(scene.cache.scales)]
        for options in OPTIONS.values():
            outcomes[name] += scene.attend(parts, **options)
    assert "portable" in outcomes
    for other in outcomes.values():
        assert_equal(other, outcomes["portable"])
