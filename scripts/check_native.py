"""Runs the tests of the native kernels on a build with AddressSanitizer and UBSan.

python -m scripts.check_native [PYTEST ARGUMENTS]. The library is built into a scratch folder and
the installed one stays as it is.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from engine.kernels.cpu import build

ROOT = Path(__file__).parents[1]
# Of g++ itself: a library with the sanitisers' own runtimes in it cannot be loaded by Python.
FLAGS = (
    *("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"),
    *("-fno-sanitize-recover=all",),
)
TESTS = [
    str(path)
    for pattern in ("cpu_*", "native_layer", "sampler", "logprobs", "penalties")
    for path in sorted((ROOT / "tests/unit/engine").glob(f"test_{pattern}.py"))
    if path.name != "test_cpu_library.py"  # it tests how libraries are built and found
]


def runtime(name: str) -> str:
    """Path of one of the compiler's shared libraries."""
    command = [os.environ.get("CXX", "g++"), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    """The exit status of pytest."""
    with tempfile.TemporaryDirectory() as scratch:
        library = Path(scratch) / build.LIBRARY.name
        build.build(library, extra_flags=FLAGS)
        environment = os.environ | {
            "VENTURI_CPU_LIBRARY": str(library),
            "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
            # Python and torch keep memory until the process ends.
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "pytest", "-q", *TESTS, *sys.argv[1:]]
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
