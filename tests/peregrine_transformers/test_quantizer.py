"""Checkpoints of `peregrine quantize` in transformers: by an installed wheel alone, and the same logits."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import peregrine_transformers.quantizer  # noqa: F401  registers, as an installed wheel does by itself
from tests.engine.packed_models import packed_gemma, packed_llama
from tests.engine.test_parity import our_logits

ROOT = Path(__file__).parents[2]
TOKENS = torch.arange(64)


@pytest.fixture(scope="module", params=[packed_llama, packed_gemma])
def checkpoint(request, tmp_path_factory) -> Path:
    """Every kind and width of format in one model."""
    return request.param(tmp_path_factory.mktemp("packed"))


def logits(directory: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    with torch.inference_mode():
        return model(TOKENS[None]).logits[0]


def test_logits_equal_the_engines(checkpoint):
    with torch.inference_mode():
        torch.testing.assert_close(logits(checkpoint), our_logits(checkpoint, TOKENS), atol=1e-3, rtol=0)


def test_a_loaded_model_is_an_ordinary_one(checkpoint, tmp_path):
    """It has the dtype asked for, saves as floats, and those load without Peregrine's method."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(tmp_path), logits(checkpoint))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2 is not supported"),
        ({"formats": {}}, "formats is missing"),
        ({"formats": {"model.layers.0.mlp.experts.0.w1.weight": "w4g64"}}, "has no place of its own"),
    ],
)
def test_a_wrong_section_is_refused(checkpoint, tmp_path, change, message):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


SCRIPT = """
import site, sys
site.addsitedir(sys.argv[1])  # reads start-up files as Python does when it starts
assert "transformers" not in sys.modules and "torch" not in sys.modules
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[2])
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
print(AUTO_QUANTIZER_MAPPING["peregrine"].__module__)
"""


def test_an_installed_wheel_is_all_it_takes(checkpoint, tmp_path):
    """The wheel's start-up file registers the method in a Python that imports transformers alone."""
    source, site_packages = tmp_path / "source", tmp_path / "site-packages"
    ignored = shutil.ignore_patterns(".*", "tests", "docs", "helm", "*.egg-info", "build")
    shutil.copytree(ROOT, source, ignore=ignored)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*command, "--target", site_packages, source], check=True, timeout=240)
    assert (site_packages / "peregrine_transformers.pth").is_file()
    python = [sys.executable, "-c", SCRIPT, str(site_packages), str(checkpoint)]
    done = subprocess.run(python, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "peregrine_transformers.quantizer"
