"""Every process has an address for its metrics, and Prometheus is told of it."""

import json
import socket
import urllib.request

import pytest
from pydantic import ValidationError

from monitoring import Recorder
from monitoring.bandwidth import measure_bandwidth
from monitoring.exporter import Exporter, MetricsSettings


@pytest.fixture
def settings(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return MetricsSettings(port=min(port, 65_000), targets_dir=tmp_path / "targets")


def scrape(exporter: Exporter) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}/metrics", timeout=5) as response:
        return response.read().decode()


def test_processes_of_a_host_take_one_port_after_the_other(settings):
    first, second = (Exporter(settings, Recorder(tiers).registry) for tiers in (("voice",), ("batch",)))
    try:
        assert second.port > first.port >= settings.port
        assert 'tier="voice"' in scrape(first)
        assert 'tier="batch"' in scrape(second)
        files = {int(f.stem): json.loads(f.read_text()) for f in settings.targets_dir.glob("*.json")}
        assert files == {e.port: [{"targets": [f"127.0.0.1:{e.port}"]}] for e in (first, second)}
    finally:
        first.close()
        second.close()
        second.close()
    assert list(settings.targets_dir.iterdir()) == []


def test_a_directory_that_cannot_be_written_costs_nothing_else(settings, tmp_path):
    (tmp_path / "file").write_text("")
    broken = settings.model_copy(update={"targets_dir": tmp_path / "file" / "targets"})
    exporter = Exporter(broken, Recorder().registry)
    try:
        assert "peregrine_requests_running" in scrape(exporter)
    finally:
        exporter.close()


def test_it_may_be_off():
    assert Exporter(MetricsSettings(port=None), Recorder().registry).port is None


def test_unknown_settings_are_refused():
    with pytest.raises(ValidationError, match="prot"):
        MetricsSettings(prot=1)


def test_bandwidth_is_that_of_a_memory():
    assert 1e8 < measure_bandwidth(1) < 1e13
