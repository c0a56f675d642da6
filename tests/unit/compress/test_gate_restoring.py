"""Restoring: the policy on made-up layers, then a sabotaged artefact of the embedded model."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.cache import Built, compress_cached
from compress.errors import CompressError
from compress.gate.config import Gate
from compress.gate.decision import Outcome
from compress.gate.flow import compress_and_judge
from compress.gate.judging import Judge
from compress.gate.report import Report
from compress.gate.restoring import Layer, attempts, kept_share, ladder, restored_recipe
from compress.plan import make_plan
from compress.progress import NoProgress
from compress.recipe import KvCache, Modifier, Recipe, resolve
from compress.treatment import combine
from engine.formats.checkpoint import Checkpoint

MakeModel = Callable[..., Path]
Sabotage = Callable[[Path, float], None]

LAYERS = st.lists(
    st.tuples(st.integers(1, 9), st.floats(0, 1) | st.just(float("inf"))), min_size=1, max_size=12
)


def make_layers(sizes: list[tuple[int, float]]) -> list[Layer]:
    return [
        Layer(f"layer {i}", (f"layers.{i}.up", f"layers.{i}.down"), weights, cost)
        for i, (weights, cost) in enumerate(sizes)
    ]


@given(sizes=LAYERS, tolerable=st.floats(0, 1), most_steps=st.integers(1, 3))
def test_attempts_restore_ever_more_of_the_worst(
    sizes: list[tuple[int, float]], tolerable: float, most_steps: int
) -> None:
    layers = make_layers(sizes)
    tried = list(attempts(layers, tolerable, most_steps))
    assert tried == [dict(one) for one in dict.fromkeys(tuple(one.items()) for one in tried)]
    for before, after in pairwise(tried):
        assert before.keys() <= after.keys()
        assert sum(before.values()) < sum(after.values())
    for steps in tried:
        assert kept_share(layers, steps) >= 0.5
        kept = [one.contribution for one in layers if one.modules[0] not in steps]
        gone = [one.contribution for one in layers if one.modules[0] in steps]
        assert min(gone) >= max(kept, default=0)
    if tried:
        assert max(tried[-1].values()) == most_steps


def test_the_first_attempt_leaves_what_is_tolerable() -> None:
    costs = [0.1, 0.4, 0.2, 0.0, 0.05, 0.0]
    layers = make_layers([(1, cost) for cost in costs])
    first = next(attempts(layers, 0.2, 1))
    assert first.keys() == {"layers.1.up", "layers.1.down", "layers.2.up", "layers.2.down"}
    broken = make_layers([(1, cost) for cost in [*costs, float("inf")]])
    assert next(attempts(broken, 1.0, 1)).keys() == {"layers.6.up", "layers.6.down"}


def test_a_model_of_one_layer_has_nothing_to_restore() -> None:
    assert not list(attempts(make_layers([(1, 1.0)]), 1.0, 2))


SPARSE = Modifier(type="wanda", sparsity=0.5, structure="unstructured")
INT4 = Modifier(type="gptq", scheme="w4a8", group_size=32, symmetric=True, scale="mse")
INT8 = Modifier(type="rtn", scheme="w8a8", scale="absmax")


@pytest.mark.parametrize(
    ("modifiers", "rungs"),
    [
        ((INT8,), ("8 bit", "original")),
        ((INT4,), ("4 bit", "8 bit", "original")),
        ((SPARSE, INT4), ("sparse 4 bit", "4 bit", "8 bit", "original")),
        ((SPARSE, INT8), ("sparse 8 bit", "8 bit", "original")),
        ((SPARSE,), ("sparse 16 bit", "original")),
    ],
)
def test_each_step_is_what_the_ladder_says(
    modifiers: tuple[Modifier, ...], rungs: tuple[str, ...]
) -> None:
    recipe = Recipe(
        name="r",
        version=1,
        seed=0,
        head="keep",
        modifiers=modifiers,
        kv_cache=KvCache(),
        gate=Gate(),
    )
    before = combine("a", modifiers, 64, (0, 2))
    assert ladder(before) == rungs
    for steps in range(1, len(rungs)):
        changed = restored_recipe(recipe, {"a": before, "b": before}, {"a": steps})
        left = [one for one in changed.modifiers if "a" not in one.ignore]
        assert [
            one for one in changed.modifiers if one.targets == ("*",) and "b" in one.ignore
        ] == []
        expected = rungs[steps:]
        assert len(left) == (0 if expected == ("original",) else 1)
        if left:
            after = combine("a", left, 64, (0, 2))
            assert ladder(after) == expected
            assert after.execution.endswith("int8")


def test_a_modifier_that_has_no_layer_left_goes(make_model: MakeModel) -> None:
    first = replace(INT8, targets=("model.layers.0.*",))
    second = replace(INT8, targets=("model.layers.1.*",), scale="mse")
    recipe = replace(resolve("w8a8"), modifiers=(first, second))
    checkpoint = Checkpoint.open(make_model())
    treatments = make_plan(recipe, checkpoint).treatments
    steps = {name: 1 for name in treatments if name.startswith("model.layers.0.")}
    changed = restored_recipe(recipe, treatments, steps)
    assert changed.modifiers == (second,)
    assert make_plan(changed, checkpoint).treatments.keys() == treatments.keys() - steps.keys()


def test_a_sabotaged_artefact_is_restored(mini: Path, sabotage: Sabotage, tmp_path: Path) -> None:
    recipe, cache = resolve("w8a8"), tmp_path / "cache"
    judge = Judge(
        original=mini,
        gate=Gate(mode="enforce", documents=8, length=48, restore=True),
        seed=0,
        kv_dtype="auto",
        cache_dir=cache,
        progress=NoProgress(),
    )

    def build(one: Recipe) -> Built:
        return compress_cached(one, mini, cache, NoProgress())

    requested = build(recipe).artefact
    sabotage(requested, 1.5)
    built, report = compress_and_judge(recipe, build, judge)
    assert report.verdict.outcome is Outcome.PASS
    (restored,) = report.restored
    assert (restored.name, restored.before, restored.after) == ("layer 3", "8 bit", "original")
    assert report.kept_share == pytest.approx(5 / 6, abs=1e-3)
    assert built.artefact != requested
    assert compress_and_judge(recipe, build, judge) == (built, report)
    shutil.rmtree(requested)
    built, report = compress_and_judge(recipe, build, judge)
    assert (built.artefact, report.restored) == (requested, ())


def test_data_is_read_before_the_work(mini: Path, tmp_path: Path) -> None:
    judge = Judge(
        original=mini,
        gate=Gate(mode="enforce", tasks=(str(tmp_path / "nowhere.jsonl"),)),
        seed=0,
        kv_dtype="auto",
        cache_dir=tmp_path,
        progress=NoProgress(),
    )
    with pytest.raises(CompressError, match=r"nowhere\.jsonl cannot be read"):
        compress_and_judge(resolve("w8a8"), lambda one: pytest.fail("compressed"), judge)


def judge_in(original: Path, cache: Path, **gate: Any) -> Judge:
    settings = {"mode": "enforce", "documents": 8, "length": 24, "restore": True, **gate}
    return Judge(
        original=original,
        gate=Gate(**settings),
        seed=0,
        kv_dtype="auto",
        cache_dir=cache,
        progress=NoProgress(),
    )


def run(judge: Judge) -> tuple[Built, Report]:
    def build(recipe: Recipe) -> Built:
        return compress_cached(recipe, judge.original, judge.cache_dir, NoProgress())

    return compress_and_judge(resolve("w8a8"), build, judge)


def test_questions_too_few_to_decide_restore_nothing(mini: Path, tmp_path: Path) -> None:
    pairs = [{"sentence_good": f"User: {n}", "sentence_bad": f"{n} :User"} for n in range(30)]
    tasks = tmp_path / "order.jsonl"
    tasks.write_text("\n".join(map(json.dumps, pairs)))
    _, report = run(judge_in(mini, tmp_path, tasks=(str(tasks),)))
    assert report.verdict.outcome is Outcome.INCONCLUSIVE
    assert report.restored == ()
    assert "questions of order would decide (there were 15)" in report.verdict.remedy
    assert not (tmp_path / "restorations").exists()


def test_where_nothing_can_be_restored_nothing_is_said_of_it(
    make_model: MakeModel, tmp_path: Path
) -> None:
    _, report = run(judge_in(make_model(layers=1), tmp_path, max_kl=1e-12))
    assert report.verdict.outcome is Outcome.FAIL
    assert "achievable" not in report.line()


@pytest.mark.parametrize(
    ("kind", "count", "message"),
    [
        ("data", 15, "gate.data has 15 windows of text, fewer than 16"),
        ("tasks", 1, "few has 1 question, and gate.restore needs 2"),
    ],
)
def test_too_little_data_for_two_halves(
    mini: Path, tmp_path: Path, kind: str, count: int, message: str
) -> None:
    line = {"text": "User: Who?", "sentence_good": "User: a", "sentence_bad": "a :User"}
    file = tmp_path / "few.jsonl"
    file.write_text((json.dumps(line) + "\n") * count)
    judge = judge_in(mini, tmp_path, **{kind: (str(file),)})
    with pytest.raises(CompressError, match=message):
        compress_and_judge(resolve("w8a8"), lambda one: pytest.fail("compressed"), judge)
    file.write_text((json.dumps(line) + "\n") * (count + 1))
    judge.check_data()


def test_a_layer_without_numbers_costs_none(
    mini: Path, sabotage: Sabotage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def costs(*_: object) -> list[float]:
        return [0.0, 0.0, 0.0, float("inf"), 0.0, 0.0]

    monkeypatch.setattr("compress.measure.contribution.contributions", costs)
    judge = judge_in(mini, tmp_path, length=48)
    sabotage(compress_cached(resolve("w8a8"), mini, tmp_path, NoProgress()).artefact, 1.5)
    _, report = run(judge)
    (restored,) = report.restored
    assert (restored.name, restored.contribution) == ("layer 3", None)
    assert run(judge)[1] == report


def test_a_recipe_that_cannot_pass_fails(mini: Path, tmp_path: Path) -> None:
    gate = Gate(mode="enforce", max_kl=1e-6, documents=8, length=24, restore=True)
    judge = Judge(
        original=mini,
        gate=gate,
        seed=0,
        kv_dtype="auto",
        cache_dir=tmp_path,
        progress=NoProgress(),
    )
    recipe = resolve("w8a8")
    built, report = compress_and_judge(
        recipe, lambda one: compress_cached(one, mini, tmp_path, NoProgress()), judge
    )
    assert report.refused
    assert "the recipe is not achievable" in report.line()
    assert report.restored == ()
    assert built.artefact == compress_cached(recipe, mini, tmp_path, NoProgress()).artefact
