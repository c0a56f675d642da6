"""Families whose layers are laid out in other ways: presets work on them, or refuse by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor

import compress
from compress.errors import CompressError
from compress.recipe import Calibration, Recipe, resolve
from engine.config import CacheConfig, EngineConfig, KernelConfig
from engine.scoring import Scorer
from engine.testing import TOKENIZER_JSON

SIZES: dict[str, Any] = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 96}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 0}
MODELS: dict[str, tuple[type[tf.PreTrainedConfig], dict[str, Any]]] = {
    "gpt2": (
        tf.GPT2Config,
        {"vocab_size": 101, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
        | {"initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0},
    ),
    "qwen3_moe": (
        tf.Qwen3MoeConfig,
        SIZES
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"head_dim": 16, "tie_word_embeddings": False},
    ),
}
LINEARS = {"gpt2": 8, "qwen3_moe": 2 * (4 + 4 * 3)}


def make(family: str, folder: Path) -> Path:
    kind, values = MODELS[family]
    torch.manual_seed(3)
    model = tf.AutoModelForCausalLM.from_config(kind(**values))
    tf.utils.logging.disable_progress_bar()
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(TOKENIZER_JSON)
    return folder


def small(preset: str) -> Recipe:
    """The preset, with little calibration text."""
    recipe = resolve(preset)
    if recipe.calibration is None:
        return recipe
    return replace(recipe, calibration=Calibration(samples=16, length=32))


def logits(folder: Path) -> Tensor:
    cache = CacheConfig(dtype="fp32", block_size=16, blocks=4)
    config = EngineConfig(model_dir=folder, cache=cache, kernels=KernelConfig(threads=1))
    with Scorer(config) as scorer:
        return scorer.logits(list(range(1, 25)))


@pytest.mark.parametrize("preset", ["w8a8", "w4a16-gptq", "w4a8", "sparse50-w8a8"])
@pytest.mark.parametrize("family", MODELS)
def test_presets_on_other_layouts(family: str, preset: str, tmp_path: Path) -> None:
    model, out = make(family, tmp_path / "model"), tmp_path / "out"
    manifest = compress.compress(small(preset), model, out)
    rows = [row for row in manifest.layers if row.method != "none"]
    assert len(rows) == LINEARS[family]
    assert all(row.bits < (9.1 if "w8" in preset else 5.1) for row in rows)
    if "sparse" in preset:
        assert all(row.sparsity is not None and row.sparsity >= 0.49 for row in rows)
    original, found = logits(model), logits(out)
    error = float((found - original).norm() / original.norm())
    assert 0 < error < (0.9 if "sparse" in preset else 0.6 if "w4" in preset else 0.3)


def test_an_expert_that_calibration_never_reaches_is_named(tmp_path: Path) -> None:
    model = make("qwen3_moe", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("layers.1.mlp.gate.weight"):
            tensor.zero_()
            tensor[1], tensor[2], tensor[3] = 1.0, -1.0, 1.0
            tensor[3, ::2] = -1.0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text()) | {"num_experts_per_tok": 1}
    (model / "config.json").write_text(json.dumps(config))
    named = r"layers\.1\.mlp\.experts\.0.*never reached this layer: give other .* under ignore"
    with pytest.raises(CompressError, match=named):
        compress.compress(small("w4a8"), model, tmp_path / "out")
