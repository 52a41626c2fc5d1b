"""Prometheus' rule file: `python -m monitoring.alerts.render monitoring/alerts/rules.yaml`."""

import sys
from pathlib import Path
from typing import Any

import yaml

from monitoring.alerts import ALERTS, RECORDS, Alert
from monitoring.alerts.objectives import alerts as burn_rates

_HEAD = (
    "# Written by `python -m monitoring.alerts.render monitoring/alerts/rules.yaml`; "
    "a test holds it to the code.\n"
)


def rules(runbooks: str = "docs/runbooks") -> dict[str, Any]:
    """The file's content. runbooks: where the alerts' pages are, a directory or a URL."""
    burning = {alert.name for alert in burn_rates()}
    records = [{"record": record.name, "expr": record.expr} for record in RECORDS]
    groups = {
        "peregrine-objectives": records,
        "peregrine-burn-rates": [_alert(alert, runbooks) for alert in ALERTS if alert.name in burning],
        "peregrine-conditions": [_alert(alert, runbooks) for alert in ALERTS if alert.name not in burning],
    }
    return {"groups": [{"name": name, "rules": made} for name, made in groups.items()]}


def annotations(alert: Alert, runbooks: str) -> dict[str, str]:
    return {
        "summary": alert.summary,
        "description": alert.description,
        "runbook_url": f"{runbooks.rstrip('/')}/{alert.name}.md",
    }


def text(runbooks: str = "docs/runbooks") -> str:
    """The file."""
    return _HEAD + yaml.dump(rules(runbooks), Dumper=_Dumper, sort_keys=False, width=1000)


def _alert(alert: Alert, runbooks: str) -> dict[str, Any]:
    return {
        "alert": alert.name,
        "expr": alert.expr,
        "for": alert.hold,
        "labels": {"severity": alert.severity},
        "annotations": annotations(alert, runbooks),
    }


class _Dumper(yaml.SafeDumper):
    """Expressions of several lines as blocks, the way that people write them."""


def _string(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _string)

if __name__ == "__main__":
    Path(sys.argv[1]).write_text(text())
