"""The block manager: every block is free or in exactly one table."""

import random

import pytest

from engine.block_manager import BlockManager


def test_grow_adds_just_the_missing_blocks() -> None:
    blocks, table = BlockManager(8, 4), list[int]()
    for tokens, wanted in ((0, 0), (1, 1), (4, 1), (5, 2), (3, 2), (32, 8)):
        blocks.grow(table, tokens)
        assert len(table) == wanted, tokens
        assert blocks.free_blocks == 8 - wanted
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


def test_release_empties_the_table_and_frees_its_blocks() -> None:
    blocks, table = BlockManager(5, 4), list[int]()
    blocks.grow(table, 17)
    blocks.release(table)
    assert table == []
    assert blocks.free_blocks == 5
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


def test_invariants_find_a_block_in_two_tables() -> None:
    blocks, table = BlockManager(4, 1), list[int]()
    blocks.grow(table, 2)
    with pytest.raises(RuntimeError, match="two tables"):
        blocks.check_invariants([table, table[:1]])


def test_invariants_find_a_lost_block() -> None:
    blocks, table = BlockManager(4, 1), list[int]()
    blocks.grow(table, 2)
    with pytest.raises(RuntimeError, match="lost"):
        blocks.check_invariants([table[:1]])


@pytest.mark.parametrize(("blocks", "size"), [(0, 1), (1, 0), (-1, 4), (4, -1)])
def test_a_pool_has_at_least_one_token(blocks: int, size: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        BlockManager(blocks, size)


def test_capacity_and_repr_tell_the_truth() -> None:
    blocks, table = BlockManager(7, 3), list[int]()
    blocks.grow(table, 4)
    assert blocks.capacity_tokens == 21
    assert repr(blocks) == "<BlockManager free 5 of 7 x 3>"


@pytest.mark.parametrize("seed", range(5))
def test_random_growing_and_releasing_loses_nothing(seed: int) -> None:
    draw = random.Random(seed)
    blocks = BlockManager(draw.randint(1, 12), draw.randint(1, 5))
    tables: list[list[int]] = [[] for _ in range(4)]
    for _ in range(200):
        table = draw.choice(tables)
        tokens = draw.randint(0, blocks.capacity_tokens + 2)
        if draw.random() < 0.3:
            blocks.release(table)
        elif blocks.can_grow(table, tokens):
            before = list(table)
            blocks.grow(table, tokens)
            assert table[: len(before)] == before
            assert len(table) * blocks.block_size >= tokens
        blocks.check_invariants(tables)
