"""Evaluation on a scorer whose logits are known, then on the embedded model."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import pytest
import tokenizers
import torch
from click.testing import CliRunner
from tokenizers import models, pre_tokenizers
from torch import Tensor

import compress
from compress.cli import evaluate_command
from compress.documents import read_windows
from compress.errors import CompressError
from compress.measure.evaluate import evaluate
from compress.measure.figures import Evaluation
from compress.measure.statistics import DocumentSums, compare, entropy, summarise
from compress.measure.text import EvaluationText, read_files
from compress.progress import NoProgress
from engine.config import EngineConfig

MakeModel = Callable[..., Path]
DIALOGUE = Path(__file__).parents[4] / "shared" / "data" / "dialogue-val.txt"
WORDS = "abcdefgh"


class FakeScorer:
    """Says the same of every position; ``logits_V`` by the folder's name."""

    logits_V: ClassVar[dict[str, list[float]]] = {}
    configs: ClassVar[dict[str, EngineConfig]] = {}
    vocabulary: ClassVar[dict[str, int]] = {}

    def __init__(self, config: EngineConfig) -> None:
        self.name = config.model_dir.name
        self.configs[self.name] = config

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    @property
    def report(self) -> Any:
        return SimpleNamespace(
            context_length=512,
            vocabulary_size=self.vocabulary.get(self.name, 10),
            weights="int8",
            head="int8",
            kv_dtype="int8",
            weight_bytes=100,
            kernels=("attention=none",),
        )

    def logits(self, token_ids: list[int]) -> Tensor:
        return torch.tensor([self.logits_V[self.name]]).expand(len(token_ids), -1)


@pytest.fixture
def original(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = make_model("original")
    vocabulary = {word: i + 1 for i, word in enumerate(WORDS)} | {"<bos>": 0, "?": 9}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(3)
    tokenizer.save(str(folder / "tokenizer.json"))
    monkeypatch.setattr(FakeScorer, "vocabulary", {})
    monkeypatch.setattr(FakeScorer, "configs", {})
    return folder


def write(folder: Path, text: str) -> Path:
    path = folder / "data.txt"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b\0c d e f g\0", [[0, 1, 2], [0, 3, 4, 5]]),
        ("a b\0\0c d\0e", [[0, 1, 2], [0, 3, 4], [0, 5]]),
        ("a b c d e", [[0, 1, 2, 3], [0, 4, 5]]),
    ],
)
def test_windows(original: Path, tmp_path: Path, text: str, expected: list[list[int]]) -> None:
    assert read_windows(original, write(tmp_path, text), window=4) == expected


def test_windows_are_drawn_of_all_files(original: Path, tmp_path: Path) -> None:
    long, short = write(tmp_path, "a\0b\0c\0d\0e"), tmp_path / "short.txt"
    short.write_text("f\0g")

    def read(limit: int | None, seed: int = 0) -> EvaluationText:
        return read_files(original, [long, short], window=4, limit=limit, seed=seed)

    everything = read(None)
    assert [ids[1] for ids in everything.documents] == [1, 2, 3, 4, 5, 6, 7]
    assert read(99) == everything
    six = read(6)
    assert len(six.documents) == 6
    assert six.documents[-2:] == everything.documents[-2:]
    assert six.documents == tuple(sorted(six.documents))
    assert {read(6, seed).documents for seed in range(9)} > {six.documents}
    assert read(6) == six
    assert read(1).source == (str(long),)
    assert read(2).source == (str(long), str(short))


class Told(NoProgress):
    def __init__(self) -> None:
        self.phases: list[str] = []
        self.layers: list[tuple[int, int, float]] = []

    def phase(self, phase: str, detail: str) -> None:
        self.phases.append(f"{phase}: {detail}")

    def layer(self, item: int, items: int, name: str, seconds_left: float) -> None:
        self.layers.append((item, items, seconds_left))


def test_reading_many_documents_is_told(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.documents._BATCH", 3)
    few, many = write(tmp_path, "a\0b\0c"), tmp_path / "many.txt"
    many.write_text("\0".join("abcdefgh"))
    told = Told()
    assert read_windows(original, few, window=4, progress=told) == [[0, 1], [0, 2], [0, 3]]
    assert told.phases == []
    windows = read_windows(original, many, window=4, progress=told)
    assert windows == [[0, i] for i in range(1, 9)]
    assert told.phases == [f"reading: 8 documents of {many}"]
    assert [one[:2] for one in told.layers] == [(3, 8), (6, 8), (8, 8)]
    assert told.layers[0][2] > 0
    assert told.layers[-1][2] == 0


def test_windows_without_bos(original: Path, tmp_path: Path) -> None:
    (original / "config.json").write_text("{}")
    file = write(tmp_path, "a b c d e\0f\0g h")
    assert read_windows(original, file, window=4) == [[1, 2, 3, 4], [7, 8]]


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (lambda f: (f / "data.txt").write_text(" \0 "), "no text to evaluate on"),
        (lambda f: (f / "data.txt").write_bytes(b"\xff"), "not text in UTF-8"),
        (lambda f: (f / "data.txt").unlink(), "cannot be read: No such file"),
        (
            lambda f: (f / "original" / "tokenizer.json").write_text("{}"),
            "tokenizer.json is broken",
        ),
        (lambda f: (f / "original" / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    ],
)
def test_data_errors(
    original: Path, tmp_path: Path, breakage: Callable[[Path], None], message: str
) -> None:
    file = write(tmp_path, "a b")
    breakage(tmp_path)
    with pytest.raises(CompressError, match=message):
        read_windows(original, file, window=4)


def test_compare_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    sums = compare(p.log().expand(3, 3), q.log().expand(3, 3), torch.tensor([0, 1, 2]))
    assert sums.tokens == 2
    assert sums.original_nll == pytest.approx(-2 * math.log(0.25))
    assert sums.artefact_nll == pytest.approx(-math.log(0.5) - math.log(0.25))
    assert sums.kl == pytest.approx(2 * (0.5 * math.log(2) - 0.25 * math.log(2)))
    assert sums.flips == 2
    bits = 0.5 * math.log(2) + 0.5 * math.log(4)
    assert (sums.entropy, sums.squared_entropy) == pytest.approx((2 * bits, 2 * bits**2))


def test_the_originals_entropy_is_over_all_tokens_and_knows_what_is_impossible() -> None:
    """A logit of -inf has no share of it."""
    certain = torch.tensor([0.0, -math.inf, -math.inf]).expand(2, 3)
    open_ = torch.zeros(4, 3)
    sums = [compare(x, x.clamp_min(-9.0), torch.zeros(len(x)).long()) for x in (certain, open_)]
    found = entropy(sums)
    assert found.mean == pytest.approx(0.75 * math.log(3))
    assert found.deviation == pytest.approx(math.sqrt(0.75 * 0.25) * math.log(3))


def test_the_bootstrap_draws_documents() -> None:
    calm = [DocumentSums(10, 10.0, 10.0, 0.1, 1, 9.0, 9.0)] * 20
    quality, kl = summarise(calm)
    assert kl.value == quality.kl.value
    assert (quality.kl.low, quality.kl.high) == pytest.approx((0.01, 0.01))
    assert quality.tokens == 200
    wild = [*calm, DocumentSums(10, 10.0, 20.0, 9.0, 9, 9.0, 9.0)]
    quality, kl = summarise(wild)
    assert quality.kl.low < quality.kl.value < quality.kl.high
    assert quality.perplexity_ratio.value == pytest.approx(math.exp(10 / 210))
    assert (quality, kl) == summarise(wild)


def run_fake(original: Path, tmp_path: Path, window: int = 4, **options: Any) -> Evaluation:
    logits = {"original": [1.0] + [0.0] * 9, "artefact": [0.0, 1.0] + [0.0] * 8}
    FakeScorer.logits_V = {**logits, **options.pop("logits", {})}
    file = write(tmp_path, "a b c\0d e\0f g h a")
    text = read_files(original, [file], window=window, limit=None, seed=0)
    return evaluate(tmp_path / "artefact", original, text, scorer=FakeScorer, **options)


def test_evaluate_with_a_fake(original: Path, tmp_path: Path) -> None:
    result = run_fake(original, tmp_path)
    assert result.quality is not None
    assert (result.documents, result.quality.tokens) == (3, 8)
    assert result.quality.flips.value == 1.0
    assert result.broken == 0
    p = math.e / (math.e + 9)
    assert result.entropy.mean == pytest.approx(math.log(math.e + 9) - p)
    assert result.entropy.deviation < 1e-6
    assert result.quality.kl.value == pytest.approx(p - p / math.e)
    assert FakeScorer.configs["original"].cache.dtype == "fp32"
    assert FakeScorer.configs["artefact"].cache.dtype == "auto"


def test_evaluate_checks_the_models(original: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="600 tokens are more than the model's context of 512"):
        run_fake(original, tmp_path, window=600)
    FakeScorer.vocabulary = {"artefact": 11}
    with pytest.raises(CompressError, match="the vocabularies differ, 10 and 11"):
        run_fake(original, tmp_path)


def test_logits_that_are_no_numbers(original: Path, tmp_path: Path) -> None:
    broken = [math.nan] + [0.0] * 9
    result = run_fake(original, tmp_path, logits={"artefact": broken})
    assert (result.broken, result.quality, result.kl) == (3, None, None)
    with pytest.raises(CompressError, match="the original gives NaN"):
        run_fake(original, tmp_path, logits={"original": broken})


@pytest.mark.shared
@pytest.mark.skipif(not DIALOGUE.exists(), reason="needs ../shared/data")
def test_the_embedded_model_loses_little(mini: Path, tmp_path: Path) -> None:
    compress.compress("w8a8", mini, tmp_path / "out")
    arguments = [tmp_path / "out", "--against", mini, "--data", DIALOGUE, "--documents", 8]
    arguments += ["--cache-dir", tmp_path / "cache"]
    report = tmp_path / "report.json"
    done = CliRunner().invoke(
        evaluate_command, [*map(str, arguments), "--window", "128", "--json", str(report)]
    )
    assert done.exit_code == 0, done.output
    assert "KL, nats per token" in done.stdout
    found = json.loads(report.read_text())
    assert found["documents"] == 8
    assert found["artefact"]["weights"] == "int8"
    assert found["artefact"]["kv_dtype"] == "int8"
    assert found["original"]["kv_dtype"] == "fp32"
    assert 0 < found["quality"]["kl"]["value"] < 0.002
    assert found["quality"]["flips"]["value"] < 0.04
    assert 0.99 < found["quality"]["perplexity_ratio"]["value"] < 1.01
