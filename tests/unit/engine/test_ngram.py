"""Drafts: found where the text repeats itself, given up where they fail."""

import random

from engine.ngram import Drafter


def test_what_followed_before_is_drafted() -> None:
    tokens = [1, 2, 3, 4, 5, 6, 9, 9, 1, 2, 3]
    assert Drafter().draft(tokens, 3) == [4, 5, 6]
    assert Drafter().draft(tokens, 1) == [4]


def test_the_latest_occurrence_counts() -> None:
    assert Drafter().draft([1, 2, 3, 4, 1, 2, 3, 5, 0, 1, 2, 3], 1) == [5]


def test_nothing_is_drafted_where_nothing_repeats() -> None:
    drafter = Drafter()
    assert drafter.draft(list(range(50)), 4) == []
    assert drafter.draft([1, 2], 4) == []
    assert drafter.draft([1, 2, 3, 4, 1, 2, 3], 0) == []


def test_it_follows_a_growing_sequence_as_if_it_saw_it_whole() -> None:
    rng = random.Random(4)
    tokens = [rng.randrange(3) for _ in range(20)]
    growing = Drafter()
    for _ in range(200):
        assert growing.draft(tokens, 4) == Drafter().draft(tokens, 4)
        tokens.append(rng.randrange(3))


def test_a_sequence_whose_drafts_fail_pauses_and_tries_again() -> None:
    drafter = Drafter()
    tokens = [1, 2, 3, 4, 1, 2, 3]
    assert drafter.draft(tokens, 4)
    for _ in range(4):
        drafter.judge(4, 0, len(tokens))
    assert drafter.draft(tokens, 4) == []
    longer = [*tokens, *range(100, 170), 1, 2, 3]
    assert drafter.draft(longer, 1)


def test_a_sequence_whose_drafts_hold_goes_on() -> None:
    drafter = Drafter()
    tokens = [1, 2, 3, 4, 1, 2, 3]
    for _ in range(50):
        drafter.judge(4, 2, len(tokens))
    assert drafter.draft(tokens, 4)
