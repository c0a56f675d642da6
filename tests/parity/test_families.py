"""Every family against transformers in float32: tiny random models, dense and INT8.

``PARITY_TABLE=docs/parity.md pytest tests/parity/test_families.py`` renews the table there.
"""

import json
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor

import compress
from engine.config import EngineConfig
from engine.formats.checkpoint import Checkpoint
from engine.model_runner import ModelRunner
from engine.models import FAMILIES, model_spec
from engine.scoring import Scorer
from engine.testing import TOKENIZER_JSON
from engine.types import (
    Request,
    SamplingParams,
    ScheduledBatch,
    ScheduledSequence,
    Sequence,
    StoppingParams,
)

MakeConfig = Callable[..., EngineConfig]
Zoo = Callable[[str], tuple[transformers.PreTrainedModel, Path]]
Table = dict[str, tuple[float, ...]]
# Longer than all windows, and odd: no multiple of a block or a chunk.
LENGTH = 43
SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 36,
    "intermediate_size": 53,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
NEOX = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
GPT2 = {"vocab_size": 101, "n_embd": 36, "n_layer": 3, "n_head": 6, "n_positions": 96}
GPT2 |= {"initializer_range": 0.2}
OPT = {"vocab_size": 101, "hidden_size": 36, "num_hidden_layers": 3, "ffn_dim": 53}
OPT |= {"num_attention_heads": 6, "max_position_embeddings": 96, "init_std": 0.2}
MPT = {"d_model": 36, "n_heads": 6, "n_layers": 3, "max_seq_len": 96, "vocab_size": 101}
MPT |= {"initializer_range": 0.2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 3.0, "beta_fast": 4.0}
YARN |= {"original_max_position_embeddings": 32}
LONGROPE = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0, 1.3, 2.5]}
LONGROPE |= {"long_factor": [2.0, 4.0, 8.0], "original_max_position_embeddings": 64}
GEMMA = {**SIZES, "head_dim": 10, "sliding_window": 7, "query_pre_attn_scalar": 17}
# Name -> transformers' config, its sizes and what is special.
CASES: dict[str, tuple[type[transformers.PreTrainedConfig], dict[str, Any]]] = {
    "llama": (tf.LlamaConfig, {**SIZES, "head_dim": 10}),
    "llama, biases": (tf.LlamaConfig, {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "llama, linear rope": (
        tf.LlamaConfig,
        {**SIZES, "rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 50.0}},
    ),
    "llama, llama3 rope": (tf.LlamaConfig, {**SIZES, "head_dim": 16, "rope_parameters": LLAMA3}),
    "llama, yarn": (tf.LlamaConfig, {**SIZES, "head_dim": 16, "rope_parameters": YARN}),
    "mistral": (tf.MistralConfig, {**SIZES, "sliding_window": 7}),
    "qwen2": (tf.Qwen2Config, SIZES),
    "qwen2, windows": (
        tf.Qwen2Config,
        {**SIZES, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": (tf.Qwen3Config, {**SIZES, "head_dim": 10}),
    "phi3": (tf.Phi3Config, {**SIZES, "sliding_window": 11}),
    "phi3, longrope": (tf.Phi3Config, {**SIZES, "rope_parameters": LONGROPE}),
    "phi3, partial": (tf.Phi3Config, {**SIZES, "partial_rotary_factor": 0.67}),
    "gemma2": (
        tf.Gemma2Config,
        {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (tf.Gemma3TextConfig, {**GEMMA, "sliding_window_pattern": 2}),
    "olmo2": (tf.Olmo2Config, SIZES),
    "granite": (
        tf.GraniteConfig,
        {
            **SIZES,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.7,
            "embedding_multiplier": 3.0,
            "logits_scaling": 1.7,
        },
    ),
    "smollm3": (tf.SmolLM3Config, {**SIZES, "no_rope_layer_interval": 2}),
    "smollm3, windows": (
        tf.SmolLM3Config,
        {
            **SIZES,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 7,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "gpt_neox": (tf.GPTNeoXConfig, {**NEOX, "rotary_pct": 0.67}),
    "gpt_neox, sequential": (
        tf.GPTNeoXConfig,
        {**NEOX, "use_parallel_residual": False, "rotary_pct": 0.67},
    ),
    "stablelm": (tf.StableLmConfig, {**SIZES, "use_qkv_bias": True, "partial_rotary_factor": 0.67}),
    "stablelm, parallel": (
        tf.StableLmConfig,
        {**SIZES, "use_parallel_residual": True, "partial_rotary_factor": 0.67},
    ),
    "gpt2": (tf.GPT2Config, GPT2),
    "gpt2, inverse scale": (tf.GPT2Config, {**GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "opt": (tf.OPTConfig, OPT),
    "opt, norms after": (tf.OPTConfig, {**OPT, "do_layer_norm_before": False}),
    "mpt": (tf.MptConfig, MPT),
    "mpt, clipped": (tf.MptConfig, {**MPT, "attn_config": {"clip_qkv": 0.8}}),
    "mixtral": (tf.MixtralConfig, {**SIZES, "num_local_experts": 5, "sliding_window": 7}),
    "qwen3_moe": (
        tf.Qwen3MoeConfig,
        {
            **SIZES,
            "head_dim": 10,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 19,
            "mlp_only_layers": [1],
        },
    ),
}
cases = pytest.mark.parametrize("case", CASES)
# Of two cases of one family, the first is the family's.
families = pytest.mark.parametrize("case", [name for name in CASES if "," not in name])
# A prompt each, the second in chunks, decoding together, then the first alone.
CROWD = [
    [(0, 30)],
    [(0, 1), (1, 9)],
    [(0, 1), (1, 17)],
    *[[(0, 1), (1, 1)]] * 5,
    *[[(0, 1)]] * 6,
]


def build(case: str, **changes: Any) -> transformers.PreTrainedModel:
    """A random model of the case, of which no norm is one and no bias zero."""
    kind, values = CASES[case]
    torch.manual_seed(3)
    config = kind(**json.loads(json.dumps(values)) | changes)
    config._experts_implementation = "eager"
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0.0, 0.3)
            elif parameter.ndim == 1:
                low = -0.5 if "gemma" in case else 0.5
                parameter.uniform_(low, low + 1.0)
    return model.eval()


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """A case's model and the folder that it is saved in, made once."""

    @cache
    def make(case: str) -> tuple[transformers.PreTrainedModel, Path]:
        folder = tmp_path_factory.mktemp("model")
        model = build(case)
        model.save_pretrained(folder)
        (folder / "tokenizer.json").write_text(TOKENIZER_JSON)
        return model, folder

    return make


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    """Family -> figures; printed at the end, and written where ``PARITY_TABLE`` says so."""
    rows: Table = {}
    yield rows
    lines = [
        "| family | dense, fp32 KV | dense, int8 KV | INT8, fp32 KV | INT8, int8 KV |",
        "|---|---|---|---|---|",
        *(
            f"| {case} | {' | '.join(f'{figure:.1e}' for figure in figures)} |"
            for case, figures in rows.items()
        ),
    ]
    print("", *lines, sep="\n")
    if path := os.environ.get("PARITY_TABLE"):
        text = Path(path).read_text(encoding="utf-8")
        start = text.index(lines[0])
        Path(path).write_text(text[:start] + "\n".join(lines) + "\n", encoding="utf-8")


def tokens(length: int = LENGTH, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 101, (length,), generator=generator).tolist()


@torch.inference_mode()
def wanted(model: transformers.PreTrainedModel, ids: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def difference(found: Tensor, logits: Tensor) -> float:
    return float((found - logits).abs().max())


def mean_kl(found: Tensor, logits: Tensor) -> float:
    """Nats for each token."""
    p, q = logits.log_softmax(-1).double(), found.log_softmax(-1).double()
    return float((p.exp() * (p - q)).sum(-1).mean())


def run_crowd(config: EngineConfig) -> list[Tensor]:
    """Logits of the sequences that run together in ``CROWD``'s steps of (sequence, tokens)."""
    runner = ModelRunner.from_config(config)
    sequences, parts = [], []
    for n in range(2):
        request = Request(
            id=str(n),
            prompt=tokens(seed=n),
            sampling=SamplingParams(),
            stopping=StoppingParams(max_tokens=1),
            arrival=0.0,
        )
        table = list(range(n, 2 * LENGTH // runner.block_size + 2, 2))
        sequences.append(Sequence(request, list(request.prompt), block_table=table))
        parts.append([])
    for step in CROWD:
        items = [
            ScheduledSequence(sequences[index], length)
            for index, length in sorted(step, key=lambda item: item[1])
        ]
        logits = runner.logits(ScheduledBatch(items))
        for item, rows in zip(items, logits.split([item.length for item in items]), strict=True):
            parts[sequences.index(item.sequence)].append(rows)
            item.sequence.computed += item.length
    return [torch.cat(rows) for rows in parts]


def test_every_family_has_a_case() -> None:
    assert {type(build(case)).__name__ for case in CASES} == set(FAMILIES)


@cases
def test_logits_are_those_of_transformers(
    case: str, zoo: Zoo, make_config: MakeConfig, table: Table
) -> None:
    """At once, in chunks, and decoded from pages beside another sequence."""
    model, folder = zoo(case)
    logits = wanted(model, tokens())
    at_once = Scorer(make_config(folder)).logits(tokens())
    assert difference(at_once, logits) < 1e-4
    assert difference(Scorer(make_config(folder, token_budget=8)).logits(tokens()), logits) < 1e-4
    first, second = run_crowd(make_config(folder))
    assert difference(first, logits) < 1e-4
    assert difference(second, wanted(model, tokens(seed=1))[: len(second)]) < 1e-4
    assert difference(Scorer(make_config(folder)).logits([7]), wanted(model, [7])) < 1e-4
    table[case] = (difference(at_once, logits),)


@cases
def test_int8_weights_and_int8_kv_cost_little(
    case: str, zoo: Zoo, make_config: MakeConfig, tmp_path: Path, table: Table
) -> None:
    model, folder = zoo(case)
    compress.compress("w8a8", folder, tmp_path / "int8")
    logits, figures = wanted(model, tokens()), []
    for where, dtype in (
        (folder, "int8"),
        (tmp_path / "int8", "fp32"),
        (tmp_path / "int8", "int8"),
    ):
        scorer = Scorer(make_config(where, dtype=dtype, block_size=16))
        figures.append(mean_kl(scorer.logits(tokens()), logits))
    # A rounded hidden state may go to other experts.
    most = 0.05 if case in ("mixtral", "qwen3_moe") else 0.005
    assert all(0.0 <= figure < most for figure in figures)
    report = scorer.report
    assert (report.weights.split(" and ")[0], report.activations, report.head) == ("int8",) * 3
    first, _ = run_crowd(make_config(tmp_path / "int8", dtype="int8", block_size=16))
    assert mean_kl(first, logits) < most
    table[case] = (*table.get(case, (float("nan"),))[:1], *figures)


@cases
def test_an_artefact_keeps_names_and_layouts(case: str, zoo: Zoo, tmp_path: Path) -> None:
    _, folder = zoo(case)
    compress.compress("w8a8", folder, tmp_path / "int8")
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "int8" / "model.safetensors")
    spec = model_spec(folder, Checkpoint.open(folder).config, before)
    scales = {f"{name}.weight_scale" for name in spec.linears()}
    assert after.keys() == before.keys() | scales
    for name in before:
        if f"{name}_scale" in scales:
            near = after[name].float() * after[f"{name}_scale"].float()
            assert near.shape == before[name].shape
            assert difference(near, before[name]) <= 0.51 * float(after[f"{name}_scale"].max())
        else:
            assert torch.equal(after[name], before[name])
    whole = [name for name, tensor in before.items() if tensor.ndim == 2 and ".weight" in name]
    kept = {name for name in whole if f"{name}_scale" not in scales}
    assert all("emb" in n or "wte" in n or "wpe" in n or "head" in n or "gate" in n for n in kept)


@families
def test_the_other_kind_of_head_from_several_files(
    case: str, tmp_path: Path, make_config: MakeConfig
) -> None:
    model = build(case, tie_word_embeddings=not build(case).config.tie_word_embeddings)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    found = Scorer(make_config(tmp_path)).logits(tokens())
    assert difference(found, wanted(model, tokens())) < 1e-4


@pytest.mark.parametrize(("case", "prefix"), [("gpt2", "transformer."), ("opt", "model.")])
def test_checkpoints_without_the_models_prefix(
    case: str, prefix: str, zoo: Zoo, tmp_path: Path, make_config: MakeConfig
) -> None:
    model, folder = zoo(case)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model" / "tokenizer.json").write_text(TOKENIZER_JSON)
    compress.compress("w8a8", tmp_path / "model", tmp_path / "int8")
    logits = wanted(model, tokens())
    assert difference(Scorer(make_config(tmp_path / "model")).logits(tokens()), logits) < 1e-4
    assert mean_kl(Scorer(make_config(tmp_path / "int8")).logits(tokens()), logits) < 0.005
