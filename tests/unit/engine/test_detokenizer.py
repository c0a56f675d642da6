"""Incremental detokenising: the pieces are the whole, and no character is cut."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from engine.client.detokenizer import IncrementalDetokenizer
from engine.client.tokenizer import Tokenizer

Decode = Callable[[list[int]], str]
REPLACEMENT = "\ufffd"
TEXTS = [
    "Once upon a time, there was a cat.",
    "emoji 👩‍👩‍👧‍👦 flag 🇩🇪 skin 👍🏽 done",
    "漢字かな交じり文。한국어도.",
    "combining e\u0301 a\u0308\u0323 zalgo Z\u0351\u036b",
    "العربية עברית हिन्दी",
    "tabs\tand\r\nnewlines\n\n  and   spaces ",
    "\U0001d518\U0001d52b four bytes \U0001f71a",
]


def pieces(decode: Decode, chunks: list[list[int]]) -> list[str]:
    """What each chunk gives, and the rest."""
    detokenizer = IncrementalDetokenizer(decode)
    return [*(detokenizer.add(chunk) for chunk in chunks), detokenizer.flush()]


def split(ids: list[int], seed: int) -> list[list[int]]:
    draw, chunks, at = random.Random(seed), [], 0
    while at < len(ids):
        size = draw.randint(1, 4)
        chunks.append(ids[at : at + size])
        at += size
    return chunks


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.from_folder(model_dir)


def fallback_decode() -> Decode:
    """A decoder as Llama 2's: ``▁`` for spaces, ``<0xE2>`` for bytes, one leading space cut."""
    words = ["▁", "▁the", "▁cat", "s", "▁▁", "é", "漢"]
    vocabulary = {f"<0x{n:02X}>": n for n in range(256)}
    vocabulary |= {word: 256 + n for n, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="▁"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer.decode


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("seed", range(4))
def test_pieces_make_the_text_and_split_no_character(
    tokenizer: Tokenizer, text: str, seed: int
) -> None:
    ids = tokenizer.encode(text)
    chunks = [[token] for token in ids] if seed == 0 else split(ids, seed)
    found = pieces(tokenizer.decode, chunks)
    assert "".join(found) == text
    assert not any(REPLACEMENT in piece for piece in found)


def test_text_comes_with_the_token_that_completes_it(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Once upon a time")
    found = pieces(tokenizer.decode, [[token] for token in ids])
    assert all(found[:-1]), "every token of plain text gives text at once"
    assert found[-1] == ""


def test_an_unfinished_character_waits_and_shows_as_replacement_at_the_end(
    tokenizer: Tokenizer,
) -> None:
    ids = tokenizer.encode("🜚")
    assert len(ids) > 1
    found = pieces(tokenizer.decode, [[token] for token in ids[:-1]])
    assert found[:-1] == [""] * (len(ids) - 1)
    assert set(found[-1]) == {REPLACEMENT}


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(ids=st.lists(st.integers(0, 4095), max_size=120), seed=st.integers(0, 99))
def test_random_ids_give_what_decoding_all_gives(
    tokenizer: Tokenizer, ids: list[int], seed: int
) -> None:
    found = pieces(tokenizer.decode, split(ids, seed))
    assert "".join(found) == tokenizer.decode(ids)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(ids=st.lists(st.integers(4, 270), max_size=120))
def test_random_bytes_give_what_decoding_all_gives(tokenizer: Tokenizer, ids: list[int]) -> None:
    found = pieces(tokenizer.decode, [[token] for token in ids])
    assert "".join(found) == tokenizer.decode(ids)


def test_special_tokens_between_give_nothing(tokenizer: Tokenizer) -> None:
    ids = [0, *tokenizer.encode("a cat"), 0, 3, *tokenizer.encode(" sat"), 0]
    found = pieces(tokenizer.decode, [[token] for token in ids])
    assert "".join(found) == "a cat sat"


def test_leading_spaces_of_words_are_kept() -> None:
    decode = fallback_decode()
    found = pieces(decode, [[257], [258], [259], [256], [257], [260], [258]])
    assert "".join(found) == decode([257, 258, 259, 256, 257, 260, 258]) == "the cats  the   cat"


def test_characters_from_byte_tokens_come_whole() -> None:
    found = pieces(fallback_decode(), [[b] for b in "€ and 👍🏽".encode()])
    assert "".join(found) == "€ and 👍🏽"
    assert not any(REPLACEMENT in piece for piece in found)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    ids=st.lists(
        st.sampled_from([*range(256, 263), 0x41, 0xE2, 0x82, 0xAC, 0xFF, 0xC3, 0xA9]), max_size=60
    )
)
def test_byte_fallback_garbage_loses_and_moves_no_text(ids: list[int]) -> None:
    """One bad byte spoils the bytes before it, also those whose character was given out."""
    decode = fallback_decode()
    found, whole = "".join(pieces(decode, [[token] for token in ids])), decode(ids)
    assert len(found) == len(whole)
    assert all(b in (a, REPLACEMENT) for a, b in zip(found, whole, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_long_text_of_byte_tokens_and_words_is_exact(seed: int) -> None:
    decode, draw = fallback_decode(), random.Random(seed)
    parts = [[word] for word in range(256, 263)] + [list(c.encode()) for c in "€é漢👍a "]
    ids = [token for part in draw.choices(parts, k=150) for token in part]
    found = pieces(decode, split(ids, seed))
    assert "".join(found) == decode(ids)
    assert not any(REPLACEMENT in piece for piece in found)


def test_the_window_stays_short_on_endless_garbage() -> None:
    """Bytes that never make a character must not cost a decode of everything at each token."""
    decoded = 0

    def decode(ids: list[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return bytes(ids).decode(errors="replace")

    count = 2000
    found = pieces(decode, [[0xFF]] * count)
    assert "".join(found) == REPLACEMENT * count
    assert decoded < 100 * count
