"""Rules of the house that a reader would otherwise have to remember."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ["server", "engine", "compress", "clients/python/venturi"]
FILES = sorted(
    path
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
    if "_pb2" not in path.name
)
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60
LOADS_CODE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal"}


@pytest.fixture(params=FILES, ids=lambda path: str(path.relative_to(ROOT)))
def path(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


@pytest.fixture
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_every_package_is_looked_at() -> None:
    for package in PACKAGES:
        assert any(path.is_relative_to(ROOT / package) for path in FILES), package


def test_no_file_is_longer_than_the_limit(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


def test_no_function_is_longer_than_the_limit(tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"


def test_no_module_state_is_rebound(tree: ast.Module) -> None:
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Global)]


def test_nothing_is_left_for_later(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"\b(?:TODO|FIXME|XXX|HACK)\b", text)


def test_no_data_is_loaded_as_code(path: Path, tree: ast.Module) -> None:
    assert not {name.split(".")[0] for name in imported(tree)} & LOADS_CODE
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not [f.lineno for f in calls if isinstance(f, ast.Name) and f.id in ("eval", "exec")]
    loads = [f for f in calls if isinstance(f, ast.Attribute) and ast.unparse(f) == "torch.load"]
    assert not loads, f"{path.name} uses torch.load"


def test_every_module_says_what_it_is(tree: ast.Module) -> None:
    assert ast.get_docstring(tree)
