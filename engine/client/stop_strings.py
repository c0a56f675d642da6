"""Finds stop strings in streamed text, also where they span pieces."""


class StopMatcher:
    """Gives out text as soon as it cannot be the start of a stop string any more."""

    def __init__(self, stops: tuple[str, ...], include_stop: bool) -> None:
        self._stops = stops
        self._include = include_stop
        self._held = ""

    def add(self, text: str) -> tuple[str, str | None]:
        """Text that is safe to send, and the stop string that ended it, if one did.

        Of several matches the one that ends first counts, and of those the longest.
        """
        self._held += text
        found = [
            (at + len(stop), -len(stop), stop)
            for stop in self._stops
            if (at := self._held.find(stop)) >= 0
        ]
        if found:
            end, _, stop = min(found)
            return self._held[: end if self._include else end - len(stop)], stop
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        safe, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return safe, None

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper start of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
