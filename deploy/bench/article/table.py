"""A table of the report, and how its cells are written."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from deploy.bench.article.results import Results, Row
from deploy.bench.article.subjects import SUBJECTS

NONE = "–"


@dataclass(frozen=True)
class Table:
    """Cells are text; those of the first `num_names` columns are names, the rest figures, of which the last
    one may be a sentence.
    """

    title: str
    note: str
    columns: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    num_names: int = 1
    ends_in_text: bool = False


def shapes(results: Results) -> list[str]:
    """Measured ones, in the order of the subjects."""
    return [name for name in SUBJECTS if name in results.runs]


def number(value: Any, form: str = ",.1f") -> str:
    return NONE if value is None else f"{value:{form}}"


def by(rows: Iterable[Row], key: str) -> dict[Any, Row]:
    return {row[key]: row for row in rows}


def floor_ms(results: Results, shape: str) -> float | None:
    return next((r.get("floor_ms") for r in results.of("memory", shape)), None)
