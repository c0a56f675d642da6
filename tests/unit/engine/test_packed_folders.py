"""Folders that other programs quantised: read, executed and reported as they are, or refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from torch import Tensor

from engine.config import CacheConfig, EngineConfig, KernelConfig
from engine.core import EngineCore
from engine.errors import ModelLoadError
from engine.formats import awq, gptq, pack_quantized
from engine.formats.grouped import GroupedWeight
from engine.scoring import Scorer

HIDDEN, MLP, VOCABULARY, LAYERS, GROUP = 64, 96, 31, 2, 32
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}
MODULES = [f"model.layers.{layer}.{name}" for layer in range(LAYERS) for name in SHAPES]
DOWN = MODULES[-1]
IDS = [1, 5, 30, 2, 2, 17]
# (module, its floating weight [N, K]) -> tensors by suffix.
Pack = Callable[[str, Tensor], dict[str, Tensor]]


def dense(module: str) -> Tensor:
    generator = torch.Generator().manual_seed(MODULES.index(module))
    shape = SHAPES[module.split(".", 3)[-1]]
    return torch.randn(shape, generator=generator) * 0.1


def write(folder: Path, pack: Pack | None, quantization: dict[str, Any] | None) -> Path:
    """``pack`` None: the weights are floating."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(99)
    embedding = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(HIDDEN)}
    for layer in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(HIDDEN)
    for module in MODULES:
        weight = dense(module)
        found = {"weight": weight} if pack is None else pack(module, weight)
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in found.items()}
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    own = {} if quantization is None else {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(CONFIG | own))
    return folder


def config(folder: Path) -> EngineConfig:
    return EngineConfig(
        model_dir=folder,
        cache=CacheConfig(blocks=16, block_size=4, dtype="fp32"),
        kernels=KernelConfig(threads=1, allow_slow=True),
    )


def logits(folder: Path) -> Tensor:
    return Scorer(config(folder)).logits(IDS)


def refused(folder: Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        EngineCore.from_config(config(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rounded(weight_NK: Tensor, *, zeros: bool, bits: int = 4, group: int = GROUP) -> GroupedWeight:
    """To nearest, without zero points of 0 (unsigned), which v1 does not know."""
    groups = weight_NK.unflatten(1, (-1, group))
    half = 1 << (bits - 1)
    scale_NG = (groups.abs().amax(2) / (half - 1)).half().float()
    zero_NG = None
    if zeros:
        zero_NG = (torch.arange(scale_NG.numel()).view_as(scale_NG) % 5 - 2).to(torch.int8)
    shift = 0 if zero_NG is None else zero_NG[..., None]
    q = ((groups / scale_NG[..., None]).round() + shift).clamp(-half, half - 1).to(torch.int8)
    return GroupedWeight(q.flatten(1), scale_NG.half(), zero_NG, group, bits)


def reference(tmp_path: Path, *, zeros: bool, bits: int, group: int = GROUP) -> Tensor:
    """Logits of the same weights as a pack-quantized folder."""

    def pack(_: str, weight: Tensor) -> dict[str, Tensor]:
        return pack_quantized.pack(rounded(weight, zeros=zeros, bits=bits, group=group))

    scheme = pack_quantized.config_group(["Linear"], bits, group, symmetric=not zeros)
    quantization = {"quant_method": "compressed-tensors", "format": pack_quantized.FORMAT}
    quantization |= {"config_groups": {"group_0": scheme}}
    return logits(write(tmp_path / "packed", pack, quantization))


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [True, False])
def test_gptq_is_served_as_it_is(
    tmp_path: Path, zeros: bool, bits: int, checkpoint_format: str
) -> None:
    version = 1 if checkpoint_format == "gptq" else 2

    def pack(_: str, weight: Tensor) -> dict[str, Tensor]:
        return gptq.pack(rounded(weight, zeros=zeros, bits=bits), version=version)

    quantization = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "sym": not zeros}
    quantization |= {"checkpoint_format": checkpoint_format, "desc_act": False}
    folder = write(tmp_path / "gptq", pack, quantization)
    assert torch.equal(logits(folder), reference(tmp_path, zeros=zeros, bits=bits))
    report = EngineCore.from_config(config(folder)).report()
    assert (report.format, report.weights) == (checkpoint_format, f"int{bits}")
    assert report.activations == "float32"
    layers = [layer for layer in report.layers if layer.name in MODULES]
    assert len(layers) == len(MODULES)
    assert {layer.execution for layer in layers} == {f"int{bits} x float32"}
    assert report.parameters == sum(dense(m).numel() for m in MODULES) + (VOCABULARY + 5) * HIDDEN


@pytest.mark.parametrize("name", ["quantization_config", "quantize_config.json"])
def test_gptq_by_activation_is_served(tmp_path: Path, name: str) -> None:
    """Linears with the same input have the same order, and are one layer."""

    def order(module: str) -> Tensor:
        columns = SHAPES[module.split(".", 3)[-1]][1]
        shuffled_K = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
        return shuffled_K.view(-1, GROUP).sort(1)[0].flatten()

    def pack(module: str, weight: Tensor) -> dict[str, Tensor]:
        order_K = order(module)
        return gptq.pack(rounded(weight[:, order_K], zeros=True), order_K, version=1)

    def floating(module: str, weight: Tensor) -> dict[str, Tensor]:
        order_K = order(module)
        found_NK = rounded(weight[:, order_K], zeros=True).dequantize()
        return {"weight": found_NK[:, order_K.argsort()]}

    own = {"bits": 4, "group_size": GROUP, "desc_act": True, "sym": False}
    inside = {"quant_method": "gptq", **own} if name == "quantization_config" else None
    folder = write(tmp_path / "gptq", pack, inside)
    if inside is None:
        (folder / name).write_text(json.dumps(own))
    wanted = logits(write(tmp_path / "float", floating, None))
    assert torch.allclose(logits(folder), wanted, atol=1e-4)
    report = EngineCore.from_config(config(folder)).report()
    assert {layer.storage for layer in report.layers if layer.name in MODULES} == {"int4"}


@pytest.mark.parametrize("name", ["quantization_config", "quant_config.json"])
@pytest.mark.parametrize("group", [GROUP, HIDDEN])
def test_awq_is_served_as_it_is(tmp_path: Path, group: int, name: str) -> None:
    def pack(module: str, weight: Tensor) -> dict[str, Tensor]:
        if module == DOWN:  # as modules_to_not_convert would have it
            return {"weight": weight}
        return awq.pack(rounded(weight, zeros=True, group=min(group, GROUP)))

    def floating(module: str, weight: Tensor) -> dict[str, Tensor]:
        if module != DOWN:
            weight = rounded(weight, zeros=True, group=min(group, GROUP)).dequantize()
        return {"weight": weight}

    inside: dict[str, Any] | None = {"quant_method": "awq", "bits": 4, "version": "gemm"}
    inside |= {"group_size": GROUP, "zero_point": True}
    own = {"zero_point": True, "q_group_size": GROUP, "w_bit": 4, "version": "GEMM"}
    folder = write(tmp_path / "awq", pack, inside if name == "quantization_config" else None)
    if name != "quantization_config":
        (folder / name).write_text(json.dumps(own))
    found, wanted = logits(folder), logits(write(tmp_path / "float", floating, None))
    assert torch.allclose(found, wanted, atol=1e-4)
    report = EngineCore.from_config(config(folder)).report()
    assert (report.format, report.weights, report.activations) == (
        "awq",
        "int4 and float32",
        "float32",
    )
    storage = {layer.name: layer.storage for layer in report.layers}
    assert (storage[MODULES[0]], storage[DOWN]) == ("int4", "float32")


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True}


def broken(change: Callable[[dict[str, Tensor]], None]) -> Pack:
    """GPTQ folders with something wrong in the last layer."""

    def pack(module: str, weight: Tensor) -> dict[str, Tensor]:
        tensors = gptq.pack(rounded(weight, zeros=False), version=1)
        if module == DOWN:
            change(tensors)
        return tensors

    return pack


def set_to(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("scales"), "scales is missing"),
        (lambda tensors: tensors.pop("qzeros"), "qzeros is missing"),
        (set_to("qweight", torch.zeros(12, 32, dtype=torch.int32)), "scales must be"),
        (set_to("qweight", torch.zeros(11, 64, dtype=torch.int32)), "not of 4 or 8 bits"),
        (set_to("qzeros", torch.zeros(3, 8, dtype=torch.int32)), "not in the middle"),
        (set_to("scales", torch.full((3, 64), float("nan"))), "NaN or infinite"),
        (set_to("g_idx", torch.zeros(96, dtype=torch.int32)), "g_idx does not divide"),
        (set_to("bias", torch.ones(64)), "a bias that config.json does not ask for"),
        (set_to("more", torch.ones(64)), "such as"),
    ],
)
def test_a_broken_layer_is_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    found = refused(write(tmp_path / "gptq", broken(change), GPTQ))
    assert message in found
    assert DOWN in found


def test_a_bias_of_nothing_is_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "with", broken(set_to("bias", torch.zeros(64))), GPTQ)
    without = write(tmp_path / "without", broken(lambda tensors: None), GPTQ)
    assert torch.equal(logits(folder), logits(without))


def test_packed_tensors_without_a_configuration_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "gptq", broken(lambda tensors: None), None)
    assert "copy the quantization_config too" in refused(folder)


def test_zero_points_of_symmetric_grids_may_be_stored(tmp_path: Path) -> None:
    pack, _, quantization = theirs(preset("W8A8"))

    def with_zeros(value: int) -> Pack:
        def packed(module: str, weight: Tensor) -> dict[str, Tensor]:
            zeros = torch.full((len(weight), 1), value, dtype=torch.int8)
            return pack(module, weight) | {"weight_zero_point": zeros}

        return packed

    wanted = logits(write(tmp_path / "without", pack, quantization))
    assert torch.equal(logits(write(tmp_path / "with", with_zeros(0), quantization)), wanted)
    assert "must be 0" in refused(write(tmp_path / "ones", with_zeros(1), quantization))


def test_v2_tensors_that_are_called_v1_are_refused(tmp_path: Path) -> None:
    def pack(_: str, weight: Tensor) -> dict[str, Tensor]:
        return gptq.pack(rounded(weight, zeros=False), version=2)

    assert "not of checkpoint_format gptq" in refused(write(tmp_path / "v2", pack, GPTQ))


def theirs(scheme: QuantizationScheme) -> tuple[Pack, Pack, dict[str, Any]]:
    """compressed-tensors' own files: tensors, what they decompress to, and the configuration."""
    args = scheme.weights
    assert args is not None
    kind = "pack-quantized" if scheme.input_activations is None else f"{args.type}-quantized"
    compressor: Any = BaseCompressor.get_value_from_registry(kind)

    def pack(_: str, weight: Tensor) -> dict[str, Tensor]:
        size = args.group_size or weight.shape[1]
        groups = weight.unflatten(1, (-1, size))
        scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), args)
        state = {"weight": weight, "weight_scale": scale}
        if not args.symmetric:
            state["weight_zero_point"] = zero
        packed: dict[str, Tensor] = compressor.compress(state, scheme)
        return packed

    def floating(module: str, weight: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = compressor.decompress(pack(module, weight), scheme)
        return {"weight": state["weight"]}

    group = json.loads(scheme.model_dump_json()) | {"format": kind}
    quantization = {"quant_method": "compressed-tensors", "format": kind}
    return pack, floating, quantization | {"config_groups": {"group_0": group}}


def preset(name: str, **weights: Any) -> QuantizationScheme:
    scheme = preset_name_to_scheme(name, ["Linear"])
    assert scheme.weights is not None
    size = {"group_size": GROUP} if scheme.weights.strategy == "group" else {}
    args = scheme.weights.model_dump() | size | weights
    return scheme.model_copy(update={"weights": QuantizationArgs(**args)})


@pytest.mark.parametrize(
    ("scheme", "execution"),
    [
        (preset("W4A16"), "int4 x float32"),
        (preset("W4A16_ASYM"), "int4 x float32"),
        (preset("W8A16"), "int8 x float32"),
        (preset("W8A16", symmetric=False), "int8 x float32"),
        (preset("W8A16", strategy="channel", group_size=None), "int8 x float32"),
        (preset("W4A16", strategy="channel", group_size=None), "int4 x float32"),
        (preset("W4A8"), "int4 x int8"),
        (preset("W8A8"), "int8 x int8"),
        (preset("FP8_DYNAMIC"), "float8_e4m3 x float8_e4m3"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_compressed_tensors_own_files(
    tmp_path: Path, scheme: QuantizationScheme, execution: str
) -> None:
    pack, floating, quantization = theirs(scheme)
    folder = write(tmp_path / "theirs", pack, quantization)
    wanted = logits(write(tmp_path / "float", floating, None))
    activations = execution.rsplit(" ", 1)[-1]
    # Rounding activations is part of the arithmetic.
    share = {"float32": 1e-5, "int8": 0.01, "float8_e4m3": 0.05}[activations]
    near = share * float(wanted.abs().max())
    assert torch.allclose(logits(folder), wanted, atol=near)
    report = EngineCore.from_config(config(folder)).report()
    assert {layer.execution for layer in report.layers if layer.name in MODULES} == {execution}


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("FP8", "weights.strategy is 'tensor'"),
        ("FP8_BLOCK", "weights.strategy is 'block'"),
        ("W3A16", "num_bits is 3"),
        ("W6A16", "num_bits is 6"),
        ("W4AFP8", "input_activations.type is 'float'"),
        ("W4A4", "input_activations.num_bits is 4"),
        ("NVFP4", "nvfp4-pack-quantized"),
        ("MXFP4", "mxfp4-pack-quantized"),
    ],
)
def test_schemes_without_arithmetic_are_refused_by_name(
    tmp_path: Path, name: str, named: str
) -> None:
    scheme = preset_name_to_scheme(name, ["Linear"])
    kind = infer_module_format(torch.nn.Linear, scheme).value
    group = json.loads(scheme.model_dump_json()) | {"format": kind}
    quantization = {"quant_method": "compressed-tensors", "format": kind}
    folder = write(tmp_path / "x", None, quantization | {"config_groups": {"group_0": group}})
    found = refused(folder)
    assert named in found
    assert "--recipe" in found


def test_int8_in_groups_is_not_served_with_int8_activations(tmp_path: Path) -> None:
    pack, _, quantization = theirs(preset("W8A16"))
    folder = write(tmp_path / "w8", pack, quantization)
    (folder / "venturi.json").write_text('{"runtime": {"activations": "int8"}}')
    assert "8 bits in groups are served with float activations" in refused(folder)


def test_fp8_is_loaded_where_slowness_is_allowed(tmp_path: Path) -> None:
    pack, _, quantization = theirs(preset("FP8_DYNAMIC"))
    folder = write(tmp_path / "fp8", pack, quantization)
    report = EngineCore.from_config(config(folder)).report()
    assert (report.weights, report.activations) == ("float8_e4m3", "float8_e4m3")
    assert "float8_e4m3=reference (slow)" in report.kernels
    assert report.format == "compressed-tensors/float-quantized"
    strict = replace(config(folder), kernels=KernelConfig(threads=1))
    with pytest.raises(ModelLoadError, match="serve it with --allow-slow"):
        EngineCore.from_config(strict)


def test_mixed_precision_is_served(tmp_path: Path) -> None:
    four, eight = theirs(preset("W4A16_ASYM")), theirs(preset("W8A8"))

    def choose(module: str) -> int:
        return int(module.endswith(("down_proj", "v_proj")))

    def mixed(part: int) -> Pack:
        def pack(module: str, weight: Tensor) -> dict[str, Tensor]:
            chosen: Pack = (four, eight)[choose(module)][part]  # type: ignore[assignment]
            return chosen(module, weight)

        return pack

    groups = {
        f"group_{i}": one[2]["config_groups"]["group_0"]
        | {"targets": [module for module in MODULES if choose(module) == i]}
        for i, one in enumerate((four, eight))
    }
    quantization = four[2] | {"format": "mixed-precision", "config_groups": groups}
    folder = write(tmp_path / "mixed", mixed(0), quantization)
    wanted = logits(write(tmp_path / "float", mixed(1), None))
    assert torch.allclose(logits(folder), wanted, atol=0.01 * float(wanted.abs().max()))
    report = EngineCore.from_config(config(folder)).report()
    execution = {layer.name: layer.execution for layer in report.layers}
    for module in MODULES:
        assert execution[module] == ("int4 x float32", "int8 x int8")[choose(module)]
