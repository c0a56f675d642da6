"""Structured output of the shipped model: it always matches, and bad constraints hurt nobody."""

import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.client.tokenizer import Tokenizer
from engine.config import CacheConfig, EngineConfig, KernelConfig, SchedulerConfig
from engine.constraints import Constraints
from engine.core import EngineCore
from engine.errors import InvalidRequest
from engine.preparation import TIME_LIMIT_S, Preparation
from engine.testing import ArithmeticRunner
from engine.types import (
    Constraint,
    FinishReason,
    Request,
    SamplingParams,
    Sequence,
    StoppingParams,
)

EOS, VOCABULARY = 0, 4096
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "stars": {"type": "integer", "minimum": 1, "maximum": 5},
        "tags": {"type": "array", "items": {"enum": ["wifi", "pool"]}, "maxItems": 2},
    },
    "required": ["name", "stars"],
    "additionalProperties": False,
}
VALUES = ["yes", "no", 'a "quoted" one\n', "é😀\x7f"]
EMAIL = r"[a-z]{3,8}@[a-z]{2,9}\.(com|org)"


def is_hotel(text: str) -> bool:
    found = json.loads(text)
    assert found.keys() <= SCHEMA["properties"].keys()  # type: ignore[attr-defined]
    return len(found["name"]) <= 10 and 1 <= found["stars"] <= 5


CASES: dict[str, tuple[Constraint, Callable[[str], Any]]] = {
    "json_schema": (Constraint(kind="json_schema", text=json.dumps(SCHEMA)), is_hotel),
    "regex": (Constraint(kind="regex", text=EMAIL), re.compile(EMAIL).fullmatch),
    "choice": (Constraint(kind="choice", text=json.dumps(VALUES)), VALUES.__contains__),
    "grammar": (
        Constraint(kind="grammar", text='start: N ("+" N){0,3}\nN: /[0-9]{1,3}/'),
        re.compile(r"\d{1,3}(\+\d{1,3}){0,3}").fullmatch,
    ),
}


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.from_folder(model_dir)


@pytest.fixture(scope="module")
def constraints(model_dir: Path) -> Constraints:
    return Constraints.from_folder(model_dir, VOCABULARY)


@pytest.fixture
def core(model_dir: Path) -> EngineCore:
    return EngineCore.from_config(
        EngineConfig(
            model_dir=model_dir,
            cache=CacheConfig(block_size=8, blocks=28),
            scheduler=SchedulerConfig(max_sequences=16),
            kernels=KernelConfig(threads=1),
        )
    )


def request(name: str, constraint: Constraint | None, **values: Any) -> Request:
    stopping = {name: values.pop(name) for name in ("max_tokens", "min_tokens") if name in values}
    stopping = {"max_tokens": 200, **stopping}
    choices = values.pop("choices", 1)
    return Request(
        id=name,
        prompt=[100, 200, 300],
        sampling=SamplingParams(constraint=constraint, **values),
        stopping=StoppingParams(eos_token_ids=(EOS,), **stopping),
        arrival=0.0,
        choices=choices,
    )


def finish(core: EngineCore) -> dict[tuple[str, int], tuple[FinishReason, list[int]]]:
    """Reason and tokens of each choice."""
    tokens: dict[tuple[str, int], list[int]] = {}
    ends: dict[tuple[str, int], FinishReason] = {}
    while core.has_work:
        output = core.step()
        for event in output.tokens:
            tokens.setdefault((event.id, event.choice), []).append(event.token)
        for finished in output.finished:
            assert (finished.id, finished.choice) not in ends
            ends[finished.id, finished.choice] = finished.reason
    return {key: (reason, tokens.get(key, [])) for key, reason in ends.items()}


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_all_at_once_in_little_memory_match(
    core: EngineCore, tokenizer: Tokenizer, temperature: float
) -> None:
    for kind, (constraint, _) in CASES.items():
        for seed in range(2):
            name = f"{kind}/{seed}"
            sampling = {"temperature": temperature, "seed": seed}
            core.submit(request(name, constraint, choices=2, **sampling))
    # Long enough to need nearly all blocks.
    core.submit(request("free", None, max_tokens=200, logit_bias=((EOS, -100.0),)))
    found = finish(core)
    if temperature == 0:
        assert core.stats().preemptions > 0
    assert len(found) == 17
    for (name, _), (reason, tokens) in found.items():
        text = tokenizer.decode(tokens)
        if name != "free" and reason is not FinishReason.LENGTH:
            assert (reason, tokens[-1]) == (FinishReason.EOS, EOS)
            assert CASES[name.split("/")[0]][1](text), (name, text)
    assert sum(reason is FinishReason.EOS for reason, _ in found.values()) >= 13


def test_alone_is_as_in_a_crowd(core: EngineCore) -> None:
    def ask(kind: str) -> Request:
        return request(kind, CASES[kind][0], temperature=1.5, seed=9, max_tokens=40)

    alone = {}
    for kind in CASES:
        core.submit(ask(kind))
        alone |= finish(core)
    for kind in CASES:
        core.submit(ask(kind))
    core.submit(request("free", None, max_tokens=50, temperature=1.0))
    together = finish(core)
    del together["free", 0]
    assert together == alone


def test_rows_without_a_constraint_keep_every_bit(constraints: Constraints) -> None:
    logits = torch.randn(3, VOCABULARY)
    before = logits.clone()
    free = Sequence(request("free", None), [100, 200, 300])
    bound = Sequence(request("bound", CASES["regex"][0]), [100, 200, 300])
    constraints.mask(logits, [free, bound, free])
    assert torch.equal(logits[[0, 2]], before[[0, 2]])
    kept = logits[1] > -torch.inf
    assert 26 <= int(kept.sum()) < VOCABULARY
    assert torch.equal(logits[1][kept], before[1][kept])


def test_a_cut_is_the_beginning_of_what_matches(core: EngineCore, tokenizer: Tokenizer) -> None:
    for most in range(1, 6):
        core.submit(request(str(most), CASES["json_schema"][0], max_tokens=most))
    for (name, _), (reason, tokens) in finish(core).items():
        assert (reason, len(tokens)) == (FinishReason.LENGTH, int(name))
        assert tokenizer.decode(tokens).startswith("{")


def test_a_complete_constraint_ends_before_min_tokens(core: EngineCore) -> None:
    core.submit(request("a", CASES["choice"][0], min_tokens=100))
    assert finish(core)["a", 0][0] is FinishReason.EOS


DEEP = '{"items":' * 5000 + "{}" + "}" * 5000
HUGE = {"anyOf": [{"properties": {f"p{i}_{j}": {} for j in range(40)}} for i in range(50)]}
BAD = [
    ("json_schema", "{"),
    ("json_schema", "[1]"),
    ("json_schema", "null"),
    ("json_schema", '{"type": "strnig"}'),
    ("json_schema", '{"$ref": "http://example.com/schema"}'),
    ("json_schema", '{"$ref": "#/nowhere"}'),
    ("json_schema", '{"type": "string", "pattern": "((("}'),
    ("json_schema", '{"not": {}}'),
    ("json_schema", "false"),
    ("json_schema", DEEP),
    ("json_schema", json.dumps({"allOf": [HUGE] * 50})),
    ("regex", "(((("),
    ("regex", "(?=a)b"),
    ("regex", r"(a)\1"),
    ("grammar", "start: nowhere"),
    ("grammar", "\x00"),
    ("grammar", '%import "/etc/passwd"\nstart: X'),
    ("grammar", "start: " + "(" * 3000 + '"a"' + ")" * 3000),
    ("poem", "roses are red"),
]


@pytest.mark.parametrize(("kind", "text"), BAD, ids=[f"{k}-{t[:20]!r}" for k, t in BAD])
def test_bad_ones_are_refused_by_name_in_one_line(
    constraints: Constraints, kind: str, text: str
) -> None:
    began = time.monotonic()
    with pytest.raises(InvalidRequest) as caught:
        constraints.compile(Constraint(kind=kind, text=text))
    assert caught.value.field == f"structured.{kind}"
    assert 0 < len(str(caught.value)) <= 300
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 2.0


BOMBS = [
    r"((a{1,1000}){1,1000}){1,1000}",
    r".*a.{300}b.{30}",
    r"(x+x+)+y",
    r"(?:a?){5000}a{5000}",
    r"(a|b|ab)*c" * 200,
    r"\w{1,10000}",
]


def test_bombs_that_compile_end_their_own_requests_only(core: EngineCore) -> None:
    for number, regex in enumerate(BOMBS):
        constraint = Constraint(kind="regex", text=regex)
        core.submit(request(f"{number}", constraint, temperature=9.0, max_tokens=60))
    core.submit(request("free", None, max_tokens=60, temperature=1.0))
    began = time.monotonic()
    found = finish(core)
    assert time.monotonic() - began < 10.0
    assert len(found["free", 0][1]) == 60 or found["free", 0][0] is FinishReason.EOS
    usual = {FinishReason.EOS, FinishReason.LENGTH, FinishReason.ERROR, FinishReason.INVALID}
    assert {reason for reason, _ in found.values()} <= usual


def test_a_bad_one_ends_all_choices_of_its_request(core: EngineCore) -> None:
    core.submit(request("bad", Constraint(kind="regex", text="(((("), choices=3))
    core.submit(request("good", CASES["regex"][0]))
    found = finish(core)
    assert [found["bad", n][0] for n in range(3)] == [FinishReason.INVALID] * 3
    assert found["good", 0][0] is FinishReason.EOS


def test_the_last_ones_are_kept(constraints: Constraints) -> None:
    first = constraints.compile(CASES["regex"][0])
    assert constraints.compile(CASES["regex"][0]) is first
    for n in range(70):
        constraints.compile(Constraint(kind="regex", text=f"a{n}"))
    assert constraints.compile(CASES["regex"][0]) is not first


def test_a_folder_without_a_tokenizer_refuses_constraints_alone(tmp_path: Path) -> None:
    without = Constraints.from_folder(tmp_path, VOCABULARY)
    with pytest.raises(InvalidRequest):
        without.compile(CASES["regex"][0])
    logits = torch.zeros(1, VOCABULARY)
    without.mask(logits, [Sequence(request("free", None), [100, 200, 300])])
    assert not logits.any()


class Slow(ArithmeticRunner):
    """Compiles when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def prepare(self, constraint: Constraint) -> None:
        assert self.gate.wait(10)
        if constraint.kind == "broken":
            raise RuntimeError("a secret")


def test_others_go_on_while_one_is_compiled() -> None:
    runner = Slow()
    core = EngineCore(runner, SchedulerConfig())
    core.submit(request("waits", CASES["regex"][0], max_tokens=3))
    core.submit(request("free", None, max_tokens=3))
    assert core.stats().queued == 2
    tokens = [event.id for _ in range(3) for event in core.step().tokens]
    assert tokens == ["free"] * 3
    assert core.has_work
    assert not core.step()
    with pytest.raises(InvalidRequest):
        core.submit(request("waits", None))
    runner.gate.set()
    assert finish(core)["waits", 0][0] is FinishReason.LENGTH


def test_one_that_is_cancelled_meanwhile_ends_so() -> None:
    runner = Slow()
    core = EngineCore(runner, SchedulerConfig())
    core.submit(request("all", CASES["regex"][0], choices=2))
    core.submit(request("second", CASES["regex"][0], choices=2, max_tokens=3))
    core.cancel("all")
    core.cancel("second", 1)
    runner.gate.set()
    found = finish(core)
    assert {found["all", 0][0], found["all", 1][0], found["second", 1][0]} == {
        FinishReason.CANCELLED
    }
    assert found["second", 0][0] is FinishReason.LENGTH


def test_what_fails_inside_says_nothing_of_it() -> None:
    runner = Slow()
    runner.gate.set()
    core = EngineCore(runner, SchedulerConfig())
    core.submit(request("a", Constraint(kind="broken", text="x")))
    output = core.step()
    while not output:
        output = core.step()
    assert output.finished[0].reason is FinishReason.INVALID
    assert "secret" not in output.finished[0].message


def test_what_takes_too_long_is_given_up() -> None:
    runner, now = Slow(), [0.0]
    preparation = Preparation(runner.prepare, lambda: now[0])
    for name in ("runs", "queues"):
        preparation.add(request(name, None), CASES["regex"][0])
    assert preparation.take() == []
    now[0] = TIME_LIMIT_S + 1
    assert ["took longer" in each.error for each in preparation.take()] == [True, True]
    assert len(preparation) == 0
    runner.gate.set()
