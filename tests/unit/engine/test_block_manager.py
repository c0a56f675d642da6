"""The block manager: every block is free, cached, or counted in the tables that hold it."""

import random
from collections import Counter

import pytest

from engine.block_manager import BlockManager

SIZE = 4


def digests_of(blocks: BlockManager, tokens: list[int], salt: str = "") -> list[bytes]:
    digests: list[bytes] = []
    blocks.extend_digests(digests, tokens, salt)
    return digests


def compute(blocks: BlockManager, tokens: list[int], salt: str = "") -> list[int]:
    """The table of a sequence that shares what is known and has computed all ``tokens``."""
    table: list[int] = []
    digests = digests_of(blocks, tokens, salt)
    blocks.share(table, blocks.match(digests))
    blocks.grow(table, len(tokens))
    for block, digest in zip(table, digests, strict=False):
        blocks.register(block, digest)
    return table


def known(blocks: BlockManager, tokens: list[int], salt: str = "") -> int:
    """How many blocks from the beginning of ``tokens`` are found."""
    return len(blocks.match(digests_of(blocks, tokens, salt)))


def counts(blocks: BlockManager) -> tuple[int, int, int]:
    """(free, cached, used)."""
    cached = blocks.cached_blocks
    return blocks.available_blocks - cached, cached, blocks.used_blocks


def test_grow_adds_just_the_missing_blocks() -> None:
    blocks, table = BlockManager(8, 4), list[int]()
    for tokens, wanted in ((0, 0), (1, 1), (4, 1), (5, 2), (3, 2), (32, 8)):
        blocks.grow(table, tokens)
        assert len(table) == wanted, tokens
        assert counts(blocks) == (8 - wanted, 0, wanted)
    assert sorted(table) == list(range(8))


def test_missing_blocks_never_counts_below_zero() -> None:
    blocks = BlockManager(4, 3)
    table: list[int] = []
    blocks.grow(table, 9)
    assert [blocks.missing_blocks(table, n) for n in (0, 1, 9, 10, 12, 13)] == [0, 0, 0, 1, 1, 2]


def test_can_grow_says_whether_grow_succeeds() -> None:
    blocks = BlockManager(3, 2)
    first: list[int] = []
    blocks.grow(first, 4)
    second: list[int] = []
    assert blocks.can_grow(second, 2)
    assert not blocks.can_grow(second, 3)
    assert blocks.can_grow(first, 6)
    with pytest.raises(AssertionError):
        blocks.grow(second, 3)
    assert second == []
    blocks.check_invariants([first, second])


def test_release_empties_the_table_and_frees_what_nobody_could_find() -> None:
    blocks, table = BlockManager(5, 4), list[int]()
    blocks.grow(table, 17)
    blocks.release(table)
    assert table == []
    assert counts(blocks) == (5, 0, 0)
    blocks.check_invariants([])


def test_a_block_cannot_be_freed_twice() -> None:
    blocks, table = BlockManager(5, 4), list[int]()
    blocks.grow(table, 8)
    copy = list(table)
    blocks.release(table)
    with pytest.raises(AssertionError, match="twice"):
        blocks.release(copy)


def test_freed_blocks_are_used_again_and_all_of_them() -> None:
    blocks = BlockManager(3, 1)
    for _ in range(5):
        table: list[int] = []
        blocks.grow(table, 3)
        assert sorted(table) == [0, 1, 2]
        blocks.release(table)


def test_full_blocks_stay_after_release_and_are_found_again() -> None:
    blocks = BlockManager(8, SIZE)
    tokens = list(range(10))
    table = compute(blocks, tokens)
    full = table[:2]
    blocks.release(table)
    assert counts(blocks) == (6, 2, 0), "the third block is not full"
    assert blocks.match(digests_of(blocks, tokens)) == full
    again = compute(blocks, tokens)
    assert again[:2] == full
    assert counts(blocks) == (5, 0, 3)
    blocks.check_invariants([again])


def test_a_shared_block_lives_as_long_as_one_table_has_it() -> None:
    blocks = BlockManager(8, SIZE)
    first, second = compute(blocks, [1] * 8), compute(blocks, [1] * 8 + [2] * 4)
    assert first == second[:2]
    assert counts(blocks) == (5, 0, 3)
    blocks.check_invariants([first, second])
    blocks.release(first)
    assert counts(blocks) == (5, 0, 3)
    blocks.check_invariants([second])
    blocks.release(second)
    assert counts(blocks) == (5, 3, 0)
    blocks.check_invariants([])


def test_only_the_common_beginning_is_shared() -> None:
    blocks = BlockManager(16, SIZE)
    compute(blocks, [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9])
    assert known(blocks, [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0]) == 2
    assert known(blocks, [1, 2, 3, 4, 5, 6, 7]) == 1, "the second block is not full"
    assert known(blocks, [1, 2, 3]) == 0
    assert known(blocks, [0, 2, 3, 4, 5, 6, 7, 8]) == 0


def test_a_digest_depends_on_everything_before() -> None:
    blocks = BlockManager(4, SIZE)
    tokens = list(range(100, 100 + 4 * SIZE))
    digests = digests_of(blocks, tokens)
    assert len(set(digests)) == 4
    for changed in range(len(tokens)):
        other = [token + (index == changed) for index, token in enumerate(tokens)]
        same = [a == b for a, b in zip(digests, digests_of(blocks, other), strict=True)]
        assert same == [index < changed // SIZE for index in range(4)]
    swapped = digests_of(blocks, tokens[SIZE:] + tokens[:SIZE])
    assert not set(swapped) & set(digests)


def test_digests_grow_with_the_sequence() -> None:
    blocks = BlockManager(4, SIZE)
    tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    digests: list[bytes] = []
    lengths = []
    for count in range(len(tokens) + 1):
        blocks.extend_digests(digests, tokens[:count], "salt")
        lengths.append(len(digests))
    assert lengths == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert digests == digests_of(blocks, tokens, "salt")


@pytest.mark.parametrize("salts", [("", "a"), ("a", "b"), ("a", "ab"), ("", "\0"), ("ä", "a")])
def test_different_salts_share_nothing(salts: tuple[str, str]) -> None:
    blocks = BlockManager(8, SIZE)
    compute(blocks, [1] * 8, salts[0])
    assert known(blocks, [1] * 8, salts[0]) == 2
    assert known(blocks, [1] * 8, salts[1]) == 0


def test_a_duplicate_stays_unknown_and_becomes_free() -> None:
    """Two computed the same at once: the first one's block is the one that others find."""
    blocks = BlockManager(8, SIZE)
    first, second = list[int](), list[int]()
    blocks.grow(first, SIZE)
    blocks.grow(second, SIZE)
    (digest,) = digests_of(blocks, [1] * SIZE)
    blocks.register(first[0], digest)
    blocks.register(second[0], digest)
    blocks.check_invariants([first, second])
    assert blocks.match([digest]) == first
    blocks.release(second)
    assert counts(blocks) == (7, 0, 1)
    assert blocks.match([digest]) == first
    blocks.check_invariants([first])


def test_a_block_is_registered_once() -> None:
    blocks, table = BlockManager(4, SIZE), list[int]()
    blocks.grow(table, SIZE)
    one, two = digests_of(blocks, [1] * SIZE + [2] * SIZE)
    blocks.register(table[0], one)
    blocks.register(table[0], one)
    blocks.register(table[0], two)
    assert blocks.match([one]) == table
    assert blocks.match([two]) == []
    blocks.check_invariants([table])


def test_only_a_used_block_can_be_registered() -> None:
    blocks, table = BlockManager(4, SIZE), list[int]()
    blocks.grow(table, SIZE)
    (block,) = table
    blocks.release(table)
    with pytest.raises(AssertionError, match="used"):
        blocks.register(block, b"digest")


def test_free_blocks_are_taken_before_cached_ones() -> None:
    blocks = BlockManager(4, SIZE)
    blocks.release(compute(blocks, [1] * 8))
    table: list[int] = []
    blocks.grow(table, 8)
    assert known(blocks, [1] * 8) == 2
    blocks.grow(table, 12)
    assert known(blocks, [1] * 8) == 1


def test_the_least_recently_used_prefix_is_evicted_first() -> None:
    blocks = BlockManager(3, SIZE)
    one, two, three = ([n] * SIZE for n in (1, 2, 3))
    for tokens in (one, two, three, one):  # one is used again
        blocks.release(compute(blocks, tokens))
    found = []
    table: list[int] = []
    for count in range(1, 4):
        blocks.grow(table, count * SIZE)
        found.append([known(blocks, tokens) for tokens in (one, two, three)])
    assert found == [[1, 0, 1], [1, 0, 0], [0, 0, 0]]


def test_ends_of_prefixes_are_evicted_before_their_beginnings() -> None:
    """A prefix whose beginning is gone could never be found again."""
    blocks = BlockManager(4, SIZE)
    tokens = list(range(4 * SIZE))
    blocks.release(compute(blocks, tokens))
    table: list[int] = []
    for evicted in range(1, 5):
        blocks.grow(table, evicted * SIZE)
        assert known(blocks, tokens) == 4 - evicted


def test_an_evicted_block_is_unknown_and_can_be_registered_anew() -> None:
    blocks = BlockManager(2, SIZE)
    blocks.release(compute(blocks, [1] * 8))
    table = compute(blocks, [2] * 8)
    assert known(blocks, [1] * 8) == 0
    assert known(blocks, [2] * 8) == 2
    blocks.check_invariants([table])
    blocks.release(table)
    assert blocks.cached_blocks == 2


def test_blocks_in_use_are_never_evicted() -> None:
    blocks = BlockManager(4, SIZE)
    first = compute(blocks, [1] * 8)
    blocks.release(compute(blocks, [2] * 8))
    second: list[int] = []
    blocks.grow(second, 8)
    assert not set(first) & set(second)
    assert not blocks.can_grow(second, 9)
    assert known(blocks, [1] * 8) == 2


def test_a_prefix_that_is_revived_cannot_be_evicted_for_the_rest() -> None:
    """``can_share_and_grow`` counts the blocks that sharing takes out of the cache."""
    blocks = BlockManager(4, SIZE)
    blocks.release(compute(blocks, [1] * 12))
    prefix = blocks.match(digests_of(blocks, [1] * 12))
    assert len(prefix) == 3
    assert blocks.can_share_and_grow(prefix, 16)
    held: list[int] = []
    blocks.grow(held, 4)
    assert not blocks.can_share_and_grow(prefix, 16), "no block is left beside the prefix"
    assert blocks.can_share_and_grow(prefix, 12)
    table: list[int] = []
    blocks.share(table, prefix)
    assert not blocks.can_grow(table, 16)


def test_a_prefix_that_is_in_use_costs_no_blocks() -> None:
    blocks = BlockManager(4, SIZE)
    compute(blocks, [1] * 12)
    prefix = blocks.match(digests_of(blocks, [1] * 12))
    assert blocks.can_share_and_grow(prefix, 16)
    assert not blocks.can_grow([], 8)


def test_a_prefix_comes_first() -> None:
    blocks = BlockManager(4, SIZE)
    table = compute(blocks, [1] * 4)
    with pytest.raises(AssertionError, match="first"):
        blocks.share(table, [table[0]])


def damaged() -> tuple[BlockManager, list[list[int]]]:
    """Two tables with a block in common, a cached block, a free one; all is well."""
    blocks = BlockManager(6, SIZE)
    tables = [compute(blocks, [1] * 8), compute(blocks, [1] * 4 + [2] * 4)]
    blocks.release(compute(blocks, [3] * 4))
    assert counts(blocks) == (2, 1, 3)
    blocks.check_invariants(tables)
    return blocks, tables


def test_invariants_find_a_block_that_one_table_lost() -> None:
    blocks, tables = damaged()
    for broken in (tables[:1], [tables[0], tables[1][:1]], [tables[0], tables[1][1:]], []):
        with pytest.raises(RuntimeError, match="references"):
            blocks.check_invariants(broken)


def test_invariants_find_a_block_in_a_table_too_many() -> None:
    blocks, tables = damaged()
    for extra in (tables[0][:1], tables[0]):
        with pytest.raises(RuntimeError, match="references"):
            blocks.check_invariants([*tables, extra])


def test_invariants_find_a_block_twice_in_a_table() -> None:
    blocks, tables = damaged()
    tables[0].append(tables[0][0])
    blocks._references[tables[0][0]] += 1
    with pytest.raises(RuntimeError, match="twice"):
        blocks.check_invariants(tables)


@pytest.mark.parametrize("where", ["lost", "doubled", "also cached", "cached and lost"])
def test_invariants_find_lost_and_doubled_blocks(where: str) -> None:
    blocks, tables = damaged()
    match where:
        case "lost":
            blocks._free.pop()
        case "doubled":
            blocks._free.append(blocks._free[0])
        case "also cached":
            blocks._cached[tables[0][1]] = None
        case "cached and lost":
            blocks._cached.clear()
    with pytest.raises(RuntimeError, match="not all"):
        blocks.check_invariants(tables)


@pytest.mark.parametrize("where", ["forgotten digest", "forgotten block", "swapped"])
def test_invariants_find_digests_that_lead_elsewhere(where: str) -> None:
    blocks, tables = damaged()
    digest = digests_of(blocks, [1] * 4)[0]
    match where:
        case "forgotten digest":
            del blocks._block_of[digest]
        case "forgotten block":
            del blocks._digest_of[tables[0][0]]
        case "swapped":
            blocks._block_of[digest] = tables[0][1]
    with pytest.raises(RuntimeError, match="digests"):
        blocks.check_invariants(tables)


@pytest.mark.parametrize("where", ["a known block is free", "an unknown block is cached"])
def test_invariants_find_blocks_in_the_wrong_place(where: str) -> None:
    blocks, tables = damaged()
    match where:
        case "a known block is free":
            blocks._free.append(blocks._cached.popitem()[0])
        case "an unknown block is cached":
            blocks._cached[blocks._free.pop()] = None
    with pytest.raises(RuntimeError, match="mixed up"):
        blocks.check_invariants(tables)


@pytest.mark.parametrize(("blocks", "size"), [(0, 1), (1, 0), (-1, 4), (4, -1)])
def test_a_pool_has_at_least_one_token(blocks: int, size: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        BlockManager(blocks, size)


def test_capacity_and_repr_tell_the_truth() -> None:
    blocks, table = BlockManager(7, 3), list[int]()
    blocks.grow(table, 4)
    assert blocks.capacity_tokens == 21
    assert repr(blocks) == "<BlockManager free 5 cached 0 used 2 of 7 x 3>"
    blocks.register(table[0], b"digest")
    blocks.release(table)
    assert repr(blocks) == "<BlockManager free 6 cached 1 used 0 of 7 x 3>"


class Naive:
    """What a pool must do, said with lists: contents by block, tables, and when each was left."""

    def __init__(self, num_blocks: int) -> None:
        self.tables: list[list[int]] = [[] for _ in range(4)]
        self.contents: dict[int, tuple[str, tuple[int, ...]]] = {}  # block: salt, all up to its end
        self.left: list[int] = []  # blocks with contents and no table, longest left first
        self.num_blocks = num_blocks

    @property
    def used(self) -> set[int]:
        return {block for table in self.tables for block in table}

    def prefix(self, salt: str, tokens: list[int], size: int) -> list[int]:
        found: list[int] = []
        for end in range(size, len(tokens) + 1, size):
            wanted = (salt, tuple(tokens[:end]))
            match = [block for block, content in self.contents.items() if content == wanted]
            if not match:
                break
            found += match
        return found

    def release(self, table: list[int]) -> None:
        blocks = table[::-1]
        table.clear()
        self.left += [b for b in blocks if b not in self.used and b in self.contents]

    def take(self, table: list[int], blocks: list[int]) -> None:
        """``blocks`` are those that the pool chose."""
        for block in blocks:
            free = set(range(self.num_blocks)) - self.used - set(self.left)
            if block not in free:
                assert not free, "a cached block was taken while another was free"
                assert self.left.pop(0) == block, "not the one that was left longest"
                del self.contents[block]
            table.append(block)


@pytest.mark.parametrize("seed", range(8))
def test_a_random_walk_agrees_with_the_naive_model(seed: int) -> None:
    """Growing, computing, releasing and sharing; every answer is that of the naive model."""
    draw = random.Random(seed)
    size = draw.randint(1, 4)
    blocks = BlockManager(draw.randint(3, 14), size)
    naive = Naive(blocks.num_blocks)
    hits: Counter[int] = Counter()
    for _ in range(400):
        index = draw.randrange(len(naive.tables))
        model = naive.tables[index]
        table = list(model)
        if model:
            blocks.release(table)
            naive.release(model)
            assert table == []
        length = draw.randint(1, blocks.capacity_tokens)
        tokens = [draw.randint(1, 2) for _ in range(length)]
        salt = draw.choice(["", "", "x"])
        digests = digests_of(blocks, tokens, salt)
        prefix = blocks.match(digests)
        assert prefix == naive.prefix(salt, tokens, size)
        fits = len(naive.used | set(prefix)) - len(prefix) - (-length // size) <= blocks.num_blocks
        assert blocks.can_share_and_grow(prefix, length) == fits
        if fits:
            hits[len(prefix)] += 1
            blocks.share(table, prefix)
            naive.left = [block for block in naive.left if block not in prefix]
            model += prefix
            blocks.grow(table, length)
            naive.take(model, table[len(prefix) :])
            assert model == table
            computed = draw.randint(0, length // size)
            for n in range(len(prefix), computed):
                blocks.register(table[n], digests[n])
                content = (salt, tuple(tokens[: (n + 1) * size]))
                if content not in naive.contents.values():
                    naive.contents[table[n]] = content
        assert (blocks.cached_blocks, blocks.used_blocks) == (len(naive.left), len(naive.used))
        blocks.check_invariants(naive.tables)
    assert sum(count for length, count in hits.items() if length) > 5, "sharing is what it is about"
