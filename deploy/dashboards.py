"""`peregrine dashboards`: to files, or into a running Grafana."""

import json
from pathlib import Path
from typing import Annotated

import typer

from deploy.terminal import fail

_FOLDER_UID, _FOLDER_TITLE = "peregrine", "Peregrine"
_SOURCE_UID, _SOURCE_NAME = "peregrine-prometheus", "Peregrine Prometheus"

app = typer.Typer(no_args_is_help=True, help="Grafana dashboards.")


@app.command()
def export(directory: Annotated[Path, typer.Argument(help="Is made where it is not there yet.")]) -> None:
    """Write one JSON file a dashboard, for file provisioning or the Helm sidecar."""
    from monitoring.dashboards import DASHBOARDS
    from monitoring.dashboards.build import build

    try:
        directory.mkdir(parents=True, exist_ok=True)
        for spec in DASHBOARDS:
            path = directory / f"{spec.uid}.json"
            path.write_text(json.dumps(build(spec), indent=2) + "\n", encoding="utf-8")
            print(path)
    except OSError as error:
        raise fail(str(error)) from None


@app.command()
def push(
    url: Annotated[str, typer.Option(help="Grafana's address.")],
    token: Annotated[
        str,
        typer.Option(envvar="GRAFANA_TOKEN", help="Of a service account that may edit.", show_envvar=True),
    ],
    prometheus: Annotated[
        str | None,
        typer.Option(
            help="Prometheus as Grafana reaches it: makes a data source of it, which takes an "
            "administrator's token. Without it the dashboards ask Grafana's default Prometheus."
        ),
    ] = None,
) -> None:
    """Create or update folder, data source and dashboards. What is up to date is left alone."""
    from monitoring.dashboards import DASHBOARDS
    from monitoring.dashboards.build import build
    from monitoring.grafana import Grafana, GrafanaError

    try:
        grafana = Grafana(url, token)
        _say("folder", _FOLDER_TITLE, grafana.ensure_folder(_FOLDER_UID, _FOLDER_TITLE))
        if prometheus is not None:
            changed = grafana.ensure_prometheus(_SOURCE_UID, _SOURCE_NAME, prometheus)
            _say("data source", _SOURCE_NAME, changed)
        for spec in DASHBOARDS:
            dashboard = build(spec, _SOURCE_UID if prometheus is not None else None)
            _say("dashboard", spec.title, grafana.ensure_dashboard(dashboard, _FOLDER_UID))
    except GrafanaError as error:
        raise fail(f"Grafana at {url}: {error}") from None


def _say(what: str, name: str, changed: bool) -> None:
    print(f"{'saved   ' if changed else 'as it is'}  {what}  {name}")
