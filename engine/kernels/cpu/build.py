"""Compiles ``csrc`` into one shared library: ``python -m engine.kernels.cpu.build [--force]``.

The install runs it too (``hatch_build.py``); it needs a C++17 compiler and the standard library
of Python alone. The library carries a hash of its sources, by which a later run knows that
there is nothing to do, and is put in place by a rename, so that a run that is killed, or two at
once, leave no broken file.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = HERE / "csrc"
# VENTURI_CPU_LIBRARY names another build: scripts/check_native.py tests one with sanitisers.
LIBRARY = Path(os.environ.get("VENTURI_CPU_LIBRARY") or HERE / "libventuri_cpu.so")
# Without the runtime's own -fopenmp: see team.h. No contraction of a * b + c: results would
# differ between instruction sets. gcc 12 takes the intrinsics' undefined operands for mistakes.
_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    *("-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Wno-psabi"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"),
)
_SETS = {
    "portable": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
        *("-mfma", "-mf16c", "-mprefer-vector-width=512"),
    ),
}


class BuildError(Exception):
    """There is no compiler, or it failed; the message says which."""


def instruction_sets() -> tuple[str, ...]:
    """Those that this kind of machine may have."""
    return tuple(_SETS) if platform.machine() in {"x86_64", "AMD64"} else ("portable",)


def source_hash() -> str:
    """Of everything that decides what the library does."""
    digest = hashlib.sha256(repr((_FLAGS, _SETS)).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def is_current(library: Path = LIBRARY) -> bool:
    """Whether ``library`` exists and was built from the sources as they are."""
    return library.exists() and source_hash().encode() in library.read_bytes()


def build(
    library: Path = LIBRARY, *, force: bool = False, extra_flags: tuple[str, ...] = ()
) -> bool:
    """Compiles where it is necessary; whether it was. Raises ``BuildError``."""
    if not force and is_current(library):
        return False
    if sys.platform != "linux":
        raise BuildError("the native kernels are built on Linux only")
    compiler = _compiler()
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as scratch:
        commands = list(_compilations(compiler, Path(scratch), extra_flags))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(_run, commands))
        linked = Path(scratch) / library.name
        _run([*compiler, "-shared", *extra_flags, "-o", str(linked), *objects])
        linked.replace(library)
    return True


def _compiler() -> list[str]:
    if asked := os.environ.get("CXX"):
        return shlex.split(asked)
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise BuildError("there is no C++ compiler (g++ or clang++; CXX names another)")


def _compilations(
    compiler: list[str], scratch: Path, extra_flags: tuple[str, ...]
) -> Iterator[list[str]]:
    """A command for each object file, whose last word is the file's path."""
    flags = [*_FLAGS, *extra_flags]
    for source in sorted(SOURCES.glob("*.cpp")):
        if source.name == "library.cpp":
            hashed = f'-DVENTURI_SOURCE_HASH="{source_hash()}"'
            output = str(scratch / "library.o")
            yield [*compiler, *flags, hashed, "-c", str(source), "-o", output]
            continue
        for name in instruction_sets():
            defines = [f"-DVENTURI_ISA={name}", f'-DVENTURI_VECTOR="vec_{name}.h"']
            output = str(scratch / f"{source.stem}-{name}.o")
            yield [*compiler, *flags, *_SETS[name], *defines, "-c", str(source), "-o", output]


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        raise BuildError(f"{shlex.join(command)} failed:\n{done.stderr.strip()}")
    if done.stderr:
        print(done.stderr, file=sys.stderr, end="")
    return command[-1]


def main() -> None:
    """Builds, and says what it did."""
    try:
        built = build(force="--force" in sys.argv[1:])
    except BuildError as error:
        sys.exit(str(error))
    print(f"{LIBRARY}: {'built' if built else 'up to date'}")


if __name__ == "__main__":
    main()
