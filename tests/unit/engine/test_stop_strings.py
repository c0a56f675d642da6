"""Stop strings in streamed text: as if the whole text had been searched."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.client.stop_strings import StopMatcher


def search(text: str, stops: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    """The text up to the match that ends first, of those the longest; the naive way."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def stream(pieces: list[str], stops: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    """What a reader gets, and the stop string that ended it."""
    matcher, out = StopMatcher(stops, include), ""
    for piece in pieces:
        safe, stop = matcher.add(piece)
        out += safe
        if stop is not None:
            return out, stop
    return out + matcher.flush(), None


def split(text: str, draw: random.Random) -> list[str]:
    cuts = sorted(draw.choices(range(len(text) + 1), k=draw.randint(0, 6)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@pytest.mark.parametrize("include", [False, True])
@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(
    text=st.text("ab\n€", max_size=24),
    stops=st.lists(st.text("ab\n€", min_size=1, max_size=4), max_size=4).map(tuple),
    seed=st.integers(0, 1000),
)
def test_it_finds_what_a_search_of_the_whole_text_finds(
    text: str, stops: tuple[str, ...], seed: int, include: bool
) -> None:
    pieces = split(text, random.Random(seed))
    assert stream(pieces, stops, include) == search(text, stops, include)
    assert stream(list(text), stops, include) == search(text, stops, include)


@pytest.mark.parametrize(
    ("pieces", "include", "wanted"),
    [
        (["Hello ST", "OP world"], False, ("Hello ", "STOP")),
        (["Hello ST", "OP world"], True, ("Hello STOP", "STOP")),
        (["S", "T", "O", "P"], False, ("", "STOP")),
        (["STO", "STOP"], False, ("STO", "STOP")),
        (["SSTOP"], False, ("S", "STOP")),
        (["no ST", "art"], False, ("no STart", None)),
        ([], False, ("", None)),
    ],
)
def test_a_stop_string_may_span_pieces(
    pieces: list[str], include: bool, wanted: tuple[str, str | None]
) -> None:
    assert stream(pieces, ("STOP",), include) == wanted


@pytest.mark.parametrize(
    ("stops", "wanted"),
    [
        (("bc", "abcd"), ("a", "bc")),
        (("cd", "abcd"), ("", "abcd")),
        (("abcd", "cd"), ("", "abcd")),
        (("d", "abcde"), ("abc", "d")),
        (("e", "bcd"), ("a", "bcd")),
    ],
)
def test_of_overlapping_stops_the_first_to_end_counts_then_the_longest(
    stops: tuple[str, ...], wanted: tuple[str, str]
) -> None:
    for pieces in (["abcde"], list("abcde"), ["ab", "cde"]):
        assert stream(pieces, stops, False) == wanted


def test_text_waits_only_while_it_may_become_a_stop() -> None:
    matcher = StopMatcher(("<end>",), False)
    assert matcher.add("a <") == ("a ", None)
    assert matcher.add("en") == ("", None)
    assert matcher.add("x") == ("<enx", None)
    assert matcher.add("<e") == ("", None)
    assert matcher.flush() == "<e"
    assert matcher.flush() == ""


def test_without_stops_nothing_waits() -> None:
    matcher = StopMatcher((), False)
    assert matcher.add("anything") == ("anything", None)
    assert matcher.flush() == ""
