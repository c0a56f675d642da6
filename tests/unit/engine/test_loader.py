"""Loading: what is in memory is what the folder says, and a folder that lies is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.config import CacheConfig, EngineConfig, KernelConfig, SchedulerConfig
from engine.core import EngineCore
from engine.errors import ModelLoadError
from engine.formats.int_quantized import config_group, pack
from engine.formats.runtime import MANIFEST_NAME
from engine.layers.weight import quantize_int8
from engine.sampler import sample
from engine.scoring import Scorer
from engine.types import FinishReason, Request, SamplingParams

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, LAYERS, VOCABULARY = 12, 4, 2, 6, 20, 2, 31
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
O_PROJ = "model.layers.1.self_attn.o_proj"


def weights(seed: int = 0) -> dict[str, Tensor]:
    """Random float32 weights under their Hugging Face names."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (VOCABULARY, HIDDEN),
        "lm_head": (VOCABULARY, HIDDEN),
        "model.norm": (HIDDEN,),
    }
    for layer in range(LAYERS):
        base = f"model.layers.{layer}"
        shapes |= {
            f"{base}.self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
            f"{base}.self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{base}.self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{base}.self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
            f"{base}.mlp.gate_proj": (MLP, HIDDEN),
            f"{base}.mlp.up_proj": (MLP, HIDDEN),
            f"{base}.mlp.down_proj": (HIDDEN, MLP),
            f"{base}.input_layernorm": (HIDDEN,),
            f"{base}.post_attention_layernorm": (HIDDEN,),
        }
    return {
        f"{name}.weight": torch.randn(shape, generator=generator) * 0.3
        for name, shape in shapes.items()
    }


def quantised(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The projections as int8 with their scales, the rest as it is."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if module.endswith("_proj"):
            out |= {f"{module}.{key}": t for key, t in pack(quantize_int8(tensor)).items()}
        else:
            out[name] = tensor
    return out


def write(
    folder: Path,
    tensors: dict[str, Tensor] | None = None,
    runtime: dict[str, str] | None = None,
    **config: Any,
) -> Path:
    save_file(weights() if tensors is None else tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    if runtime is not None:
        (folder / MANIFEST_NAME).write_text(json.dumps({"runtime": runtime}))
    return folder


QUANTISATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {"group_0": config_group(["Linear"])},
}


def config(folder: Path, **cache: Any) -> EngineConfig:
    cache = {"blocks": 16, "block_size": 4, **cache}
    return EngineConfig(
        model_dir=folder,
        cache=CacheConfig(**cache),
        scheduler=SchedulerConfig(max_sequences=4, token_budget=16),
        kernels=KernelConfig(threads=1),
    )


def load(folder: Path, **cache: Any) -> EngineCore:
    return EngineCore.from_config(config(folder, **cache))


def refused(folder: Path, **cache: Any) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load(folder, **cache)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_report_tells_what_is_in_memory(tmp_path: Path) -> None:
    tensors = weights()
    report = load(write(tmp_path)).report()
    assert report.parameters == sum(t.numel() for t in tensors.values())
    matrices = [t for name, t in tensors.items() if t.ndim == 2 and "embed" not in name]
    assert report.weight_bytes == 4 * sum(t.numel() for t in matrices)
    assert (report.weights, report.activations, report.head) == ("float32", "float32", "float32")
    assert (report.architecture, report.vocabulary_size) == ("LlamaForCausalLM", VOCABULARY)
    assert (report.context_length, report.max_sequence_tokens) == (64, 64)
    assert (report.kv_dtype, report.kv_block_size, report.kv_blocks) == ("int8", 4, 16)
    assert report.kv_bytes == 16 * 4 * LAYERS * KV_HEADS * (HEAD_DIM + 4) * 2
    assert report.format == "safetensors"


def test_weights_rounded_as_they_are_loaded(tmp_path: Path) -> None:
    asked = config(write(tmp_path))
    kernels = replace(asked.kernels, int8_weights=True)
    report = EngineCore.from_config(replace(asked, kernels=kernels)).report()
    assert {layer.storage for layer in report.layers} == {"int8"}
    assert (report.weights, report.activations, report.head) == ("int8", "int8", "int8")


def test_every_linear_layer_is_listed_by_its_own_name(tmp_path: Path) -> None:
    report = load(write(tmp_path)).report()
    wanted = {n.removesuffix(".weight") for n in weights() if "proj" in n or "lm_head" in n}
    assert {layer.name for layer in report.layers} == wanted
    assert len(report.layers) == len(wanted)
    sizes = {f"{layer.name}.weight": layer.bytes for layer in report.layers}
    assert all(size == 4 * weights()[name].numel() for name, size in sizes.items())


def test_a_compressed_folder_is_reported_as_such(tmp_path: Path) -> None:
    folder = write(tmp_path, quantised(weights()), quantization_config=QUANTISATION)
    report = load(folder).report()
    assert (report.weights, report.activations, report.head) == ("int8", "int8", "float32")
    assert report.format == "compressed-tensors/int-quantized"
    assert report.parameters == sum(t.numel() for t in weights().values())
    kinds = {layer.storage for layer in report.layers if layer.name != "lm_head"}
    assert kinds == {"int8"}


def test_a_compressed_folder_computes_nearly_the_same(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("dense", "int8")]
    for folder, tensors in zip(folders, (weights(), quantised(weights())), strict=True):
        folder.mkdir()
        write(folder, tensors)
    ids = [1, 5, 30, 2, 2, 17]
    dense, int8 = (Scorer(config(folder, dtype="fp32")).logits(ids) for folder in folders)
    assert float((dense - int8).abs().max()) < 0.05 * float(dense.abs().max())
    assert not torch.equal(dense, int8)


def test_a_partly_compressed_layer_runs_unfused(tmp_path: Path) -> None:
    tensors = quantised(weights())
    for name in ("q_proj", "up_proj"):
        for layer in range(LAYERS):
            part = "self_attn" if name == "q_proj" else "mlp"
            module = f"model.layers.{layer}.{part}.{name}"
            del tensors[f"{module}.weight_scale"]
            tensors[f"{module}.weight"] = weights()[f"{module}.weight"]
    report = load(write(tmp_path, tensors)).report()
    storage = {layer.name.rsplit(".", 1)[-1]: layer.storage for layer in report.layers}
    assert (storage["q_proj"], storage["k_proj"]) == ("float32", "int8")
    assert (storage["gate_proj"], storage["up_proj"]) == ("int8", "float32")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", ["int8", "keep"])
def test_the_head_is_stored_as_the_runtime_asks(tmp_path: Path, head: str, tied: bool) -> None:
    tensors = weights()
    if tied:
        del tensors["lm_head.weight"]
    runtime = {"head": head, "kv_dtype": "fp32"}
    report = load(write(tmp_path, tensors, runtime, tie_word_embeddings=tied)).report()
    assert report.head == {"int8": "int8", "keep": "float32"}[head]
    assert report.kv_dtype == "fp32"
    assert report.parameters == sum(t.numel() for t in tensors.values())


def test_the_configured_kv_dtype_wins_over_the_runtime(tmp_path: Path) -> None:
    folder = write(tmp_path, runtime={"kv_dtype": "fp32"})
    assert load(folder, dtype="int8").report().kv_dtype == "int8"


def test_progress_counts_the_layers(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    EngineCore.from_config(config(write(tmp_path)), lambda item, items: seen.append((item, items)))
    assert seen == [(1, LAYERS), (2, LAYERS)]


@pytest.mark.parametrize("name", ["model.norm", "model.embed_tokens", "lm_head", O_PROJ])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    tensors = weights()
    del tensors[f"{name}.weight"]
    assert name in refused(write(tmp_path, tensors))


@pytest.mark.parametrize("name", ["model.norm", "model.embed_tokens", "lm_head", O_PROJ])
def test_a_tensor_of_another_shape_is_named(tmp_path: Path, name: str) -> None:
    tensors = weights()
    tensors[f"{name}.weight"] = torch.zeros(3, 3)
    assert name in refused(write(tmp_path, tensors))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.norm", "model.embed_tokens", "lm_head", O_PROJ])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, name: str, bad: float) -> None:
    tensors = weights()
    tensors[f"{name}.weight"].view(-1)[3] = bad
    assert name in refused(write(tmp_path, tensors))


@pytest.mark.parametrize("name", ["model.norm", "model.embed_tokens", "lm_head", O_PROJ])
def test_integer_weights_without_scales_are_named(tmp_path: Path, name: str) -> None:
    tensors = weights()
    tensors[f"{name}.weight"] = torch.ones_like(tensors[f"{name}.weight"], dtype=torch.int8)
    assert name in refused(write(tmp_path, tensors))


@pytest.mark.parametrize(
    "scale",
    [
        torch.ones(HIDDEN),
        torch.ones(1, HIDDEN),
        torch.ones(HIDDEN, 1, dtype=torch.int32),
        torch.full((HIDDEN, 1), float("nan")),
        torch.full((HIDDEN, 1), float("inf")),
    ],
    ids=["flat", "row", "int32", "nan", "inf"],
)
def test_scales_that_make_no_sense_are_named(tmp_path: Path, scale: Tensor) -> None:
    tensors = quantised(weights())
    tensors[f"{O_PROJ}.weight_scale"] = scale
    assert O_PROJ in refused(write(tmp_path, tensors, quantization_config=QUANTISATION))


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["BertModel"]},
        {"architectures": None},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": []},
        {"hidden_act": "mish"},
        {"hidden_act": ["silu"]},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
        {"rope_parameters": {"rope_type": ["linear"], "factor": 4.0}},
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        {"rope_scaling": {"type": "linear"}},
        {"rope_scaling": {"type": "linear", "factor": 0.0}},
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        {"rope_parameters": "default"},
        {"rope_parameters": {"rope_theta": "far"}},
        {"num_key_value_heads": 3},
        {"head_dim": 5},
        {"head_dim": -6},
        {"hidden_size": "wide"},
        {"hidden_size": None},
        {"intermediate_size": 0},
        {"num_attention_heads": 0, "head_dim": None, "num_key_value_heads": None},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 3},
        {"vocab_size": 32},
        {"vocab_size": 0},
        {"max_position_embeddings": 0},
        {"max_position_embeddings": -5},
        {"max_position_embeddings": float("inf")},
        {"rms_norm_eps": [1e-5]},
        {"quantization_config": {"quant_method": "awq"}},
    ],
)
def test_a_config_that_makes_no_sense_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    refused(write(tmp_path, **change))


def test_weights_that_the_config_does_not_ask_for_are_named(tmp_path: Path) -> None:
    bias = O_PROJ.replace("o_proj", "q_proj.bias")
    assert bias in refused(write(tmp_path, weights() | {bias: torch.zeros(HEADS * HEAD_DIM)}))


def test_constants_of_older_checkpoints_are_ignored(tmp_path: Path) -> None:
    """And a head that is stored although it is tied."""
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    load(write(tmp_path, weights() | extra, tie_word_embeddings=True))


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "rms_norm_eps", "hidden_act"])
def test_a_config_that_lacks_something_is_refused(tmp_path: Path, key: str) -> None:
    write(tmp_path)
    kept = {name: value for name, value in CONFIG.items() if name != key}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    assert key in refused(tmp_path)


def test_an_unknown_kv_dtype_is_refused(tmp_path: Path) -> None:
    assert "fp8" in refused(write(tmp_path), dtype="fp8")


def test_kv_memory_that_holds_no_block_is_refused(tmp_path: Path) -> None:
    assert "block" in refused(write(tmp_path), blocks=None, memory_bytes=100)


def test_the_pool_takes_no_more_than_its_memory_and_no_more_than_can_be_used(
    tmp_path: Path,
) -> None:
    folder = write(tmp_path)
    small = load(folder, blocks=None, memory_bytes=5000).report()
    assert small.kv_bytes <= 5000 < small.kv_bytes + small.kv_bytes // small.kv_blocks
    large = load(folder, blocks=None).report()
    assert large.kv_blocks == 4 * 64 // 4, "four sequences of the whole context"


@pytest.mark.parametrize("block_size", [1, 3, 100])
def test_any_block_size_loads(tmp_path: Path, block_size: int) -> None:
    """Also one that is longer than the context."""
    assert load(write(tmp_path), block_size=block_size).report().kv_block_size == block_size


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_overflows_ends_the_request_and_not_the_engine(
    tmp_path: Path, make_request: Callable[..., Request], temperature: float
) -> None:
    tensors = weights()
    tensors["model.embed_tokens.weight"][:, 0] = 0.0
    tensors["model.embed_tokens.weight"][7, 0] = 9.0
    # The first feature, which token 7 alone has, makes values of layer 0 overflow.
    tensors["model.layers.0.self_attn.v_proj.weight"][:, 0] = 3e38
    core = load(write(tmp_path, tensors))
    sampling = SamplingParams(temperature=temperature, seed=3)
    core.submit(make_request("bad", [1, 7, 2], 3, sampling=sampling))
    core.submit(make_request("good", [1, 6, 2], 3, sampling=sampling))
    reasons: dict[str, FinishReason] = {}
    for _ in range(10):
        reasons |= {one.id: one.reason for one in core.step().finished}
    assert reasons == {"bad": FinishReason.ERROR, "good": FinishReason.LENGTH}
    assert core.stats().blocks_used == 0


def test_a_sampled_token_is_drawn_for_its_own_seed_and_position(
    tmp_path: Path, make_request: Callable[..., Request]
) -> None:
    folder = write(tmp_path)
    core = load(folder, dtype="fp32")
    params = {
        name: SamplingParams(temperature=5.0, seed=seed)
        for name, seed in (("a", 1), ("same", 1), ("other", 2))
    }
    for name, sampling in params.items():
        core.submit(make_request(name, [1, 2, 3], 12, sampling=sampling))
    tokens: dict[str, list[int]] = {name: [] for name in params}
    while core.has_work:
        for event in core.step().tokens:
            tokens[event.id].append(event.token)
    assert tokens["a"] == tokens["same"] != tokens["other"]
    scorer = Scorer(config(folder, dtype="fp32"))
    for name, found in tokens.items():
        logits = scorer.logits([1, 2, 3, *found])[2:-1]
        assert sample(logits, [params[name]] * 12, list(range(12))) == found
