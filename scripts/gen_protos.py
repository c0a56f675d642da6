"""Generates clients/python/venturi/v1 from proto/. With --check, fails on a difference."""

import argparse
import filecmp
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
TARGET = ROOT / "clients" / "python"


def generate(out: Path) -> list[Path]:
    """Writes the stubs below ``out`` and returns their paths relative to it."""
    include = Path(protoc.__file__).parent / "_proto"
    sources = sorted(str(p.relative_to(PROTO)) for p in PROTO.rglob("*.proto"))
    flags = [f"--{kind}={out}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    if protoc.main(["protoc", f"-I{PROTO}", f"-I{include}", *flags, *sources]) != 0:
        raise SystemExit("gen_protos: protoc failed")
    return sorted(p.relative_to(out) for p in out.rglob("*_pb2*.py*"))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    if not parser.parse_args().check:
        generate(TARGET)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        fresh = generate(Path(folder))
        stale = [
            str(p)
            for p in fresh
            if not (TARGET / p).exists()
            or not filecmp.cmp(Path(folder) / p, TARGET / p, shallow=False)
        ]
        committed = {p.relative_to(TARGET) for p in (TARGET / "venturi" / "v1").glob("*_pb2*.py*")}
        stale += [str(p) for p in sorted(committed - set(fresh))]
    if stale:
        print("gen_protos: run scripts/gen_protos.py and commit:", *stale, file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
