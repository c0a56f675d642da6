"""How a running compression is told: JSON lines for programs, a bar or lines for people.

With ``--progress json`` stdout has one JSON object a line, each with ``event`` and ``time_ns``
(unix time in nanoseconds); ``done`` or ``error`` is the last:

    phase  phase (climbing, hashing, waiting, searching, planning, generating, compressing,
           verifying, publishing, reading, evaluating or restoring), detail; of climbing it is
           the rung
    layer  item, items, name, seconds_left
    done   recipe, artefact, key, cached, seconds, peak_rss_anon_bytes, baseline_rss_anon_bytes;
           gate where there was one: mode, verdict, refused, line, data_sha256, tokens,
           mean_kl_nats, perplexity, original_perplexity, restored, decode
           (tokens per second by the number of sequences, where that was timed)
    error  message
"""

import json
import sys
import time
from collections.abc import Mapping
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichBar


class Progress(Protocol):
    """Receives what happens, in order."""

    def phase(self, phase: str, detail: str) -> None:
        """A phase begins."""
        ...

    def layer(self, item: int, items: int, name: str, seconds_left: float) -> None:
        """Layer, document or question ``item`` of ``items`` (from 1) is done."""
        ...

    def done(self, result: Mapping[str, object]) -> None:
        """All is well; ``result`` has the fields of the ``done`` event."""
        ...

    def error(self, message: str) -> None:
        """Nothing was published; ``message`` is one line."""
        ...


class NoProgress:
    """Tells nobody."""

    def phase(self, phase: str, detail: str) -> None:
        """Nothing."""

    def layer(self, item: int, items: int, name: str, seconds_left: float) -> None:
        """Nothing."""

    def done(self, result: Mapping[str, object]) -> None:
        """Nothing."""

    def error(self, message: str) -> None:
        """Nothing."""


class JsonProgress:
    """One JSON object a line on stdout."""

    def phase(self, phase: str, detail: str) -> None:
        """See ``Progress``."""
        self._write({"event": "phase", "phase": phase, "detail": detail})

    def layer(self, item: int, items: int, name: str, seconds_left: float) -> None:
        """See ``Progress``."""
        fields = {"item": item, "items": items, "name": name}
        self._write({"event": "layer", **fields, "seconds_left": round(seconds_left, 1)})

    def done(self, result: Mapping[str, object]) -> None:
        """See ``Progress``."""
        self._write({"event": "done", **result})

    def error(self, message: str) -> None:
        """See ``Progress``; people get the message on stderr as well."""
        self._write({"event": "error", "message": message})
        print(f"venturi: {message}", file=sys.stderr)

    def _write(self, event: dict[str, object]) -> None:
        print(json.dumps({**event, "time_ns": time.time_ns()}), flush=True)


class PlainProgress:
    """Lines on stderr, at most one a second for layers; the artefact's path on stdout."""

    def __init__(self) -> None:
        self._told = time.monotonic()

    def phase(self, phase: str, detail: str) -> None:
        """See ``Progress``."""
        print(f"{phase}: {detail}", file=sys.stderr)

    def layer(self, item: int, items: int, name: str, seconds_left: float) -> None:
        """See ``Progress``."""
        if time.monotonic() - self._told > 1 or item == items:
            self._told = time.monotonic()
            print(f"{item}/{items} {name}, {_left(seconds_left)}", file=sys.stderr)

    def done(self, result: Mapping[str, object]) -> None:
        """See ``Progress``."""
        how = "found in the cache" if result["cached"] else "compressed"
        print(f"{how} in {result['seconds']} s", file=sys.stderr)
        gate = result.get("gate")
        if isinstance(gate, Mapping):
            print(f"gate: {gate['line']}", file=sys.stderr)
        print(result["artefact"])

    def error(self, message: str) -> None:
        """See ``Progress``."""
        print(f"venturi: {message}", file=sys.stderr)


class BarProgress(PlainProgress):
    """As ``PlainProgress``, with a bar for the layers; for a terminal."""

    def __init__(self) -> None:
        super().__init__()
        self._console = Console(stderr=True)
        self._bar: RichBar | None = None

    def phase(self, phase: str, detail: str) -> None:
        """See ``Progress``."""
        self._stop()
        self._console.print(f"[bold]{phase}[/bold] {escape(detail)}", highlight=False)

    def layer(self, item: int, items: int, name: str, seconds_left: float) -> None:
        """See ``Progress``."""
        if self._bar is None:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = RichBar(*columns, console=self._console, transient=True)
            self._bar.add_task("", total=items)
            self._bar.start()
        text = f"{escape(name)}, {_left(seconds_left)}"
        self._bar.update(self._bar.task_ids[0], completed=item, description=text)
        if item == items:
            self._stop()

    def done(self, result: Mapping[str, object]) -> None:
        """See ``Progress``."""
        self._stop()
        super().done(result)

    def error(self, message: str) -> None:
        """See ``Progress``."""
        self._stop()
        super().error(message)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _left(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s left"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min left" if minutes >= 60 else f"{minutes} min left"


def make_progress(mode: str) -> Progress:
    """``json``, ``plain``, or ``auto``: a bar where stderr is a terminal, else plain."""
    if mode == "json":
        return JsonProgress()
    return BarProgress() if mode == "auto" and sys.stderr.isatty() else PlainProgress()
