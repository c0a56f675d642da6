"""The models that benches measure are ones which can be compressed and loaded."""

from pathlib import Path

from bench.random_model import Shape, write
from compress import compress
from engine.client.tokenizer import Tokenizer
from engine.config import EngineConfig
from engine.scoring import Scorer

SHAPE = Shape(hidden=64, layers=1, heads=4, kv_heads=2, mlp=96, vocabulary=40, context=64)


def test_a_random_model_is_compressed_and_loaded(tmp_path: Path) -> None:
    original = write(SHAPE, tmp_path / "model")
    compress("w8a8", original, tmp_path / "w8a8")
    ids = Tokenizer.from_folder(tmp_path / "w8a8").encode("t17 t3")
    logits_TV = Scorer(EngineConfig(model_dir=tmp_path / "w8a8")).logits(ids)
    assert (ids, logits_TV.shape) == ([17, 3], (2, SHAPE.vocabulary))
