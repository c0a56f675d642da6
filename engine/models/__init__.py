"""Model families: architecture name in config.json -> the function that maps it."""

from collections.abc import Callable, Collection
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from engine.errors import ModelLoadError
from engine.models import (
    gemma,
    gpt2,
    gpt_neox,
    granite,
    llama,
    mistral,
    mixtral,
    mpt,
    olmo2,
    opt,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
    stablelm,
)
from engine.models.config import refuse
from engine.models.spec import ModelSpec

FAMILIES: dict[str, Callable[[dict[str, Any]], ModelSpec]] = {
    "GPT2LMHeadModel": gpt2.spec,
    "GPTNeoXForCausalLM": gpt_neox.spec,
    "Gemma2ForCausalLM": gemma.gemma2,
    "Gemma3ForCausalLM": gemma.gemma3,
    "GraniteForCausalLM": granite.spec,
    "LlamaForCausalLM": llama.spec,
    "MistralForCausalLM": mistral.spec,
    "MixtralForCausalLM": mixtral.spec,
    "MptForCausalLM": mpt.spec,
    "OPTForCausalLM": opt.spec,
    "Olmo2ForCausalLM": olmo2.spec,
    "Phi3ForCausalLM": phi3.spec,
    "Qwen2ForCausalLM": qwen2.spec,
    "Qwen3ForCausalLM": qwen3.spec,
    "Qwen3MoeForCausalLM": qwen3_moe.spec,
    "SmolLM3ForCausalLM": smollm3.spec,
    "StableLmForCausalLM": stablelm.spec,
}


def model_spec(folder: Path, config: dict[str, Any], tensors: Collection[str]) -> ModelSpec:
    """The spec of the model in ``folder``, whose weights are named ``tensors``.

    Raises ``ModelLoadError``.
    """
    names = config.get("architectures") or ["(none)"]
    family = FAMILIES.get(str(names[0])) if isinstance(names, list) else None
    if family is None:
        raise ModelLoadError(
            f"{folder / 'config.json'} names the architecture {names}; "
            f"supported: {', '.join(FAMILIES)}"
        )
    try:
        refuse(config, per_layer_config=None)
        spec = family(config)
    except KeyError as error:
        raise ModelLoadError(f"{folder / 'config.json'} lacks {error}") from error
    except (ArithmeticError, AttributeError, IndexError, TypeError, ValueError) as error:
        raise ModelLoadError(f"{folder / 'config.json'}: {error}") from error
    return spec if f"{spec.embedding}.weight" in tensors else _without_prefix(spec)


def _without_prefix(spec: ModelSpec) -> ModelSpec:
    """The spec with the names of a checkpoint that leaves ``optional_prefix`` out."""

    def strip(value: Any) -> Any:
        if isinstance(value, str):
            return value.removeprefix(spec.optional_prefix)
        if isinstance(value, tuple):
            return tuple(strip(item) for item in value)
        if is_dataclass(value) and not isinstance(value, type):
            changed = {one.name: strip(getattr(value, one.name)) for one in fields(value)}
            return replace(value, **changed)
        return value

    stripped: ModelSpec = strip(spec)
    return stripped
