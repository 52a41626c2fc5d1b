"""The form of every benchmark's result: machine, versions, date, command, rows."""

import datetime
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]

_PACKAGES = ("peregrine-llm", "torch", "triton", "ray", "transformers", "llama-cpp-python")


def machine() -> dict[str, Any]:
    """GPU where there is one, processor, cores that this process may use, memory."""
    return {
        **_gpu(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
    }


def _gpu() -> dict[str, str]:
    import torch

    return {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def publish(rows: Sequence[Row], title: str, path: Path | None) -> None:
    """Print the rows as a table, and write them to `path` if there is one."""
    table = Table(title=title)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column, justify="left" if isinstance(rows[0].get(column), str) else "right")
    for row in rows:
        table.add_row(*("" if row.get(c) is None else str(row[c]) for c in columns))
    Console().print(table)
    if path is None:
        return
    result = {**circumstances(), "rows": list(rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def circumstances(of: Row | None = None) -> dict[str, Any]:
    """Machine, versions, date and command of a result. of: `machine()` where another process called it."""
    return {
        "machine": of or machine(),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join([*_program(), *sys.argv[1:]]),
    }


def _program() -> list[str]:
    """`peregrine`, or the module that runs by itself."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = spec.name if spec else "deploy.cli"
    return ["peregrine"] if name == "deploy.cli" else ["python", "-m", name.removesuffix(".__main__")]


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank percentile of a non-empty sequence; `share` in [0, 1]."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
