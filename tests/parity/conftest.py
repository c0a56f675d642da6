"""Shared by the parity tests: tiny Llamas from transformers, the shipped model, both configured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compress import compress
from engine.config import CacheConfig, EngineConfig, KernelConfig, SchedulerConfig

MakeConfig = Callable[..., EngineConfig]
MakeLlama = Callable[..., transformers.LlamaForCausalLM]


@pytest.fixture(autouse=True, scope="session")
def quiet_and_single_threaded() -> None:
    """Tests share the machine, and transformers' advice is not about this code."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The model that ships with the server."""
    return Path(__file__).parents[2] / "server" / "assets" / "venturi-mini"


@pytest.fixture(scope="session")
def w8a8_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, compressed."""
    folder = tmp_path_factory.mktemp("artefact") / "w8a8"
    compress("w8a8", model_dir, folder)
    return folder


@pytest.fixture(scope="session")
def make_config() -> MakeConfig:
    """An engine's configuration for a folder."""

    def make(
        folder: Path,
        *,
        dtype: str = "fp32",
        blocks: int = 64,
        block_size: int = 4,
        token_budget: int = 256,
    ) -> EngineConfig:
        return EngineConfig(
            model_dir=folder,
            cache=CacheConfig(dtype=dtype, block_size=block_size, blocks=blocks),
            scheduler=SchedulerConfig(max_sequences=8, token_budget=token_budget),
            kernels=KernelConfig(threads=1),
        )

    return make


@pytest.fixture(scope="session")
def make_llama() -> MakeLlama:
    """A random Llama of odd sizes, in float32."""

    def make(**changes: Any) -> transformers.LlamaForCausalLM:
        torch.manual_seed(7)
        values: dict[str, Any] = {
            "vocab_size": 101,
            "hidden_size": 36,
            "intermediate_size": 53,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 10,
            "max_position_embeddings": 96,
            "initializer_range": 0.2,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
        }
        config = transformers.LlamaConfig(**values | changes)
        config._attn_implementation = "eager"
        model = transformers.LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
        return model

    return make
