"""The command line: what it prints, its exit codes, and its one-line errors."""

import json
import threading
from importlib.metadata import EntryPoint
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner, Result
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2 as rpc

from venturi import cli
from venturi.testing import Failure, FakeServer, Script
from venturi.v1 import inference_pb2 as pb

_NOWHERE = "127.0.0.1:1"
_CANNOT_REACH = (
    f"venturi: cannot reach {_NOWHERE}: is the server running? start it with: venturi serve\n"
)


def _run(*args: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli.group, list(args), input=stdin)


@pytest.fixture
def target(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    """The server, as the default of --target."""
    monkeypatch.setenv("VENTURI_TARGET", server.target)
    return server


def test_generate_prints_the_text_and_nothing_else(target: FakeServer) -> None:
    result = _run("generate", "hi")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Hello, world\n", "")
    assert target.requests == [pb.GenerateStreamRequest(text="hi")]


def test_the_options_of_generate_arrive(target: FakeServer) -> None:
    options = "--model fake --max-tokens 9 --temperature 0 --top-p 0.5 --top-k 3 --seed 4"
    result = _run("generate", "hi", "--chat", "--stop", "a", "--stop", "b", *options.split())
    assert result.exit_code == 0
    assert target.requests == [
        pb.GenerateStreamRequest(
            model="fake",
            chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")]),
            sampling=pb.Sampling(temperature=0, top_p=0.5, top_k=3, seed=4),
            stopping=pb.Stopping(max_tokens=9, stop=["a", "b"]),
        )
    ]


def test_generate_reads_the_prompt_from_stdin(target: FakeServer) -> None:
    _run("generate", "-", stdin="two\nlines\n")
    assert target.requests == [pb.GenerateStreamRequest(text="two\nlines")]


def test_generate_as_json(target: FakeServer) -> None:
    response = json.loads(_run("generate", "hi", "--json").stdout)
    assert response["choices"][0]["text"] == "Hello, world"
    assert response["choices"][0]["finish_reason"] == "eos"


def test_statistics_go_to_stderr_when_asked_for(target: FakeServer) -> None:
    result = _run("generate", "hi", "-v")
    assert result.stdout == "Hello, world\n"
    assert result.stderr == (
        "2 + 12 tokens, finish eos, first token 0.020 s, 100.0 tokens/s, fake@original, "
        "request fake-1\n"
    )


def test_health(target: FakeServer) -> None:
    result = _run("health")
    assert (result.stdout, result.exit_code) == ("SERVING\n", 0)
    target.set_serving(False)
    result = _run("health", "--service", "")
    assert (result.stdout, result.exit_code) == ("NOT_SERVING\n", 1)
    result = _run("health", "--service", "nope")
    assert (result.stdout, result.exit_code) == ("", 1)


def test_health_says_what_its_exit_codes_mean() -> None:
    told = " ".join(_run("health", "--help").output.split())
    assert "exit code is 0 or 1; 2 when no server answers" in told


def test_health_waits(target: FakeServer) -> None:
    target.set_serving(False)
    timer = threading.Timer(0.3, target.set_serving, [True])
    timer.start()
    result = _run("health", "--wait", "5")
    timer.join()
    assert (result.stdout, result.exit_code) == ("SERVING\n", 0)


def test_health_does_not_wait_for_ever() -> None:
    result = _run("health", "--wait", "0.3", "--target", _NOWHERE)
    assert (result.stderr, result.exit_code) == (_CANNOT_REACH, 2)


@pytest.mark.usefixtures("target")
def test_model() -> None:
    lines = _run("model").stdout.splitlines()
    assert lines[0] == "model        fake@original"
    assert "kv cache     float32, 4,096 tokens" in lines
    served = json.loads(_run("model", "fake", "--json").stdout)
    assert served[0]["context_length"] == 4096
    result = _run("model", "other")
    assert result.stderr == "venturi: unknown model (request fake-3)\n"
    assert result.exit_code == 1


@pytest.mark.parametrize("command", ["generate hi", "chat", "health"])
def test_no_server_is_one_line_with_the_remedy(command: str) -> None:
    result = _run(*command.split(), "--target", _NOWHERE)
    assert (result.stdout, result.stderr, result.exit_code) == ("", _CANNOT_REACH, 2)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("generate", "Missing argument 'PROMPT'. (see: venturi generate --help)"),
        ("generate hi --top-k x", "Invalid value for '--top-k': 'x' is not a valid integer."),
        ("generate hi --top-k -1", "top_k: Value out of range: -1"),
        ("nothing", "No such command 'nothing'. (see: venturi --help)"),
        ("--nothing", "No such option"),
    ],
)
def test_usage_errors_are_one_line(command: str, message: str) -> None:
    result = _run(*command.split())
    assert result.stderr.startswith(f"venturi: {message}")
    assert result.stderr.count("\n") == 1
    assert result.exit_code == 2


def _failure(code: grpc.StatusCode, *details: rpc.RetryInfo | rpc.BadRequest) -> Failure:
    return Failure(code=code, message="first\nsecond", details=details)


_BAD_REQUEST = rpc.BadRequest(
    field_violations=[
        rpc.BadRequest.FieldViolation(field="sampling.top_p", description="not in (0, 1]")
    ]
)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (_failure(grpc.StatusCode.INTERNAL), "first second"),
        (
            _failure(grpc.StatusCode.INVALID_ARGUMENT, _BAD_REQUEST),
            "sampling.top_p: not in (0, 1]",
        ),
        (
            _failure(
                grpc.StatusCode.RESOURCE_EXHAUSTED, rpc.RetryInfo(retry_delay=Duration(seconds=2))
            ),
            "first second: try again in 2.0 s",
        ),
    ],
)
def test_errors_of_the_server_are_one_line(
    target: FakeServer, failure: Failure, message: str
) -> None:
    target.script.failure = failure
    result = _run("generate", "hi")
    assert result.stderr == f"venturi: {message} (request fake-1)\n"
    assert (result.stdout, result.exit_code) == ("", 1)


def test_a_failure_in_the_middle_ends_the_line(target: FakeServer) -> None:
    target.script = Script(failure=_failure(grpc.StatusCode.INTERNAL), fail_after=1)
    result = _run("generate", "hi")
    assert (result.stdout, result.exit_code) == ("Hello\n", 1)


def test_a_timeout_says_which_option_helps(target: FakeServer) -> None:
    target.script.delay_s = 30
    result = _run("generate", "hi", "--timeout", "0.1")
    assert "--timeout" in result.stderr
    assert result.exit_code == 1


def test_chat_keeps_the_conversation(target: FakeServer) -> None:
    result = _run("chat", "--system", "Be brief.", stdin="one\n\ntwo\n/reset\nthree\n/exit\nfour\n")
    assert (result.exit_code, result.stdout) == (0, "Hello, world\n" * 3)
    assert result.stderr == "fake@original (/reset, /exit)\n"
    chats = [
        [(message.role, message.content) for message in request.chat.messages]
        for request in target.requests
        if isinstance(request, pb.GenerateStreamRequest)
    ]
    system, answer = ("system", "Be brief."), ("assistant", "Hello, world")
    assert chats == [
        [system, ("user", "one")],
        [system, ("user", "one"), answer, ("user", "two")],
        [system, ("user", "three")],
    ]


def test_chat_goes_on_after_an_error(target: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["one", "two", None])

    def read() -> str | None:
        line = next(lines)
        target.script.failure = _failure(grpc.StatusCode.INTERNAL) if line == "one" else None
        return line

    monkeypatch.setattr("venturi._chat._read", read)
    result = _run("chat")
    assert (result.exit_code, result.stdout) == (0, "Hello, world\n")
    assert "venturi: first second (request fake-2)\n" in result.stderr
    last = target.requests[-1]
    assert isinstance(last, pb.GenerateStreamRequest)
    assert [message.content for message in last.chat.messages] == ["two"]


def test_help_lists_all_commands_without_importing_the_servers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entries = [
        EntryPoint("serve", "no.such.module:serve", cli._GROUP),
        EntryPoint("other", "no.such.module:other", cli._GROUP),
    ]
    monkeypatch.setattr(cli, "entry_points", lambda group: entries)
    result = _run("--help")
    assert result.exit_code == 0
    for line in ("generate", "chat", "health", "model", "serve  Run the inference service."):
        assert f"\n  {line}" in result.stdout
    assert "other  From no.such.module." in result.stdout
    assert result.stdout.count("\n") < 24
    assert _run().stdout == result.stdout


def test_a_command_of_the_server_is_loaded_when_it_is_invoked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entries = [
        EntryPoint("serve", "venturi._commands:health", cli._GROUP),
        EntryPoint("doctor", "no.such.module:doctor", cli._GROUP),
    ]
    monkeypatch.setattr(cli, "entry_points", lambda group: entries)
    assert "NOT_SERVING" in _run("serve", "--help").stdout
    result = _run("doctor")
    assert result.stderr.startswith("venturi: cannot load `doctor`: No module named 'no'")
    assert result.exit_code == 1
    result = _run("compress")
    assert "a command of the server application, which is not installed" in result.stderr
    assert result.exit_code == 2


def test_an_unexpected_error_is_one_line_too(
    target: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr("venturi._commands._describe", fail)
    result = _run("model")
    assert result.stderr == "venturi: ZeroDivisionError: by zero (VENTURI_DEBUG=1 shows where)\n"
    assert result.exit_code == 1
    monkeypatch.setenv("VENTURI_DEBUG", "1")
    assert isinstance(_run("model").exception, ZeroDivisionError)


@pytest.mark.parametrize("seconds", ["inf", "nan", "0", "-1"])
def test_a_timeout_that_is_none_is_a_usage_error(target: FakeServer, seconds: str) -> None:
    result = _run("generate", "hi", f"--timeout={seconds}")
    assert result.exit_code == 2
    assert result.stderr.startswith("venturi: timeout: give a positive number of seconds")
    assert not target.requests


def test_the_options_of_structured_output_and_endings_arrive(
    target: FakeServer, tmp_path: Path
) -> None:
    (tmp_path / "schema.json").write_text('{"type": "integer"}', encoding="utf-8")
    schema = str(tmp_path / "schema.json")
    _run("generate", "hi", "--ignore-eos", "--min-p", "0.1", "--json-schema", schema)
    _run("generate", "hi", "--regex", "a+")
    assert target.requests == [
        pb.GenerateStreamRequest(
            text="hi",
            sampling=pb.Sampling(min_p=0.1),
            stopping=pb.Stopping(ignore_eos=True),
            structured=pb.Structured(json_schema='{"type": "integer"}'),
        ),
        pb.GenerateStreamRequest(text="hi", structured=pb.Structured(regex="a+")),
    ]


def test_chat_says_what_its_commands_are(target: FakeServer) -> None:
    result = _run("chat", stdin="/help\n/exit\n")
    assert "/reset starts anew" in result.stderr
    assert not any(isinstance(sent, pb.GenerateStreamRequest) for sent in target.requests)


def test_chat_tells_how_to_go_on_when_a_conversation_is_too_long(
    target: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["one", "two", None])

    def read() -> str | None:
        line = next(lines)
        too_long = _failure(grpc.StatusCode.INVALID_ARGUMENT)
        target.script.failure = too_long if line == "two" else None
        return line

    monkeypatch.setattr("venturi._chat._read", read)
    result = _run("chat")
    assert result.stderr.endswith("venturi: /reset starts a conversation anew\n")
