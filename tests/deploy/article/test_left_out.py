"""What a run had no time for stands in its tables and pictures, and is never a zero."""

import json

import pytest
from rich.console import Console

from deploy.bench.article import report
from deploy.bench.article.asked import asked_table
from deploy.bench.article.claims import claims
from deploy.bench.article.floors import H100
from deploy.bench.article.left_out import left_out
from deploy.bench.article.results import Results
from deploy.bench.article.speed_tables import summary
from deploy.bench.article.table import long_by_rate_s
from tests.deploy.article.rows import MACHINE, filled, goodput_row

SPENT = "not begun: the shape's 50 s were spent"
PARTS = ("long", "integration", "workload", "goodput", "goodput", "goodput", "goodput")


def cut_short(directory) -> Results:
    """A shape whose time was up while its streams grew."""
    results = Results(directory / "article.json")
    results.begin("180b", MACHINE)
    for prompt in (128, 512, 2048):
        results.add("180b", "ttft", {"path": "http", "prompt_tokens": prompt, "ttft_ms": 100.0})
    for streams in (1, 16):
        figures = {"itl_ms": 20.0, "itl_ms_p99": 21.0, "tok_s": 50.0 * streams}
        results.add("180b", "decode", {"path": "http", "bits": 2.125, "streams": streams, **figures})
    results.add("180b", "engine", {"failed": "stopped after 1 s"})
    results.add("180b", "decode", {"path": "http", "failed": "stopped after 2 s"})
    for part in PARTS:
        results.add("180b", part, {"path": "http", "failed": SPENT})
    return results


def test_a_shape_has_a_row_for_each_reason(tmp_path):
    rows = [row[1:] for row in left_out(cut_short(tmp_path)).rows if row[0] == "180B (dense)"]
    assert rows == [
        [
            "engine alone",
            "first token of 128, 512, 2,048; streams: 1, 16, 64; launches",
            "stopped after 1 s",
        ],
        ["over HTTP", "streams, more than 16", "stopped after 2 s"],
        ["over HTTP", "2,000 tokens; probes of the APIs; kinds of prompts; goodput", SPENT],
    ]


def test_shapes_and_parts_without_any_row_are_named(tmp_path):
    results = Results(tmp_path / "article.json")
    results.begin("8b", MACHINE)
    results.add("8b", "goodput", goodput_row(1.0, 1.0))
    rows = {(row[0], row[1]): row[2:] for row in left_out(results).rows}
    assert rows["70B (Llama 3)", "–"] == ["everything", "given no machine time by any run"]
    what, why = rows["8B (Llama 3)", "over HTTP"]
    assert why == "the run ended before it"
    assert "goodput, edge, copilot, agent" in what
    assert "two small random layers" not in {name for name, _ in rows}


def test_failures_of_no_shape_and_probes_that_fail_are_rows(tmp_path):
    results = filled(tmp_path)
    results.add("any", "kernels", {"failed": "no compiler"})
    rows = left_out(results).rows
    assert ["all", "–", "kernels", "no compiler"] in rows
    assert ["8B (Llama 3)", "over HTTP", "failed: the probe a <b>", "404: |"] in rows
    assert not [row for row in rows if "plain torch" in row[2]]


def test_more_streams_that_were_not_tried_are_said(tmp_path):
    results = cut_short(tmp_path)
    assert summary(results).rows[0][-3] == "16, cut off"
    measured = {row[0]: row[1] for row in asked_table(results).rows}
    assert measured["180B: at least 1,200 tokens/s of all streams"].endswith("; no time was left for more")
    ours = {c.what: c.ours(results) for c in claims(H100)}
    assert ours["aggregate, 180B at 2.125 bits, 128 streams"] == "800 tokens/s with 16; more not reached"


def test_a_long_answer_that_was_not_timed_has_a_least_time(tmp_path):
    results = cut_short(tmp_path)
    assert long_by_rate_s(results, "180b", 2000) == pytest.approx(0.1 + 1999 * 0.02)
    assert long_by_rate_s(results, "8b", 2000) is None
    ours = {c.what: c.ours(results) for c in claims(H100)}
    assert ours["2,000 tokens of one stream, 180B at 2.125 bits"] == "at least 40.1 s, by its rate"
    text = "180B at 2.125 bits, not timed, takes at least 40.08 s by its rate"
    assert asked_table(results).rows[-1][1:] == [text, "no"]


def test_a_rate_that_would_do_is_no_proof(tmp_path):
    results = Results(tmp_path / "article.json")
    results.begin("3.8b-w2", MACHINE)
    results.add("3.8b-w2", "ttft", {"path": "http", "prompt_tokens": 128, "ttft_ms": 5.0})
    results.add(
        "3.8b-w2", "decode", {"path": "http", "bits": 2.125, "streams": 1, "itl_ms": 0.5, "tok_s": 2e3}
    )
    assert asked_table(results).rows[-1][2] == "–"


def test_launches_are_cut_from_the_count_where_none_were_run(tmp_path):
    results = filled(tmp_path)
    results.rows = [r for r in results.rows if r.get("kind") != "unfused"]
    ours = {c.what: c.ours(results) for c in claims(H100)}
    assert ours["kernel launches cut by"] == "98.6% (70B: 356, one an operation, to 5)"


def test_pictures_tell_what_is_missing(tmp_path):
    results = filled(tmp_path)
    results.rows = [r for r in results.rows if (r["part"], r.get("path")) != ("decode", "http")]
    peers = tmp_path / "peer.json"
    row = {"engine": "a peer", "kernel": "k_1", "shape": "8b", "bits": 4.125, "prompt_tokens": 128}
    rows = [{**row, "batch": 1, "ttft_ms": 9.0}]
    peers.write_text(json.dumps({"machine": {"gpu": "NVIDIA H100"}, "rows": rows}))
    report.write(results, tmp_path, 3.0, peers, Console(quiet=True))
    plots = {f.stem: f.read_text() for f in (tmp_path / "plots").iterdir()}
    assert plots["goodput"].count("<!-- not measured -->") == 6  # three tiers of two shapes
    assert "Peregrine, engine alone" in plots["floor"]
    assert "Peregrine, over HTTP" not in plots["floor"]
    assert "a peer, k 1 (engine alone)" in plots["ttft"]
    assert "a peer" not in plots["streams"]
