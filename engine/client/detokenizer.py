"""Token ids to text, piece by piece, never splitting a UTF-8 character."""

from collections.abc import Callable

_REPLACEMENT = "\ufffd"
# An unfinished UTF-8 character is at most three bytes, and so at most three U+FFFD.
_UNFINISHED = 3
# Ids that may end within a character before they count as garbage. Byte-fallback decoders turn
# a whole run of bytes into U+FFFD while its last character is unfinished.
_PATIENCE = 64
_KEPT_IDS = 8


class IncrementalDetokenizer:
    """The pieces together are what decoding all ids at once gives.

    Decodes a short window of the last ids anew for each piece, so that the decoder's treatment
    of spaces between tokens is kept. Text that ends within a character waits for its rest.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._sent = 0  # characters of the window's text that were given out
        self._held = 0  # ids since the text ended with a whole character

    def add(self, ids: list[int]) -> str:
        """The text that ``ids`` complete."""
        self._window += ids
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT):
            self._held += len(ids)
            if self._held < _PATIENCE:
                return ""
            end = max(self._sent, len(text) - _UNFINISHED)
        else:
            end = len(text)
        self._held = 0
        piece, self._sent = text[self._sent : end], end
        if len(self._window) > 2 * _KEPT_IDS:
            self._shorten(text)
        return piece

    def flush(self) -> str:
        """What is left at the end; an unfinished character becomes U+FFFD."""
        piece = self._decode(self._window)[self._sent :]
        self._window, self._sent, self._held = [], 0, 0
        return piece

    def _shorten(self, text: str) -> None:
        """Drops ids whose text is out, where the rest decodes to the same end.

        A cut within a character does not; one of four successive cuts is between two.
        """
        for kept in range(_KEPT_IDS, _KEPT_IDS + 4):
            tail = self._decode(self._window[-kept:])
            dropped = len(text) - len(tail)
            if text.endswith(tail) and dropped <= self._sent:
                self._window = self._window[-kept:]
                self._sent -= dropped
                return
