"""Rules of the house that a reader would otherwise have to remember."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

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


def offenders(rule: Callable[[ast.Module], Iterator[str]]) -> list[str]:
    """``file: what is wrong`` for everything that ``rule`` finds."""
    return [
        f"{path.relative_to(ROOT)}: {found}"
        for path in FILES
        for found in rule(ast.parse(path.read_text(encoding="utf-8")))
    ]


def test_every_package_is_looked_at() -> None:
    for package in PACKAGES:
        assert any(path.is_relative_to(ROOT / package) for path in FILES), package


def test_no_file_is_longer_than_the_limit() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in FILES
    }
    assert not {name: n for name, n in lengths.items() if n > MAX_FILE_LINES}


def test_no_function_is_longer_than_the_limit() -> None:
    def rule(tree: ast.Module) -> Iterator[str]:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    yield f"{node.name} has {lines} lines"

    assert not offenders(rule)


def test_no_module_state_is_rebound() -> None:
    def rule(tree: ast.Module) -> Iterator[str]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Global):
                yield f"line {node.lineno}"

    assert not offenders(rule)


def test_nothing_is_left_for_later() -> None:
    marks = re.compile(r"\b(?:TODO|FIXME|XXX|HACK)\b")
    texts = {path: path.read_text(encoding="utf-8") for path in FILES}
    assert not [str(path) for path, text in texts.items() if marks.search(text)]


def test_no_data_is_loaded_as_code() -> None:
    def rule(tree: ast.Module) -> Iterator[str]:
        for node in ast.walk(tree):
            match node:
                case ast.Import(names=names):
                    yield from (n.name for n in names if n.name.split(".")[0] in LOADS_CODE)
                case ast.ImportFrom(module=str(module)) if module.split(".")[0] in LOADS_CODE:
                    yield module
                case ast.Call(func=called) if ast.unparse(called) in ("eval", "exec", "torch.load"):
                    yield f"line {node.lineno} calls {ast.unparse(called)}"

    assert not offenders(rule)


def test_every_module_says_what_it_is() -> None:
    def rule(tree: ast.Module) -> Iterator[str]:
        if tree.body and not ast.get_docstring(tree):
            yield "no docstring"

    assert not offenders(rule)
