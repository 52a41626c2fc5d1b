"""article.json: rows as they come. A later run replaces the parts that it measures and keeps the others."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deploy.bench import report

Row = dict[str, Any]
"""Flat; `shape`, `part` and `path` (engine, http) say of what; the rest are figures, units in their names.

A part that failed is a row with `failed`, the reason.
"""


class Results:
    """Every change is on disk before the next measurement begins."""

    def __init__(self, path: Path, announce: Callable[[Row], None] = lambda row: None) -> None:
        self._path, self._announce = path, announce
        raw = json.loads(path.read_text()) if path.exists() else {}
        self.rows: list[Row] = raw.get("rows", [])
        self.runs: dict[str, dict[str, Any]] = raw.get("runs", {})
        """Machine, versions, date and command by which each shape was measured last."""

    def begin(self, shape: str, machine: Row) -> None:
        """Note the circumstances of what follows."""
        self.runs[shape] = report.circumstances(machine)
        self._save()

    def replace(self, shape: str, part: str, path: str | None = None) -> None:
        """Forget earlier rows of a part that is measured again."""
        self.rows = [
            r
            for r in self.rows
            if (r["shape"], r["part"]) != (shape, part) or (path is not None and r.get("path") != path)
        ]

    def add(self, shape: str, part: str, figures: Row) -> None:
        row = {"shape": shape, "part": part, **figures}
        self.rows.append(row)
        self._save()
        self._announce(row)

    def of(self, part: str, shape: str | None = None, path: str | None = None) -> Iterator[Row]:
        """Rows that have figures."""
        for row in self.rows:
            asked = row["part"] == part and shape in (None, row["shape"]) and path in (None, row.get("path"))
            if asked and "failed" not in row:
                yield row

    def failures(self) -> list[Row]:
        return [row for row in self.rows if "failed" in row]

    def _save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_suffix(".tmp")
        unfinished.write_text(json.dumps({"runs": self.runs, "rows": self.rows}, indent=1) + "\n")
        os.replace(unfinished, self._path)  # a killed run leaves the last whole file
