"""What the terminal shows while the service starts: bars, or plain lines elsewhere."""

import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from server.config import DEFAULT_PORT, ServerConfig
from server.serving import Progress, Serving
from venturi.v1 import admin_pb2 as pb

_EXAMPLE = "User: I would like to find a restaurant in San Jose."
TITLES = {
    pb.PHASE_STARTING: "starting",
    pb.PHASE_COMPRESSING: "compressing",
    pb.PHASE_EVALUATING: "evaluating",
    pb.PHASE_LOADING: "loading",
    pb.PHASE_READY: "ready",
    pb.PHASE_FAILED: "failed",
    pb.PHASE_UNRESPONSIVE: "the engine does not answer",
    pb.PHASE_RESTARTING: "restarting the engine",
    pb.PHASE_DRAINING: "draining",
}


class StartupDisplay:
    """Shows progress on standard error. Use as a context manager."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bars = Bars(
            TextColumn("venturi: {task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._tasks: dict[pb.Phase, TaskID] = {}
        self._shown: tuple[pb.Phase, str] | None = None

    def __enter__(self) -> "StartupDisplay":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, progress: Progress) -> None:
        """Takes in a state of the start-up."""
        if self._console.is_terminal and progress.items:
            task = self._tasks.get(progress.phase)
            if task is None:
                task = self._bars.add_task(TITLES[progress.phase], detail="")
                self._tasks[progress.phase] = task
            self._bars.update(
                task, completed=progress.item, total=progress.items, detail=progress.detail
            )
        elif not self._console.is_terminal:
            self._line(progress)

    def _line(self, progress: Progress) -> None:
        """A line for each phase, and one for each quarter of a counted one."""
        part = str(4 * progress.item // progress.items) if progress.items else progress.detail
        said_elsewhere = progress.phase in (pb.PHASE_READY, pb.PHASE_FAILED)
        if said_elsewhere or self._shown == (progress.phase, part):
            return
        self._shown = (progress.phase, part)
        count = f" {progress.item}/{progress.items}" if progress.items else ""
        detail = f" {progress.detail}" if progress.detail else ""
        say(f"{TITLES[progress.phase]}{count}{detail}")


def say(line: str) -> None:
    """One line for the operator."""
    print(f"venturi: {line}", file=sys.stderr, flush=True)


def ready_lines(config: ServerConfig, serving: Serving, port: int, seconds: float) -> str:
    """Where the service is, what it serves, and the command to try."""
    report = serving.engine.report if serving.engine is not None else None
    assert report is not None
    what = (
        f"{serving.name}@{serving.variant}, {report.weights} weights, {report.kv_dtype} KV cache "
        f"of {report.kv_blocks * report.kv_block_size} tokens"
    )
    usual = (config.host, port) == ("127.0.0.1", DEFAULT_PORT)
    target = "" if usual else f" --target {config.host}:{port}"
    return (
        f"ready on {config.host}:{port} in {seconds:.1f} s ({what}); try:\n"
        f'  {_command()} generate "{_EXAMPLE}" --max-tokens 60{target}'
    )


def _command() -> str:
    """The client's command as this shell would find it."""
    if shutil.which("venturi"):
        return "venturi"
    beside = Path(sys.executable).parent / "venturi"
    here = Path.cwd()
    return str(beside.relative_to(here) if beside.is_relative_to(here) else beside)
