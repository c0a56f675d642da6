"""The table from exceptions to statuses."""

import pytest
from google.rpc import error_details_pb2 as details
from google.rpc import status_pb2

from engine import errors
from server.errors import TABLE, code_of, retry_after_ms, to_status

NEVER_IN_A_REQUEST = {errors.ModelLoadError}
EXAMPLES: dict[type[errors.EngineError], errors.EngineError] = {
    errors.InvalidRequest: errors.InvalidRequest("sampling.top_p", "too much"),
    errors.NotServed: errors.NotServed("output.echo", "not yet"),
    errors.UnknownModel: errors.UnknownModel("gpt"),
    errors.Overloaded: errors.Overloaded("full", 2.5),
    errors.EngineUnavailable: errors.EngineUnavailable("restarting", 0.25),
    errors.DeadlineExceeded: errors.DeadlineExceeded("late"),
    errors.GenerationFailed: errors.GenerationFailed("secret of the inside"),
}


def kinds(status: status_pb2.Status) -> set[str]:
    return {detail.type_url.rsplit(".", 1)[-1] for detail in status.details}


def test_every_error_has_a_status() -> None:
    assert set(TABLE) == set(errors.EngineError.__subclasses__()) - NEVER_IN_A_REQUEST
    assert set(EXAMPLES) == set(TABLE)


@pytest.mark.parametrize("kind", EXAMPLES, ids=lambda kind: kind.__name__)
def test_each_status_has_its_details(kind: type[errors.EngineError]) -> None:
    status = to_status(EXAMPLES[kind], "id-1")
    assert code_of(status) is TABLE[kind][0]
    assert {"ErrorInfo", "RequestInfo"} <= kinds(status)
    retries = kind in (errors.Overloaded, errors.EngineUnavailable)
    assert (retry_after_ms(status) is not None) == retries
    assert ("BadRequest" in kinds(status)) == (kind in (errors.InvalidRequest, errors.NotServed))


def test_retry_times_survive() -> None:
    assert retry_after_ms(to_status(EXAMPLES[errors.Overloaded], "x")) == 2500


@pytest.mark.parametrize(
    "error", [ValueError("secret /etc/key"), RuntimeError(), EXAMPLES[errors.GenerationFailed]]
)
def test_what_went_wrong_inside_stays_inside(error: Exception) -> None:
    status = to_status(error, "id-1")
    assert code_of(status).name == "INTERNAL"
    assert status.message == "internal error, request id-1"
    assert b"secret" not in status.SerializeToString()


@pytest.mark.parametrize(
    "error",
    [errors.UnknownModel("x" * 20_000), errors.InvalidRequest("chat", "y" * 20_000)],
)
def test_a_status_fits_into_the_trailers(error: Exception) -> None:
    """gRPC ends a stream whose trailers pass 16 KiB without any status."""
    assert len(to_status(error, "z" * 128).SerializeToString()) < 4096


def test_a_bad_field_is_named_by_its_path() -> None:
    status = to_status(EXAMPLES[errors.InvalidRequest], "x")
    bad = details.BadRequest()
    assert any(detail.Unpack(bad) for detail in status.details)
    assert bad.field_violations[0].field == "sampling.top_p"
    assert status.message == "sampling.top_p: too much"
