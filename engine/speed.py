"""Measured speeds of steps, and what they say about times to come. No clock of its own."""

from engine.types import Request

_WEIGHT = 0.2  # of the newest step in the moving averages
_OUTLIER = 4.0
_ENOUGH_PROMPT_TOKENS = 32


class StepSpeed:
    """A step takes ``decode_s`` and ``prompt_token_s`` for each prompt token in it.

    A sequence gets a token every ``token_s``: a step gives it several where drafts are right.
    """

    def __init__(self) -> None:
        self.decode_s: float | None = None
        self.token_s: float | None = None
        self.prompt_token_s: float | None = None
        self._last_prompt_token_s = 0.0

    def __repr__(self) -> str:
        return f"<StepSpeed decode {self.decode_s} s, prompt token {self.prompt_token_s} s>"

    def observe(self, seconds: float, prompt_tokens: int, tokens_each: float = 1.0) -> None:
        """Takes in a step, in which a sequence got ``tokens_each`` on average.

        Small chunks tell only that prompts are no slower than that.
        """
        if prompt_tokens == 0:
            self.decode_s = _average(self.decode_s, seconds)
            self.token_s = _average(self.token_s, seconds / max(1.0, tokens_each))
        elif prompt_tokens >= _ENOUGH_PROMPT_TOKENS:
            per_token = max(0.0, seconds - (self.decode_s or 0.0)) / prompt_tokens
            self.prompt_token_s = _average(self.prompt_token_s, per_token)
            self._last_prompt_token_s = per_token
        elif self.prompt_token_s is not None:
            # Too noisy to be believed at once, so that it halves at most.
            most = max(0.0, seconds - (self.decode_s or 0.0)) / prompt_tokens
            self.prompt_token_s = min(self.prompt_token_s, max(most, self.prompt_token_s / 2))
            last = self._last_prompt_token_s
            self._last_prompt_token_s = min(last, max(most, last / 2))

    def prompt_tokens_within(self, seconds: float) -> int | None:
        """Prompt tokens that a step may take beside its decodes; None where not measured."""
        # Later chunks of a prompt attend to more and are slower: the last one tells it first.
        slowest = max(self.prompt_token_s or 0.0, self._last_prompt_token_s)
        if slowest == 0.0:
            return None
        return max(0, int((seconds - (self.decode_s or 0.0)) / slowest))

    def seconds_needed(self, request: Request, prompt_tokens: int) -> float:
        """What ``request`` takes at least, with ``prompt_tokens`` to compute, its own and others'.

        How soon an end token comes nobody knows, so that only a request without any needs all
        its tokens. What was not measured counts as 0.
        """
        stopping = request.stopping
        endless = not (stopping.eos_token_ids or stopping.stop_token_ids)
        steps = stopping.max_tokens if endless else max(1, stopping.min_tokens)
        return prompt_tokens * (self.prompt_token_s or 0.0) + steps * (self.token_s or 0.0)


def _average(old: float | None, new: float) -> float:
    # One step that the machine held up must not count for a long time.
    # A coarse clock may have said 0, which is as good as nothing.
    return old + _WEIGHT * (min(new, _OUTLIER * old) - old) if old else new
