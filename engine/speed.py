"""Measured speeds of steps, and what they say about times to come. No clock of its own."""

_WEIGHT = 0.2  # of the newest step in the moving averages
_ENOUGH_PROMPT_TOKENS = 32


class StepSpeed:
    """A step takes ``decode_s`` and ``prompt_token_s`` for each prompt token in it."""

    def __init__(self) -> None:
        self.decode_s: float | None = None
        self.prompt_token_s: float | None = None

    def __repr__(self) -> str:
        return f"<StepSpeed decode {self.decode_s} s, prompt token {self.prompt_token_s} s>"

    def observe(self, seconds: float, prompt_tokens: int) -> None:
        """Takes in a step. Small chunks tell too little about prompts and are left out."""
        if prompt_tokens == 0:
            self.decode_s = _average(self.decode_s, seconds)
        elif prompt_tokens >= _ENOUGH_PROMPT_TOKENS:
            rest = max(0.0, seconds - (self.decode_s or 0.0))
            self.prompt_token_s = _average(self.prompt_token_s, rest / prompt_tokens)

    def prompt_tokens_within(self, seconds: float) -> int | None:
        """Prompt tokens that a step may take beside its decodes; None where not measured."""
        if not self.prompt_token_s:
            return None
        return max(0, int((seconds - (self.decode_s or 0.0)) / self.prompt_token_s))

    def seconds_until(self, prompt_tokens: int, decode_steps: int) -> float:
        """A time that is needed at least; 0 for what was not measured."""
        return prompt_tokens * (self.prompt_token_s or 0.0) + decode_steps * (self.decode_s or 0.0)


def _average(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT * (new - old)
