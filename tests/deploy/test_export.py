"""`peregrine export` as a command: what it says and refuses. Its values are tests/engine/test_export.py's."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.cli import app
from tests.engine.packed_models import packed_llama
from tests.engine.test_quantization import TEXT, small_model


@pytest.fixture(scope="module")
def with_zero_points(tmp_path_factory) -> Path:
    return packed_llama(tmp_path_factory.mktemp("packed"))


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    return done.exit_code, " ".join(done.output.split())


def test_a_symmetric_quantization_exports_whole(tmp_path):
    """quantize --symmetric, then export without any option."""
    model = small_model(tmp_path / "model", num_hidden_layers=2)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(TEXT * 3))
    options = ("--calibration", text, "--windows", 4, "--window", 32, "--widths", "3,4,8", "--symmetric")
    code, said = run("quantize", model, "--out", tmp_path / "q", "--bits", 6, *options)
    assert code == 0, said
    formats = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["formats"]
    assert all(f.endswith("-sym") for f in formats.values())
    code, said = run("export", tmp_path / "q", "--out", tmp_path / "ct")
    assert code == 0, said
    assert "matrices of 4 bits" in said or "matrices of 8 bits" in said
    section = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == "compressed-tensors"
    assert sum(len(g["targets"]) for g in section["config_groups"].values()) == 2 * 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "awq"), "format: must be one of compressed-tensors, safetensors, got 'awq'"),
        (("--others", "drop"), "others: must be one of refuse, wide, floats, got 'drop'"),
        (("--dtype", "int8"), "dtype: must be one of float32, bfloat16, float16, got 'int8'"),
        ((), "others: model.layers.0.mlp.down_proj.weight"),
    ],
)
def test_what_it_refuses_leaves_nothing_behind(with_zero_points, tmp_path, options, message):
    code, said = run("export", with_zero_points, "--out", tmp_path / "out", *options)
    assert code == 1
    assert message in said
    assert not (tmp_path / "out").exists()


def test_a_missing_directory_is_said_to_be_missing(tmp_path):
    code, said = run("export", tmp_path / "none", "--out", tmp_path / "out")
    assert code == 1
    assert "no such directory" in said
