"""Runs `python -m compress` as a child process and follows its JSON lines."""

import asyncio
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from server.serving import Progress
from venturi.v1 import admin_pb2 as pb


class CompressionFailed(Exception):
    """One line that names the cause and the remedy."""


@dataclass(slots=True)
class Compression:
    """A finished run. ``phases`` are (name, begin, end) in Unix nanoseconds."""

    artefact: Path
    cached: bool
    phases: list[tuple[str, int, int]] = field(default_factory=list)


async def compress(
    model: Path,
    recipe: str,
    cache_dir: Path | None,
    report: Callable[[Progress], None],
    *,
    allow_slow: bool = False,
) -> Compression:
    """The artefact for (model, recipe), made or found. Raises ``CompressionFailed``.

    So does a recipe that this machine can only evaluate, unless ``allow_slow``. A cancelled call
    ends the child, which leaves nothing half-written.
    """
    arguments = ["-P", "-m", "compress", str(model), "--recipe", recipe, "--progress", "json"]
    if not allow_slow:
        arguments.append("--refuse-slow")
    if cache_dir is not None:
        arguments += ["--cache-dir", str(cache_dir)]
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
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
    async for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            raise CompressionFailed(f"compress printed {line[:80]!r} in place of JSON") from None
        match event["event"]:
            case "phase":
                phases.append((event["phase"], event["time_ns"]))
                report(Progress(phase=pb.PHASE_COMPRESSING, detail=event["phase"]))
            case "layer":
                report(_layer(event))
            case "error":
                raise CompressionFailed(event["message"])
            case "done":
                ends = [begin for _, begin in phases[1:]] + [time.time_ns()]
                spans = [
                    (name, begin, end) for (name, begin), end in zip(phases, ends, strict=True)
                ]
                return Compression(Path(event["artefact"]), event["cached"], spans)
    return None


def _layer(event: dict[str, object]) -> Progress:
    left = event.get("seconds_left")
    return Progress(
        phase=pb.PHASE_COMPRESSING,
        detail=str(event["name"]),
        item=int(str(event["item"])),
        items=int(str(event["items"])),
        seconds_left=None if left is None else float(str(left)),
    )
