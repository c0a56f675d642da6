"""A real model's output with drafts and without: the same, greedy and sampled."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from engine.client.tokenizer import Tokenizer
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.types import EngineStats, Request, SamplingParams, StoppingParams

MakeConfig = Callable[..., EngineConfig]
TEXTS = [
    "The cat sat on the mat. The dog sat on the log. The cat sat on the mat. The dog",
    "Once upon a time, there was a little girl named Lily. Lily had a ball. Lily",
    "one two three one two three one two three one",
]


def outputs(
    config: EngineConfig, most: int, prompts: list[list[int]], temperature: float
) -> tuple[dict[tuple[str, int], list[int]], EngineStats]:
    core = EngineCore.from_config(
        replace(config, scheduler=replace(config.scheduler, speculative_tokens=most))
    )
    for number, prompt in enumerate(prompts):
        request = Request(
            id=str(number),
            prompt=prompt,
            sampling=SamplingParams(temperature=temperature, top_p=0.9, seed=number),
            stopping=StoppingParams(max_tokens=60),
            arrival=float(number),
            choices=2,
        )
        core.submit(request)
    tokens: dict[tuple[str, int], list[int]] = {}
    while core.has_work:
        for event in core.step().tokens:
            tokens.setdefault((event.id, event.choice), []).append(event.token)
    return tokens, core.stats()


@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_drafts_change_no_token(
    w8a8_dir: Path, make_config: MakeConfig, temperature: float
) -> None:
    """On native kernels, where that holds to the bit."""
    tokenizer = Tokenizer.from_folder(w8a8_dir)
    prompts = [tokenizer.encode(text) for text in TEXTS]
    config = make_config(w8a8_dir, dtype="int8", block_size=16, blocks=64)
    config = replace(config, kernels=replace(config.kernels, backend="cpu"))
    wanted, plain = outputs(config, 0, prompts, temperature)
    found, stats = outputs(config, 5, prompts, temperature)
    assert found == wanted
    assert plain.drafted_tokens == 0
    assert stats.accepted_tokens > 4
    assert stats.drafted_tokens > stats.accepted_tokens
