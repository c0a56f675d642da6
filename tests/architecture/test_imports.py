"""What importing a part drags in, and what the parts use of each other."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import engine.client
from engine.errors import EngineError
from engine.types import FinishReason

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "numpy", "grpc", "safetensors")
LIGHT = ["engine", "engine.types", "engine.errors", "engine.config", "engine.messages"]
POLICY = [
    "engine.scheduler",
    "engine.block_manager",
    "engine.speed",
    "engine.endings",
    "engine.types",
    "engine.errors",
]
CLIENT = [module.name for module in pkgutil.walk_packages(engine.client.__path__, "engine.client.")]


def imported_with(*modules: str) -> set[str]:
    """Top-level packages in memory after importing ``modules`` in a fresh interpreter."""
    code = f"import sys, {', '.join(modules)}; print(*{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return set(done.stdout.split())


def test_the_front_ends_half_of_the_engine_is_light() -> None:
    assert len(CLIENT) > 8
    assert not imported_with(*LIGHT, *CLIENT) & set(HEAVY)


def test_policy_needs_the_standard_library_only() -> None:
    found = imported_with(*POLICY)
    assert not found & {*HEAVY, "msgspec", "tokenizers", "jinja2"}


def test_what_a_model_is_can_be_read_without_torch() -> None:
    assert not imported_with("engine.models", "engine.models.spec") & {"torch", "transformers"}


def test_the_fake_runner_is_light() -> None:
    assert not imported_with("engine.testing") & set(HEAVY)


@pytest.mark.parametrize("package", ["server", "compress", "venturi"])
def test_importing_the_other_packages_brings_no_torch(package: str) -> None:
    assert not imported_with(package) & {"torch", "transformers"}


def test_the_servers_modules_bring_no_torch() -> None:
    names = [path.stem for path in (ROOT / "server").glob("*.py") if path.stem != "__main__"]
    found = imported_with(*(f"server.{name}" for name in names))
    assert not found & {"torch", "transformers"}


def engine_imports(package: str) -> set[tuple[str, str]]:
    """(module, name) of everything that ``package`` takes from the engine."""
    found: set[tuple[str, str]] = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "engine":
                found |= {(node.module or "", alias.name) for alias in node.names}
    return found


@pytest.mark.parametrize("package", ["server", "compress"])
def test_others_use_public_names_of_the_engine_that_exist(package: str) -> None:
    uses = engine_imports(package)
    assert uses
    for module, name in uses:
        assert not name.startswith("_"), f"{package} uses {module}.{name}"
        assert not any(part.startswith("_") for part in module.split("."))
        found = importlib.import_module(module)
        assert hasattr(found, name) or importlib.import_module(f"{module}.{name}"), name


def test_errors_and_reasons_are_those_that_callers_know() -> None:
    """The server's tables and the SDK have an answer for each of these."""
    assert {kind.__name__ for kind in EngineError.__subclasses__()} == {
        "DeadlineExceeded",
        "EngineUnavailable",
        "GenerationFailed",
        "InvalidRequest",
        "ModelLoadError",
        "NotServed",
        "Overloaded",
        "UnknownModel",
    }
    assert {reason.value for reason in FinishReason} == {
        "stop",
        "length",
        "eos",
        "time_limit",
        "cancelled",
        "deadline",
        "refused",
        "invalid",
        "error",
        "lost",
    }
