"""What a verdict depends on besides files: the programs and the processor. Imports no torch."""

import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path

from engine.kernels.cpu.build import source_hash

_CPUINFO = Path("/proc/cpuinfo")


def engine_identity() -> dict[str, str]:
    """Changes wherever the same artefact may give other logits."""
    return {
        "venturi": version("venturi-server"),
        "torch": version("torch"),
        "kernels": source_hash(),
        "instruction_set": os.environ.get("VENTURI_CPU_ISA", "auto"),
        "processor": _processor(),
    }


def _processor() -> str:
    """The kind of machine, and a hash of what its processor can do, where the system tells."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:16]}"
