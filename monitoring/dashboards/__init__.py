"""The dashboards, as code. `build` needs Grafana's SDK, the specifications do not."""

from monitoring.dashboards.capacity import CAPACITY
from monitoring.dashboards.engine import ENGINE
from monitoring.dashboards.overview import OVERVIEW
from monitoring.dashboards.router import ROUTER
from monitoring.dashboards.spec import Dashboard, Panel

DASHBOARDS: tuple[Dashboard, ...] = (OVERVIEW, ENGINE, ROUTER, CAPACITY)

__all__ = ["DASHBOARDS", "Dashboard", "Panel"]
