"""Quantized checkpoints written as compressed-tensors and as floats: the same values, read by others."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import kernels
from deploy.bench.foreign_checkpoints import Scheme, write_gptq
from deploy.bench.interchange import decompressed, exact_values
from deploy.bench.parity.models import MODELS, save
from engine.checkpoint import open_checkpoint
from engine.checkpoint.export import export_compressed_tensors, export_floats
from engine.errors import ParameterError
from engine.quantization.pipeline import Options, quantize
from engine.quantization.search import Budget
from tests.engine.helpers import save_random_llama
from tests.engine.packed_models import pack_checkpoint, packed_gemma, packed_llama
from tests.engine.test_parity import our_logits

SYMMETRIC = {
    "embed_tokens": "w8row-sym",
    "lm_head": "w6g128-sym",
    "q_proj": "w4g64-sym",
    "k_proj": "w4g128-sym",
    "v_proj": "w8row-sym",
    "o_proj": "w3g64-sym",
    "gate_proj": "w2g64-sym",
    "up_proj": "w4g32-sym",
    "down_proj": "w5g128-sym",
}
TOKENS = torch.arange(64)


@pytest.fixture(scope="module")
def symmetric(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("symmetric")
    save_random_llama(directory, hidden_size=256, intermediate_size=416, attention_bias=True)
    return pack_checkpoint(directory, lambda name: SYMMETRIC[name.removesuffix(".weight").rpartition(".")[2]])


@pytest.fixture(scope="module")
def with_zero_points(tmp_path_factory) -> Path:
    return packed_llama(tmp_path_factory.mktemp("zero"))


def assert_round_trip(source: Path, out: Path) -> None:
    """The library's decompressor and this project's reader both give the source's values, bit for bit."""
    before, after, theirs = open_checkpoint(source), open_checkpoint(out), decompressed(out)
    for name in (f"{m}.weight" for m in _modules(source)):
        expected = exact_values(before.tensor(name, keep_packed=True))
        assert torch.equal(exact_values(after.tensor(name, keep_packed=True)), expected), name
        if name in theirs:
            assert torch.equal(theirs[name], expected), name
    assert theirs


def _modules(source: Path) -> list[str]:
    names = load_file(source / "model.safetensors")
    return [n.removesuffix(".packed") for n in names if n.endswith(".packed") and "proj" in n]


def test_symmetric_formats_go_over_exactly(symmetric, tmp_path):
    """2, 3 and 4 bits as W4, 5 to 8 as W8; q, k, v and gate, up get one scheme each, as vLLM wants them."""
    result = export_compressed_tensors(symmetric, tmp_path / "out", "float32")
    assert result.num_matrices == {4: 3 * 3, 8: 3 * 4}
    assert_round_trip(symmetric, tmp_path / "out")
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"][
        "config_groups"
    ]
    for layer in range(3):
        for together in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            holders = [
                {
                    name
                    for name, g in groups.items()
                    if any(t.endswith(f"{layer}.{p}.{m}") for t in g["targets"])
                }
                for m in together
                for p in ("self_attn" if m in ("q_proj", "k_proj", "v_proj") else "mlp",)
            ]
            assert len(set(map(frozenset, holders))) == 1
            assert len(holders[0]) == 1
    # Read back, all but the widened ones are packed again, and nothing needs floats.
    checkpoint = open_checkpoint(tmp_path / "out")
    assert all(
        isinstance(checkpoint.tensor(f"{m}.weight", keep_packed=True), kernels.PackedWeight)
        for m in _modules(symmetric)
    )


@pytest.mark.parametrize("others", ["wide", "floats"])
def test_zero_points_between_codes_become_wide_or_floats(with_zero_points, tmp_path, others):
    result = export_compressed_tensors(with_zero_points, tmp_path / "out", "float32", others)
    assert (result.num_floats > 1) == (others == "floats")
    if others == "wide":
        assert_round_trip(with_zero_points, tmp_path / "out")
    with torch.inference_mode():
        expected = our_logits(with_zero_points, TOKENS)
        torch.testing.assert_close(our_logits(tmp_path / "out", TOKENS), expected, atol=1e-4, rtol=0)


def test_by_default_they_are_refused_by_name_and_nothing_is_written(with_zero_points, tmp_path):
    with pytest.raises(
        ParameterError, match=r"others: model\.layers\.0\.mlp\.down_proj\.weight.* more cannot be"
    ):
        export_compressed_tensors(with_zero_points, tmp_path / "out", "float32")
    assert not (tmp_path / "out").exists()


def test_transformers_computes_the_same_from_it(symmetric, tmp_path):
    """By its own compressed-tensors quantizer, without any part of this project."""
    export_compressed_tensors(symmetric, tmp_path / "out", "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.inference_mode():
        expected = our_logits(symmetric, TOKENS)
        torch.testing.assert_close(model(TOKENS[None]).logits[0], expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("make", [packed_llama, packed_gemma])
def test_floats_load_in_transformers(tmp_path, make):
    make(tmp_path / "q")
    export_floats(tmp_path / "q", tmp_path / "out", "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.inference_mode():
        expected = our_logits(tmp_path / "q", TOKENS)
        torch.testing.assert_close(model(TOKENS[None]).logits[0], expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "scheme", [Scheme(4, 64), Scheme(4, 64, False, scale_dtype=torch.bfloat16), Scheme(8, -1)]
)
def test_what_came_from_elsewhere_goes_out_again(tmp_path, scheme):
    save_random_llama(tmp_path / "m", hidden_size=128, intermediate_size=256)
    twin = load_file(write_gptq(tmp_path / "m", tmp_path / "q", scheme) / "model.safetensors")
    export_compressed_tensors(tmp_path / "q", tmp_path / "out", "float32")
    for name, weight in decompressed(tmp_path / "out").items():
        assert torch.equal(weight.float(), twin[name])


@pytest.mark.parametrize("family", ["Phi-3 mini", "Mixtral", "Gemma 3"])
def test_families_go_out_under_their_own_names(tmp_path, family):
    """Fused projections whole, experts one by one, and both forms load in transformers."""
    small = next(m for m in MODELS if m.name == family)
    save(small.build(), tmp_path / "m")
    options = Options(Budget(bits=6.0), (4, 8), 4, 2, window=32, is_symmetric=True)
    documents = [" ".join(f"w{(i * i + j) % 190}" for i in range(400)) for j in range(3)]
    quantize(tmp_path / "m", tmp_path / "q", options, documents)
    export_floats(tmp_path / "q", tmp_path / "floats", "float32")
    export_compressed_tensors(tmp_path / "q", tmp_path / "packed", "float32")
    tokens = torch.arange(100)  # longer than what the small models' scaled rotary embeddings were trained for
    with torch.inference_mode():
        expected = our_logits(tmp_path / "q", tokens)
        torch.testing.assert_close(our_logits(tmp_path / "packed", tokens), expected, atol=1e-3, rtol=0)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "floats", dtype=torch.float32)
        torch.testing.assert_close(model(tokens[None]).logits[0], expected, atol=1e-3, rtol=0)
        model.load_state_dict(
            {n: w.float() for n, w in decompressed(tmp_path / "packed").items() if n in model.state_dict()},
            strict=False,
        )
        torch.testing.assert_close(model(tokens[None]).logits[0], expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [(("int8",), "dtype: must be one of float32"), (("float32", "guess"), "others: must be one of refuse")],
)
def test_wrong_options_are_refused(symmetric, tmp_path, options, message):
    with pytest.raises(ParameterError, match=message):
        export_compressed_tensors(symmetric, tmp_path / "out", *options)


def test_a_directory_with_other_files_is_left_alone(symmetric, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for write in (export_compressed_tensors, export_floats):
        with pytest.raises(ParameterError, match="holds other files"):
            write(symmetric, tmp_path, "float32")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
