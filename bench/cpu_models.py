"""The random models that engines are compared on, and what recipes make of them, in a folder."""

from pathlib import Path

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
    """A random model in ``out``, written where it is not there yet."""
    if not (out / "written").is_file():
        write(shape, out)
        (out / "written").touch()
    return out


def artefact(name: str, recipe: str, folder: Path) -> Path:
    """What ``recipe`` makes of the model, compressed where it is not there yet."""
    out = folder / f"{name}-{recipe}"
    if not out.is_dir():
        from compress import compress

        compress(str(FILES.get(recipe, recipe)), model(name, folder), out)
    return out
