"""Results on disk, and the report of made-up ones."""

import dataclasses
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from deploy.bench.article import launches, machine, report
from deploy.bench.article.plan import QUICK, Options
from deploy.bench.article.results import Results
from deploy.bench.article.shape import Shape
from deploy.bench.article.subjects import SUBJECTS
from deploy.bench.article.tables import tables
from deploy.cli import app
from tests.deploy.article.rows import MACHINE, filled


def test_rows_are_on_disk_as_they_come(tmp_path):
    results = filled(tmp_path)
    assert Results(tmp_path / "article.json").rows == results.rows
    assert not list(tmp_path.glob("*.tmp"))


def test_a_later_run_replaces_what_it_measures_and_keeps_the_rest(tmp_path):
    results = filled(tmp_path)
    before = len(results.rows)
    results.replace("8b", "ttft", "http")
    assert len(results.rows) == before - 3
    assert [r["path"] for r in results.of("ttft", "8b")] == ["engine"] * 3
    assert len(list(results.of("ttft", "70b"))) == 6


def test_a_failure_has_no_figures(tmp_path):
    results = filled(tmp_path)
    assert [r["failed"] for r in results.failures()] == ["stopped after 3 s"]
    assert len(list(results.of("long", "70b"))) == 1


def test_every_cell_has_its_column(tmp_path):
    found = tables(filled(tmp_path), 3.0)
    for table in found:
        assert {len(row) for row in table.rows} == {len(table.columns)}, table.title
    titles = [t.title for t in found]
    assert titles[:2] == ["What was asked", "The article's rows"]
    assert "Speculation on copy-heavy work" not in titles  # no rows of it


def test_what_serving_costs(tmp_path):
    found = {t.title: t for t in tables(filled(tmp_path), 3.0)}
    first = found["First token: the engine alone and over HTTP"].rows[0]
    assert first == ["8b", "128", "1.28", "4.28", "+3.00", "yes"]
    between = found["Between tokens: the engine alone and over HTTP"].rows
    assert [row[-1] for row in between] == ["yes"] * 4


def test_the_report_is_written(tmp_path):
    console = Console(quiet=True)
    filled(tmp_path)
    report.write(Results(tmp_path / "article.json"), tmp_path, 3.0, None, console)
    page, text = (tmp_path / "article.html").read_text(), (tmp_path / "article.md").read_text()
    assert page.count("<svg") == 5
    assert "a &lt;b&gt;" in page
    assert "<b>" not in page
    assert "404: \\|" in text
    for picture in ("floor", "streams", "ttft", "goodput", "memory"):
        assert f"plots/{picture}.svg" in text
        assert (tmp_path / "plots" / f"{picture}.svg").exists()
    assert "stopped after 3 s" in page
    assert "3.8B at 3.25 bits" in text


def test_a_shape_that_ran_without_a_gpu_is_named(tmp_path):
    results = filled(tmp_path)
    assert "Without a GPU" not in report.lead(results)
    results.begin("smollm2", {"cpu": "a processor", "cores": 2})
    assert report.lead(results).endswith("Without a GPU: SmolLM2-135M, real weights on 2 CPU cores.")


@pytest.mark.parametrize(("name", "other"), [("H200", "H100"), ("H100", "H200")])
def test_a_report_names_the_card_that_it_was_measured_on(tmp_path, name, other):
    results = filled(tmp_path, {**MACHINE, "gpu": f"NVIDIA {name}"})
    report.write(results, tmp_path, 3.0, None, Console(quiet=True))
    text = (tmp_path / "article.md").read_text()
    assert f"floor, one {name}" in text
    assert f"that one {name} allows" in text
    assert f"Beyond any {name} as published" in text
    assert other not in text.replace("Mistral Large 2 on two H100", "")  # published of that card


def test_pictures_have_ids_of_their_own(tmp_path):
    filled(tmp_path)
    report.write(Results(tmp_path / "article.json"), tmp_path, 3.0, None, Console(quiet=True))
    page = (tmp_path / "article.html").read_text()
    ids = [part.split('"')[0] for part in page.split(' id="')[1:]]
    assert len(ids) == len(set(ids))


def test_an_empty_result_has_its_claims(tmp_path):
    report.write(Results(tmp_path / "article.json"), tmp_path, 3.0, None, Console(quiet=True))
    assert "## The article's rows" in (tmp_path / "article.md").read_text()


@pytest.mark.parametrize(("gpu", "is_shown"), [("NVIDIA H100 80GB HBM3", True), ("NVIDIA H200", False)])
def test_peers_stand_in_the_pictures_of_their_own_card(tmp_path, gpu, is_shown):
    peers = tmp_path / "peer.json"
    row = {"engine": "a peer", "kernel": "k", "shape": "8b", "bits": 4.125, "batch": 1, "tok_s": 294}
    peers.write_text(json.dumps({"machine": {"gpu": gpu}, "rows": [row]}))
    report.write(filled(tmp_path), tmp_path, 3.0, peers, Console(quiet=True))
    assert ("a peer" in (tmp_path / "plots" / "floor.svg").read_text()) == is_shown


def test_a_part_that_fails_is_a_row_and_the_next_one_runs(tmp_path, monkeypatch):
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr("deploy.bench.article.processes.started", fail)
    monkeypatch.setattr("deploy.bench.article.processes.server", fail)
    results = Results(tmp_path / "article.json")
    results.begin("tiny", MACHINE)
    Shape(SUBJECTS["tiny"], Options(tmp_path, ["tiny"], QUICK), results, tmp_path / "m", {}).run()
    assert {(r["part"], r["failed"]) for r in results.failures()} == {
        ("engine", "no such thing"),
        ("server", "no such thing"),
    }


def test_nothing_begins_when_the_budget_is_spent(tmp_path, monkeypatch):
    monkeypatch.setattr("deploy.bench.article.processes.started", None)
    results = Results(tmp_path / "article.json")
    plan = dataclasses.replace(QUICK, budget_s=0.0)
    Shape(SUBJECTS["tiny"], Options(tmp_path, ["tiny"], plan), results, tmp_path / "m", {}).run()
    assert all("not begun" in r["failed"] for r in results.failures())
    assert len(results.failures()) == 2


def test_launches_of_any_depth_from_two():
    assert launches.of_depth({2: 60.0, 4: 100.0}, 32) == pytest.approx(660)
    with pytest.raises(ValueError, match="two depths"):
        launches.of_depth({2: 60.0}, 32)


def test_the_command_refuses_unknown_shapes_and_renders_without_measuring(tmp_path):
    runner = CliRunner()
    refused = runner.invoke(app, ["bench", "article", "--out", str(tmp_path), "--shapes", "9b"])
    assert refused.exit_code == 1
    assert "unknown '9b'" in refused.stderr
    assert "3.8b" in refused.stderr
    written = runner.invoke(app, ["bench", "article", "--out", str(tmp_path / "new"), "--render"])
    assert written.exit_code == 0, written.output
    assert (tmp_path / "new" / "article.html").exists()


def test_launches_are_counted_once_for_all_shapes(tmp_path, monkeypatch):
    def count(module: str, arguments: list[str], log: Path, timeout_s: float) -> None:
        rows = (
            {"part": "launches", "kind": "unfused", "layers": n, "per_token": 20.0 * n + 4} for n in (2, 4)
        )
        Path(arguments[0]).write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr("deploy.bench.article.processes.run", count)
    results, options = Results(tmp_path / "article.json"), Options(tmp_path, ["tiny"], QUICK)
    assert machine.count_unfused(options, results, tmp_path) == {2: 44.0, 4: 84.0}
    monkeypatch.setattr("deploy.bench.article.processes.run", None)
    assert machine.count_unfused(options, results, tmp_path) == {2: 44.0, 4: 84.0}
