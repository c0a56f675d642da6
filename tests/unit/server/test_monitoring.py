"""Averages and alarms, of figures that a test makes up; the fallback that follows."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from engine.client.engine_client import EngineClient
from engine.errors import ModelLoadError
from engine.figures import LayerFigures, StepFigures
from server import convert
from server.config import ServerConfig
from server.fallback import check_original, watch_over
from server.monitoring import WINDOW_ROWS, Alarm, AlarmLimits, Average, EntropyReference, Watch
from server.provenance import Provenance
from server.serving import Progress, Serving
from venturi.v1 import admin_pb2 as pb

LIMITS = AlarmLimits(entropy_nats=1.0, non_finite=3)
REFERENCE = EntropyReference(mean=2.0)


def step(entropy: float = 2.0, rows: int = 16, **layer: Any) -> StepFigures:
    layers = (LayerFigures(rounded=100, outlier=2.0), LayerFigures(**layer))
    return StepFigures(rows=rows, layers=layers, entropies=(entropy,) * rows)


def take(watch: Watch, steps: int, figures: StepFigures) -> None:
    for _ in range(steps):
        watch.take(figures)


def test_an_average_forgets() -> None:
    average = Average()
    assert average.value is None
    average.add(0.0, 0.0, 4)
    assert average.value is None
    average.add(10.0, 100.0, 1)
    assert average.value == pytest.approx(0.1)
    for _ in range(20 * WINDOW_ROWS):
        average.add(50.0, 100.0, 1)
    assert average.value == pytest.approx(0.5)
    for _ in range(WINDOW_ROWS):
        average.add(0.0, 100.0, 1)
    assert average.value == pytest.approx(0.5 / 2.718, rel=0.01)


def test_shares_and_counts_of_layers() -> None:
    watch = Watch(LIMITS, None)
    take(watch, 2, step(rounded=50, zeroed=5, saturated=1, outlier=9.0, kv_non_finite=1))
    watch.take(StepFigures(non_finite_logits=0))
    first, second = watch.layers
    assert (first.zeroed.value, first.outlier.value) == (0.0, pytest.approx(2.0))
    assert second.zeroed.value == pytest.approx(0.1)
    assert second.saturated.value == pytest.approx(0.02)
    assert second.kv_non_finite == 2
    assert watch.sampled_steps == 2
    assert watch.non_finite == 2


def test_layers_that_round_nothing_have_no_shares() -> None:
    watch = Watch(LIMITS, None)
    watch.take(StepFigures(rows=1, layers=(LayerFigures(outlier=3.0),)))
    message = convert.monitoring(watch)
    assert not message.layers[0].HasField("zeroed_share")
    assert message.layers[0].outlier_ratio == pytest.approx(3.0)
    assert not message.HasField("entropy_nats")


@pytest.mark.parametrize("entropy", [0.5, 3.5])
def test_an_entropy_alarm_begins_once_and_ends(
    entropy: float, caplog: pytest.LogCaptureFixture
) -> None:
    watch, heard = Watch(LIMITS, REFERENCE, "mini@w8a8"), list[Alarm]()
    watch.on_alarm = lambda alarm, line: heard.append(alarm)
    take(watch, WINDOW_ROWS // 16 - 1, step(entropy))
    assert watch.entropy_shift is None, "too few rows"
    assert not watch.alarms
    take(watch, 5, step(entropy))
    assert watch.entropy_shift == pytest.approx(entropy - 2.0)
    assert heard == [Alarm.ENTROPY]
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"mini@w8a8: output entropy is {entropy:.2f} nats, and the original's was 2.00" in line
    assert "docs/monitoring.md" in line
    assert convert.monitoring(watch).alarms[0].kind == "entropy"
    with caplog.at_level(logging.INFO):
        take(watch, 100, step(2.0))
    assert not watch.alarms
    assert "within its limits again" in caplog.text
    take(watch, 100, step(entropy))
    assert heard == [Alarm.ENTROPY] * 2


def test_an_alarm_does_not_flicker_at_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch(LIMITS, REFERENCE)
    take(watch, 200, step(3.05))
    for _ in range(50):
        take(watch, 20, step(2.85))
        take(watch, 20, step(3.15))
    assert len(caplog.records) == 1


def test_without_a_reference_there_is_no_shift_and_no_alarm() -> None:
    watch = Watch(LIMITS, None)
    take(watch, 500, step(100.0))
    assert watch.entropy == pytest.approx(100.0)
    assert watch.entropy_shift is None
    assert not watch.alarms
    message = convert.monitoring(watch)
    assert not message.HasField("reference_entropy_nats")
    assert not message.HasField("entropy_shift_nats")


def test_a_non_finite_alarm_counts_everything_and_stays(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch(LIMITS, None)
    watch.take(StepFigures(non_finite_logits=1))
    watch.take(step(non_finite=1))
    assert not watch.alarms
    watch.take(StepFigures(non_finite_logits=1))
    take(watch, 100, step())
    assert list(watch.alarms) == [Alarm.NON_FINITE]
    assert "3 times NaN or infinite numbers (2 rows of logits, 1 in layers)" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("manifest", "wanted"),
    [
        ({"reference_entropy": {"mean": 2, "deviation": 1.5}}, REFERENCE),
        ({}, None),
        ({"reference_entropy": {"mean": 2}}, REFERENCE),
        ({"reference_entropy": {"mean": float("nan")}}, None),
        ({"reference_entropy": {"mean": float("inf")}}, None),
        ({"reference_entropy": {"mean": "much", "deviation": 1}}, None),
        ({"reference_entropy": 7}, None),
    ],
)
def test_the_reference_is_in_the_manifest(
    manifest: dict[str, Any], wanted: EntropyReference | None
) -> None:
    assert Provenance(manifest).entropy() == wanted


class Replaced(EngineClient):
    def __init__(self) -> None:
        super().__init__(lambda: None)  # type: ignore[arg-type, return-value]
        self.replaced: list[str] = []

    def replace(self, make_transport: object, why: str) -> None:
        self.replaced.append(why)


def watched(fallback: str) -> tuple[Serving, Replaced]:
    config = ServerConfig(fallback=fallback, alarm_entropy=1.0)
    serving, engine = Serving("mini", "w8a8"), Replaced()
    serving.provenance = Provenance({"reference_entropy": {"mean": 2.0, "deviation": 1.0}})
    serving.report(Progress(phase=pb.PHASE_READY))
    watch_over(config, serving, engine, lambda: None)  # type: ignore[arg-type, return-value]
    return serving, engine


NON_FINITE, SHIFTED = StepFigures(non_finite_logits=1), step(9.0)


@pytest.mark.parametrize(
    ("fallback", "figures", "falls_back"),
    [
        ("off", NON_FINITE, False),
        ("non-finite", NON_FINITE, True),
        ("alarm", NON_FINITE, True),
        ("off", SHIFTED, False),
        ("non-finite", SHIFTED, False),
        ("alarm", SHIFTED, True),
    ],
)
def test_what_a_fallback_follows(fallback: str, figures: StepFigures, falls_back: bool) -> None:
    serving, engine = watched(fallback)
    before = serving.watch
    assert before is not None
    take(before, 30, figures)
    assert len(engine.replaced) == falls_back
    assert before.alarms
    assert serving.variant == ("original" if falls_back else "w8a8")
    if falls_back:
        assert serving.fallback is not None
        assert serving.fallback.variant == "w8a8"
        assert serving.watch is not before
        assert serving.watch is not None
        assert serving.watch.reference == EntropyReference(mean=2.0)
        # The original itself has nothing to fall back to.
        take(serving.watch, 30, figures)
        assert len(engine.replaced) == 1


def test_a_service_that_drains_does_not_fall_back() -> None:
    serving, engine = watched("alarm")
    serving.report(Progress(phase=pb.PHASE_DRAINING))
    assert serving.watch is not None
    serving.watch.take(NON_FINITE)
    assert not engine.replaced
    assert serving.variant == "w8a8"
    assert Alarm.NON_FINITE in serving.watch.alarms


def model_folder(folder: Path, config: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").touch()
    return folder


def test_an_original_has_weights_and_as_many_tokens(tmp_path: Path) -> None:
    served = model_folder(tmp_path / "served", json.dumps({"vocab_size": 7}))
    check_original(model_folder(tmp_path / "sound", json.dumps({"vocab_size": 7})), served)
    with pytest.raises(ModelLoadError, match="is no folder"):
        check_original(tmp_path / "nothing", served)
    other = model_folder(tmp_path / "other", json.dumps({"vocab_size": 8}))
    with pytest.raises(ModelLoadError, match=r"has 8 tokens, and .* has 7"):
        check_original(other, served)
    for number, config in enumerate(("{", "{}", "[]")):
        with pytest.raises(ModelLoadError, match=r"config\.json"):
            check_original(model_folder(tmp_path / str(number), config), served)
    (other / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="has no weights"):
        check_original(other, served)


def test_a_broken_manifest_of_the_original_is_found_before_serving(tmp_path: Path) -> None:
    (tmp_path / "venturi.json").write_text("{")
    config = ServerConfig(fallback="alarm", original=tmp_path)
    with pytest.raises(ModelLoadError, match=r"venturi\.json"):
        watch_over(config, Serving("mini", "w8a8"), Replaced(), lambda: None)  # type: ignore[arg-type, return-value]
