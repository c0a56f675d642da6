"""What calibration captures of a layer, against transformers' hooks."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from compress.sequential import Sequential
from engine.blocks import Blocks
from engine.formats.checkpoint import Checkpoint


def expected(folder: Path, ids_SL: Tensor) -> dict[str, Tensor]:
    """The mean of x x^T of every linear of the decoder layers, by module name."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: dict[str, Tensor] = {}

    def watch(name: str, linear: nn.Module) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x_MK = inputs[0].flatten(0, 1)
            seen[name] = x_MK.t() @ x_MK / len(x_MK)

        linear.register_forward_pre_hook(hook)

    for name, module in model.model.named_modules():
        if isinstance(module, nn.Linear):
            watch(f"model.{name}", module)
    with torch.inference_mode():
        model(ids_SL)
    return seen


def test_what_linears_read(make_model: Callable[..., Path]) -> None:
    folder = make_model(layers=2)
    ids_SL = torch.randint(64, (3, 20), generator=torch.Generator().manual_seed(0))
    blocks = Blocks.open(Checkpoint.open(folder))
    state, reference = Sequential(blocks, ids_SL, folder), expected(folder, ids_SL)
    found: dict[str, Tensor] = {}
    for index, names in enumerate(blocks.spec.names):
        modules = {module for matrix in names.matrices() for module in matrix.modules}
        for shared, inputs in state.capture(index, modules).items():
            found |= dict.fromkeys(shared, inputs.hessian_KK)
        state.advance(index, {})
    assert found.keys() == reference.keys()
    for name, hessian_KK in found.items():
        scale = float(reference[name].abs().max())
        assert torch.allclose(hessian_KK, reference[name], atol=1e-4 * scale), name
