"""The automatic recipe on small models: budgets are kept, and what was found is found again."""

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest
import torch

import compress
from compress.auto.candidates import ORIGINAL
from compress.auto.config import Auto, Frontier
from compress.auto.plot import plot
from compress.auto.resolve import resolve_auto
from compress.errors import CompressError
from compress.methods import METHODS
from compress.progress import NoProgress
from compress.recipe import Calibration, Recipe, load, resolve
from compress.sources import MANIFEST_NAME
from engine.errors import ModelLoadError
from engine.formats.checkpoint import Checkpoint

MakeModel = Callable[..., Path]
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def small(**auto: Any) -> Recipe:
    recipe = resolve("auto")
    return replace(
        recipe,
        auto=Auto(**{"budget": "bits", "limit": 5.5, "swaps": 4, **auto}),
        calibration=Calibration(samples=4, length=32),
    )


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / MANIFEST_NAME).read_text())
    return found


@pytest.mark.parametrize("limit", [4.6, 6.0, 9.0])
def test_the_artefact_keeps_the_budget(make_model: MakeModel, tmp_path: Path, limit: float) -> None:
    compress.compress(small(limit=limit), make_model(), tmp_path / "out")
    found = manifest(tmp_path / "out")
    touched = [row for row in found["layers"] if row["name"] != "lm_head"]
    weights = sum(8 * row["bytes"] / row["bits"] for row in touched)
    bits = 8 * sum(row["bytes"] for row in touched) / weights
    assert bits <= limit
    point = next(one for one in found["recipe"]["resolved"]["frontier"]["points"] if one["chosen"])
    assert point["nbytes"] == sum(row["bytes"] for row in touched)
    assert point["bits"] == pytest.approx(bits, abs=1e-3)
    storage = {row["name"]: row["storage"] for row in touched}
    for fused in FUSED:
        for name in storage:
            if name.endswith(fused[0]):
                parts = [name.replace(fused[0], part) for part in fused]
                assert len({storage[part] for part in parts}) == 1
    assert len(set(storage.values())) > 1


def test_twice_the_same(make_model: MakeModel, tmp_path: Path) -> None:
    model, recipe = make_model(), small()
    for name in ("a", "b"):
        compress.compress(recipe, model, tmp_path / name)
    first, second = Checkpoint.open(tmp_path / "a"), Checkpoint.open(tmp_path / "b")
    assert first.tensors.keys() == second.tensors.keys()
    for name in first.tensors:
        assert torch.equal(first.tensor(name), second.tensor(name))


def test_a_second_start_finds_the_search(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = make_model(), tmp_path / "cache"
    found = resolve_auto(small(), model, cache, NoProgress())
    assert found.modifiers
    assert (found.auto, found.gate) == (small().auto, small().gate)
    assert [file.read_text()[:4] for file in cache.glob("searches/*.svg")] == ["<svg"]
    assert resolve_auto(found, model, cache, NoProgress()) == found
    monkeypatch.setattr("compress.auto.run.search", lambda *_: pytest.fail("searched again"))
    assert resolve_auto(small(), model, cache, NoProgress()) == found


def test_the_picture_has_the_limit_of_the_run(make_model: MakeModel, tmp_path: Path) -> None:
    model, recipe = make_model(), small()
    found = resolve_auto(recipe, model, tmp_path, NoProgress())
    assert found.frontier is not None
    limit = found.frontier.chosen.kl
    other = replace(recipe, gate=replace(recipe.gate, max_kl=limit))
    assert resolve_auto(other, model, tmp_path, NoProgress()).frontier == found.frontier
    (picture,) = tmp_path.glob("searches/*.svg")
    assert picture.read_text() == plot(found.frontier, limit)
    assert plot(found.frontier, limit) != plot(found.frontier)


def test_another_version_of_gptq_searches_again(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    resolve_auto(small(), model, tmp_path, NoProgress())
    monkeypatch.setitem(METHODS, "gptq", replace(METHODS["gptq"], version=1000))
    resolve_auto(small(), model, tmp_path, NoProgress())
    assert len(list(tmp_path.glob("searches/*.json"))) == 2


def test_what_a_killed_search_left_is_removed(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    with monkeypatch.context() as patch:
        # A killed process removes nothing.
        patch.setattr("compress.auto.run.generate", lambda *_, **__: pytest.fail("killed"))
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(pytest.fail.Exception):
            resolve_auto(small(), model, tmp_path, NoProgress())
    (left,) = tmp_path.glob("searches/*.work")
    (left / "roundings").write_text("many")
    resolve_auto(small(), model, tmp_path, NoProgress())
    names = {file.suffix for file in (tmp_path / "searches").iterdir()}
    assert names == {".json", ".lock", ".svg"}


def test_memory_is_judged_before_the_model_is_timed(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("group_seconds", "other_seconds"):
        monkeypatch.setattr(f"compress.auto.run.{name}", lambda *_: pytest.fail("timed"))
    monkeypatch.setattr("compress.auto.run.available_bytes", lambda: 1 << 20)
    recipe = small(budget="tokens_per_second", limit=450.0)
    with pytest.raises(CompressError, match=r"and 1 MB are free: free some, or ask for bits"):
        resolve_auto(recipe, make_model(), tmp_path, NoProgress())


def test_a_disk_that_fills_up_is_told(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("compress.auto.library.LayerStore.save", full)
    with pytest.raises(CompressError, match=r"searches/\w+\.work: the disk is full: name a writ"):
        resolve_auto(small(), make_model(), tmp_path, NoProgress())


def test_an_error_of_the_system_in_a_search_is_not_one_of_writing(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("no such device")

    monkeypatch.setattr("compress.auto.run.generate", broken)
    with pytest.raises(OSError, match="no such device"):
        resolve_auto(small(), make_model(), tmp_path, NoProgress())


def test_more_bits_cost_less(make_model: MakeModel, tmp_path: Path) -> None:
    found = resolve_auto(small(), make_model(), tmp_path, NoProgress())
    assert found.frontier is not None
    points = [one for one in found.frontier.points if one.name == "auto"]
    predicted = [one.predicted_kl for one in points if not one.chosen]
    assert predicted == sorted(predicted, reverse=True)
    assert points[0].kl is not None
    assert points[-1].kl is not None
    assert points[-1].kl < points[0].kl
    assert sum(share for _, share in found.frontier.chosen.schemes) == pytest.approx(1, abs=1e-3)


def test_time_that_is_over_stops_the_swaps(make_model: MakeModel, tmp_path: Path) -> None:
    found = resolve_auto(small(time_budget=1e-6), make_model(), tmp_path, NoProgress())
    assert found.frontier is not None
    assert found.frontier.stopped == "time_budget, 0 swaps tried"


def test_a_speed_within_reach_is_kept(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(groups: Any, plan: Any, checkpoint: Any, schemes: Any) -> Any:
        assert not any(ORIGINAL in one for one in schemes)
        return [{name: 2e-4 if name == "w8a8" else 1e-4 for name in one} for one in schemes]

    monkeypatch.setattr("compress.auto.run.group_seconds", seconds)
    monkeypatch.setattr("compress.auto.run.other_seconds", lambda *_: 0.001)
    recipe, model = small(budget="tokens_per_second", limit=450.0), make_model()
    found = resolve_auto(recipe, model, tmp_path, NoProgress())
    assert found.frontier is not None
    # Eight groups: 1.8 ms with 4 bits, and 2.2 ms with four of them at 8 bits.
    assert found.frontier.chosen.tokens_per_second == pytest.approx(1 / 2.2e-3, abs=0.01)
    speeds = [one.tokens_per_second for one in found.frontier.points]
    assert (max(speeds), min(speeds)) == pytest.approx((1 / 1.8e-3, 1 / 2.6e-3), abs=0.01)
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    resolve_auto(recipe, model, tmp_path, NoProgress())
    assert len(list(tmp_path.glob("searches/*.json"))) == 2


def test_a_disk_that_is_too_small_is_told_first(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(CompressError, match="needed: free some or name a writable folder"):
        resolve_auto(small(), make_model(), tmp_path, NoProgress())


def test_a_broken_tokenizer_is_found_before_the_search(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.auto.run.generate", lambda *_, **__: pytest.fail("searched"))
    model = make_model()
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json is broken"):
        resolve_auto(small(), model, tmp_path, NoProgress())


def test_the_report_shows_the_frontier(make_model: MakeModel, tmp_path: Path) -> None:
    compress.compress(small(), make_model(), tmp_path / "out")
    record = manifest(tmp_path / "out")["recipe"]["resolved"]["frontier"]
    frontier = msgspec.convert(record, Frontier)
    picture = ElementTree.fromstring(plot(frontier, frontier.chosen.kl))
    titles = [one.text or "" for one in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == len([one for one in frontier.points if one.kl > 1e-7])
    texts = [one.text or "" for one in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert any(text.startswith("gate's limit") for text in texts)
    assert any("uniform w4a8 g32" in text for text in texts)


def test_ignored_layers_stay(make_model: MakeModel, tmp_path: Path) -> None:
    recipe = small(ignore=("lm_head", "*.down_proj"))
    compress.compress(recipe, make_model(), tmp_path / "out")
    rows = {row["name"]: row["method"] for row in manifest(tmp_path / "out")["layers"]}
    assert {m for n, m in rows.items() if n.endswith("down_proj")} == {"none"}


@pytest.mark.parametrize(
    ("budget", "limit", "message"),
    [
        ("bits", 3.0, r"auto.bits of 3 cannot be kept: for this model, ask for at least 4\."),
        ("bits", 16.0, r"auto.bits of 16 is kept by original alone: .* less than 16\.000"),
        ("bytes", 100.0, r"auto.bytes of 100 cannot be kept: .* ask for at least \d+, less"),
        (
            "tokens_per_second",
            1e9,
            r"(cannot be kept: .* more than [\d.]+, at most [\d.]+$|"
            "nothing is faster)",
        ),
        ("tokens_per_second", 1e-3, r"of 0.001 is kept by w8a8 alone|nothing is faster"),
    ],
)
def test_budgets_out_of_reach(
    make_model: MakeModel, tmp_path: Path, budget: str, limit: float, message: str
) -> None:
    with pytest.raises(CompressError, match=message):
        resolve_auto(small(budget=budget, limit=limit), make_model(), tmp_path, NoProgress())


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("auto: {bits: 5, bytes: 7}", 2, "exactly one of bits, bytes, tokens_per_second; it has"),
        ("auto: {time_budget: 5}", 2, "it has none"),
        ("auto: {bitts: 5}", 2, "did you mean 'bits'?"),
        ("auto: {bits: 0}", 2, "auto.bits must be a number above 0"),
        ("auto: {bytes: lots}", 2, "auto.bytes must be a size such as 500M or 1.5Gi, not 'lots'"),
        ("auto: {bits: 5, time_budget: never}", 2, "auto.time_budget must be a number above 0"),
        ("auto: {bits: 5, ignore: ['re:[']}", 2, "is not a regular expression"),
        ("auto: {tokens_per_second: 5}\nhead: keep", 3, "timed with an int8 head and KV cache"),
        ("auto: {tokens_per_second: 5}\nkv_cache: {dtype: fp32}", 3, "remove kv_cache, or ask"),
        ("auto: {bits: 5}\nmodifiers: [{type: rtn, scheme: w8a8}]", 3, "remove one of both"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, text: str, line: int, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"version: 1\n{text}\n")
    with pytest.raises(CompressError) as error:
        load(file)
    assert str(error.value).startswith(f"{file}:{line}: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("size", "nbytes"), [("500M", 500e6), ("1.5Gi", 1.5 * 2**30), ("7", 7), ("2 kB", 2000)]
)
def test_sizes(tmp_path: Path, size: str, nbytes: float) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"version: 1\nauto: {{bytes: {size}}}\n")
    recipe = load(file)
    assert recipe.auto == Auto(budget="bytes", limit=nbytes)
    assert recipe.calibration == Calibration()
    assert recipe.head == "int8"
