"""Structured output: which tokens may come next, with llguidance (an optional dependency).

Shape letters: R rows, V vocabulary, W 32-bit words of a row's mask.
"""

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence as Many
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.client.defaults import GenerationDefaults
from engine.errors import InvalidRequest
from engine.types import Constraint, Sequence

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

logger = logging.getLogger(__name__)

_CACHED = 64
_MAX_ERROR = 300
# One at most: a model that is not sure what comes next prints blanks wherever it may.
_WHITESPACE = " "
# All bytes as rows of bits, lowest first.
_BITS = (torch.arange(256)[:, None] >> torch.arange(8)) & 1 == 1


class Constraints:
    """Compiled constraints of one engine, and where its sequences are in them.

    ``compile`` may be called in any thread, ``mask`` in the engine's only.
    """

    def __init__(self, tokenizer: "LLTokenizer | None") -> None:
        self._tokenizer = tokenizer
        self._compiled: OrderedDict[Constraint, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()
        # Of the last step's rows. Another sequence's is made again from its tokens.
        self._matchers: dict[Sequence, tuple[LLMatcher, int]] = {}

    @classmethod
    def from_folder(cls, folder: Path, vocabulary_size: int) -> "Constraints":
        """With the folder's tokenizer.json; can compile nothing where that does not work."""
        path = folder / "tokenizer.json"
        try:
            from llguidance import LLTokenizer

            ends = list(GenerationDefaults.from_folder(folder).eos_token_ids)
            text = path.read_text(encoding="utf-8")
            return cls(LLTokenizer(text, n_vocab=vocabulary_size, eos_token=ends or None))
        except ImportError:
            logger.info("no structured output: llguidance is not installed")
        except Exception as error:  # the library raises plain exceptions for what it cannot read
            logger.warning("no structured output: %s cannot be used: %s", path, error)
        return cls(None)

    def compile(self, constraint: Constraint) -> "LLMatcher":
        """The constraint's beginning; the last ones are kept. Raises ``InvalidRequest``."""
        with self._lock:
            if (found := self._compiled.get(constraint)) is not None:
                self._compiled.move_to_end(constraint)
                return found
        matcher = self._compile(constraint)
        with self._lock:
            self._compiled[constraint] = matcher
            if len(self._compiled) > _CACHED:
                self._compiled.popitem(last=False)
        return matcher

    def mask(self, logits_RV: Tensor, sequences: Many[Sequence]) -> None:
        """Leaves in the rows of constrained sequences only the tokens that may come.

        The end token may where the constraint is met. A row of a sequence that went beyond the
        limits keeps nothing.
        """
        rows = [i for i, s in enumerate(sequences) if s.request.sampling.constraint is not None]
        self._matchers = {sequences[row]: self._advance(sequences[row]) for row in rows}
        if rows:
            allowed_RV = self._allowed([m for m, _ in self._matchers.values()], logits_RV.shape[1])
            logits_RV[rows] = logits_RV[rows].masked_fill(~allowed_RV, -torch.inf)

    def is_over_limits(self, sequence: Sequence) -> bool:
        """Whether the last ``mask`` left nothing of the sequence's row for that."""
        matcher, _ = self._matchers.get(sequence, (None, 0))
        return matcher is not None and matcher.is_error()

    def _compile(self, constraint: Constraint) -> "LLMatcher":
        field = f"structured.{constraint.kind}"
        if self._tokenizer is None:
            raise InvalidRequest(field, "this model's tokenizer does not allow it")
        from llguidance import LLMatcher

        try:
            grammar = _grammar(constraint)
        except ValueError as error:
            raise InvalidRequest(field, _one_line(str(error))) from error
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_limits())
        if not matcher.is_error():
            matcher.compute_bitmask()  # what is too complex mostly shows here
        if matcher.is_error():
            raise InvalidRequest(field, _one_line(matcher.get_error()))
        return matcher

    def _advance(self, sequence: Sequence) -> "tuple[LLMatcher, int]":
        """The sequence's matcher behind all of its tokens, and how many these are."""
        matcher, used = self._matchers.get(sequence, (None, 0))
        if matcher is None:
            constraint = sequence.request.sampling.constraint
            assert constraint is not None
            matcher = self.compile(constraint).deep_copy()
        new = sequence.tokens[len(sequence.request.prompt) + used :]
        if new and not matcher.consume_tokens(new):
            logger.warning("a constraint stopped: %s", _one_line(matcher.get_error()))
        return matcher, used + len(new)

    def _allowed(self, matchers: "list[LLMatcher]", vocabulary: int) -> Tensor:
        """bool [R, V]"""
        bits_RW = torch.zeros(len(matchers), -(-vocabulary // 32), dtype=torch.int32)
        size = bits_RW.shape[1] * 4
        for row, matcher in enumerate(matchers):
            if not matcher.is_error():
                matcher.unsafe_compute_mask_ptr(bits_RW[row].data_ptr(), size)
            if matcher.is_error():
                bits_RW[row] = 0
        return _BITS[bits_RW.view(torch.uint8).long()].flatten(1)[:, :vocabulary]


def _grammar(constraint: Constraint) -> str:
    from llguidance import LLMatcher

    text = constraint.text
    match constraint.kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(
                text, defaults={"whitespace_pattern": _WHITESPACE}
            )
        case "regex":
            return LLMatcher.grammar_from_regex(text)
        case "grammar":
            return LLMatcher.grammar_from_lark(text)
        case "choice":
            values = (json.dumps(value).replace("\x7f", r"\u007f") for value in json.loads(text))
            return LLMatcher.grammar_from_lark("start: " + " | ".join(values))
    raise ValueError(f"unknown constraint {constraint.kind!r}")


def _limits() -> "LLParserLimits":
    from llguidance import LLParserLimits

    # More than schemas in use need; a step takes some 5 ms, a sequence some 10 MB at worst.
    return LLParserLimits(
        max_items_in_row=1000,
        initial_lexer_fuel=500_000,
        step_lexer_fuel=50_000,
        step_max_items=20_000,
        max_lexer_states=10_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_MAX_ERROR]
