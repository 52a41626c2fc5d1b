"""What was asked beside what was measured."""

from deploy.bench.article.asked import asked_table
from deploy.bench.article.results import Results
from tests.deploy.article.rows import MACHINE, filled


def test_without_rows_nothing_is_kept_nor_broken(tmp_path):
    rows = asked_table(Results(tmp_path / "article.json")).rows
    assert {(measured, kept) for _, measured, kept in rows} == {("not measured", "–")}


def test_the_cost_of_serving_is_judged(tmp_path):
    rows = {asked: (measured, kept) for asked, measured, kept in asked_table(filled(tmp_path)).rows}
    between = next(v for k, v in rows.items() if k.startswith("8B, 16 streams"))
    assert between == ("3.43 ms, alone 3.40 ms: +0.9%", "yes")
    first = next(v for k, v in rows.items() if k.startswith("8B: first token"))
    assert first == ("+3.00 ms of 128, +3.00 ms of 512, +3.00 ms of 2,048", "yes")
    assert rows["70B: first token of 512 in at most 90 ms"] == ("8.1 ms", "yes")


def test_the_largest_shape_that_is_fast_enough_is_named(tmp_path):
    results = Results(tmp_path / "article.json")
    for shape, bits, seconds in (("3.8b-w2", 2.125, 1.0), ("3.8b", 3.25, 1.15), ("8b", 4.25, 6.0)):
        results.begin(shape, MACHINE)
        results.add(shape, "long", {"path": "http", "bits": bits, "output_tokens": 2000, "e2e_s": seconds})
    assert asked_table(results).rows[-1][1:] == ["3.8B at 3.25 bits: 1.15 s", "yes"]
    results.replace("3.8b", "long", "http")
    assert asked_table(results).rows[-1][1:] == ["3.8B at 2.125 bits: 1.00 s", "yes"]
    results.replace("3.8b-w2", "long", "http")
    assert asked_table(results).rows[-1][1:] == ["none; the fastest is 8B at 4.25 bits: 6.00 s", "no"]
