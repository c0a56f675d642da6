"""Small Llama-named checkpoints, made on the spot."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.sources import model_hashes
from engine.testing import TOKENIZER_JSON

MakeModel = Callable[..., Path]


@pytest.fixture(scope="session")
def mini() -> Path:
    return Path(__file__).parents[3] / "server" / "assets" / "venturi-mini"


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """make_model(layers=, hidden=, mlp=, vocab=, dtype=, tied=, shards=, change=) -> folder."""

    def make(
        name: str = "model",
        *,
        layers: int = 2,
        hidden: int = 64,
        mlp: int = 96,
        vocab: int = 100,
        dtype: torch.dtype = torch.bfloat16,
        tied: bool = True,
        shards: int = 1,
        change: Callable[[dict[str, Tensor]], None] = lambda tensors: None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        tensors = _tensors(layers, hidden, mlp, vocab, tied)
        tensors = {key: value.to(dtype) for key, value in tensors.items()}
        change(tensors)
        _save(folder, tensors, shards)
        config = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
        config |= {"model_type": "llama"}
        config |= {"num_hidden_layers": layers, "tie_word_embeddings": tied, "bos_token_id": 0}
        config |= {"hidden_size": hidden, "vocab_size": vocab, "intermediate_size": mlp}
        config |= {"num_attention_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer.json").write_text(TOKENIZER_JSON)
        (folder / "pytorch_model.bin").write_bytes(b"never copied")
        (folder / "pytorch_model.bin.index.json").write_text("{}")
        (folder / "modeling.py").write_text("never copied")
        return folder

    return make


@pytest.fixture(scope="session")
def sabotage() -> Callable[[Path, float], None]:
    """sabotage(artefact, factor): decoder layer 3 as if it had been compressed so badly."""

    def multiply(artefact: Path, factor: float) -> None:
        tensors = load_file(artefact / "model.safetensors")
        for name, tensor in tensors.items():
            if name.startswith("model.layers.3.") and name.endswith("_scale"):
                tensor.mul_(factor)
        save_file(tensors, artefact / "model.safetensors", metadata={"format": "pt"})
        manifest = json.loads((artefact / "venturi.json").read_text())
        manifest["hashes"] = model_hashes(artefact)
        (artefact / "venturi.json").write_text(json.dumps(manifest))

    return multiply


def _tensors(layers: int, hidden: int, mlp: int, vocab: int, tied: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.02

    tensors = {
        "model.embed_tokens.weight": random(vocab, hidden),
        "model.norm.weight": torch.ones(hidden),
    }
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name in "qkvo":
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = random(hidden, hidden)
        tensors[f"{layer}.mlp.gate_proj.weight"] = random(mlp, hidden)
        tensors[f"{layer}.mlp.up_proj.weight"] = random(mlp, hidden)
        tensors[f"{layer}.mlp.down_proj.weight"] = random(hidden, mlp)
        tensors[f"{layer}.input_layernorm.weight"] = torch.ones(hidden)
        tensors[f"{layer}.post_attention_layernorm.weight"] = torch.ones(hidden)
    return tensors if tied else tensors | {"lm_head.weight": random(vocab, hidden)}


def _save(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {key: names[i % shards] for i, key in enumerate(tensors)}
    for name in names:
        part = {key: tensors[key] for key, file in weight_map.items() if file == name}
        save_file(part, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
