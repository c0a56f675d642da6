"""Runs `python -m compress`, or `compress.gate`, as a child process and follows its JSON lines."""

import asyncio
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from server.quality import GateResult
from server.serving import Progress
from venturi.v1 import admin_pb2 as pb


class CompressionFailed(Exception):
    """One line that names the cause and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to compress and how to judge it; ``gate`` None leaves the recipe's mode.

    ``scale`` looks for the recipe. With ``original`` the model is compressed already, and judged.
    """

    model: Path
    original: Path | None
    recipe: str
    scale: bool
    cache_dir: Path | None
    gate: str | None
    kv_dtype: str
    allow_slow: bool

    @property
    def arguments(self) -> list[str]:
        """Of the child: a module and its own."""
        found = [str(self.model), "--kv-dtype", self.kv_dtype]
        if self.cache_dir is not None:
            found += ["--cache-dir", str(self.cache_dir)]
        if self.gate is not None:
            found += ["--gate", self.gate]
        if self.original is not None:
            return ["compress.gate", *found, "--original", str(self.original)]
        found += ["--scale"] if self.scale else ["--recipe", self.recipe]
        if not self.allow_slow:
            found.append("--refuse-slow")
        return ["compress", *found, "--progress", "json"]


@dataclass(slots=True)
class Compression:
    """A finished run; ``recipe`` "" where none was compressed by.

    ``phases`` are (name, begin, end) in Unix nanoseconds.
    """

    recipe: str
    artefact: Path
    cached: bool
    phases: list[tuple[str, int, int]] = field(default_factory=list)
    gate: GateResult | None = None


async def compress(wanted: Wanted, report: Callable[[Progress], None]) -> Compression:
    """The artefact, made or found, and its verdict. Raises ``CompressionFailed``.

    So does a recipe that this machine can only evaluate, unless ``allow_slow``. A cancelled call
    ends the child, which leaves nothing half-written.
    """
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        *wanted.arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    errors = asyncio.create_task(child.stderr.read())
    try:
        result = await _follow(child.stdout, report)
        await child.wait()
    finally:
        if child.returncode is None:
            child.terminate()
            await child.wait()
    if result is None:
        lines = (await errors).decode(errors="replace").strip().splitlines()
        raise CompressionFailed(lines[-1] if lines else f"ended with code {child.returncode}")
    return result


async def _follow(
    lines: asyncio.StreamReader, report: Callable[[Progress], None]
) -> Compression | None:
    phases: list[tuple[str, int]] = []
    phase, rung = pb.PHASE_COMPRESSING, ""
    async for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            raise CompressionFailed(f"compress printed {line[:80]!r} in place of JSON") from None
        match event["event"]:
            case "phase" if event["phase"] == "climbing":
                phase, rung = pb.PHASE_COMPRESSING, f"{event['detail']}: "
            case "phase":
                phases.append((event["phase"], event["time_ns"]))
                judging = phase == pb.PHASE_EVALUATING or event["phase"] == "evaluating"
                phase = pb.PHASE_EVALUATING if judging else pb.PHASE_COMPRESSING
                report(Progress(phase=phase, detail=rung + event["phase"]))
            case "layer":
                report(_layer(phase, rung, event))
            case "error":
                raise CompressionFailed(event["message"])
            case "done":
                ends = [begin for _, begin in phases[1:]] + [time.time_ns()]
                spans = [
                    (name, begin, end) for (name, begin), end in zip(phases, ends, strict=True)
                ]
                gate = GateResult.from_event(event["gate"]) if "gate" in event else None
                artefact = Path(event["artefact"])
                return Compression(event["recipe"], artefact, event["cached"], spans, gate)
    return None


def _layer(phase: pb.Phase, rung: str, event: dict[str, object]) -> Progress:
    left = event.get("seconds_left")
    return Progress(
        phase=phase,
        detail=f"{rung}{event['name']}",
        item=int(str(event["item"])),
        items=int(str(event["items"])),
        seconds_left=None if left is None else float(str(left)),
    )
