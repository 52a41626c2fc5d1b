"""`peregrine alerts`: Prometheus' rules, to a file."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, help="Prometheus alert rules.")


@app.callback()
def _group() -> None:
    """Prometheus alert rules."""


@app.command()
def export(
    path: Annotated[Path, typer.Argument(help="The rule file to write.")],
    runbooks: Annotated[
        str, typer.Option(help="Where the alerts' pages are: a directory or a URL.")
    ] = "docs/runbooks",
) -> None:
    """Write the rule file, as in monitoring/alerts/rules.yaml."""
    from monitoring.alerts.render import text

    try:
        path.write_text(text(runbooks), encoding="utf-8")
    except OSError as error:
        Console(stderr=True).print(f"[bold red]peregrine:[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
