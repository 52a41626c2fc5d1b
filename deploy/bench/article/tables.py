"""Rows of article.json as the report's tables, in its order."""

from deploy.bench.article import other_tables, speed_tables
from deploy.bench.article.asked import asked_table
from deploy.bench.article.floors import card_of
from deploy.bench.article.left_out import left_out
from deploy.bench.article.results import Results
from deploy.bench.article.table import Table


def tables(results: Results, dollars_an_hour: float) -> list[Table]:
    """Those that have rows; what was asked and the claims always."""
    found = [
        asked_table(results),
        other_tables.claims_table(results, card_of(results)),
        speed_tables.summary(results),
        speed_tables.first_tokens(results),
        speed_tables.serving_cost(results),
        speed_tables.concurrency(results),
        speed_tables.goodput(results),
        speed_tables.workloads(results),
        other_tables.memory(results),
        other_tables.launches(results),
        other_tables.speculation(results),
        other_tables.edge(results),
        other_tables.scores(results, dollars_an_hour),
        left_out(results),
        other_tables.machines(results),
    ]
    return [table for table in found if table.rows]
