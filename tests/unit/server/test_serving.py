"""Which phase the service is in, and who may come in."""

import asyncio
from types import SimpleNamespace

import pytest

from engine.client.engine_client import EngineState
from engine.errors import EngineUnavailable, UnknownModel
from server.provenance import Provenance
from server.serving import Fallback, Progress, Serving, TokenRate
from venturi.v1 import admin_pb2 as pb


def test_names_and_variants_are_found() -> None:
    serving = Serving("mini", "w8a8")
    for name in ("", "mini", "mini@w8a8"):
        serving.find(name)
    for name in ("other", "mini@w4a8", "@w8a8", "mini@"):
        with pytest.raises(UnknownModel):
            serving.find(name)


def test_a_variant_that_was_given_up_is_still_found() -> None:
    serving = Serving("mini", "w8a8")
    serving.fallback = Fallback(variant="w8a8", reason="its numbers overflow")
    serving.variant = "original"
    for name in ("", "mini", "mini@w8a8", "mini@original"):
        serving.find(name)
    with pytest.raises(UnknownModel):
        serving.find("mini@w4a8")


def test_nothing_is_served_before_it_is_ready() -> None:
    serving = Serving("mini", "w8a8")
    serving.report(Progress(phase=pb.PHASE_COMPRESSING))
    with pytest.raises(EngineUnavailable, match="compressing"):
        serving.generator("")


async def test_watchers_see_the_present_state_and_each_change() -> None:
    serving = Serving("mini", "w8a8")
    seen: list[int] = []

    async def watch() -> None:
        async for progress in serving.progress():
            seen.append(progress.phase)

    watching = asyncio.ensure_future(watch())
    await asyncio.sleep(0)
    for phase in (pb.PHASE_COMPRESSING, pb.PHASE_LOADING, pb.PHASE_READY):
        serving.report(Progress(phase=phase))
        await asyncio.sleep(0)
    await asyncio.wait_for(watching, 1)
    assert seen == [pb.PHASE_STARTING, pb.PHASE_COMPRESSING, pb.PHASE_LOADING, pb.PHASE_READY]


async def test_readiness_changes_are_told_once_and_draining_is_final() -> None:
    serving = Serving("mini", "w8a8")
    told: list[bool] = []
    serving.on_ready_change = told.append
    for phase in (pb.PHASE_LOADING, pb.PHASE_READY, pb.PHASE_RESTARTING, pb.PHASE_READY):
        serving.report(Progress(phase=phase))
    assert await serving.drain(0.0) == (0, 0)
    serving.report(Progress(phase=pb.PHASE_READY))
    assert told == [True, False, True, False]
    assert not serving.ready


async def test_a_restart_says_why() -> None:
    serving = Serving("mini", "w8a8")
    engine = SimpleNamespace(state=EngineState.RESTARTING, last_end="it fell over", on_change=None)
    serving.open(SimpleNamespace(engine=engine))  # type: ignore[arg-type]
    engine.on_change()
    assert await anext(serving.progress()) == Progress(
        phase=pb.PHASE_RESTARTING, detail="it fell over"
    )
    engine.state = EngineState.READY
    engine.on_change()
    assert await anext(serving.progress()) == Progress(phase=pb.PHASE_READY)


def test_engine_ids_differ_for_one_request_id() -> None:
    serving = Serving("mini", "w8a8")
    assert serving.next_id("a") != serving.next_id("a")


def test_the_rate_is_that_of_the_last_ten_seconds() -> None:
    now = 100.0
    rate = TokenRate(clock=lambda: now)
    for _ in range(40):
        now += 1
        rate.add(30)
    assert rate.per_second() == pytest.approx(30.0)
    now += 60
    assert rate.per_second() == 0.0


@pytest.mark.parametrize(
    "manifest", [{}, {"recipe": 3, "sources": [], "versions": None, "layers": {}}, {"layers": [1]}]
)
def test_a_manifest_of_any_shape_is_reported(manifest: dict[str, object]) -> None:
    provenance = Provenance(manifest)
    assert provenance.to_proto("safetensors").format == "safetensors"
    assert provenance.methods() == {}
