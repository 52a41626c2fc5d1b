"""`peregrine keys` and `peregrine usage`."""

import sys
from typing import Annotated

import typer
from rich.console import Console

from deploy.terminal import console, fail

_TIMEOUT_S = 10.0

keys = typer.Typer(no_args_is_help=True, help="API keys of tenants.")


@keys.callback()
def _keys() -> None:
    """Keeps `new` a command of its own while it is the only one."""


@keys.command()
def new(
    tenant: Annotated[str, typer.Option(help="Whose: lower-case letters, digits, '.', '_' and '-'.")],
) -> None:
    """Make a key: it is shown once, on standard error; its hash is printed for the configuration."""
    import yaml
    from pydantic import TypeAdapter, ValidationError

    from serving.tenants.keys import hash_key, new_key
    from serving.tenants.settings import TenantName

    try:
        TypeAdapter(TenantName).validate_python(tenant)
    except ValidationError:
        allowed = "up to 63 lower-case letters, digits, '.', '_' and '-'"
        raise fail(f"--tenant: must be {allowed}, got {tenant!r}") from None
    key = new_key()
    console.print(
        f"The key of {tenant}, shown this once: {key}", highlight=False, markup=False, soft_wrap=True
    )
    members = {tenant: {"keys": [hash_key(key.encode())]}}
    print(yaml.safe_dump({"tenants": {"members": members}}, sort_keys=False), end="")


def usage(
    base_url: Annotated[str, typer.Option(help="Where the server is.")] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="PEREGRINE_API_KEY",
            help="An operator's (serving.api_keys): all tenants; a tenant's: its own.",
        ),
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="CSV on standard output, for a file.")] = False,
) -> None:
    """What was used, by hour, tenant and model."""
    import httpx
    from rich.table import Table

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    url = f"{base_url.rstrip('/').removesuffix('/v1')}/v1/usage"
    try:
        answer = httpx.get(
            url, params={"format": "csv" if csv else "json"}, headers=headers, timeout=_TIMEOUT_S
        )
    except httpx.HTTPError as error:
        raise fail(f"{url}: {error}") from None
    if answer.status_code == 404:
        raise fail(f"{url}: this server has no tenants")
    if answer.is_error:
        raise fail(f"{url}: {answer.json()['error']['message']}")
    if csv:
        sys.stdout.write(answer.text)
        return
    rows = answer.json()["data"]
    table = Table(*(rows[0] if rows else ("nothing was used",)))
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
