"""What every peer's script shares: its arguments, the prompts, the decode clock, the answer.

Standard library only: each script runs in its peer's own environment, and nothing of Venturi is
there. The same arguments and the same line of JSON serve for Venturi's own measurement.
"""

import argparse
import json
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

# Their random prompts are kept away from the ids that often are special.
_FIRST_TOKEN = 16
PREFILL_TOKENS = 512
CHECK_PROMPTS, CHECK_LENGTH, CHECK_NEW = 16, 32, 2


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One measurement. ``work`` is a folder for converted weights, kept between runs."""

    model: Path
    work: Path
    bits: int
    threads: int
    prompt: int
    new: int
    batches: list[int]
    seed: int
    vocabulary: int

    def prompts(self, count: int, tokens: int, name: str) -> list[list[int]]:
        """Random ids that differ by repetition, by batch and by ``name``."""
        rng = random.Random(f"{self.seed} {count} {tokens} {name}")
        top = self.vocabulary
        return [[rng.randrange(_FIRST_TOKEN, top) for _ in range(tokens)] for _ in range(count)]

    def check_prompts(self) -> list[list[int]]:
        """The same in every repetition and for every engine."""
        rng, top = random.Random("check"), self.vocabulary
        lengths = [CHECK_LENGTH] * CHECK_PROMPTS
        return [[rng.randrange(_FIRST_TOKEN, top) for _ in range(length)] for length in lengths]


@dataclass(kw_only=True)
class Answer:
    """What a script prints: rates in tokens/s; ``tokens`` follow the check prompts, greedily."""

    engine: str
    version: str
    prefill_tps: float
    decode_tps: dict[str, float] = field(default_factory=dict)
    tokens: list[list[int]] = field(default_factory=list)
    detail: dict[str, object] = field(default_factory=dict)

    def print(self) -> None:
        """The line that ``bench.cpu`` reads, the last of the output."""
        print(json.dumps(asdict(self)), flush=True)


class DecodeClock:
    """Tokens/s while all sequences decode: from the step in which the last of them got its first
    token to the first step in which one is done. Prefill lies before, the thinning batch after.
    """

    def __init__(self, sequences: int, new: int) -> None:
        self._left = dict.fromkeys(range(sequences), new)
        self._new = new
        self._begin = self._end = 0.0
        self._tokens = 0

    def add(self, counts: dict[int, int]) -> None:
        """A step gave sequence i ``counts[i]`` tokens."""
        if self._end:
            return
        now = time.perf_counter()
        for sequence, count in counts.items():
            self._left[sequence] -= count
        if self._begin:
            self._tokens += sum(counts.values())
        elif all(left < self._new for left in self._left.values()):
            self._begin = now
        if any(left <= 0 for left in self._left.values()):
            self._end = now

    @property
    def tokens_per_second(self) -> float:
        """Raises ``ValueError`` where some were done before others began."""
        if not self._tokens:
            raise ValueError("the sequences never decoded all at once: give more new tokens")
        return self._tokens / (self._end - self._begin)


def settings(description: str | None) -> Settings:
    """From the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--work", type=Path, required=True, help="keeps what is converted")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seed", type=int, default=0)
    given = vars(parser.parse_args())
    config = json.loads((given["model"] / "config.json").read_text(encoding="utf-8"))
    return Settings(**given, vocabulary=config["vocab_size"])
