"""When time ends a sequence. Times are of ``time.monotonic``."""

from engine.types import FinishReason, Sequence


def expiry(sequence: Sequence, now: float) -> tuple[FinishReason, str] | None:
    """The reason, with a message where the caller needs one; None while there is time."""
    request = sequence.request
    stopping = request.stopping
    if stopping.deadline is not None and now >= stopping.deadline:
        return FinishReason.DEADLINE, ""
    if stopping.time_limit is not None and now >= stopping.time_limit:
        return FinishReason.TIME_LIMIT, ""
    # A choice that waits for its leader belongs to a request that runs.
    parts = (sequence, sequence.leader or sequence)
    waiting = all(part.scheduled_at is None for part in parts)
    if waiting and request.queue_deadline is not None and now >= request.queue_deadline:
        return FinishReason.REFUSED, "queue_timeout passed before the request could run"
    return None
