"""Fakes that ship with the engine: a runner whose tokens can be computed by hand, a tokenizer."""

from engine.types import Constraint, ModelReport, ScheduledBatch, StepResult

EOS = 0
# The least tokenizer.json: a vocabulary of one word.
TOKENIZER_JSON = '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'


class ArithmeticRunner:
    """Next token = (sum of all tokens so far) % vocabulary; no tensors, no model.

    It depends on the whole sequence, so that a lost or doubled token shows, and on nothing
    else, so that what a request must get is known without running it.
    """

    def __init__(
        self, num_blocks: int = 64, block_size: int = 4, context_length: int = 256
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._context_length = context_length
        self.vocabulary_size = 97
        self.steps: list[ScheduledBatch] = []

    @property
    def context_length(self) -> int:
        """Positions that the model knows."""
        return self._context_length

    def next_token(self, tokens: list[int]) -> int:
        """What follows ``tokens``; never ``EOS``."""
        return 1 + sum(tokens) % (self.vocabulary_size - 1)

    def expected(self, prompt: list[int], count: int) -> list[int]:
        """The first ``count`` tokens after ``prompt``."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(self.next_token(tokens))
        return tokens[len(prompt) :]

    def run(self, batch: ScheduledBatch) -> StepResult:
        """See ``engine.core.Runner``."""
        self.steps.append(batch)
        result = StepResult([0] * len(batch.items))
        for index, item in enumerate(batch.items):
            if item.samples:
                tokens = list(item.sequence.tokens)
                result.tokens[index] = self.next_token(tokens)
                result.after_drafts[index] = [
                    self.next_token(tokens := [*tokens, draft]) for draft in item.drafts
                ]
        return result

    def prepare(self, constraint: Constraint) -> None:
        """See ``engine.core.Runner``; its tokens match no constraint."""

    def report(self, max_sequence_tokens: int) -> ModelReport:
        """See ``engine.core.Runner``."""
        return ModelReport(
            architecture="Arithmetic",
            context_length=self._context_length,
            max_sequence_tokens=max_sequence_tokens,
            vocabulary_size=self.vocabulary_size,
            parameters=0,
            weights="none",
            activations="none",
            head="none",
            weight_bytes=0,
            kernels=(),
            format="none",
            layers=(),
            kv_dtype="none",
            kv_block_size=self.block_size,
            kv_blocks=self.num_blocks,
            kv_bytes=0,
        )
