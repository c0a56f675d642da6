"""What the automatic recipe measures, against the engine's logits and against its definition."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.auto.candidates import CANDIDATES, ORIGINAL, tied_groups, uniform
from compress.auto.config import Auto
from compress.auto.costs import stored_bytes
from compress.auto.final_kl import FinalKl
from compress.auto.library import Library
from compress.auto.search import group_costs
from compress.plan import make_plan
from compress.progress import NoProgress
from compress.recipe import Calibration, Recipe, resolve
from engine.blocks import Blocks
from engine.config import CacheConfig, EngineConfig
from engine.formats.checkpoint import Checkpoint
from engine.scoring import Scorer

MakeModel = Callable[..., Path]


def recipe() -> Recipe:
    auto = Auto(budget="bits", limit=5.0)
    return replace(resolve("auto"), auto=auto, calibration=Calibration(samples=4, length=32))


def logits(folder: Path, ids: list[int]) -> Tensor:
    cache = CacheConfig(dtype="fp32", block_size=16, blocks=4)
    with Scorer(EngineConfig(model_dir=folder, cache=cache)) as scorer:
        return scorer.logits(ids)


def test_the_kl_is_that_of_the_engines_logits(make_model: MakeModel) -> None:
    name = "model.layers.1.mlp.down_proj.weight"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name] * -20

    model = make_model(dtype=torch.float32)
    other = make_model("other", dtype=torch.float32, change=change)
    ids_SL = torch.randint(0, 100, (3, 17), generator=torch.Generator().manual_seed(1))
    kl = FinalKl(Blocks.open(Checkpoint.open(model)), ids_SL)
    changed = {name: Checkpoint.open(other).tensor(name)}
    found_S = kl.whole(lambda index: changed if index == 1 else {})
    for ids, found in zip(ids_SL.tolist(), found_S.tolist(), strict=True):
        p, q = (logits(folder, ids).log_softmax(-1).double() for folder in (model, other))
        expected = float((p.exp() * (p - q)).sum(-1).mean())
        assert expected > 1e-5
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert kl.whole(lambda index: {}).abs().max() < 1e-6


def test_roundings_and_what_they_cost(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    checkpoint = Checkpoint.open(model)
    plans = {scheme: make_plan(uniform(recipe(), scheme), checkpoint) for scheme in CANDIDATES}
    groups = tied_groups(plans["w8a8"])
    generator = torch.Generator().manual_seed(0)
    ids_SL = torch.randint(0, 100, (4, 32), generator=generator)
    library = Library(checkpoint, plans, groups, tmp_path)
    blocks = Blocks.open(checkpoint)
    library.fill(blocks, ids_SL, NoProgress())
    sizes = stored_bytes(groups, plans, checkpoint)
    for errors, nbytes in zip(library.errors, sizes, strict=True):
        assert errors.keys() == nbytes.keys()
        assert errors[ORIGINAL] == 0
        assert 0 < errors["w8a8"] < errors["w4a8 g32"]
        assert nbytes["w4a8 g32"] < nbytes["w4a8 g32 zero points"] < nbytes["w8a8"]
    # 96 in-features are three groups of 32, and none of 64.
    assert "w4a8 g64" not in library.errors[3]
    name = groups[1].modules[0]
    (changed,) = library.changed(0, {name: "w4a8 g32"}).items()
    original = checkpoint.tensor(f"{name}.weight").float()
    assert changed[0] == f"{name}.weight"
    assert 0 < float((changed[1] - original).norm() / original.norm()) < 0.2
    kl = FinalKl(blocks, ids_SL)
    costs = group_costs(kl, library, groups, NoProgress())
    for group, cost, errors in zip(groups, costs, library.errors, strict=True):
        worst = max(errors, key=lambda scheme: errors[scheme])
        alone = library.changed(group.layer, dict.fromkeys(group.modules, worst))
        nats = float(kl.whole(_at(group.layer, alone)).mean())
        assert cost[worst] == pytest.approx(max(0.0, nats), rel=1e-6, abs=1e-12)
        assert cost["w8a8"] == pytest.approx(cost[worst] * errors["w8a8"] / errors[worst])


def _at(layer: int, tensors: dict[str, Tensor]) -> Callable[[int], dict[str, Tensor]]:
    return lambda index: tensors if index == layer else {}
