"""The native library: how it is built, found, chosen and refused."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import ModelLoadError
from engine.kernels import cpu, resolve
from engine.kernels.cpu import build, library

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """The loader forgets the library and the environment before a test, and after it."""
    cached = (library.load, library.kernels)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def in_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_there_is_one_openmp_runtime() -> None:
    code = (
        "import torch\nfrom engine.kernels.cpu import library\nlibrary.kernels()\n"
        "maps = open('/proc/self/maps').read().splitlines()\n"
        "print(len({line.split()[-1] for line in maps if 'omp' in line.split('/')[-1]}))"
    )
    done = in_process(code)
    assert done.stdout.strip() == "1", done.stdout + done.stderr


def test_the_best_instruction_set_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VENTURI_CPU_ISA", raising=False)
    assert library.kernels().instruction_set == library.supported()[-1]
    assert library.kernels().name == f"venturi-{library.supported()[-1]}"


@pytest.mark.parametrize("name", library.INSTRUCTION_SETS[:1])
def test_the_environment_chooses_the_instruction_set(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VENTURI_CPU_ISA", name)
    assert library.kernels().instruction_set == name


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENTURI_CPU_ISA", "avx3")
    with pytest.raises(ModelLoadError, match="'avx3' is unknown; known: portable"):
        library.kernels()
    with pytest.raises(ModelLoadError, match="avx3"):
        resolve("auto")


def test_an_instruction_set_that_the_machine_lacks_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(library, "supported", lambda: ("portable",))
    monkeypatch.setenv("VENTURI_CPU_ISA", "avx512")
    with pytest.raises(ModelLoadError, match="does not support avx512"):
        library.kernels()


def without_library(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    load = library.load
    monkeypatch.setattr(library, "load", lambda: load(path))


def test_without_the_library_torch_serves_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    without_library(monkeypatch, tmp_path / "none.so")
    with caplog.at_level(logging.WARNING):
        assert resolve("auto") == "torch"
    assert [record.message for record in caplog.records] == [
        "serving with torch's kernels, which are slower: the native CPU kernels are not built; "
        f"`{sys.executable} -m engine.kernels.cpu.build` builds them"
    ]
    with pytest.raises(ModelLoadError, match="not built"):
        resolve("cpu")


def test_a_machine_without_vectors_is_served_by_torch_unless_asked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "supported", lambda: ("portable",))
    with caplog.at_level(logging.WARNING):
        assert resolve("auto") == "torch"
    assert "portable" in caplog.text
    assert resolve("cpu") == "cpu"
    monkeypatch.setenv("VENTURI_CPU_ISA", "portable")
    assert resolve("auto") == "cpu"


def test_backends_mean_themselves() -> None:
    assert resolve("torch") == "torch"
    assert resolve("cpu") == resolve("auto") == "cpu"
    with pytest.raises(ModelLoadError, match="'cuda' is unknown; known: auto, torch, cpu"):
        resolve("cuda")


def test_a_library_of_other_sources_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "source_hash", lambda: "0" * 64)
    with pytest.raises(ModelLoadError, match="older than their sources"):
        library.load()


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.so"
    path.write_bytes(b"no library")
    with pytest.raises(ModelLoadError, match="cannot be loaded"):
        library.load(path)


SOURCE = """
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT const char* venturi_source_hash() { return VENTURI_SOURCE_HASH; }
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sources that compile at once."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "library.cpp").write_text(SOURCE, encoding="utf-8")
    monkeypatch.setattr(build, "SOURCES", folder)
    return folder


def test_a_build_happens_when_sources_changed_only(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "lib.so"
    assert build.build(out)
    assert build.is_current(out)
    assert not build.build(out)
    assert build.build(out, force=True)
    (sources / "more.h").write_text("// new", encoding="utf-8")
    assert not build.is_current(out)
    assert build.build(out)
    assert [path.name for path in out.parent.iterdir()] == ["lib.so"]


def test_a_build_that_fails_leaves_the_library_as_it_was(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "lib.so"
    build.build(out)
    before = out.read_bytes()
    (sources / "library.cpp").write_text("no C++", encoding="utf-8")
    with pytest.raises(build.BuildError, match=r"library\.cpp"):
        build.build(out)
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["csrc", "lib.so"]


@pytest.mark.usefixtures("sources")
def test_a_compiler_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="no-such-compiler cannot be run"):
        build.build(tmp_path / "lib.so")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        build.build(tmp_path / "lib.so")


def test_each_source_is_compiled_for_each_instruction_set() -> None:
    """A file that only one set has would be found missing on another machine alone."""
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", build.LIBRARY], capture_output=True, text=True, check=True
    ).stdout.split()
    names = [name for name in symbols if name.startswith("venturi_")]
    entries = {
        one: {name.removesuffix(f"_{one}") for name in names if name.endswith(f"_{one}")}
        for one in build.instruction_sets()
    }
    assert len(entries["portable"]) > 3
    assert all(found == entries["portable"] for found in entries.values())


def test_sources_are_short() -> None:
    for path in Path(cpu.__file__).with_name("csrc").iterdir():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 350, path.name


GUARDED = """
import torch
from engine.kernels.cpu import attention
from engine.kernels.cpu.attention import AttentionOptions, paged_attention
from engine.kv_cache import InterleavedInt8KvCache, KvShape

held = []
def guarded(size):
    held.append(torch.full((size + 65_536 + 64,), 7, dtype=torch.uint8))
    begin = -held[-1].data_ptr() % 64
    held[-1][begin : begin + size] = 0
    held.append(begin + size)
    return [held[-2].data_ptr() + begin]
attention.scratch = guarded

torch.manual_seed(0)
torch.set_num_threads(4)
context, heads, kv_heads, dim = 4600, 8, 4, 64
cache = InterleavedInt8KvCache(
    KvShape(layers=1, kv_heads=kv_heads, head_dim=dim, block_size=16), 288
)
slots = torch.arange(context)
cache.write(0, torch.randn(context, kv_heads, dim), torch.randn(context, kv_heads, dim), slots)
sequences = torch.tensor([[0, 3, context, 0]], dtype=torch.int32)
blocks = torch.arange(288, dtype=torch.int32)
options = AttentionOptions(scale=0.125)
out = paged_attention(torch.randn(3, heads, dim), cache.layers[0], sequences, blocks, options)
assert bool((held[0][held[1]:] == 7).all()), "written behind the scratch"
print(out.sum().item())
"""


def test_fewer_threads_than_asked_for_stay_inside_the_scratch() -> None:
    sums = set()
    for limit in ("1", "2", "8"):
        done = in_process(GUARDED, OMP_THREAD_LIMIT=limit, OMP_NUM_THREADS="4")
        assert done.returncode == 0, done.stderr
        sums.add(done.stdout)
    assert len(sums) == 1
