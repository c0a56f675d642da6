"""When a sequence ends: by its last token or by time. Times are of ``time.monotonic``."""

from engine.types import FinishReason, Sequence

# What a step gives in place of a token.
NOT_FINITE = -1
OVER_LIMITS = -2
NOTHING_LEFT = -3


def failure(token: int) -> tuple[FinishReason, str]:
    """Why a sequence that got no token ends, and what is said of it."""
    if token == OVER_LIMITS:
        return FinishReason.INVALID, "it is too complex to be followed further"
    if token == NOTHING_LEFT:
        return FinishReason.INVALID, "it leaves no token to choose"
    return FinishReason.ERROR, "the model's logits are not finite"


def ending(sequence: Sequence) -> FinishReason | None:
    """Why the sequence's last token, which was generated, is its last; None where it goes on."""
    stopping, token = sequence.request.stopping, sequence.tokens[-1]
    if token in stopping.eos_token_ids:
        return FinishReason.EOS
    if token in stopping.stop_token_ids:
        return FinishReason.STOP
    return FinishReason.LENGTH if sequence.generated >= stopping.max_tokens else None


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
