"""`bench article` from its server to its report, on a small random model; its speed does not matter here."""

import dataclasses

import pytest
from rich.console import Console

from deploy.bench.article import report
from deploy.bench.article.plan import QUICK, Options
from deploy.bench.article.run import run
from deploy.bench.article.workloads import DEADLINES

pytestmark = pytest.mark.e2e

SHORT = dataclasses.replace(
    QUICK,
    prompts=(128,),
    engine_batches=(1,),
    streams=(1, 2),
    output=256,  # enough that streams run together, however late the second one begins
    long_output=64,
    workload_share=0.02,
    deadlines=[dataclasses.replace(DEADLINES[0], seconds=60.0)],
    rates=1,
    rate_s=0.5,
)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("is_shared", [False, True], ids=["own cluster", "shared cluster"])
def test_every_part_of_a_shape_ends_in_the_report(tmp_path, is_shared):
    console = Console(quiet=True)
    results = run(Options(tmp_path, ["tiny"], dataclasses.replace(SHORT, is_shared=is_shared)), console)
    assert results.failures() == []
    parts = {row["part"] for row in results.rows}
    assert parts == {
        "memory",
        "ttft",
        "decode",
        "server",
        "long",
        "workload",
        "goodput",
        "integration",
    }
    assert {r["probe"] for r in results.of("integration") if not r["passed"]} == set()
    assert len(list(results.of("workload"))) == 15
    report.write(results, tmp_path, 3.0, None, console)
    assert "two small random layers" in (tmp_path / "article.html").read_text()
