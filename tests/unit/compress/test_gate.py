"""The gate: verdicts on known figures, its data, and whole runs on small models."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers
from torch import Tensor

import compress
from compress.errors import CompressError
from compress.files import write_whole
from compress.gate.config import Gate
from compress.gate.decision import Outcome
from compress.gate.evaluation_command import Asked, evaluate_folder
from compress.gate.judging import Judge, Measured
from compress.gate.page import make_page
from compress.gate.report import Restored, read_report
from compress.gate.verdict import judge
from compress.measure import text as texts
from compress.measure.answers import is_right, log_likelihood
from compress.measure.figures import (
    Entropy,
    Estimate,
    Evaluation,
    Interval,
    Quality,
    Side,
    Speed,
    TaskResult,
)
from compress.measure.tasks import Choice, Question, read_tasks
from compress.measure.text import NGRAM, EvaluationText, generate_text, ngrams
from compress.progress import NoProgress
from engine.errors import ModelLoadError

MakeModel = Callable[..., Path]
Sabotage = Callable[[Path, float], None]
WORDS = ["the", "cat", "cats", "sleep", "sleeps", "dog", "runs", "run"]
SIDE = Side(
    folder="f", weights="int8", head="int8", kv_dtype="int8", weight_bytes=1, tokens_per_second=1
)


def evaluation(kl: Estimate | None, *tasks: TaskResult) -> Evaluation:
    quality = None
    if kl is not None:
        flat = Interval(kl.value, kl.low, kl.high)
        quality = Quality(
            tokens=100, original_perplexity=2.0, artefact_perplexity=2.0,
            perplexity_ratio=flat, kl=flat, flips=flat,
        )  # fmt: skip
    return Evaluation(
        original=SIDE, artefact=SIDE, data=("generated",), data_sha256="0", window=4,
        documents=30, broken=0 if kl else 3, quality=quality, kl=kl,
        entropy=Entropy(mean=2.0, deviation=1.0), tasks=tasks,
    )  # fmt: skip


def kl(value: float, half: float) -> Estimate:
    return Estimate(value, value - half, value + half, 30, half / 2)


def task(correct: int, lost: int, gained: int, items: int = 1000) -> TaskResult:
    return TaskResult(
        name="cats", items=items, chance=0.5, original_correct=correct, lost=lost, gained=gained
    )


LOW = kl(0.001, 0.0005)


@pytest.mark.parametrize(
    ("found", "outcome", "words"),
    [
        (evaluation(LOW), "pass", "KL to the original is 0.00100 .* within the limit of 0.05"),
        (evaluation(kl(0.3, 0.1)), "fail", "above the limit of 0.05"),
        (evaluation(kl(0.05, 0.01)), "inconclusive", "may be above the limit"),
        (evaluation(None), "fail", "NaN or infinite logits on 3 of 30 documents"),
        (evaluation(LOW, task(800, 5, 5)), "pass", "lost on cats is 0.00 %"),
        (evaluation(LOW, task(800, 100, 10)), "fail", "lost on cats is 9.00 %"),
        (evaluation(LOW, task(800, 20, 12)), "inconclusive", "lost on cats is 0.80 %"),
        (evaluation(LOW, task(510, 200, 10)), "pass", "KL to the original"),
    ],
)
def test_verdicts(found: Evaluation, outcome: str, words: str) -> None:
    verdict = judge(found, Gate())
    assert verdict.outcome == outcome
    assert re.search(words, verdict.sentence)
    assert bool(verdict.remedy) == (outcome != "pass")


def test_guessing_is_reported_and_not_gated() -> None:
    (_, check) = judge(evaluation(LOW, task(510, 200, 10)), Gate()).checks
    assert check.outcome is None
    assert "guessing (50.0 %) may explain" in check.note


def test_an_undecided_check_says_what_would_decide() -> None:
    verdict = judge(evaluation(kl(0.045, 0.01)), Gate())
    (check,) = verdict.checks
    assert check.items_to_decide is not None
    assert check.items_to_decide > 30
    assert f"about {check.items_to_decide} documents would decide" in verdict.remedy
    assert "gate.documents" in verdict.remedy


def test_few_documents_decide_nothing() -> None:
    few = replace(kl(1e-6, 0.0), items=7)
    verdict = judge(evaluation(few), Gate())
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "about 8 documents would decide (there were 7)" in verdict.remedy


def test_a_task_may_be_called_kl() -> None:
    named = replace(task(800, 100, 10), name="kl")
    verdict = judge(evaluation(LOW, named), Gate())
    assert verdict.sentence.startswith("the accuracy lost on kl is 9.00 %")
    assert "gate.max_drop" in verdict.remedy
    assert verdict.kl == verdict.checks[0]


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (evaluation(LOW), False),
        (evaluation(kl(0.3, 0.1)), True),
        (evaluation(kl(0.05, 0.01)), True),
        (evaluation(None), True),
        (evaluation(LOW, task(48, 0, 0, items=60)), False),
        (evaluation(LOW, task(800, 100, 10)), True),
    ],
)
def test_an_undecided_task_is_no_reason_to_restore(found: Evaluation, wanted: bool) -> None:
    assert judge(found, Gate()).wants_restoring is wanted


@pytest.mark.parametrize(
    ("found", "share"),
    [
        (kl(0.0, 0.0), 1.0),
        (kl(-0.001, 0.0005), 1.0),
        (kl(0.3, 0.1), 0.125),
    ],
)
def test_the_kl_that_may_stay(found: Estimate, share: float) -> None:
    measured = Measured("", evaluation(found), judge(evaluation(found), Gate()))
    assert measured.tolerable == pytest.approx(share)


def test_what_is_slower_everywhere_is_flagged() -> None:
    sizes = {"original_bytes": 2, "artefact_bytes": 1}
    speed = tuple(Speed(batch=b, original=10.0, artefact=9.0, **sizes) for b in (1, 8, 32))
    verdict = judge(replace(evaluation(LOW), speed=speed), Gate())
    assert verdict.outcome is Outcome.PASS
    assert "slower than the original at every batch size (x 0.90 at best)" in verdict.sentence
    faster = (*speed[:2], Speed(batch=32, original=10.0, artefact=11.0, **sizes))
    assert "slower" not in judge(replace(evaluation(LOW), speed=faster), Gate()).sentence


def with_tokenizer(folder: Path) -> Path:
    vocabulary = {word: i + 1 for i, word in enumerate(WORDS)} | {"<bos>": 0, "?": 9}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def lines(path: Path, *objects: object) -> Path:
    path.write_text("\n".join(map(json.dumps, objects)) + "\n")
    return path


def test_tasks_are_read(make_model: MakeModel, tmp_path: Path) -> None:
    folder = with_tokenizer(make_model())
    pair = {"sentence_good": "the cats sleep", "sentence_bad": "the cats sleeps"}
    choice = {"question": "the dog", "choices": [" run", " runs"], "answer": 1}
    (found,) = read_tasks(folder, [lines(tmp_path / "agree.jsonl", pair, choice)])
    assert (found.name, found.chance, found.longest) == ("agree", 0.5, 4)
    assert found.questions[0] == Question((Choice((0, 1, 3, 4), 1), Choice((0, 1, 3, 5), 1)), 0)
    assert found.questions[1] == Question((Choice((0, 1, 6, 8), 3), Choice((0, 1, 6, 7), 3)), 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"sentence_good": "cat"}, "needs sentence_good and sentence_bad"),
        ({"question": "cat", "choices": ["a"], "answer": 0}, "needs sentence_good"),
        ({"question": "cat", "choices": ["a", "b"], "answer": 2}, "index of a choice"),
        ({"question": "cat", "choices": ["a", "b"], "answer": True}, "index of a choice"),
        ({"question": "cat", "choices": ["", "b"], "answer": 0}, "no token of its own"),
        ([], "must be an object"),
    ],
)
def test_a_wrong_question_names_its_line(
    make_model: MakeModel, tmp_path: Path, line: object, message: str
) -> None:
    file = lines(tmp_path / "t.jsonl", {"sentence_good": "cat", "sentence_bad": "dog"}, line)
    with pytest.raises(CompressError, match=message) as caught:
        read_tasks(with_tokenizer(make_model()), [file])
    assert str(caught.value).startswith(f"{file}:2: ")


def test_no_questions(make_model: MakeModel, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("\n")
    with pytest.raises(CompressError, match="has no questions"):
        read_tasks(with_tokenizer(make_model()), [tmp_path / "t.jsonl"])


def test_two_files_of_one_name_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    question = {"sentence_good": "cat", "sentence_bad": "dog"}
    files = [lines(folder / "t.jsonl", question) for folder in (tmp_path, tmp_path / "other")]
    with pytest.raises(CompressError, match="are both named t"):
        read_tasks(with_tokenizer(make_model()), files)


def test_a_question_longer_than_the_context(make_model: MakeModel, tmp_path: Path) -> None:
    question = {"question": "cat " * 62, "choices": ["dog", "dog dog"], "answer": 0}
    file = lines(tmp_path / "t.jsonl", question)
    with pytest.raises(CompressError, match=r"t\.jsonl:1: 65 tokens are more than .* of 64: short"):
        read_tasks(with_tokenizer(make_model()), [file])


def test_a_short_context_shortens_what_is_generated(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.measure.speed.BATCHES", (1, 2))
    folder = make_model()
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 24
    (folder / "config.json").write_text(json.dumps(config))
    compress.compress("w8a8", folder, tmp_path / "w8a8")
    limits = Gate(documents=8)
    asked = Asked(
        artefact=tmp_path / "w8a8", original=folder, limits=limits, speed=True, cache_dir=tmp_path
    )
    found = evaluate_folder(asked, NoProgress()).evaluation
    assert (found.window, found.documents) == (24, 8)
    assert [one.batch for one in found.speed] == [1, 2]
    assert all(one.original > 0 < one.artefact for one in found.speed)


def test_answers_by_hand() -> None:
    p_V = torch.tensor([0.5, 0.25, 0.25])

    def logits(ids: list[int]) -> Tensor:
        return p_V.log().expand(len(ids), 3)

    assert log_likelihood(logits, Choice((2, 0, 1), 1)) == pytest.approx(-2.0794, abs=1e-4)
    assert is_right(logits, Question((Choice((2, 0), 1), Choice((2, 1), 1)), 0))
    tie = Question((Choice((2, 1), 1), Choice((2, 2), 1)), 0)
    assert not is_right(logits, tie)
    assert not is_right(lambda ids: logits(ids) * float("nan"), tie)


def test_generated_text_shares_nothing_with_calibration(
    mini: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = generate_text(mini, documents=4, window=24, seed=0)
    assert first == generate_text(mini, documents=4, window=24, seed=0)
    other = generate_text(mini, documents=4, window=24, seed=0, avoid=first.documents[:2])
    grams = {gram for ids in first.documents[:2] for gram in ngrams(ids)}
    assert len(grams) == 2 * (24 - NGRAM + 1)
    assert not any(ngrams(ids) & grams for ids in other.documents)
    assert len({*first.half(0).documents, *first.half(1).documents}) == 4

    def same(*_: object, samples: int, length: int, **__: object) -> Tensor:
        return torch.ones(samples, length, dtype=torch.long)

    monkeypatch.setattr("compress.generated.generate", same)
    with pytest.raises(CompressError, match="the model repeats itself: only 1 of 4"):
        generate_text(mini, documents=4, window=24, seed=0)


def test_text_is_saved_whole(tmp_path: Path) -> None:
    text = EvaluationText(source=("generated",), window=3, documents=((1, 2), (3, 4)))
    texts.save(text, tmp_path / "t.json")
    assert texts.load(tmp_path / "t.json") == text
    (tmp_path / "t.json").write_text('{"source": [], "window"')
    assert texts.load(tmp_path / "t.json") is None


def test_a_file_is_on_the_disk_before_it_replaces_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_whole(tmp_path / "t.json", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "t.json", "new")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"t.json": "old"}


class Heard(NoProgress):
    def __init__(self) -> None:
        self.phases: list[str] = []

    def phase(self, phase: str, detail: str) -> None:
        self.phases.append(phase)


def make_judge(original: Path, cache: Path, **gate: Any) -> Judge:
    settings = {"mode": "enforce", "documents": 8, "length": 24, **gate}
    return Judge(
        original=original,
        gate=Gate(**settings),
        seed=0,
        kv_dtype="auto",
        cache_dir=cache,
        progress=Heard(),
    )


def phases(judge: Judge) -> list[str]:
    assert isinstance(judge.progress, Heard)
    return judge.progress.phases


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in INT8; tests that change it copy it."""
    mini = Path(__file__).parents[3] / "server" / "assets" / "venturi-mini"
    folder = tmp_path_factory.mktemp("gate") / "w8a8"
    compress.compress("w8a8", mini, folder)
    return folder


def test_a_verdict_is_found_again_until_something_changes(
    mini: Path, artefact: Path, tmp_path: Path
) -> None:
    first = make_judge(mini, tmp_path)
    report = first.report(artefact)
    assert report.verdict.outcome is Outcome.PASS
    assert not report.refused
    assert phases(first) == ["generating", "evaluating"]
    again = make_judge(mini, tmp_path)
    assert again.report(artefact) == report == read_report(artefact)
    assert phases(again) == []
    strict = make_judge(mini, tmp_path, max_kl=1e-5)
    refused = strict.report(artefact)
    assert refused.refused
    assert phases(strict) == []
    manifest = json.loads((artefact / "venturi.json").read_text())
    assert manifest["verdict"]["outcome"] == "fail"
    assert manifest["reference_entropy"] == asdict(report.evaluation.entropy)
    fp32 = replace(make_judge(mini, tmp_path), kv_dtype="fp32")
    assert fp32.report(artefact).evaluation.artefact.kv_dtype == "fp32"
    assert phases(fp32) == ["evaluating"]


def test_speed_is_timed_once_where_it_is_asked_for(
    mini: Path, artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.measure.speed.BATCHES", (1, 2))
    plain = make_judge(mini, tmp_path).report(artefact)
    assert plain.evaluation.speed == ()
    assert plain.event()["decode"] == {}
    timing = make_judge(mini, tmp_path, speed=True)
    report = timing.report(artefact)
    assert phases(timing) == ["evaluating"]
    one, two = report.evaluation.speed
    assert (one.batch, two.batch) == (1, 2)
    assert report.event()["decode"] == {"1": one.artefact, "2": two.artefact}
    # A sequence of 48 tokens fills three blocks: float32 keys and values of 4 heads in 6 layers.
    assert two.original_bytes - one.original_bytes == 48 * 2 * 6 * 4 * 32 * 4
    assert one.artefact_bytes < one.original_bytes
    again = make_judge(mini, tmp_path, speed=True)
    assert again.report(artefact) == report == read_report(artefact)
    assert phases(again) == []
    assert make_judge(mini, tmp_path).report(artefact) == plain


def test_a_changed_artefact_is_measured_again_and_fails(
    mini: Path, artefact: Path, sabotage: Sabotage, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(artefact, tmp_path / "copy"))
    judging = make_judge(mini, tmp_path / "cache")
    judging.report(copy)
    sabotage(copy, 1.5)
    report = judging.report(copy)
    assert report.refused
    assert report.evaluation.kl is not None
    assert report.evaluation.kl.low > 0.05
    sabotage(copy, float("nan"))
    with pytest.raises(ModelLoadError, match="NaN or infinite"):
        judging.report(copy)


def test_logits_that_overflow_are_refused(
    mini: Path, artefact: Path, sabotage: Sabotage, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(artefact, tmp_path / "copy"))
    sabotage(copy, 3e38)
    restored = Restored(name="layer 3", before="8 bit", after="original", contribution=None)
    report = make_judge(mini, tmp_path / "cache").report(copy, restored=(restored,))
    assert report.refused
    assert "NaN or infinite logits on 8 of 8 documents" in report.line()
    assert read_report(copy) == report
    assert "no numbers" in make_page(report, {})


def test_only_a_failed_write_is_blamed_on_the_cache(
    mini: Path, artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    judging = make_judge(mini, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("compress.measure.evaluate.evaluate", full)
        with pytest.raises(OSError, match="No space left"):
            judging.report(artefact)
    monkeypatch.setattr("compress.gate.judging.write_whole", full)
    with pytest.raises(CompressError, match=r"evaluations: the disk is full: name a writable"):
        judging.report(artefact)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"\xff\xfe", "not text in UTF-8"),
        (b"", "no text to evaluate on"),
    ],
)
def test_data_that_cannot_be_used(
    mini: Path, artefact: Path, tmp_path: Path, content: bytes | None, message: str
) -> None:
    data = tmp_path / "data.txt"
    if content is not None:
        data.write_bytes(content)
    with pytest.raises(CompressError, match=message):
        make_judge(mini, tmp_path / "cache", data=(str(data),)).report(artefact)


def test_users_data_and_tasks(mini: Path, artefact: Path, tmp_path: Path) -> None:
    data = lines(tmp_path / "d.jsonl", *({"text": f"User: Who is number {i}?"} for i in range(9)))
    pairs = [{"sentence_good": f"User: {n}", "sentence_bad": f"{n} :User"} for n in range(12)]
    tasks = lines(tmp_path / "order.jsonl", *pairs)
    report = make_judge(mini, tmp_path, data=(str(data),), tasks=(str(tasks),)).report(artefact)
    assert report.evaluation.documents == 8
    (result,) = report.evaluation.tasks
    assert (result.name, result.items) == ("order", 12)
    assert [check.name for check in report.verdict.checks] == ["kl", "order"]
