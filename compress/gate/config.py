"""A recipe's ``gate``: what may be lost, and on what that is measured."""

from dataclasses import dataclass
from typing import Literal

Mode = Literal["off", "warn", "enforce"]
# Of fewer a bootstrap knows nothing.
FEWEST_DOCUMENTS = 8
MODES: tuple[Mode, ...] = ("off", "warn", "enforce")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """``enforce`` serves nothing that does not pass, ``warn`` serves it and says so.

    Limits: ``max_kl`` in nats per token, ``max_drop`` a share of a task's questions. ``data`` are
    text files; without, the original writes ``documents`` of ``length`` tokens. ``restore``: what
    does not pass gets its worst layers back, one precision up. ``speed``: generating is timed too.
    """

    mode: Mode = "off"
    max_kl: float = 0.05
    max_drop: float = 0.01
    data: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    documents: int = 32
    length: int = 128
    restore: bool = False
    speed: bool = False
