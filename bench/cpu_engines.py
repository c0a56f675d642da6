"""Who is measured, on which models, and how each is started."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

_SCRIPTS = Path(__file__).parent / "peers"
# Venturi's recipes that are compared, with their bits. Rounding to nearest: on random weights
# calibration would take long and change no speed.
RECIPES = {"w8a8": 8, "w4a8": 4}
FILES = {"w4a8": Path(__file__).parent / "w4a8-rtn.yaml"}


@dataclass(frozen=True, kw_only=True)
class Engine:
    """``recipe`` is empty for a peer; ``environment`` is the folder of a peer's own Python,
    empty for this one. ``most`` is its largest batch."""

    name: str
    bits: int
    recipe: str = ""
    environment: str = ""
    most: int = 32
    models: str = "SML"

    def command(self, peers: Path) -> list[str]:
        """Without the settings. Raises ``RuntimeError`` where the peer is not set up."""
        if self.recipe:
            return [sys.executable, "-m", "bench.cpu_engine"]
        if self.environment == "transformers":  # comes with the project's own dev extra
            return [sys.executable, str(_SCRIPTS / "run_transformers.py")]
        python = peers / self.environment / "bin" / "python"
        if not python.is_file():
            raise RuntimeError(f"{self.name} is not set up in {peers}: run make bench-peers")
        return [str(python), str(_SCRIPTS / f"run_{self.environment}.py")]


OURS = [
    Engine(name=f"Venturi {recipe}", bits=bits, recipe=recipe) for recipe, bits in RECIPES.items()
]
PEERS = [
    Engine(name="llama.cpp Q8_0", bits=8, environment="llamacpp"),
    Engine(name="OpenVINO GenAI int8", bits=8, environment="openvino"),
    Engine(name="llama.cpp Q4_0", bits=4, environment="llamacpp"),
    Engine(name="OpenVINO GenAI int4", bits=4, environment="openvino"),
    # Static batches: beyond a few sequences nobody would use them so.
    Engine(name="CTranslate2 int8", bits=8, environment="ctranslate2", most=8, models="SM"),
    Engine(name="transformers fp32", bits=32, environment="transformers", most=8, models="SM"),
]


def threads() -> int:
    """One for each core that this process may use."""
    return len(os.sched_getaffinity(0))
