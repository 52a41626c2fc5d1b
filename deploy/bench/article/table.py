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


def has_gpu(results: Results, shape: str) -> bool:
    """Whether it was measured on one."""
    return "gpu" in results.runs[shape]["machine"]


def label(shape: str) -> str:
    """Short, for pictures: the model and its bits."""
    subject = SUBJECTS[shape]
    name = subject.title.partition(",")[0] if subject.bits is not None else subject.title
    return name if subject.bits is None else f"{name}, {subject.bits:g} bits"


def number(value: Any, form: str = ",.1f") -> str:
    return NONE if value is None else f"{value:{form}}"


def by(rows: Iterable[Row], key: str) -> dict[Any, Row]:
    return {row[key]: row for row in rows}


def floor_ms(results: Results, shape: str) -> float | None:
    return next((r.get("floor_ms") for r in results.of("memory", shape)), None)


def is_cut_off(results: Results, shape: str) -> bool:
    """Whether more streams were to be tried over HTTP than there was time for."""
    return any(
        (r["shape"], r["part"], r.get("path")) == (shape, "decode", "http") for r in results.failures()
    )


def long_by_rate_s(results: Results, shape: str, output_tokens: int) -> float | None:
    """What a long answer takes at the least, by the first token and the rate of one stream over HTTP.

    The rate is of contexts of 128 to 256 tokens; in longer ones a token takes longer. None without rows.
    """
    first = by(results.of("ttft", shape, "http"), "prompt_tokens").get(128)
    one = by(results.of("decode", shape, "http"), "streams").get(1)
    if first is None or one is None:
        return None
    return (first["ttft_ms"] + (output_tokens - 1) * one["itl_ms"]) / 1e3
