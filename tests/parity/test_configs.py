"""config.json as it was written before transformers 5, and what is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.errors import ModelLoadError
from engine.layers.rotary import frequencies
from engine.models import FAMILIES, model_spec
from engine.models.rope import rope_spec
from engine.models.spec import ModelSpec


def released(architecture: str, kind: str, sizes: list[int], **keys: Any) -> dict[str, Any]:
    """A config with the keys of Llama's; ``sizes``: hidden, MLP, heads, KV heads, context."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    shared = dict(zip((*names, "max_position_embeddings"), sizes, strict=True))
    shared |= {"hidden_act": "silu", "num_hidden_layers": 13, "vocab_size": 50000}
    shared |= {"rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "tie_word_embeddings": False}
    return {"architectures": [architecture], "model_type": kind, "pad_token_id": 0} | shared | keys


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LONGROPE = {"type": "longrope", "short_factor": [1 + i / 48 for i in range(48)]}
LONGROPE |= {"long_factor": [2.0 + i for i in range(48)]}
QWEN = {"max_window_layers": 28, "sliding_window": 131072, "use_sliding_window": False}
GEMMA = {"head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256}
GEMMA |= {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": None}
# Keys and sizes as released models have them, with fewer layers and words.
RELEASED: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": released(
        "LlamaForCausalLM", "llama", [4096, 14336, 32, 8, 131072], rope_scaling=LLAMA3
    ),
    "Llama-2-7b, scaled": released(
        "LlamaForCausalLM",
        "llama",
        [4096, 11008, 32, 32, 4096],
        rope_scaling={"type": "linear", "factor": 2.0},
    ),
    "Mistral-7B-v0.1": released(
        "MistralForCausalLM", "mistral", [4096, 14336, 32, 8, 32768], sliding_window=4096
    ),
    "Qwen2.5-7B, YaRN": released(
        "Qwen2ForCausalLM", "qwen2", [3584, 18944, 28, 4, 32768], rope_scaling=YARN, **QWEN
    ),
    "Qwen2, windows": released(
        "Qwen2ForCausalLM",
        "qwen2",
        [896, 4864, 14, 2, 32768],
        max_window_layers=5,
        sliding_window=4096,
        use_sliding_window=True,
    ),
    "Qwen3-4B": released(
        "Qwen3ForCausalLM", "qwen3", [2560, 9728, 32, 8, 40960], head_dim=128, **QWEN
    ),
    "Phi-3-mini-128k": released(
        "Phi3ForCausalLM",
        "phi3",
        [3072, 8192, 32, 32, 131072],
        original_max_position_embeddings=4096,
        rope_scaling=LONGROPE,
        sliding_window=262144,
    ),
    "gemma-2-2b": released(
        "Gemma2ForCausalLM",
        "gemma2",
        [2304, 9216, 8, 4, 8192],
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        sliding_window=4096,
        **GEMMA,
    ),
    "gemma-3-4b": released(
        "Gemma3ForCausalLM",
        "gemma3_text",
        [2560, 10240, 8, 4, 131072],
        rope_local_base_freq=12345.0,
        rope_scaling={"factor": 8.0, "rope_type": "linear"},
        sliding_window=1024,
        sliding_window_pattern=6,
        **GEMMA,
    ),
    "OLMo-2-7B": released("Olmo2ForCausalLM", "olmo2", [4096, 11008, 32, 32, 4096]),
    "granite-3.1-8b": released(
        "GraniteForCausalLM",
        "granite",
        [4096, 12800, 32, 8, 131072],
        attention_multiplier=0.0078125,
        embedding_multiplier=12.0,
        logits_scaling=16.0,
        residual_multiplier=0.22,
    ),
    "SmolLM3-3B": released(
        "SmolLM3ForCausalLM", "smollm3", [2048, 11008, 16, 4, 65536], no_rope_layer_interval=4
    ),
    "stablelm-2-1_6b": released(
        "StableLmForCausalLM",
        "stablelm",
        [2048, 5632, 32, 32, 4096],
        layer_norm_eps=1e-05,
        partial_rotary_factor=0.25,
        use_qkv_bias=True,
    ),
    "Mixtral-8x7B": released(
        "MixtralForCausalLM",
        "mixtral",
        [4096, 14336, 32, 8, 32768],
        num_experts_per_tok=2,
        num_local_experts=8,
        sliding_window=None,
    ),
    "Qwen3-30B-A3B": released(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        [2048, 6144, 32, 4, 40960],
        decoder_sparse_step=2,
        head_dim=128,
        mlp_only_layers=[3],
        moe_intermediate_size=768,
        norm_topk_prob=True,
        num_experts=16,
        num_experts_per_tok=8,
        **QWEN,
    ),
    "pythia-160m": {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "rotary_emb_base": 20000,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
        "vocab_size": 50304,
    },
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-05,
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "vocab_size": 50257,
    },
    "opt-125m": {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "ffn_dim": 3072,
        "hidden_size": 768,
        "max_position_embeddings": 2048,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "vocab_size": 50272,
        "word_embed_proj_dim": 768,
    },
    "mpt-7b": {
        "architectures": ["MptForCausalLM"],
        "model_type": "mpt",
        "attn_config": {"alibi": True, "alibi_bias_max": 8, "clip_qkv": None, "qk_ln": False},
        "d_model": 4096,
        "expansion_ratio": 4,
        "max_seq_len": 2048,
        "n_heads": 32,
        "n_layers": 32,
        "no_bias": True,
        "vocab_size": 50432,
    },
}


def spec_of(config: dict[str, Any]) -> ModelSpec:
    return model_spec(Path("model"), config, ())


def rewritten(config: dict[str, Any]) -> dict[str, Any]:
    """The config as transformers understands it and writes it today."""
    kind = transformers.CONFIG_MAPPING[config["model_type"]]
    keys = {name: value for name, value in config.items() if value is not None}
    return {**kind(**keys).to_dict(), "architectures": config["architectures"]}


def test_every_family_has_a_released_model() -> None:
    assert {config["architectures"][0] for config in RELEASED.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", RELEASED)
def test_old_configs_mean_what_transformers_reads_in_them(name: str) -> None:
    config = {key: value for key, value in RELEASED[name].items() if value is not None}
    assert spec_of(config) == spec_of(rewritten(config))


@pytest.mark.parametrize("name", RELEASED)
def test_a_missing_key_is_refused_or_has_the_default_of_transformers(name: str) -> None:
    """But for sizes of which the weights' shapes tell."""
    whole = {key: value for key, value in RELEASED[name].items() if value is not None}
    for key in whole.keys() - {"model_type", "num_key_value_heads", "head_dim"}:
        config = {other: value for other, value in whole.items() if other != key}
        try:
            found = spec_of(config)
        except ModelLoadError:
            continue
        assert found == spec_of(rewritten(config)), key


ROPES = ["Llama-3.1-8B", "Llama-2-7b, scaled", "Qwen2.5-7B, YaRN", "Phi-3-mini-128k"]


@pytest.mark.parametrize("name", ROPES)
def test_rope_scaling_is_that_of_transformers(name: str) -> None:
    config = RELEASED[name]
    found = spec_of(config).ropes[0]
    theirs = transformers.CONFIG_MAPPING[config["model_type"]](**config)
    wanted, amplitude = ROPE_INIT_FUNCTIONS[found.kind](theirs)
    assert torch.allclose(frequencies(found), wanted, rtol=1e-5, atol=0.0)
    assert found.amplitude == pytest.approx(amplitude)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_factor": 1.7},
        {"mscale": 0.7, "mscale_all_dim": 0.5},
        {"beta_fast": 16, "beta_slow": 2, "truncate": False},
        {"factor": 1.0},
    ],
)
def test_yarn_is_that_of_transformers(changes: dict[str, Any]) -> None:
    config = RELEASED["Llama-2-7b, scaled"] | {"rope_scaling": {**YARN, **changes}}
    found = rope_spec(config, 128)
    wanted, amplitude = ROPE_INIT_FUNCTIONS["yarn"](transformers.LlamaConfig(**config))
    assert torch.allclose(frequencies(found), wanted, rtol=1e-5, atol=0.0)
    assert found.amplitude == pytest.approx(amplitude)


def test_longrope_is_served_up_to_the_length_of_its_short_factors() -> None:
    assert spec_of(RELEASED["Phi-3-mini-128k"]).context_length == 4096


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gpt2", {"architectures": ["BertModel"]}, [*FAMILIES, "BertModel"]),
        ("gpt2", {"add_cross_attention": True}, ["add_cross_attention"]),
        ("gpt2", {"per_layer_config": {"0": {"n_inner": 8}}}, ["per_layer_config"]),
        ("gpt2", {"activation_function": "mish"}, ["mish", "gelu_new", "silu"]),
        ("opt-125m", {"word_embed_proj_dim": 512}, ["word_embed_proj_dim", "512"]),
        ("opt-125m", {"layer_norm_elementwise_affine": False}, ["elementwise_affine"]),
        ("mpt-7b", {"attn_config": {"alibi": False}}, ["alibi"]),
        ("mpt-7b", {"attn_config": {"qk_ln": True}}, ["qk_ln"]),
        ("mpt-7b", {"attn_config": {"attn_type": "multiquery_attention"}}, ["multiquery"]),
        ("mpt-7b", {"attn_config": {"prefix_lm": True}}, ["prefix_lm"]),
        ("mpt-7b", {"no_bias": False}, ["no_bias"]),
        ("mpt-7b", {"logit_scale": "inv_sqrt_d_model"}, ["logit_scale"]),
        ("stablelm-2-1_6b", {"qk_layernorm": True}, ["qk_layernorm"]),
        ("pythia-160m", {"rotary_pct": 0.33}, ["even", "21"]),
        ("gemma-2-2b", {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        ("gemma-3-4b", {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        ("gemma-3-4b", {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping"]),
        ("gemma-2-2b", {"layer_types": ["full_attention"]}, ["1 layer_types", "13 layers"]),
        ("gemma-2-2b", {"layer_types": ["chunked_attention"] * 13}, ["chunked", "sliding"]),
        ("gemma-2-2b", {"sliding_window": None}, ["sliding_window"]),
        ("gemma-2-2b", {"sliding_window": 0}, ["window", "0"]),
        ("Mistral-7B-v0.1", {"layer_types": ["full_attention"] * 13}, ["layer_types"]),
        ("Qwen3-4B", {"layer_types": ["sliding_attention"] * 13}, ["use_sliding_window"]),
        ("Qwen3-30B-A3B", {"num_experts_per_tok": 17}, ["17 of 16 experts"]),
        ("SmolLM3-3B", {"no_rope_layers": [1, 0]}, ["argument"]),
        ("OLMo-2-7B", {"rope_scaling": {"rope_type": "dynamic"}}, ["dynamic", "yarn", "linear"]),
        ("OLMo-2-7B", {"rope_scaling": {"rope_type": "proportional"}}, ["proportional"]),
        ("OLMo-2-7B", {"rope_scaling": {"rope_type": "llama3"}}, ["factor"]),
        ("Llama-3.1-8B", {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, ["freq_factor"]),
        ("Phi-3-mini-128k", {"rope_scaling": {**LONGROPE, "short_factor": [1.0]}}, ["1 rope"]),
        ("Phi-3-mini-128k", {"rope_scaling": YARN}, ["yarn"]),
        ("Llama-3.1-8B", {"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial"]),
        ("Llama-3.1-8B", {"rope_parameters": {"full_attention": {}}}, ["rope_parameters"]),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    name: str, changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ModelLoadError) as caught:
        spec_of(RELEASED[name] | changes)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)
