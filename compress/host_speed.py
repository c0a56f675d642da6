"""How fast this host is, measured in a fraction of a second with the machine as it is now."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from compress.methods.columns import ColumnRounder, column_loop
from compress.methods.grid import make_grid
from compress.methods.scheme import Scheme
from compress.shards import digest

_SIZE = 512
_COLUMNS = 128
# Other processes' time slices are part of what a second is worth here: long enough for several.
_LEAST_S = 0.05
_FILE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class HostSpeed:
    """Seconds for: a float32 multiplication and addition in a product; a column of 512 weights
    in GPTQ's loop; to hash a byte; to write one durably.
    """

    product: float
    column: float
    digest: float
    write: float


def measure(folder: Path) -> HostSpeed:
    """Of the threads that torch has now, and the disk of ``folder``. Raises ``OSError``."""
    generator = torch.Generator().manual_seed(0)
    weight_NK = torch.randn(_SIZE, _SIZE, generator=generator)
    products = mean_seconds(lambda: weight_NK @ weight_NK)
    digests = mean_seconds(lambda: digest(weight_NK))
    return HostSpeed(
        product=products / _SIZE**3,
        column=_column_seconds(weight_NK[:, :_COLUMNS].contiguous()),
        digest=digests / weight_NK.nbytes,
        write=_write_seconds(folder) / _FILE_BYTES,
    )


def mean_seconds(work: Callable[[], object]) -> float:
    """Of a call, after a first one."""
    work()
    begin, calls = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - begin) < _LEAST_S:
        work()
        calls += 1
    return elapsed / calls


def _column_seconds(weight_NK: torch.Tensor) -> float:
    grid = make_grid(weight_NK, Scheme(bits=4, group_size=32))
    upper_KK = torch.eye(_COLUMNS)

    def loop() -> None:
        column_loop(weight_NK.t().contiguous(), upper_KK, ColumnRounder(grid, _COLUMNS))

    return mean_seconds(loop) / _COLUMNS


def _write_seconds(folder: Path) -> float:
    path = folder / f".{os.getpid()}.venturi-speed"
    try:
        begin = time.perf_counter()
        with path.open("wb") as file:
            file.write(bytes(_FILE_BYTES))
            file.flush()
            os.fsync(file.fileno())
        return time.perf_counter() - begin
    finally:
        path.unlink(missing_ok=True)
