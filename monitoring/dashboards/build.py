"""From a specification to Grafana's JSON, through Grafana's own SDK, whose types are Grafana's schema.

The classic model: the HTTP API, file provisioning and the Helm sidecar all take it.
"""

import json
from typing import Any

from grafana_foundation_sdk.builders import common
from grafana_foundation_sdk.builders import dashboard as grafana
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.stat import Panel as NumberPanel
from grafana_foundation_sdk.builders.timeseries import Panel as GraphPanel
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import BigValueGraphMode, SortOrder, TooltipDisplayMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableOption,
    VariableRefresh,
)

from monitoring.dashboards.spec import Dashboard, Panel
from monitoring.metrics import METRICS

TAG = "peregrine"
_SOURCE = DataSourceRef("prometheus", "${datasource}")
_HEIGHTS = {"graph": 8, "number": 4}
_JOBS_OF = METRICS["peregrine_replica_ready"].name


def build(spec: Dashboard, datasource: str | None = None) -> dict[str, Any]:
    """The dashboard as Grafana stores it; the same specification gives the same JSON.

    datasource: uid of the data source to ask at first; None: Grafana's default Prometheus.
    """
    links = (
        grafana.DashboardLink("Peregrine")
        .type(DashboardLinkType.DASHBOARDS)
        .tags([TAG])
        .as_dropdown(True)
        .keep_time(True)
        .include_vars(True)
    )
    builder = (
        grafana.Dashboard(spec.title)
        .uid(spec.uid)
        .description(spec.description)
        .tags([TAG])
        .refresh("10s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .link(links)
        .with_variable(_source_variable(datasource))
        .with_variable(
            grafana.QueryVariable("job")
            .label("Job")
            .datasource(_SOURCE)
            .query(f"label_values({_JOBS_OF}, job)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .include_all(True)
            .all_value(".*")
            .multi(True)
            .current(VariableOption(True, "All", "$__all"))
        )
    )
    for box in spec.textboxes:
        builder.with_variable(grafana.TextBoxVariable(box.name).label(box.label).default_value(box.default))
    number = 0
    for row in spec.rows:
        builder.with_row(grafana.Row(row.title).id(number := number + 1))
        for panel in row.panels:
            builder.with_panel(_panel(panel).id(number := number + 1))
    made: dict[str, Any] = json.loads(json.dumps(builder.build(), cls=JSONEncoder))
    return made


def _source_variable(uid: str | None) -> grafana.DatasourceVariable:
    variable = grafana.DatasourceVariable("datasource").label("Data source").type("prometheus")
    return variable if uid is None else variable.current(VariableOption(True, uid, uid))


def _panel(spec: Panel) -> GraphPanel | NumberPanel:
    panel = _graph() if spec.kind == "graph" else _number()
    panel.title(spec.title).description(spec.description).unit(spec.unit).datasource(_SOURCE)
    panel.span(spec.width).height(_HEIGHTS[spec.kind]).min(0)
    if spec.maximum is not None:
        panel.max(spec.maximum)
    if spec.limits is not None:
        panel.thresholds(_thresholds(*spec.limits))
    for number, target in enumerate(spec.targets):
        query = Dataquery().expr(target.expr).legend_format(target.legend).ref_id(chr(ord("A") + number))
        panel.with_target(query.range())
    return panel


def _graph() -> GraphPanel:
    tooltip = common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING)
    legend = common.VizLegendOptions().show_legend(True)
    return GraphPanel().line_width(1).fill_opacity(8).legend(legend).tooltip(tooltip)


def _number() -> NumberPanel:
    last = common.ReduceDataOptions().calcs(["lastNotNull"]).values(False)
    return NumberPanel().graph_mode(BigValueGraphMode.AREA).reduce_options(last)


def _thresholds(yellow: float, red: float) -> grafana.ThresholdsConfig:
    if yellow < red:
        steps = [Threshold(None, "green"), Threshold(yellow, "yellow"), Threshold(red, "red")]
    else:
        steps = [Threshold(None, "red"), Threshold(red, "yellow"), Threshold(yellow, "green")]
    return grafana.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)
