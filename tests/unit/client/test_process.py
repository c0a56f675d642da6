"""What only a process of its own shows: signals, closed pipes, and what an import costs."""

import os
import signal
import subprocess
import sys

from venturi.testing import FakeServer, Script

_VENTURI = [sys.executable, "-c", "from venturi.cli import main; main()"]


def _environment(server: FakeServer) -> dict[str, str]:
    return {**os.environ, "VENTURI_TARGET": server.target}


def _spawn(server: FakeServer, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*_VENTURI, *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(server),
    )


def _endless(server: FakeServer) -> None:
    server.script = Script(chunks=["x"] * 100_000, delay_s=0.01)


def test_ctrl_c_stops_the_answer_and_not_the_chat(server: FakeServer) -> None:
    _endless(server)
    with _spawn(server, "chat") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("hi\n")
        process.stdin.flush()
        assert process.stdout.read(2) == "xx"
        process.send_signal(signal.SIGINT)
        assert server.wait_cancelled()
        server.script = Script(chunks=["again"])
        stdout, stderr = process.communicate("more\n/exit\n", timeout=10)
    assert stdout.endswith(" [stopped]\nagain\n")
    assert "Traceback" not in stderr
    assert process.returncode == 0


def test_ctrl_c_ends_generate_quietly(server: FakeServer) -> None:
    _endless(server)
    with _spawn(server, "generate", "hi") as process:
        assert process.stdout is not None
        assert process.stdout.read(2) == "xx"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=10)
    assert server.wait_cancelled()
    assert stderr.strip() == "venturi: interrupted"
    assert process.returncode == 130


def test_a_closed_pipe_is_quiet_and_cancels_the_call(server: FakeServer) -> None:
    _endless(server)
    with _spawn(server, "generate", "hi") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(2) == "xx"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert server.wait_cancelled()


def test_importing_is_fast_and_help_needs_no_server_code() -> None:
    code = """
import sys, time
start = time.perf_counter()
import venturi
seconds = time.perf_counter() - start
from venturi.cli import group
try:
    group.main(["--help"], prog_name="venturi")
except SystemExit:
    pass
ours = {"torch", "server", "engine", "compress", "rich"} & set(sys.modules)
assert not ours, ours
print(seconds, file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30
    )
    assert float(done.stderr) < 0.3
