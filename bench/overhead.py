"""What a step of the engine costs beside the model's arithmetic, by its parts.

python -m bench.overhead [--quick] [--json FILE]

The engine's own core, scheduler, batch, penalties, sampler and log-probabilities run with a
model that computes nothing: its logits are random, and the time in which it makes them does not
count. So the figures hold for models of any size with a vocabulary of 32,000.
"""

import argparse
import json
import platform
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor

from bench.serve import commit
from engine.batch import ModelInputs
from engine.config import MonitorConfig, SchedulerConfig
from engine.constraints import Constraints
from engine.core import EngineCore
from engine.formats.runtime import Runtime
from engine.kernels import resolve
from engine.kv_cache import KvCache
from engine.loader import LoadedModel
from engine.model_runner import ModelRunner
from engine.models.decoder import Decoder
from engine.types import (
    Constraint,
    ModelReport,
    Request,
    SamplingParams,
    ScheduledBatch,
    StepResult,
    StoppingParams,
)

VOCABULARY = 32_000
# Logits as peaked as a trained model's: entropy about 2 nats, 98 % on 256 tokens.
DEVIATION = 4.5
PROMPT, WARM_UP, STEPS = 256, 20, 200
PARTS = ("schedule", "build", "sample", "commit")

GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95)
EVERYTHING = SamplingParams(
    temperature=0.8,
    top_p=0.95,
    presence_penalty=0.5,
    frequency_penalty=0.5,
    repetition_penalty=1.1,
    logprobs=5,
)
KINDS = {"": GREEDY, "_sampled": SAMPLED, "_penalties_logprobs": EVERYTHING}


@dataclass
class Stopwatch:
    """Seconds between marks, by name, of one step."""

    last: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)

    def start(self) -> None:
        """A new step."""
        self.seconds = {}
        self.last = time.perf_counter()

    def mark(self, name: str) -> None:
        """What passed since the last mark was ``name``."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


class RandomDecoder:
    """Stands for a decoder; each step's logits are others, so that no text repeats itself."""

    def __init__(self, watch: Stopwatch) -> None:
        self.spec = SimpleNamespace(context_length=1 << 20)
        self.layers = ()
        self._watch = watch
        self._generator = torch.Generator().manual_seed(0)
        self._logits_RV = DEVIATION * torch.randn(64, VOCABULARY, generator=self._generator)

    def hidden(self, inputs: ModelInputs, cache: KvCache, observe: None) -> Tensor:
        """See ``Decoder``."""
        self._watch.mark("build")
        hidden_TK = torch.zeros(len(inputs.token_ids_T), 1)
        self._watch.mark("model")
        return hidden_TK

    def logits(self, hidden_RK: Tensor) -> Tensor:
        """See ``Decoder``."""
        self._watch.mark("sample")
        shift, row = torch.randint(VOCABULARY, (2,), generator=self._generator).tolist()
        rows_R = (torch.arange(len(hidden_RK)) + row) % len(self._logits_RV)
        logits_RV = self._logits_RV[rows_R].roll(shift, dims=1)
        self._watch.mark("model")
        return logits_RV


class TimedRunner:
    """A ``Runner`` that marks where the core's own parts end and begin."""

    def __init__(self, runner: ModelRunner, watch: Stopwatch) -> None:
        self.block_size, self.num_blocks = runner.block_size, runner.num_blocks
        self.context_length = runner.context_length
        self._runner = runner
        self._watch = watch

    def run(self, batch: ScheduledBatch) -> StepResult:
        """See ``engine.core.Runner``."""
        self._watch.mark("schedule")
        result = self._runner.run(batch)
        self._watch.mark("sample")
        return result

    def prepare(self, constraint: Constraint) -> None:
        """See ``engine.core.Runner``."""
        self._runner.prepare(constraint)

    def report(self, max_sequence_tokens: int) -> ModelReport:
        """See ``engine.core.Runner``."""
        return self._runner.report(max_sequence_tokens)


def make_core(watch: Stopwatch) -> EngineCore:
    model = LoadedModel(cast(Decoder, RandomDecoder(watch)), (), (), Runtime(), "none", 0, ())
    off = MonitorConfig(every_steps=0)
    cache = cast(KvCache, None)
    runner = ModelRunner(model, Constraints(None), cache, 16, 4096, resolve("auto"), off)
    return EngineCore(TimedRunner(runner, watch), SchedulerConfig())


def decoding(watch: Stopwatch, sequences: int, sampling: SamplingParams) -> EngineCore:
    """A core that decodes so many sequences for at least ``STEPS`` steps to come."""
    core = make_core(watch)
    for index in range(sequences):
        core.submit(
            Request(
                id=str(index),
                prompt=torch.randint(VOCABULARY, (PROMPT,)).tolist(),
                sampling=sampling,
                stopping=StoppingParams(max_tokens=2 * STEPS),
                arrival=float(index),
            )
        )
    while core.stats().queued:
        core.step()
    for _ in range(WARM_UP):
        core.step()
    return core


def steps(sequences: int, sampling: SamplingParams) -> list[dict[str, float]]:
    """Seconds by part of ``STEPS`` decode steps."""
    watch, measured = Stopwatch(), list[dict[str, float]]()
    core = decoding(watch, sequences, sampling)
    for _ in range(STEPS):
        watch.start()
        core.step()
        watch.mark("commit")
        measured.append(watch.seconds)
    return measured


def microseconds(sequences: int, sampling: SamplingParams, rounds: int) -> dict[str, float]:
    """Medians of the parts, and of their sum as ``overhead``."""
    measured = [step for _ in range(rounds) for step in steps(sequences, sampling)]
    found = {part: [1e6 * step[part] for step in measured] for part in PARTS}
    found["overhead"] = [sum(values) for values in zip(*found.values(), strict=True)]
    return {part: statistics.median(values) for part, values in found.items()}


def measure(rounds: int) -> dict[str, object]:
    """The whole measurement, as it is written to JSON."""
    figures: dict[str, object] = {
        "machine": f"{platform.processor() or platform.machine()}, {platform.system()}",
        "commit": commit(),
        "threads": torch.get_num_threads(),
    }
    for suffix, sampling in KINDS.items():
        for sequences in (1, 32):
            for part, value in microseconds(sequences, sampling, rounds).items():
                figures[f"{part}_us_{sequences}{suffix}"] = value
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    figures = measure(1 if arguments.quick else 5)
    for name, value in figures.items():
        print(f"{name:36} {value:.1f}" if isinstance(value, float) else f"{name:36} {value}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
