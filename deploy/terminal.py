"""What the commands say on standard error."""

import typer
from rich.console import Console
from rich.markup import escape

console = Console(stderr=True)


def fail(message: str) -> typer.Exit:
    """One line on standard error, exit status 1."""
    console.print(f"[bold red]peregrine:[/] {escape(message)}", highlight=False, soft_wrap=True)
    return typer.Exit(1)
