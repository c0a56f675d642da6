"""`venturi doctor`: what this machine has and what the server would do with it."""

import importlib.util
import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import click

from engine.kernels.cpu import build
from server import __version__
from server.config import EMBEDDED_MODEL, ConfigError, load_config
from server.metrics import ENDPOINTS as METRIC_ENDPOINTS
from server.telemetry import ENDPOINTS as TRACE_ENDPOINTS

_PACKAGES = ("torch", "grpcio", "protobuf", "tokenizers", "safetensors", "uvloop")
_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_vbmi2", "avx512_bf16", "amx_int8")
# (what, finding, whether it is all right)
Row = tuple[str, str, bool]


@click.command()
@click.option("--port", type=int, help="Port that the server is to use.")
@click.option("--cache-dir", type=click.Path(), help="Where artefacts are kept.")
def doctor(port: int | None, cache_dir: str | None) -> None:
    """Check what this machine can run. Exits with 1 where something is wrong."""
    given = {"port": port, "cache_dir": cache_dir}
    rows = list(_rows({name: value for name, value in given.items() if value is not None}))
    for what, finding, fine in rows:
        click.echo(f"{'ok  ' if fine else 'FAIL'} {what:<12} {finding}")
    if not all(fine for _, _, fine in rows):
        raise SystemExit(1)


def _rows(given: dict[str, object]) -> Iterator[Row]:
    yield "venturi", f"{__version__}, Python {platform.python_version()}", True
    yield "packages", ", ".join(f"{name} {version(name)}" for name in _PACKAGES), True
    yield "cpu", f"{os.cpu_count()} cores; {', '.join(_flags()) or 'no known extensions'}", True
    yield _kernels()
    gpu = "nvidia-smi found" if shutil.which("nvidia-smi") else "none"
    yield "gpu", f"{gpu} (this version computes on the CPU)", True
    yield "memory", _memory(), True
    try:
        config = load_config(given, None)
    except ConfigError as error:
        yield "settings", str(error), False
        return
    yield "model", str(config.model), (config.model / "config.json").is_file()
    yield "embedded", str(EMBEDDED_MODEL), (EMBEDDED_MODEL / "model.safetensors").is_file()
    yield _port(config.host, config.port)
    yield _cache(config.cache_dir)
    exporter = importlib.util.find_spec("opentelemetry.exporter.otlp.proto.grpc") is not None
    names = (*TRACE_ENDPOINTS, *METRIC_ENDPOINTS)
    endpoint = ", ".join(dict.fromkeys(os.environ[name] for name in names if os.environ.get(name)))
    yield "telemetry", f"exported to {endpoint}" if endpoint else "off", exporter or not endpoint


def _flags() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return [flag for flag in _CPU_FLAGS if flag in line.split()]


def _kernels() -> Row:
    """The library is looked at, not loaded: the front end has no torch."""
    wanted, known = os.environ.get("VENTURI_CPU_ISA", ""), build.instruction_sets()
    if wanted and wanted not in known:
        return "kernels", f"VENTURI_CPU_ISA={wanted}: known here are {', '.join(known)}", False
    if not build.is_current():
        remedy = f"{sys.executable} {build.__file__}"
        return "kernels", f"not built: torch's serve, slower; `{remedy}` builds them", True
    return "kernels", f"native, {wanted or 'the best set of this processor'}", True


def _memory() -> str:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"


def _port(host: str, port: int) -> Row:
    try:
        with socket.create_server((host, port)):
            return "port", f"{host}:{port} is free", True
    except OSError as error:
        return "port", f"{host}:{port}: {error.strerror}; choose another --port", False


def _cache(folder: Path | None) -> Row:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "venturi"
    folder = folder or default
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    writable = existing.is_dir() and os.access(existing, os.W_OK)
    free = shutil.disk_usage(existing).free / 1e9
    return (
        "cache",
        f"{folder}, {free:.0f} GB free" + ("" if writable else ": not writable"),
        writable,
    )
