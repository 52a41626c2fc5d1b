"""`peregrine quantize` as a command: what it writes, says and refuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.test_quantization import TEXT, small_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(TEXT * 3))
    return path


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.cli", "quantize", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)


def test_it_writes_a_checkpoint_and_a_report(model, calibration, tmp_path):
    out = tmp_path / "out"
    options = ("--calibration", calibration, "--windows", 4, "--window", 32, "--widths", "3,4,8")
    done = run(model, "--out", out, "--bits", 5, *options)
    assert done.returncode == 0, done.stderr
    assert "sensitivity: 100%" in done.stderr
    assert "quantization: 100%" in done.stderr
    assert f"peregrine serve {out}" in done.stderr
    written = {p.name for p in out.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "report.json", "report.html"} <= written
    report = json.loads((out / "report.json").read_text())
    assert report["bits"] <= 5
    html = (out / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 3
    assert not re.search(r"https?://", html)  # nothing is fetched
    for tensor, name in report["allocation"].items():
        assert tensor in html
        assert re.fullmatch(r"w[348](g\d+|row)(-sym)?", name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "budget: give exactly one of bits, memory-gb and max-kl"),
        (("--bits", 3, "--max-kl", 0.1), "budget: give exactly one of"),
        (("--bits", 0), "must be positive"),
        (("--bits", 4, "--widths", "4,x"), "is not a list of numbers"),
        (("--bits", 4, "--widths", "7"), "widths: must be some of 2, 3, 4, 5, 6, 8"),
        (("--bits", 4, "--trials", 9), "trials: must be 1 to 3"),
        (("--bits", 4, "--calibration", "/nowhere.txt"), "/nowhere.txt cannot be read"),
    ],
)
def test_bad_options_are_refused(model, tmp_path, arguments, message):
    done = run(model, "--out", tmp_path / "out", *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_budget_that_is_too_small_says_what_it_takes(model, calibration, tmp_path):
    options = ("--calibration", calibration, "--windows", 4, "--window", 32)
    done = run(model, "--out", tmp_path / "out", "--memory-gb", 0.00001, *options)
    assert done.returncode == 1
    assert re.search(r"budget: leaves -?\d+ bytes for matrices, the smallest formats take \d+", done.stderr)
