"""A real server as a child process, for tests and measurements."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

_READY = re.compile(r"ready on (\S+):(\d+) in ([\d.]+) s")
_LISTENING = re.compile(r"listening on (\S+):(\d+)")


class ServerProcess:
    """`python -m server ARGUMENTS --port 0`. Entering waits for its ready line."""

    def __init__(
        self,
        *arguments: str,
        env: dict[str, str] | None = None,
        wait_ready: bool = True,
        timeout_s: float = 60.0,
    ) -> None:
        self._arguments = arguments
        self._env = {**os.environ, **(env or {})}
        self._wait_ready = wait_ready
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[str] | None = None
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self.target = ""

    def __enter__(self) -> "ServerProcess":
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "server", *self._arguments, "--port", "0"],
            stderr=subprocess.PIPE,
            text=True,
            env=self._env,
        )
        self._reader.start()
        try:
            found = self.wait_for(_READY if self._wait_ready else _LISTENING)
        except BaseException:
            self._end()
            raise
        self.target = f"{found[1]}:{found[2]}"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def _end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        # It ends when the last process that has the pipe does, an engine that outlives its
        # server for a second too.
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()

    @property
    def process(self) -> subprocess.Popen[str]:
        """The child."""
        assert self._process is not None, "enter the context first"
        return self._process

    @property
    def output(self) -> str:
        """What it has printed so far."""
        with self._changed:
            return "".join(self._lines)

    @property
    def seconds_to_ready(self) -> float:
        """As the server measured it."""
        return float(self.wait_for(_READY)[3])

    def engine_pids(self) -> list[int]:
        """Process ids of its engines (Linux)."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        pids = [int(pid) for pid in children.read_text().split()]
        return [p for p in pids if b"engine.host" in Path(f"/proc/{p}/cmdline").read_bytes()]

    def wait_for(self, pattern: re.Pattern[str]) -> re.Match[str]:
        """The first match in the output. ``TimeoutError``, or ``RuntimeError`` at its end."""
        give_up = time.monotonic() + self._timeout_s
        with self._changed:
            while (found := pattern.search("".join(self._lines))) is None:
                if self.process.poll() is not None:
                    raise RuntimeError("the server ended: " + "".join(self._lines))
                if not self._changed.wait(timeout=0.1) and time.monotonic() > give_up:
                    raise TimeoutError("the server is not there: " + "".join(self._lines))
        return found

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self._lines.append(line)
                self._changed.notify_all()
