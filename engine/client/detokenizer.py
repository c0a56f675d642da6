"""Token ids to text, piece by piece, never splitting a UTF-8 character."""

from collections.abc import Callable

_REPLACEMENT = "�"


class IncrementalDetokenizer:
    """The pieces together are what decoding all ids at once gives.

    Decodes a short window twice and takes the difference, so that the decoder's treatment of
    spaces between tokens is kept. Text that ends within a character waits for its rest.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._begin = 0  # where the window starts
        self._read = 0  # ids whose text was given out

    def add(self, ids: list[int]) -> str:
        """The text that ``ids`` complete."""
        self._ids += ids
        before = self._decode(self._ids[self._begin : self._read])
        now = self._decode(self._ids[self._begin :])
        if len(now) <= len(before) or now.endswith(_REPLACEMENT):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def flush(self) -> str:
        """What is left at the end; an unfinished character becomes U+FFFD."""
        before = self._decode(self._ids[self._begin : self._read])
        now = self._decode(self._ids[self._begin :])
        self._begin = self._read = len(self._ids)
        return now[len(before) :]
