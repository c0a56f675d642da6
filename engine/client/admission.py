"""What may be open at a time; each request takes its place before its costly part."""

from engine.errors import Overloaded

_RETRY_AFTER_S = 1.0
_BYTES_OF_A_TOKEN = 3


def estimate_tokens(text: str) -> int:
    """Tokens of ``text`` before it is tokenised.

    Vocabularies spend about 4 bytes of UTF-8 on a token of English, 3 on code and on scripts
    of three-byte characters. So 3 errs on the side of reserving too much; text that falls apart
    into single bytes has at most 3 times as many tokens, which is corrected a moment later.
    Characters would be 6 times wrong there.
    """
    return -(-len(text.encode(errors="replace")) // _BYTES_OF_A_TOKEN)


class Admission:
    """Bounds the open requests, and the prompt tokens of those that have no token yet.

    The tokens' bound is one on the wait for a first token. It never refuses a request that
    nothing waits before, whose prompt it would make impossible.
    """

    def __init__(self, max_requests: int, max_queued_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_queued_tokens = max_queued_tokens
        self.open_requests = 0
        self.queued_tokens = 0

    def __repr__(self) -> str:
        return f"<Admission {self.open_requests} open, {self.queued_tokens} prompt tokens queued>"

    def enter(self) -> "Place":
        """A place for a request. Raises ``Overloaded``."""
        if self.open_requests >= self._max_requests:
            raise Overloaded(f"{self.open_requests} requests are open already", _RETRY_AFTER_S)
        self.open_requests += 1
        return Place(self)

    def replace(self, old: int, new: int) -> None:
        """Reserves ``new`` prompt tokens in place of ``old``. Raises ``Overloaded``, and then
        ``old`` stays reserved; fewer than before are never refused."""
        others = self.queued_tokens - old
        if new > old and others and others + new > self._max_queued_tokens:
            raise Overloaded(f"{others} prompt tokens are queued already", _RETRY_AFTER_S)
        self.queued_tokens = others + new


class Place:
    """One open request's, until ``leave``."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._tokens = 0
        self._left = False

    def reserve(self, tokens: int) -> None:
        """Corrects how many prompt tokens wait. Raises ``Overloaded``; the place is kept."""
        self._admission.replace(self._tokens, tokens)
        self._tokens = tokens

    def start(self) -> None:
        """The first token is there, or will not come: the prompt waits no longer."""
        self.reserve(0)

    def leave(self) -> None:
        """Gives everything back. Idempotent."""
        self.start()
        if not self._left:
            self._left = True
            self._admission.open_requests -= 1
