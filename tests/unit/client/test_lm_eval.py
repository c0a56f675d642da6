"""The model ``venturi`` of lm-evaluation-harness, with the least of lm_eval that it needs.

lm_eval itself brings 730 MB of packages, so that it is left to `make lm-eval-check`.
"""

import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import grpc
import pytest
import tokenizers
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo

from venturi import APIConnectionError, VenturiError
from venturi._scoring import rolling_windows, sampling
from venturi.cli import group
from venturi.testing import Failure, FakeServer

WORDS = ["<s>", "</s>", "<turn>", "a", "b", "c", "Q"]
CONFIG = b'{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}'


def tokenizer_json() -> bytes:
    """Words apart by spaces; a begin token before each text."""
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="Q")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>", "<turn>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return tokenizer.to_str().encode()


class CacheHook:
    def __init__(self) -> None:
        self.seen: list[tuple[str, tuple[object, ...], object]] = []

    def add_partial(self, kind: str, arguments: tuple[object, ...], answer: object) -> None:
        self.seen.append((kind, arguments, answer))


class LM:
    def __init__(self) -> None:
        self.cache_hook = CacheHook()


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, type]]:
    """A package lm_eval; gives the models that were registered."""
    registered: dict[str, type] = {}

    def register_model(name: str) -> Any:
        return lambda cls: registered.setdefault(name, cls)

    parts: dict[str, dict[str, object]] = {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.models": {},
        "lm_eval.api.model": {"LM": LM},
        "lm_eval.api.registry": {"register_model": register_model},
        "lm_eval.__main__": {"cli_evaluate": lambda: registered.setdefault("argv", sys.argv)},
    }
    for name, members in parts.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "venturi.lm_eval", raising=False)
    yield registered
    sys.modules.pop("venturi.lm_eval", None)


@pytest.fixture
def make(harness: dict[str, type], server: FakeServer) -> Any:
    """Makes the model; it is connected to the fake server."""
    server.script.tokenizer_files = {
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": CONFIG,
    }
    import_module("venturi.lm_eval")
    return lambda **options: harness["venturi"](target=server.target, **options)


def request(*arguments: object, doc: int = 0) -> SimpleNamespace:
    return SimpleNamespace(args=arguments, task_name="sums", doc_id=doc, idx=1)


def prompts(server: FakeServer) -> list[list[int]]:
    return [list(each.token_ids.ids) for each in server.requests if hasattr(each, "token_ids")]


def test_text_is_generated_up_to_a_stop(make: Any, server: FakeServer) -> None:
    model = make()
    options = {"until": ["Q:", "<turn>", ""], "max_gen_toks": 5, "do_sample": False}
    assert model.generate_until([request("a b", options)], disable_tqdm=True) == ["Hello, world"]
    sent = server.requests[-1]
    assert list(sent.token_ids.ids) == [0, 3, 4]
    assert list(sent.stopping.stop) == ["Q:"]
    assert list(sent.stopping.stop_token_ids) == [1, 2]  # the end token, and <turn>
    assert (sent.stopping.max_tokens, sent.sampling.temperature) == (5, 0.0)
    assert model.cache_hook.seen == [("generate_until", ("a b", options), "Hello, world")]


def test_a_text_that_begins_with_the_begin_token_gets_no_second(
    make: Any, server: FakeServer
) -> None:
    make().generate_until([request("<s> a", {"until": []})], disable_tqdm=True)
    assert prompts(server)[-1] == [0, 3]


def test_a_long_context_loses_its_beginning(make: Any, server: FakeServer) -> None:
    make(max_length=10).generate_until(
        [request(" ".join("abcabcabc"), {"until": "b", "max_gen_toks": 6})], disable_tqdm=True
    )
    assert prompts(server)[-1] == [5, 3, 4, 5]
    assert list(server.requests[-1].stopping.stop) == ["b"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"max_gen_toks": 10}, "max_gen_toks is 10; the model holds 10 tokens"),
        ({"beams": 2}, "generation option 'beams' is not known"),
        ({"num_beams": 2}, "there is no beam search"),
    ],
)
def test_what_no_request_can_hold_names_the_document(
    options: dict[str, object], problem: str, make: Any
) -> None:
    with pytest.raises(VenturiError, match=rf"task sums, document 7, request 1: .*{problem}"):
        make(max_length=10).generate_until([request("a", options, doc=7)], disable_tqdm=True)


def test_a_failed_request_is_named_and_ends_the_others(make: Any, server: FakeServer) -> None:
    model = make(concurrency=1)
    server.script.failure = Failure(code=grpc.StatusCode.INTERNAL, message="broken")
    server.script.delay_s = 0.05
    before = len(server.requests)
    with pytest.raises(VenturiError, match="task sums, document 0, request 1: broken"):
        model.generate_until([request("a", {}, doc=i) for i in range(50)], disable_tqdm=True)
    assert len(server.requests) - before < 50


@pytest.mark.parametrize("code", ["RESOURCE_EXHAUSTED", "UNAVAILABLE"])
def test_a_full_server_is_asked_again(code: str, make: Any, server: FakeServer) -> None:
    model = make()
    wait = RetryInfo(retry_delay=Duration(nanos=1000))
    server.script.failure = Failure(
        code=grpc.StatusCode[code], details=[wait], metadata={"grpc-retry-pushback-ms": "1"}
    )
    server.script.fail_times = 7
    assert model.generate_until([request("a", {})], disable_tqdm=True) == ["Hello, world"]


def test_a_full_server_is_not_asked_for_ever(make: Any, server: FakeServer) -> None:
    model = make(timeout=5.0)
    wait = RetryInfo(retry_delay=Duration(seconds=60))
    server.script.failure = Failure(
        code=grpc.StatusCode.RESOURCE_EXHAUSTED, message="full", details=[wait]
    )
    with pytest.raises(VenturiError, match="full"):
        model.generate_until([request("a", {})], disable_tqdm=True)


def test_requests_run_at_once_but_no_more_than_asked(make: Any, server: FakeServer) -> None:
    model = make(concurrency=3)
    open_now, most, lock = [0], [0], threading.Lock()
    generate = model._scorer.generate

    def counted(*arguments: Any) -> str:
        with lock:
            open_now[0] += 1
            most[0] = max(most[0], open_now[0])
        try:
            return f"{generate(*arguments)} {arguments[0]}"
        finally:
            with lock:
                open_now[0] -= 1

    model._scorer.generate = counted
    server.script.delay_s = 0.02
    texts = [f"a {'b ' * i}" for i in range(9)]
    answers = model.generate_until([request(text, {}) for text in texts], disable_tqdm=True)
    assert answers == [f"Hello, world {text}" for text in texts]
    assert most[0] == 3


def test_another_variant_that_answers_ends_the_evaluation(make: Any) -> None:
    """A server that falls back in the middle must not mix two models' scores."""
    model = make()
    scorer = model._scorer
    scorer.model = replace(scorer.model, variant="w8a8")
    with pytest.raises(VenturiError, match="fake@original answered, and fake@w8a8 is evaluated"):
        model.generate_until([request("a b", {"until": []})], disable_tqdm=True)


def test_a_continuation_that_is_not_scored_whole_is_an_error(make: Any, server: FakeServer) -> None:
    model = make()
    with pytest.raises(VenturiError, match="the server scored 0 of the continuation's 1 tokens"):
        model.loglikelihood([request("a", " b")], disable_tqdm=True)


def test_reasoning_is_cut_off(make: Any, server: FakeServer) -> None:
    server.script.chunks = ("so 6 times 7", " </think>\n 42")
    model = make(think_end_token="</think>")
    assert model.generate_until([request("a", {})], disable_tqdm=True) == ["42"]


def test_chats_are_rendered_by_the_server(make: Any, server: FakeServer) -> None:
    model = make(enable_thinking=False)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The answer is "}]
    assert model.apply_chat_template(chat[:1]) == "user: Hi\n"
    assert server.requests[-1].chat.add_generation_prompt
    assert server.requests[-1].chat.template_kwargs == '{"enable_thinking": false}'
    # What the model is to continue ends where the last message does.
    continued = model.apply_chat_template(chat, add_generation_prompt=False)
    assert continued == "user: Hi\nassistant: The answer is"
    assert not server.requests[-1].chat.add_generation_prompt


def test_what_was_evaluated_is_told(make: Any) -> None:
    model = make()
    assert model.tokenizer_name == "fake@original"
    assert model.get_model_info()["served_weights"] == "float32"


def test_arguments_are_checked(make: Any) -> None:
    make(batch_size=1, max_batch_size=None, device="cpu")
    with pytest.raises(TypeError, match="no argument 'adress'"):
        make(adress="here")
    with pytest.raises(ValueError, match="concurrency is 0"):
        make(concurrency=0)
    with pytest.raises(ValueError, match=r"max_length is 5000; this server allows 1 to 4094"):
        make(max_length=5000)


def test_a_tokenizer_without_ends_needs_a_prefix(make: Any, server: FakeServer) -> None:
    server.script.tokenizer_files = {"tokenizer.json": tokenizer_json()}
    with pytest.raises(ValueError, match="prefix_token_id"):
        make()
    make(prefix_token_id=3)


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 8, 9, 13])
def test_windows_predict_each_token_once(length: int) -> None:
    tokens = list(range(100, 100 + length))
    windows = list(rolling_windows(tokens, 7, 4))
    assert [token for _, predicted in windows for token in predicted] == tokens
    text = [7, *tokens]
    for context, predicted in windows:
        end = text.index(predicted[-1]) + 1
        # At most 4 tokens before the last predicted, and as many as there are.
        assert [*context, *predicted] == text[max(0, end - 5) : end]


def test_greedy_unless_sampling_is_asked_for() -> None:
    assert sampling({"temperature": 0.7, "do_sample": False}, 0)["temperature"] == 0.0
    assert sampling({}, 0)["temperature"] == 0.0
    assert sampling({"temperature": 0.7}, 0)["temperature"] == 0.7
    assert sampling({"do_sample": True}, 0)["temperature"] == 1.0
    request = sampling({"do_sample": True, "seed": 5, "top_p": 0.9}, 3)
    assert (request["seed"], request["top_p"]) == (8, 0.9)


def test_the_command_hands_over_to_lm_eval(
    harness: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["venturi"])
    with pytest.raises(SystemExit) as end:
        group.main(["lm-eval", "--tasks", "gsm8k", "--limit", "3", "-h"])
    assert end.value.code == 0
    assert harness["argv"][1:4] == ["run", "--model", "venturi"]
    assert harness["argv"][4:] == ["--tasks", "gsm8k", "--limit", "3", "-h"]
    assert "venturi" in harness


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (APIConnectionError("refused"), 2, "venturi: refused: name the server with --model_args"),
        (
            VenturiError("task sums, document 0: broken"),
            1,
            "venturi: task sums, document 0: broken",
        ),
    ],
)
def test_the_commands_errors_are_one_line(
    error: VenturiError,
    code: int,
    line: str,
    harness: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails() -> None:
        raise error

    monkeypatch.setattr(sys.modules["lm_eval.__main__"], "cli_evaluate", fails)
    monkeypatch.setattr(sys, "argv", ["venturi"])
    with pytest.raises(SystemExit) as end:
        group.main(["lm-eval"])
    assert end.value.code == code
    assert capsys.readouterr().err.startswith(line)


def test_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit) as end:
        group.main(["lm-eval", "--tasks", "gsm8k"])
    assert end.value.code == 1
    assert "pip install 'venturi-client[lm-eval]'" in capsys.readouterr().err
