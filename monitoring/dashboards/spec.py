"""What a dashboard is made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from monitoring.promql import PromQL

QUERY = PromQL('job=~"$job"', "$__rate_interval")
"""What every panel asks: of the jobs chosen at the top, over a window that fits the resolution."""


@dataclass(frozen=True)
class Target:
    """One query. `legend` is Grafana's template, e.g. `{{tier}}`."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """A graph, or one number with its course behind it.

    unit: one of Grafana's unit ids.
    width: of 24 columns.
    limits: values from which on the colour is yellow, and red; where less is worse, red is the smaller.
    """

    title: str
    description: str
    unit: str
    targets: Sequence[Target]
    kind: Literal["graph", "number"] = "graph"
    width: int = 8
    limits: tuple[float, float] | None = None
    maximum: float | None = None


@dataclass(frozen=True)
class Row:
    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Textbox:
    """A number that the viewer may change: `$name` in expressions."""

    name: str
    label: str
    default: str


@dataclass(frozen=True)
class Dashboard:
    uid: str
    title: str
    description: str
    rows: Sequence[Row]
    textboxes: Sequence[Textbox] = ()

    @property
    def panels(self) -> list[Panel]:
        return [panel for row in self.rows for panel in row.panels]
