"""The registry of compression methods. Importing it imports no torch.

To add a method: its file, its line in ``METHODS``, its row in the tests
(docs/add-a-method.md).
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["scaling", "pruner", "quantiser"]


@dataclass(frozen=True, slots=True)
class MethodEntry:
    """What a method is, and the version of its arithmetic: raised whenever bits change.

    ``calibrated``: it needs the layers' inputs.
    """

    kinds: frozenset[Kind]
    version: int
    calibrated: bool = True


def _entry(*kinds: Kind, version: int = 1, calibrated: bool = True) -> MethodEntry:
    return MethodEntry(frozenset(kinds), version, calibrated)


METHODS = {
    "rtn": _entry("quantiser", calibrated=False),
    "gptq": _entry("quantiser", version=3),
    "awq": _entry("scaling", "quantiser", version=3),
    "smoothquant": _entry("scaling"),
    # 2: zeros of rounded weights are left out of the file.
    "magnitude": _entry("pruner", version=2),
    "wanda": _entry("pruner", version=2),
    "sparsegpt": _entry("pruner", version=3),
}
PLANNED_METHODS = ("distill",)
# By less than this a layer's sparsity is off the mean where owl allocates it.
OWL_SHIFT = 0.16
