"""Generated tokens: the engine's against transformers', and alone against in a crowd.

A first difference counts only where it is no tie in the reference run: of greedy tokens where the
two likeliest are apart by less than ``GAP``, of sampled ones where the random number is nearer than
``GAPS`` to the other token's part of the cumulative distribution. Ties are counted and printed.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.client.tokenizer import Tokenizer
from engine.config import EngineConfig, KernelConfig
from engine.core import EngineCore
from engine.scoring import Scorer
from engine.types import FinishReason, Request, SamplingParams, StoppingParams
from engine.uniform import uniform_number

MakeConfig = Callable[..., EngineConfig]
GAP = 1e-3
# By KV dtype: a value halfway between two int8 levels may be rounded either way, which moves the
# logits of this model by up to 3e-3.
GAPS = {"fp32": GAP, "int8": 4 * GAP}
NEW_TOKENS = 24
# Few small blocks, and prompts in chunks of what decoding leaves.
CROWDED = {"blocks": 28, "token_budget": 16}
PROMPTS = [
    "Once upon a time, there was a little girl named",
    "The dog ran to the park and",
    "Tom and Sue were best friends. One day,",
    "It was a sunny day",
    "The old man said,",
    "In a big green forest, there lived a",
    "Mom gave Ben a red ball.",
    '"Can we go home now?" asked',
    "The cat",
    "A bird flew over the house. It saw",
    "Lily wanted to",
    "One night, the moon",
    "The boy was sad because he lost his",
    "There was a small boat on the",
    "At the zoo, they saw a big lion and a",
    "Max liked to eat",
    "The princess opened the door and found",
    "Every morning the rooster",
    "He did not know what to do, so he",
    "She smiled and said thank you. Then they all went to",
]


def request(
    name: str,
    prompt: list[int],
    max_tokens: int = NEW_TOKENS,
    sampling: SamplingParams = SamplingParams(),  # noqa: B008  frozen
    choices: int = 1,
) -> Request:
    return Request(
        id=name,
        prompt=prompt,
        sampling=sampling,
        stopping=StoppingParams(max_tokens=max_tokens, eos_token_ids=(0,)),
        arrival=float(len(name)),
        choices=choices,
    )


class Answers:
    """Tokens of each choice of ``requests``, as they come; those of others are dropped."""

    def __init__(self, requests: list[Request]) -> None:
        self._tokens: dict[tuple[str, int], list[int]] = {
            (request.id, choice): [] for request in requests for choice in range(request.choices)
        }

    def step(self, core: EngineCore) -> None:
        output = core.step()
        for event in output.tokens:
            self._tokens.get((event.id, event.choice), []).append(event.token)
        for finished in output.finished:
            usable = (FinishReason.LENGTH, FinishReason.EOS, FinishReason.CANCELLED)
            assert finished.reason in usable

    def in_order(self) -> list[list[int]]:
        """By request, then by choice."""
        return list(self._tokens.values())


def run(core: EngineCore, requests: list[Request]) -> list[list[int]]:
    answers = Answers(requests)
    for each in requests:
        core.submit(each)
    while core.has_work:
        answers.step(core)
    return answers.in_order()


def assert_equal_but_for_ties(
    found: list[list[int]], wanted: list[list[int]], tie_at: Callable[[int, int], bool]
) -> None:
    """``tie_at(case, position)`` says whether the reference's decision there was one."""
    ties = 0
    for case, (a, b) in enumerate(zip(found, wanted, strict=True)):
        if a == b:
            continue
        at = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        assert at is not None, f"case {case} has {len(a)} tokens instead of {len(b)}"
        assert tie_at(case, at), f"case {case} differs at token {at}, which is no tie"
        ties += 1
    print(f"{ties} ties in {len(wanted)} cases")
    assert ties <= len(wanted) // 4, "so many ties are a difference"


@pytest.fixture(scope="module")
def prompts(model_dir: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_folder(model_dir)
    return [tokenizer.encode(prompt) for prompt in PROMPTS]


@torch.no_grad()
def test_greedy_tokens_are_those_of_transformers(
    model_dir: Path, prompts: list[list[int]], make_config: MakeConfig
) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    wanted, gaps = [], []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        wanted.append(out.sequences[0, len(prompt) :].tolist())
        top = torch.cat(out.scores).topk(2, dim=1).values
        gaps.append((top[:, 0] - top[:, 1]).tolist())
    core = EngineCore.from_config(make_config(model_dir, blocks=400, token_budget=64))
    found = run(core, greedy(prompts))
    assert_equal_but_for_ties(found, wanted, lambda case, at: gaps[case][at] < GAP)


@pytest.fixture
def request_dirs(model_dir: Path, w8a8_dir: Path) -> dict[str, Path]:
    return {"original": model_dir, "w8a8": w8a8_dir}


def greedy(prompts: list[list[int]]) -> list[Request]:
    return [request(str(number), prompt) for number, prompt in enumerate(prompts)]


@pytest.mark.parametrize("weights", ["original", "w8a8"])
def test_a_request_gets_the_same_alone_and_in_a_crowd(
    weights: str, prompts: list[list[int]], make_config: MakeConfig, request_dirs: dict[str, Path]
) -> None:
    alone, crowded = (
        EngineCore.from_config(make_config(request_dirs[weights], dtype="int8", **pool))
        for pool in ({}, CROWDED)
    )
    requests = greedy(prompts)
    wanted = [tokens for each in requests for tokens in run(alone, [each])]
    found = crowd(crowded, requests, random.Random(weights))
    with Scorer(make_config(request_dirs[weights], dtype="int8")) as scorer:

        def tie_at(case: int, at: int) -> bool:
            row = scorer.logits(prompts[case] + wanted[case][:at])[-1]
            top = row.topk(2).values
            return float(top[0] - top[1]) < GAP

        assert_equal_but_for_ties(found, wanted, tie_at)


def sampled(prompts: list[list[int]], draw: random.Random) -> list[Request]:
    """One to three choices of each prompt, with all kinds of sampling and different seeds."""
    return [
        request(
            str(number),
            prompt,
            sampling=SamplingParams(
                temperature=draw.choice([0.3, 0.8, 1.0, 1.5]),
                top_p=draw.choice([0.7, 0.95, 1.0]),
                top_k=draw.choice([0, 0, 40]),
                min_p=draw.choice([0.0, 0.0, 0.05]),
                seed=draw.getrandbits(64),
            ),
            choices=1 + number % 3,
        )
        for number, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_a_sampled_request_gets_the_same_alone_and_in_a_crowd(
    dtype: str, prompts: list[list[int]], make_config: MakeConfig, model_dir: Path
) -> None:
    alone, crowded = (
        EngineCore.from_config(make_config(model_dir, dtype=dtype, **pool))
        for pool in ({}, CROWDED)
    )
    requests = sampled(prompts, random.Random(dtype))
    wanted = [tokens for each in requests for tokens in run(alone, [each])]
    found = crowd(crowded, requests, random.Random(dtype))
    cases = [(each, choice) for each in requests for choice in range(each.choices)]
    with Scorer(make_config(model_dir, dtype=dtype)) as scorer:

        def tie_at(case: int, at: int) -> bool:
            asked, choice = cases[case]
            logits_V = scorer.logits(asked.prompt + wanted[case][:at])[-1]
            number = uniform_number(asked.sampling.seed, at, choice)
            token = found[case][at]
            return may_be_drawn(token, logits_V, asked.sampling, number, GAPS[dtype])

        assert_equal_but_for_ties(found, wanted, tie_at)


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_on_native_kernels_not_a_bit_depends_on_the_crowd(
    kind: str, prompts: list[list[int]], make_config: MakeConfig, w8a8_dir: Path
) -> None:
    """Alone with one thread, in a crowd with two: no tie is forgiven."""
    draw = random.Random(kind)
    requests = greedy(prompts) if kind == "greedy" else sampled(prompts, draw)
    alone, crowded = (
        replace(
            make_config(w8a8_dir, dtype="int8", block_size=16, **pool),
            kernels=KernelConfig(backend="cpu", threads=threads),
        )
        for threads, pool in ((1, {}), (2, {"blocks": 9, "token_budget": 16}))
    )
    core = EngineCore.from_config(alone)
    wanted = [tokens for each in requests for tokens in run(core, [each])]
    try:
        assert crowd(EngineCore.from_config(crowded), requests, draw) == wanted
    finally:
        torch.set_num_threads(1)


def may_be_drawn(
    token: int, logits_V: Tensor, params: SamplingParams, number: float, gap: float
) -> bool:
    """Whether the random ``number`` is in, or next to, the part of the distribution that may be
    ``token``'s, where a token that is at the edge of top-p may be in or out."""
    for top_p in (params.top_p - gap, params.top_p, min(1.0, params.top_p + gap)):
        warpers = LogitsProcessorList(
            [
                TemperatureLogitsWarper(params.temperature),
                TopKLogitsWarper(params.top_k or len(logits_V)),
                TopPLogitsWarper(top_p),
                MinPLogitsWarper(params.min_p),
            ]
        )
        warped_V = warpers(torch.zeros(1, 1, dtype=torch.long), logits_V[None])[0]
        probabilities_V = warped_V.double().softmax(0)
        before, up_to = probabilities_V[:token].sum(), probabilities_V[: token + 1].sum()
        if before - gap < number < up_to + gap:
            return True
    return False


def crowd(core: EngineCore, requests: list[Request], draw: random.Random) -> list[list[int]]:
    """All requests at random times, among others that are cancelled midway."""
    answers = Answers(requests)
    waiting = list(requests)
    draw.shuffle(waiting)
    noise: list[str] = []
    cancelled = 0
    while waiting or core.has_work:
        if waiting and draw.random() < 0.4:
            core.submit(waiting.pop())
        if waiting and draw.random() < 0.2:
            noise.append(f"noise {cancelled + len(noise)}")
            core.submit(request(noise[-1], [draw.randint(4, 4095) for _ in range(40)], 60))
        while noise and (not waiting or draw.random() < 0.2):
            core.cancel(noise.pop(draw.randrange(len(noise))))
            cancelled += 1
        answers.step(core)
    stats = core.stats()
    assert cancelled > 0
    assert stats.preemptions > 0
    assert stats.blocks_used == 0
    return answers.in_order()
