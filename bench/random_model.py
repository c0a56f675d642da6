"""Random-weight Llama folders for measurements: right shapes, no meaning."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama's dimensions."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    context: int
    tied: bool = True


TINY = Shape(hidden=256, layers=4, heads=8, kv_heads=4, mlp=704, vocabulary=4096, context=8192)


def write(shape: Shape, folder: Path) -> Path:
    """Writes config.json, bf16 weights of standard deviation 0.02 and a tokenizer of words; returns
    ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    head_dim = shape.hidden // shape.heads
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "head_dim": head_dim,
        "intermediate_size": shape.mlp,
        "max_position_embeddings": shape.context,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": shape.tied,
        "vocab_size": shape.vocabulary,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    torch.manual_seed(0)
    tensors = {"model.embed_tokens.weight": _matrix(shape.vocabulary, shape.hidden)}
    if not shape.tied:
        tensors["lm_head.weight"] = _matrix(shape.vocabulary, shape.hidden)
    tensors["model.norm.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
    for index in range(shape.layers):
        tensors |= _layer(f"model.layers.{index}", shape, head_dim)
    save_file(tensors, folder / "model.safetensors")
    _write_tokenizer(shape.vocabulary, folder)
    return folder


def _layer(name: str, shape: Shape, head_dim: int) -> dict[str, torch.Tensor]:
    q, kv = shape.heads * head_dim, shape.kv_heads * head_dim
    sizes = {
        "self_attn.q_proj": (q, shape.hidden),
        "self_attn.k_proj": (kv, shape.hidden),
        "self_attn.v_proj": (kv, shape.hidden),
        "self_attn.o_proj": (shape.hidden, q),
        "mlp.gate_proj": (shape.mlp, shape.hidden),
        "mlp.up_proj": (shape.mlp, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.mlp),
    }
    tensors = {f"{name}.{part}.weight": _matrix(*size) for part, size in sizes.items()}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{name}.{norm}.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
    return tensors


def _matrix(rows: int, columns: int) -> torch.Tensor:
    return (torch.randn(rows, columns) * 0.02).to(torch.bfloat16)


def _write_tokenizer(vocabulary: int, folder: Path) -> None:
    """Token 17 is the word ``t17``: peers and servers want a tokenizer, the prompts are ids."""
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {f"t{token}": token for token in range(vocabulary)},
            "unk_token": "t0",
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "t0",
        "bos_token": "t1",
        "eos_token": "t2",
        "pad_token": "t2",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
