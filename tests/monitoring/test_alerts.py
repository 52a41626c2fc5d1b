"""The rules: the file is what the code makes, promtool accepts it, each alert fires when it should."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from deploy.alerts import app
from monitoring.alerts import ALERTS
from monitoring.alerts.objectives import ITL_LIMITS_S
from monitoring.alerts.render import annotations, rules, text
from serving.tiers import TIERS
from tests.helm.rendering import render, values_file
from tests.monitoring.alert_cases import CASES, Case, Series

ROOT = Path(__file__).parents[2]
RULES = ROOT / "monitoring" / "alerts" / "rules.yaml"
RUNBOOKS = ROOT / "docs" / "runbooks"
BY_NAME = {alert.name: alert for alert in ALERTS}

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (tests/install-prometheus.sh)"
)


def promtool(*arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_file_is_current():
    assert RULES.read_text() == text(), "run: python -m monitoring.alerts.render monitoring/alerts/rules.yaml"


def test_every_alert_has_cases_and_a_page_and_the_reverse():
    assert sorted(case.alert for case in CASES) == sorted(BY_NAME)
    assert sorted(page.stem for page in RUNBOOKS.glob("Peregrine*.md")) == sorted(BY_NAME)
    assert all(case.fires and case.silent for case in CASES)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_page_says_what_it_means_and_what_to_do(name):
    page = (RUNBOOKS / f"{name}.md").read_text()
    assert page.startswith(f"# {name}\n")
    for part in ("## What it means", "## Look", "## Do"):
        assert part in page


def test_export_may_point_to_the_pages_elsewhere(tmp_path):
    path = tmp_path / "rules.yaml"
    options = ["export", str(path), "--runbooks", "https://wiki.example/runbooks/"]
    assert CliRunner().invoke(app, options).exit_code == 0
    groups = yaml.safe_load(path.read_text())["groups"]
    found = {
        rule["annotations"]["runbook_url"] for group in groups for rule in group["rules"] if "alert" in rule
    }
    assert found == {f"https://wiki.example/runbooks/{name}.md" for name in BY_NAME}


def test_the_charts_rules_are_these():
    (rule,) = render(values_file("pod-monitor.yaml")).by_template["prometheusrule.yaml"]
    assert rule["spec"]["groups"] == rules()["groups"]


def test_every_built_in_tier_has_a_limit():
    assert ITL_LIMITS_S.keys() == TIERS.keys()


@needs_promtool
def test_promtool_accepts_the_rules():
    promtool("check", "rules", str(RULES))


@needs_promtool
@pytest.mark.parametrize("case", CASES, ids=[case.alert for case in CASES])
def test_it_fires_when_it_should_and_is_silent_otherwise(case, tmp_path):
    tests = [
        *(_test(case, series, fires=True) for series in case.fires),
        *(_test(case, series, fires=False) for series in case.silent),
    ]
    path = tmp_path / "cases.yaml"
    cases = {"rule_files": [str(RULES)], "evaluation_interval": case.interval, "tests": tests}
    path.write_text(yaml.safe_dump(cases))
    promtool("test", "rules", str(path))


def _test(case: Case, series: Series, *, fires: bool) -> dict[str, object]:
    alert = BY_NAME[case.alert]
    labels = {"severity": alert.severity, **case.labels}
    texts = {
        key: re.sub(r"{{ \$labels\.(\w+) }}", lambda match: labels[match[1]], value)
        for key, value in annotations(alert, "docs/runbooks").items()
    }
    expected = [{"exp_labels": labels, "exp_annotations": texts}] if fires else []
    return {
        "interval": case.interval,
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [{"eval_time": case.at, "alertname": case.alert, "exp_alerts": expected}],
    }
