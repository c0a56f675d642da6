"""What the doctor says of this machine's settings."""

import pytest
from click.testing import CliRunner

from server.doctor import doctor
from server.metrics import ENDPOINTS as METRIC_ENDPOINTS
from server.telemetry import ENDPOINTS as TRACE_ENDPOINTS


@pytest.mark.parametrize("name", [*TRACE_ENDPOINTS, *METRIC_ENDPOINTS])
def test_each_endpoint_of_telemetry_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in (*TRACE_ENDPOINTS, *METRIC_ENDPOINTS):
        monkeypatch.delenv(other, raising=False)
    assert "exported to" not in CliRunner().invoke(doctor).output
    monkeypatch.setenv(name, "http://collector:4317")
    assert "exported to http://collector:4317\n" in CliRunner().invoke(doctor).output
