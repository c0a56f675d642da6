"""Logits of the engine's layers, kernels and pages against transformers in float32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.config import EngineConfig
from engine.scoring import Scorer

MakeConfig = Callable[..., EngineConfig]
MakeLlama = Callable[..., transformers.LlamaForCausalLM]

TOLERANCE = 1e-4
FAMILIES: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "tied head": {"tie_word_embeddings": True},
    "one KV head": {"num_key_value_heads": 1, "head_dim": 16},
    "own KV heads": {"num_key_value_heads": 6, "head_dim": 6},
    "another theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "one layer": {"num_hidden_layers": 1, "hidden_size": 12, "num_attention_heads": 2},
}


def ids(length: int, vocabulary: int = 101) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, vocabulary, (length,), generator=generator).tolist()


@torch.no_grad()
def wanted(model: transformers.LlamaForCausalLM, token_ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([token_ids])).logits[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_shape_of_llama(
    name: str, make_llama: MakeLlama, make_config: MakeConfig, tmp_path: Path
) -> None:
    model = make_llama(**FAMILIES[name])
    model.save_pretrained(tmp_path)
    with Scorer(make_config(tmp_path, token_budget=11)) as scorer:
        for length in (1, 2, 7, 33, 96):
            found = scorer.logits(ids(length))
            assert found.shape == (length, 101)
            assert float((found - wanted(model, ids(length))).abs().max()) < TOLERANCE


@pytest.mark.parametrize("token_budget", [8, 9, 37, 256])
@pytest.mark.parametrize("block_size", [1, 5, 16])
def test_every_chunk_and_block(
    token_budget: int,
    block_size: int,
    make_llama: MakeLlama,
    make_config: MakeConfig,
    tmp_path: Path,
) -> None:
    model = make_llama()
    model.save_pretrained(tmp_path)
    config = make_config(
        tmp_path, token_budget=token_budget, block_size=block_size, blocks=-(-77 // block_size)
    )
    with Scorer(config) as scorer:
        for length in (77, 38):  # the second finds the first one's leftovers in its blocks
            found = scorer.logits(ids(length))
            assert float((found - wanted(model, ids(length))).abs().max()) < TOLERANCE


def test_a_sharded_folder(make_llama: MakeLlama, make_config: MakeConfig, tmp_path: Path) -> None:
    model = make_llama()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with Scorer(make_config(tmp_path)) as scorer:
        found = scorer.logits(ids(21))
    assert float((found - wanted(model, ids(21))).abs().max()) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_run_in_float32(
    dtype: torch.dtype, make_llama: MakeLlama, make_config: MakeConfig, tmp_path: Path
) -> None:
    make_llama().to(dtype).save_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with Scorer(make_config(tmp_path)) as scorer:
        found = scorer.logits(ids(21))
    assert float((found - wanted(model, ids(21))).abs().max()) < TOLERANCE


@pytest.mark.parametrize("block_size", [4, 16])
def test_int8_pages_cost_little(
    block_size: int, make_llama: MakeLlama, make_config: MakeConfig, tmp_path: Path
) -> None:
    model = make_llama()
    model.save_pretrained(tmp_path)
    reference = wanted(model, ids(60))
    with Scorer(make_config(tmp_path, dtype="int8", block_size=block_size)) as scorer:
        found = scorer.logits(ids(60))
    error = float((found - reference).abs().max())
    assert TOLERANCE < error < 0.1 * float(reference.abs().max())


def test_the_shipped_model(model_dir: Path, make_config: MakeConfig) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with Scorer(make_config(model_dir, token_budget=100)) as scorer:
        for length in (1, 133, 255):
            found = scorer.logits(ids(length, 4096))
            reference = wanted(model, ids(length, 4096))
            assert float((found - reference).abs().max()) < TOLERANCE * float(reference.abs().max())


def test_a_length_that_does_not_fit_is_refused(
    make_llama: MakeLlama, make_config: MakeConfig, tmp_path: Path
) -> None:
    make_llama().save_pretrained(tmp_path)
    for blocks, most in ((64, 96), (5, 20)):
        with Scorer(make_config(tmp_path, blocks=blocks)) as scorer:
            assert scorer.report.max_sequence_tokens == most
            for length in (0, most + 1):
                with pytest.raises(ValueError, match=str(most)):
                    scorer.logits(ids(length))
            assert len(scorer.logits(ids(most))) == most
