"""`python -m tests.monitoring.live`: two live replicas under locust's load, scraped by a real Prometheus.

Every metric of the table, every expression of every panel and every rule is asked for; what has no data
must be one of the cases that are listed here with their reasons.
"""

import argparse
import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

from deploy.bench import report
from deploy.cluster import running_cluster
from deploy.config import load_config
from deploy.ray_environment import free_port
from monitoring import METRICS
from monitoring.alerts import ALERTS, RECORDS
from monitoring.dashboards import DASHBOARDS

RULES = Path(__file__).parents[2] / "monitoring" / "alerts" / "rules.yaml"
_READY_TIMEOUT_S = 30.0
_SERIES = re.compile(r"(?<![\w:])peregrine_[a-z0-9_]+(?:\{[^}]*\})?")
# Grafana's variables, as it would fill them in.
_VARIABLES = {"$job": ".*", "$__rate_interval": "15s", "$gpu_hour_price": "2.5"}
_HAS_NVML = Path("/dev/nvidiactl").exists()
# Selectors that have no data in a healthy cluster, and why.
_EMPTY = {
    "peregrine_gpu_xid_errors_total": "no GPU has reported an error",
    'status=~"5.."': "no request has failed",
    "peregrine_tenant_": "there are no tenants (tests/e2e/test_tenants.py reads them where there are)",
}


@contextlib.contextmanager
def prometheus(targets_dir: Path) -> Iterator[str]:
    """A Prometheus of this process's own on loopback, with the rules, scraping each second; its address."""
    with tempfile.TemporaryDirectory(prefix="pg-prom-") as folder:
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(RULES)],
            "scrape_configs": [
                {
                    "job_name": "peregrine",
                    "file_sd_configs": [{"files": [f"{targets_dir}/*.json"], "refresh_interval": "1s"}],
                }
            ],
        }
        path = Path(folder) / "prometheus.yaml"
        path.write_text(yaml.safe_dump(config))
        address = f"127.0.0.1:{free_port()}"
        command = ["prometheus", f"--config.file={path}", f"--storage.tsdb.path={folder}/data"]
        command += [f"--web.listen-address={address}", "--log.level=warn"]
        with subprocess.Popen(command) as server:
            try:
                _wait_until_ready(f"http://{address}", server)
                yield f"http://{address}"
            finally:
                server.terminate()
                server.wait(30)


def _wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/-/ready").status_code == 200:
                return
        time.sleep(0.2)
    raise RuntimeError("prometheus did not become ready")


class Asked:
    """One Prometheus, asked for everything."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=30)

    def rows(self) -> list[dict[str, Any]]:
        """One for each metric, panel query and rule: how many series it gives, or why it gives none."""
        rows = [self._row("metric", name, name, series=metric.series) for name, metric in METRICS.items()]
        for spec in DASHBOARDS:
            for panel in spec.panels:
                for target in panel.targets:
                    name = f"{spec.title}, {panel.title}, {target.legend}"
                    rows.append(self._row("panel", name, target.expr))
        rows += [self._row("record", record.name, record.expr) for record in RECORDS]
        rows += [self._alert(alert.name, alert.expr) for alert in ALERTS]
        return rows

    def targets(self) -> list[dict[str, Any]]:
        active: list[dict[str, Any]] = self._get("/api/v1/targets", {})["activeTargets"]
        return active

    def rule_errors(self) -> list[str]:
        """Of rules that Prometheus could not evaluate."""
        groups = self._get("/api/v1/rules", {})["groups"]
        return [rule["lastError"] for group in groups for rule in group["rules"] if rule.get("lastError")]

    def count(self, expr: str) -> int:
        """Series that the expression gives now."""
        for name, value in _VARIABLES.items():
            expr = expr.replace(name, value)
        return len(self._get("/api/v1/query", {"query": expr})["result"])

    def _row(self, kind: str, name: str, expr: str, series: tuple[str, ...] = ()) -> dict[str, Any]:
        counts = [self.count(part) for part in series or (expr,)]
        return {"kind": kind, "name": name, "series": min(counts), "empty_because": _reason(expr, counts)}

    def _alert(self, name: str, expr: str) -> dict[str, Any]:
        """Empty while its condition does not hold; then every series that it reads must be there."""
        count = self.count(expr)
        reason = None
        if not count and not (reason := _reason(expr, [0])):
            missing = [s for s in _SERIES.findall(expr) if not self.count(s) and not _reason(s, [0])]
            reason = None if missing else "its condition does not hold, and every series it reads is there"
        return {"kind": "alert", "name": name, "series": count, "empty_because": reason}

    def _get(self, path: str, parameters: dict[str, str]) -> Any:
        answer = self._client.get(path, params=parameters).json()
        if answer["status"] != "success":
            raise RuntimeError(f"{parameters}: {answer.get('error')}")
        return answer["data"]


def _reason(expr: str, counts: list[int]) -> str | None:
    """Why it may be empty; None where it is not, or may not be."""
    if min(counts) > 0:
        return None
    names = set(re.findall(r"peregrine_[a-z0-9_]+", expr))
    if not _HAS_NVML and any(name.startswith("peregrine_gpu_") for name in names):
        return "there is no GPU"
    return next((reason for part, reason in _EMPTY.items() if part in expr), None)


def without_data(rows: list[dict[str, Any]]) -> list[str]:
    """Names of what has no data and no reason."""
    return [row["name"] for row in rows if not row["series"] and not row["empty_because"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenario", default="steady", help="of tests.load")
    parser.add_argument("--capacity", type=float, default=2.0, help="requests a second, as tests.load has it")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if shutil.which("prometheus") is None:
        parser.error("prometheus is not installed (tests/install-prometheus.sh)")
    with tempfile.TemporaryDirectory(prefix="pg-targets-") as targets:
        config = load_config(
            None,
            {
                "serving": {"metrics": {"targets_dir": targets}},
                "cluster": {"replicas": 2, "port": free_port(), "haproxy": "on"},
            },
        )
        with running_cluster(config) as url, prometheus(Path(targets)) as address:
            command = [sys.executable, "-m", "tests.load.run", options.scenario, "--url", url]
            subprocess.run([*command, "--capacity", str(options.capacity)], check=True)
            asked = Asked(address)
            rows = asked.rows()
            health = [target["health"] for target in asked.targets()]
            errors = asked.rule_errors()
    report.publish(rows, "Metrics, panels and rules on a live cluster", options.json)
    print(f"targets: {', '.join(health)}; rules with errors: {errors}")
    if missing := without_data(rows):
        sys.exit(f"no data and no reason: {', '.join(missing)}")


if __name__ == "__main__":
    main()
