"""The page is what the table says."""

from pathlib import Path

from monitoring import METRICS
from monitoring.documentation import page

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_the_page_is_current():
    assert PAGE.read_text() == page(), "run: python -m monitoring.documentation docs/metrics.md"


def test_every_metric_is_on_it_once():
    rows = [line.split("`")[1] for line in page().splitlines() if line.startswith("| `peregrine_")]
    assert sorted(rows) == sorted(METRICS)
