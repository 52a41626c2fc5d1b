"""Whoever names a metric names one of the table: dashboards, alerts, chart, deployment, docs."""

import json
import re
from pathlib import Path

import pytest

from monitoring import METRICS
from monitoring.alerts import ALERTS, RECORDS
from monitoring.dashboards import DASHBOARDS
from monitoring.dashboards.build import build
from monitoring.promql import PromQL

ROOT = Path(__file__).parents[2]
SERIES = {*METRICS, *(series for metric in METRICS.values() for series in metric.series)}
RECORDED = {record.name for record in RECORDS}
_NAME = re.compile(r"(?<![\w./-])peregrine(?:_[a-z0-9_:]+|:[a-z0-9_]+:[a-z0-9_]+)")
# Python's packages and distribution, and a task of the quality documentation.
_OTHERS = {"peregrine_llm", "peregrine_local", "peregrine_transformers"}
_SUFFIXES = {".md", ".yaml", ".yml", ".tpl", ".json", ".txt"}


def named_in(text: str) -> set[str]:
    return {name.rstrip("_:") for name in _NAME.findall(text)} - _OTHERS


def files() -> list[Path]:
    folders = [ROOT / name for name in ("docs", "helm", "deploy", "monitoring")]
    found = [
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix in _SUFFIXES and path.parent.name != "benchmarks"  # results name no metric
    ]
    return [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted(found)]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_files_names_are_in_the_table(path):
    assert named_in(path.read_text(encoding="utf-8")) <= SERIES | RECORDED


@pytest.mark.parametrize("spec", DASHBOARDS, ids=lambda spec: spec.uid)
def test_a_dashboards_names_are_in_the_table(spec):
    names = named_in(json.dumps(build(spec)))
    assert names
    assert names <= SERIES


def test_the_alerts_names_are_in_the_table():
    for rule in (*ALERTS, *RECORDS):
        assert named_in(rule.expr) <= SERIES | RECORDED, rule.name


def test_every_metric_is_on_a_dashboard_or_in_an_alert():
    text = " ".join(t.expr for spec in DASHBOARDS for panel in spec.panels for t in panel.targets)
    text += " ".join(rule.expr for rule in (*ALERTS, *RECORDS))
    assert {name for name, metric in METRICS.items() if not named_in(text) & set(metric.series)} == set()


def test_another_name_does_not_become_an_expression():
    with pytest.raises(KeyError, match="peregrine_ttft_secs"):
        PromQL().series("peregrine_ttft_secs")
    with pytest.raises(ValueError, match=r"0\.06 is no bucket"):
        PromQL().share_above(0.06, "peregrine_itl_seconds")
