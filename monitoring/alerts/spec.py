"""What an alert is, and where it comes from."""

from dataclasses import dataclass
from typing import Literal

from monitoring.promql import PromQL

OWNER = ("namespace", "job")
"""Labels that tell one installation from another."""


@dataclass(frozen=True)
class Record:
    """A recording rule. Its name has colons, by Prometheus' convention: nobody exports it."""

    name: str
    expr: str


@dataclass(frozen=True)
class Alert:
    """A page wakes somebody, a ticket waits for the morning.

    hold: how long the expression must hold, a duration.
    summary, description: may use `{{ $labels.x }}`, but no values: each would be a new alert.

    What to do stands in docs/runbooks/<name>.md.
    """

    name: str
    severity: Literal["page", "ticket"]
    expr: str
    hold: str
    summary: str
    description: str


def over(window: str) -> PromQL:
    """Expressions with a fixed window."""
    return PromQL(window=window)
