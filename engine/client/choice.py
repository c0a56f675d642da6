"""Turns the tokens of one choice into text, up to its first stop string."""

from collections.abc import Callable

from engine.client.detokenizer import IncrementalDetokenizer
from engine.client.stop_strings import StopMatcher
from engine.types import StoppingParams, TokenEvent

# decode(ids, skip_special_tokens=...)
Decode = Callable[..., str]


class TextChoice:
    """``matched`` is the stop string that ended it, ``count`` the tokens up to and with that.

    ``echo`` comes before all other text; no stop string matches in it, nor in the text of the
    first ``min_tokens`` tokens.
    """

    def __init__(
        self,
        decode: Decode,
        stopping: StoppingParams,
        stops: tuple[str, ...],
        include_stop: bool,
        echo: str = "",
    ) -> None:
        self._decode = decode
        self._end_tokens = frozenset((*stopping.stop_token_ids, *stopping.eos_token_ids))
        self._min_tokens = stopping.min_tokens
        self._include_stop = include_stop
        self._echo = echo
        self._detokenizer = IncrementalDetokenizer(decode)
        self._matcher = StopMatcher(stops, include_stop)
        self.matched: str | None = None
        self.count = 0

    def take(self, events: list[TokenEvent]) -> tuple[str, list[TokenEvent]]:
        """Text that the tokens complete, and those of them that count."""
        text, self._echo = self._echo, ""
        for used, event in enumerate(events, 1):
            self.count += 1
            piece = self._piece(event.token)
            if self.count <= self._min_tokens:
                text += piece
                continue
            safe, self.matched = self._matcher.add(piece)
            text += safe
            if self.matched is not None:
                return text, events[:used]
        return text, events

    def rest(self) -> str:
        """Text that waited for more: an unfinished character, the start of a stop string."""
        safe, self.matched = self._matcher.add(self._detokenizer.flush())
        return safe if self.matched is not None else safe + self._matcher.flush()

    def _piece(self, token: int) -> str:
        if token not in self._end_tokens:
            return self._detokenizer.add([token])
        if not self._include_stop:
            return ""
        # It may be a special token, which the text does not show otherwise.
        return self._decode([token], skip_special_tokens=False)
