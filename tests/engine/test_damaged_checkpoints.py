"""Damaged and malicious checkpoints are refused with a ModelLoadError, never anything else, never loaded."""

import json
import pickle
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint import open_checkpoint
from engine.errors import ModelLoadError
from engine.models.build import build_model
from engine.quantization.pipeline import Options, quantize
from engine.quantization.search import Budget
from tests.engine.test_quantization import OPTIONS, TEXT, small_model

DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    model = small_model(directory / "model", num_hidden_layers=1)
    quantize(model, directory / "out", Options(Budget(bits=5.5), **OPTIONS), TEXT)
    return directory / "out"


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    for file in whole.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def load(directory: Path) -> None:
    build_model(
        open_checkpoint(directory),
        max_model_len=64,
        dtype=torch.float32,
        device=torch.device("cpu"),
        keep_packed=True,
    )


def edit_config(directory: Path, change) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def edit_tensors(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors = {k: v.clone() for k, v in tensors.items()}
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_the_whole_one_loads(whole):
    load(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(quant_method="quip"), "quant_method 'quip' is not supported"),
        (lambda q: q.update(version=2), "version 2 is not supported"),
        (lambda q: q.pop("formats"), "formats is missing"),
        (lambda q: q.update(formats=[]), "formats is missing"),
        (lambda q: q["formats"].update({f"{DOWN}.weight": "w9g64"}), "bits must be one of"),
        (lambda q: q["formats"].update({f"{DOWN}.weight": 4}), "unknown format '4'"),
        (lambda q: q["formats"].update({f"{DOWN}.weight": "w4g32-f16"}), "expected uint8"),
        (lambda q: q["formats"].pop(f"{DOWN}.weight"), f"tensor {DOWN}.weight is missing"),
        (lambda q: q["formats"].update({"model.norm.weight": "w4g64"}), "model.norm.packed is missing"),
        (lambda q: q["formats"].update({"../../etc/passwd.weight": "w4g64"}), None),
    ],
)
def test_a_wrong_quantization_config_is_refused(copy, change, message):
    edit_config(copy, lambda config: change(config["quantization_config"]))
    if message is None:  # a name that no layer asks for is never read
        load(copy)
        return
    with pytest.raises(ModelLoadError, match=message):
        load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{DOWN}.packed"), "down_proj.packed is missing"),
        (lambda t: t.update({f"{DOWN}.packed": t[f"{DOWN}.packed"][:-1]}), "expected uint8"),
        (lambda t: t.update({f"{DOWN}.packed": t[f"{DOWN}.packed"].to(torch.int32)}), "expected uint8"),
        (lambda t: t.update({f"{DOWN}.packed": t[f"{DOWN}.packed"].float()}), "expected uint8"),
        (lambda t: t[f"{DOWN}.packed"][0, -32:].fill_(0xFF), "NaN or infinite"),
        (lambda t: t["model.norm.weight"].fill_(float("nan")), "model.norm.weight holds NaN"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), "model.norm.weight has shape"),
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
    ],
)
def test_wrong_tensors_are_refused(copy, change, message):
    edit_tensors(copy, change)
    with pytest.raises(ModelLoadError, match=message):
        load(copy)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "model.bin", "a/b.safetensors", 5])
def test_shards_outside_the_directory_are_refused(copy, shard):
    names = load_file(copy / "model.safetensors").keys()
    index = {"weight_map": dict.fromkeys(names, shard)}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match="is not the name of a safetensors file beside it"):
        load(copy)


class _Exploit:
    def __reduce__(self):
        return (Path("/tmp/peregrine-pickle-ran").touch, ())


def test_pickle_files_are_never_opened(copy):
    marker = Path("/tmp/peregrine-pickle-ran")
    marker.unlink(missing_ok=True)
    payload = pickle.dumps(_Exploit())
    (copy / "pytorch_model.bin").write_bytes(payload)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"neither model\.safetensors nor"):
        load(copy)
    (copy / "model.safetensors").write_bytes(payload)
    with pytest.raises(ModelLoadError, match="not a readable safetensors file"):
        load(copy)
    assert not marker.exists()


def test_truncated_files_are_refused(copy):
    content = (copy / "model.safetensors").read_bytes()
    for length in [0, 1, 7, 8, 100, len(content) // 2, len(content) - 1]:
        (copy / "model.safetensors").write_bytes(content[:length])
        with pytest.raises(ModelLoadError):
            load(copy)
    (copy / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + content[8:])
    with pytest.raises(ModelLoadError):
        load(copy)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_random_damage_is_refused_or_harmless(copy, name):
    """Flipped bytes: the checkpoint loads (a flipped code is a valid code) or says why not."""
    content = (copy / name).read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        limit = len(content) if name == "config.json" else 3000  # mostly the header
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(limit)] = rng.randrange(256)
        (copy / name).write_bytes(bytes(damaged))
        try:
            load(copy)
        except ModelLoadError:
            refused += 1
    assert refused > 20
