"""Prompt lookup: what followed the last tokens before may follow again. Standard library only."""

_NGRAM = 3
_TRIAL = 16  # drafted tokens after which a sequence is judged
_LEAST_RATE = 0.3  # accepted of drafted, below which drafting costs more than it brings
_PAUSE = 64  # tokens after which a sequence that was switched off is tried again


class Drafter:
    """Drafts for one sequence; switches itself off while its drafts do not pay.

    Source: prompt lookup decoding (A. Saxena, 2023).
    """

    __slots__ = ("_accepted", "_drafted", "_follows", "_indexed", "_resume_at")

    def __init__(self) -> None:
        self._follows: dict[tuple[int, ...], int] = {}  # n-gram -> position after it
        self._indexed = 0
        self._drafted = 0
        self._accepted = 0
        self._resume_at = 0

    def __repr__(self) -> str:
        return f"<Drafter accepted {self._accepted} of {self._drafted}>"

    def draft(self, tokens: list[int], most: int) -> list[int]:
        """At most ``most`` tokens that may follow ``tokens``."""
        if most < 1 or len(tokens) < max(self._resume_at, _NGRAM):
            return []
        self._index(tokens)
        found = self._follows.get(tuple(tokens[-_NGRAM:]))
        if found is None:
            return []
        drafts: list[int] = []
        for at in range(found, found + most):
            # Where the repetition reaches the end, it is taken to go on in circles.
            drafts.append(tokens[at] if at < len(tokens) else drafts[at - len(tokens)])
        return drafts

    def judge(self, drafted: int, accepted: int, length: int) -> None:
        """Takes in how a draft fared in a sequence that has ``length`` tokens now."""
        self._drafted += drafted
        self._accepted += accepted
        if self._drafted >= _TRIAL:
            if self._accepted < _LEAST_RATE * self._drafted:
                self._resume_at = length + _PAUSE
            self._drafted = self._accepted = 0

    def _index(self, tokens: list[int]) -> None:
        # The last n-gram is the one that is looked up: what follows it is not known yet.
        for end in range(max(self._indexed, _NGRAM), len(tokens)):
            self._follows[tuple(tokens[end - _NGRAM : end])] = end
        self._indexed = max(self._indexed, len(tokens))
