"""A real Prometheus scrapes the live replicas and routers: all metrics, panels and rules have data."""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.conftest import MODEL
from tests.monitoring.live import Asked, prometheus, without_data

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.model,
    pytest.mark.skipif(
        shutil.which("prometheus") is None,
        reason="prometheus is not installed (tests/install-prometheus.sh)",
    ),
]

_TIERS = ("voice", "copilot", "agent", "default", "batch")
_SCRAPES_S = 4.0


def test_everything_that_is_shown_has_data(client, metrics_targets):
    def ask(number: int) -> None:
        client.completions.create(
            model=MODEL,
            prompt=f"{number}. The river runs through the old town, and " * 4,
            max_tokens=8,
            extra_body={"service_tier": _TIERS[number % len(_TIERS)]},
            extra_headers={"x-slo-ttft-ms": "60000"},
        )

    with prometheus(metrics_targets) as address:
        time.sleep(_SCRAPES_S)  # rates need samples of before
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(ask, range(30)))
        time.sleep(_SCRAPES_S)
        asked = Asked(address)
        rows = asked.rows()
        assert without_data(rows) == []
        assert asked.rule_errors() == []
        up = [target for target in asked.targets() if target["health"] == "up"]
        assert len(up) >= 2 + 2  # replicas and routers
