"""The native kernels that the tests run are those of the sources as they are."""

from engine.kernels.cpu.build import build


def pytest_sessionstart() -> None:
    """Compiles what changed. Raises ``BuildError`` where there is no compiler."""
    build()
