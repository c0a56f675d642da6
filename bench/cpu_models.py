"""The random models that engines are compared on, and what recipes make of them, in a folder."""

import json
from pathlib import Path
from typing import Any

from bench.cpu_engines import FILES
from bench.random_model import Shape, write

SHAPES = {
    "S": Shape(
        hidden=576, layers=30, heads=9, kv_heads=3, mlp=1536, vocabulary=49152, context=4096
    ),
    "M": Shape(
        hidden=896,
        layers=24,
        heads=14,
        kv_heads=2,
        mlp=4864,
        vocabulary=32000,
        context=4096,
    ),
    "L": Shape(
        hidden=2048,
        layers=22,
        heads=32,
        kv_heads=4,
        mlp=5632,
        vocabulary=32000,
        context=4096,
        tied=False,
    ),
}


def matrix_weights(shape: Shape) -> int:
    """Weights that a decode step reads: all matrices, the head included, embeddings not."""
    head_dim = shape.hidden // shape.heads
    attention = 2 * shape.hidden * head_dim * (shape.heads + shape.kv_heads)
    return shape.layers * (attention + 3 * shape.hidden * shape.mlp) + shape.vocabulary * (
        shape.hidden
    )


def model(name: str, folder: Path) -> Path:
    """The folder of the model ``name``, written where it is not there yet."""
    return write_model(SHAPES[name], folder / name)


def write_model(shape: Shape, out: Path) -> Path:
    """A random model with a tokenizer in ``out``, written where it is not there yet."""
    if not (out / "written").is_file():
        write(shape, out)
        _write_tokenizer(shape.vocabulary, out)
        (out / "written").touch()
    return out


def artefact(name: str, recipe: str, folder: Path) -> Path:
    """What ``recipe`` makes of the model, compressed where it is not there yet."""
    out = folder / f"{name}-{recipe}"
    if not out.is_dir():
        from compress import compress

        compress(str(FILES.get(recipe, recipe)), model(name, folder), out)
    return out


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
