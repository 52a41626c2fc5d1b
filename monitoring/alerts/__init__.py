"""The alert rules, as code; rules.yaml beside this file is what they make."""

from monitoring.alerts.conditions import CONDITIONS
from monitoring.alerts.objectives import alerts, records
from monitoring.alerts.spec import Alert, Record

RECORDS: tuple[Record, ...] = tuple(records())
ALERTS: tuple[Alert, ...] = (*alerts(), *CONDITIONS)

__all__ = ["ALERTS", "RECORDS", "Alert", "Record"]
