"""Messages between the processes: what goes in comes out, and nothing else does."""

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from engine.config import CacheConfig, EngineConfig, KernelConfig, SchedulerConfig
from engine.core import EngineCore
from engine.figures import LayerFigures, StepFigures
from engine.messages import (
    Cancel,
    Events,
    FromEngine,
    GetStats,
    LoadFailed,
    Loading,
    Ready,
    Shutdown,
    Stats,
    Submit,
    ToEngine,
    decode_config,
    decode_from_engine,
    decode_to_engine,
    encode,
    encode_config,
)
from engine.testing import ArithmeticRunner
from engine.types import (
    Constraint,
    Finished,
    FinishReason,
    LayerReport,
    PromptLogprobs,
    Request,
    SamplingParams,
    StepOutput,
    TokenEvent,
    TokenLogprobs,
)

MakeRequest = Callable[..., Request]

FINISHED = Finished(
    id="ä\u0000😀",
    reason=FinishReason.TIME_LIMIT,
    scheduled_at=1.25,
    first_token_at=None,
    finished_at=3.5,
    choice=3,
    cached=32,
    recomputed=48,
    retry_after_s=2.25,
    preemptions=2,
    stop_token_id=4095,
    message="why",
)
LOGPROBS = TokenLogprobs(5, -0.25, 2, [(4, -0.125), (5, -0.25)])
PROMPTS = [PromptLogprobs("a", [LOGPROBS, LOGPROBS]), PromptLogprobs("b", [])]
FULL = TokenEvent(id="a", token=4095, choice=2, cached=16, logprobs=LOGPROBS)


def defaults_left(value: object) -> list[str]:
    """Fields that still have their default, which a test of all fields must not leave."""
    default = type(value)()
    names = [field.name for field in dataclasses.fields(value)]  # type: ignore[arg-type]
    return [name for name in names if getattr(value, name) == getattr(default, name)]


def test_every_message_to_the_engine_survives(make_request: MakeRequest) -> None:
    sampling = SamplingParams(
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        seed=(1 << 64) - 1,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        repetition_penalty=1.5,
        logit_bias=((0, -100.0), (4095, 100.0)),
        logprobs=20,
        prompt_logprobs=0,
        constraint=Constraint(kind="choice", text='["ja", "nein"]'),
    )
    assert not defaults_left(sampling)
    full = make_request(
        "a",
        [0, 1, 4095],
        7,
        sampling=sampling,
        choices=4,
        priority=-7,
        queue_deadline=1.25,
        cache_salt="ä\u0000",
        stop_token_ids=(1, 2),
        eos_token_ids=(3,),
        min_tokens=2,
        deadline=2.5,
        time_limit=1.5,
    )
    messages: list[ToEngine] = [
        Submit(make_request("b")),
        Submit(full),
        Cancel("a"),
        Cancel("a", 2),
    ]
    for message in [*messages, GetStats(), Shutdown()]:
        assert decode_to_engine(encode(message)) == message


LAYER = LayerFigures(
    rounded=1 << 40, zeroed=3, saturated=2, outlier=7.5, non_finite=1, kv_non_finite=4
)


def test_every_message_from_the_engine_survives() -> None:
    core = EngineCore(ArithmeticRunner(), SchedulerConfig())
    layer = LayerReport(name="model.o", storage="int8", execution="int8 x int8", bytes=1 << 40)
    report = dataclasses.replace(core.report(), layers=(layer, layer), kernels=("int8=x",))
    messages: list[FromEngine] = [
        Loading(1, 2, "x"),
        Ready(report),
        Events(StepOutput(PROMPTS, [TokenEvent(id="a", token=0), FULL], [FINISHED])),
        Events(StepOutput()),
        Events(StepOutput(figures=StepFigures(non_finite_logits=1))),
        Events(StepOutput(figures=StepFigures(rows=1, layers=(LAYER, LAYER), entropies=(0.5,)))),
        Stats(core.stats()),
        LoadFailed("no such file"),
    ]
    for message in messages:
        assert decode_from_engine(encode(message)) == message


@pytest.mark.parametrize("reason", FinishReason)
def test_every_reason_survives(reason: FinishReason) -> None:
    finished = dataclasses.replace(FINISHED, reason=reason)
    message = Events(StepOutput(finished=[finished]))
    assert decode_from_engine(encode(message)) == message


@pytest.mark.parametrize(
    "value",
    [
        {"type": "Cancel"},
        {"type": "Cancel", "id": 7},
        {"type": "Cancel", "id": None},
        {"type": "Cancel", "id": "a", "choice": "0"},
        {"type": "Eval", "code": "1"},
        {"id": "a"},
        ["Cancel", "a"],
        "Shutdown",
        None,
        {"type": "Submit", "request": {"id": "a"}},
        {"type": "Submit", "request": {"id": "a", "prompt": ["x"]}},
        {"type": "Loading", "item": 1, "items": 2, "detail": "meant for the other side"},
    ],
)
def test_data_of_other_types_is_refused(value: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_to_engine(msgspec.msgpack.encode(value))


def test_a_message_for_the_other_side_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_from_engine(encode(Shutdown()))


def test_a_request_with_a_wrong_number_is_refused(make_request: MakeRequest) -> None:
    message = msgspec.msgpack.decode(encode(Submit(make_request("a"))))
    for path, wrong in (("max_tokens", 1.5), ("max_tokens", "4"), ("stop_token_ids", [None])):
        broken = msgspec.msgpack.decode(msgspec.msgpack.encode(message))
        broken["request"]["stopping"][path] = wrong
        with pytest.raises(msgspec.ValidationError):
            decode_to_engine(msgspec.msgpack.encode(broken))


def test_cut_or_random_bytes_are_refused(make_request: MakeRequest) -> None:
    data = encode(Submit(make_request("a")))
    for length in range(len(data)):
        with pytest.raises(msgspec.DecodeError):
            decode_to_engine(data[:length])
    draw = random.Random(0)
    for _ in range(300):
        with pytest.raises(msgspec.DecodeError):
            decode_to_engine(draw.randbytes(draw.randint(0, 64)))


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(model_dir=Path("relative/ünïcode folder")),
        EngineConfig(
            model_dir=Path("/m"),
            cache=CacheConfig(dtype="int8", block_size=8, blocks=3, memory_bytes=1 << 40),
            scheduler=SchedulerConfig(max_sequences=3, token_budget=99, max_gap_s=0.25),
            kernels=KernelConfig(backend="reference", threads=2, int8_weights=True),
        ),
    ],
)
def test_a_config_survives_as_json(config: EngineConfig) -> None:
    decoded = decode_config(encode_config(config))
    assert decoded == config
    assert isinstance(decoded.model_dir, Path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"model_dir": "m", "cache": {"block_size": "x"}}',
        '{"model_dir": "m", "cache": {"blocks": 0}}',
        '{"model_dir": "m", "scheduler": {"max_sequences": 9, "token_budget": 8}}',
    ],
)
def test_a_broken_config_is_refused(text: str) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_config(text)


@pytest.mark.parametrize("values", [{"block_size": 0}, {"blocks": 0}, {"blocks": -3}])
def test_a_cache_without_blocks_is_refused(values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        CacheConfig(**values)  # type: ignore[arg-type]
