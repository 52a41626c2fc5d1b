"""GPTQ, AWQ and compressed-tensors checkpoints: read without rounding again, and the same logits."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import kernels
from deploy.bench.foreign_checkpoints import Scheme, write_awq, write_compressed_tensors, write_gptq
from engine.checkpoint import open_checkpoint
from engine.errors import ModelLoadError
from engine.models.build import build_model
from tests.engine.helpers import greedy, make_core, run_all, save_random_llama
from tests.engine.test_parity import our_logits

BF16 = torch.bfloat16
GATE = "model.layers.1.mlp.gate_proj"
DOWN = "model.layers.1.mlp.down_proj"
QUERY = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("floats")
    save_random_llama(directory, hidden_size=256, intermediate_size=512, attention_bias=True, mlp_bias=True)
    return directory


def gptq_v2(model: Path, out: Path, scheme: Scheme) -> Path:
    return write_gptq(model, out, scheme, version=2)


CASES = {
    **{
        f"gptq-{bits}bit-g{size}-{kind}": (write_gptq, Scheme(bits, size, kind == "sym"), "packed")
        for bits in (2, 3, 4, 8)
        for size in (32, 64, 128, -1)
        for kind in ("sym", "asym")
        if (bits, kind) != (8, "asym")
    },
    "gptq-v2": (gptq_v2, Scheme(4, 64, False), "packed"),
    "gptq-v2-3bit": (gptq_v2, Scheme(3, 64, False), "packed"),
    "gptq-bf16-scales": (write_gptq, Scheme(4, 64, False, scale_dtype=BF16), "w4g64-f16"),
    "gptq-desc-act-row": (write_gptq, Scheme(4, -1, is_ordered=True), "packed"),
    "awq-g32": (write_awq, Scheme(4, 32, False), "w5g32-f16"),
    "awq-g64": (write_awq, Scheme(4, 64, False), "w5g64-f16"),
    "awq-g128": (write_awq, Scheme(4, 128, False), "w5g128-f16"),
    "awq-row": (write_awq, Scheme(4, -1, False), "packed"),
    **{
        f"ct-{bits}bit-g{size}-{kind}": (
            write_compressed_tensors,
            Scheme(bits, size, kind == "sym", scale_dtype=BF16),
            f"w{bits}{'row' if size == -1 else f'g{size}'}-f16",
        )
        for bits in (4, 8)
        for size in (32, 128, -1)
        for kind in ("sym", "asym")
        if (bits, kind) != (8, "asym")
    },
    **{
        f"ct-{bits}bit-{'sym' if sym else 'asym'}": (
            write_compressed_tensors,
            Scheme(bits, 32, sym, scale_dtype=BF16),
            "packed" if sym or bits < 5 else "either",
        )
        for bits in (2, 3, 5, 6)
        for sym in (True, False)
    },
    "ct-float32-scales": (write_compressed_tensors, Scheme(4, 64, scale_dtype=torch.float32), "floats"),
    "ct-8bit-asym": (write_compressed_tensors, Scheme(8, 64, False, scale_dtype=BF16), "either"),
    "gptq-8bit-asym": (write_gptq, Scheme(8, 64, False), "floats"),
}
"""Writer, scheme, and what holds it: a format's name, any `packed` one, `floats`, or `either`."""


@pytest.mark.parametrize("name", CASES)
def test_values_are_carried_over_exactly(model, tmp_path, name):
    """Every matrix equals the written one bit for bit, packed in what is named."""
    write, scheme, expected = CASES[name]
    floats = load_file(write(model, tmp_path / "q", scheme) / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "q")
    for tensor, values in floats.items():
        got = checkpoint.tensor(tensor, keep_packed=True)
        is_matrix = "proj.weight" in tensor
        if isinstance(got, kernels.PackedWeight):
            assert is_matrix
            assert str(got.format) == expected or expected in ("packed", "either")
            got = kernels.dequantize(got)
        elif is_matrix:
            assert expected in ("floats", "either")
        assert torch.equal(got, values), tensor


@pytest.mark.parametrize("name", ["gptq-3bit-g64-asym", "gptq-4bit-g-1-sym", "awq-g64", "ct-8bit-g-1-sym"])
def test_logits_match_transformers_on_the_same_values(model, tmp_path, name):
    write, scheme, _ = CASES[name]
    twin = write(model, tmp_path / "q", scheme)
    token_ids = torch.randint(0, 199, (100,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32)(token_ids[None]).logits[0]
        torch.testing.assert_close(our_logits(tmp_path / "q", token_ids), expected, atol=1e-3, rtol=0)
    prompt = token_ids[:20].tolist()
    text = run_all(make_core(tmp_path / "q", dtype="auto"), {"a": (prompt, greedy(12))})["a"]
    assert text == run_all(make_core(twin), {"a": (prompt, greedy(12))})["a"]


@pytest.mark.parametrize("write", [write_gptq, write_compressed_tensors])
def test_scattered_groups_move_behind_the_gate_and_are_floats_elsewhere(model, tmp_path, caplog, write):
    """desc_act: down_proj stays packed, its columns sorted by group; the rows of gate and up move along."""
    twin = write(model, tmp_path / "q", Scheme(4, 32, is_ordered=True))
    checkpoint = open_checkpoint(tmp_path / "q")
    floats, tensors = load_file(twin / "model.safetensors"), load_file(tmp_path / "q" / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(checkpoint.tensor(f"{QUERY}.weight", keep_packed=True), floats[f"{QUERY}.weight"])
    assert "groups of scattered columns (desc_act)" in caplog.text
    down = checkpoint.tensor(f"{DOWN}.weight", keep_packed=True)
    assert isinstance(down, kernels.PackedWeight)
    index = next(tensors[n] for n in (f"{DOWN}.g_idx", f"{DOWN}.weight_g_idx") if n in tensors)
    order = torch.argsort(index.long(), stable=True)
    assert torch.equal(kernels.dequantize(down), floats[f"{DOWN}.weight"][:, order])
    for last in ("weight", "bias"):
        got = checkpoint.tensor(f"{GATE}.{last}", keep_packed=False)
        assert torch.equal(got, floats[f"{GATE}.{last}"][order])
    token_ids = torch.arange(60)
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32)(token_ids[None]).logits[0]
        torch.testing.assert_close(our_logits(tmp_path / "q", token_ids), expected, atol=1e-3, rtol=0)


def test_shards_and_a_last_group_that_is_shorter(tmp_path):
    save_random_llama(tmp_path / "m", hidden_size=160, num_attention_heads=5, num_key_value_heads=5)
    twin = write_gptq(tmp_path / "m", tmp_path / "q", Scheme(4, 64))
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    (tmp_path / "q" / "model.safetensors").unlink()
    shards = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(sorted(tensors))}
    for shard in set(shards.values()):
        save_file({n: t for n, t in tensors.items() if shards[n] == shard}, tmp_path / "q" / shard)
    (tmp_path / "q" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    checkpoint = open_checkpoint(tmp_path / "q")
    for name, expected in load_file(twin / "model.safetensors").items():
        assert torch.equal(checkpoint.tensor(name, keep_packed=False), expected)


REFUSED = [
    ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    ("gptq", {"bits": None}, "quantization_config.bits must be an integer"),
    ("gptq", {"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' is not supported"),
    ("gptq", {"quant_method": None}, "quant_method None is not supported"),
    ("awq", {"version": "gemv"}, "version 'gemv'"),
    ("awq", {"bits": 3}, "bits 3"),
    ("ct", {"format": "float-quantized"}, "format 'float-quantized'"),
    ("ct", {"config_groups": {}}, "config_groups is missing"),
    ("ct", {"sparsity_config": {"format": "sparse-bitmask"}}, "sparsity_config.format 'sparse-bitmask'"),
    ("ct", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is not supported"),
    ("ct", {"transform_config": {"config_groups": {"a": {}}}}, "transform_config is not supported"),
    (
        "ct",
        {"config_groups": {"a": {"weights": {"num_bits": 4}, "input_activations": {"num_bits": 8}}}},
        "config_groups.a.input_activations",
    ),
    ("ct", {"config_groups": {"a": {"weights": {"num_bits": 4, "type": "float"}}}}, "weights.type 'float'"),
]
WRITERS = {"gptq": write_gptq, "awq": write_awq, "ct": write_compressed_tensors}


@pytest.mark.parametrize(("method", "change", "message"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(model, tmp_path, method, change, message):
    WRITERS[method](model, tmp_path / "q", Scheme(is_symmetric=False))
    file = tmp_path / "q" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(change)
    file.write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=message):
        open_checkpoint(tmp_path / "q")


DAMAGE = {
    "gptq": {
        "qzeros": lambda t: t[:, :-1],
        "scales": lambda t: t * float("nan"),
        "qweight": lambda t: t[:-1],
        "g_idx": lambda t: t + 1,
    },
    "awq": {"qweight": lambda t: t[:, 1:], "qzeros": lambda t: t[1:], "scales": lambda t: t.float() / 0},
    "ct": {
        "weight_packed": lambda t: t[:, :-1],
        "weight_scale": lambda t: t[1:],
        "weight_shape": lambda t: t[:1],
        "weight_zero_point": lambda t: t.float(),
    },
}


OPTIONAL = ("g_idx", "weight_zero_point")
DAMAGED = [(method, last, False) for method, names in DAMAGE.items() for last in names]
MISSING = [(method, last, True) for method, last, _ in DAMAGED if last not in OPTIONAL]


@pytest.mark.parametrize(("method", "last", "is_gone"), DAMAGED + MISSING)
def test_damaged_tensors_are_refused(model, tmp_path, method, last, is_gone):
    WRITERS[method](model, tmp_path / "q", Scheme(is_symmetric=False))
    file = tmp_path / "q" / "model.safetensors"
    tensors = load_file(file)
    value = tensors.pop(f"{DOWN}.{last}")
    if not is_gone:
        tensors[f"{DOWN}.{last}"] = DAMAGE[method][last](value).contiguous()
    save_file(tensors, file)
    with pytest.raises(ModelLoadError, match=r"layers\.1\.mlp\.down_proj"):
        build_model(
            open_checkpoint(tmp_path / "q"),
            max_model_len=64,
            dtype=torch.float32,
            device=torch.device("cpu"),
            keep_packed=True,
        )


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(bits, size, sym, scale_dtype=BF16)
        for bits in (4, 8)
        for size in (32, -1)
        for sym in (True, False)
    ],
    ids=str,
)
def test_the_reader_agrees_with_the_compressed_tensors_library(model, tmp_path, scheme):
    """What its own compressor packs, read here, is what its own decompressor makes of it."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    twin = write_compressed_tensors(model, tmp_path / "q", scheme)
    args = QuantizationArgs(
        num_bits=scheme.bits,
        symmetric=scheme.is_symmetric,
        strategy="channel" if scheme.group_size == -1 else "group",
        group_size=None if scheme.group_size == -1 else scheme.group_size,
    )
    library, theirs = BaseCompressor.get_value_from_registry("pack-quantized"), {}
    ct_scheme = QuantizationScheme(targets=["Linear"], weights=args)
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    floats = load_file(twin / "model.safetensors")
    modules = [n.removesuffix(".weight_packed") for n in tensors if n.endswith(".weight_packed")]
    assert modules
    for module in modules:
        own = {n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{module}.")}
        state = {"weight": floats[f"{module}.weight"], "weight_scale": own["weight_scale"].float()}
        if not scheme.is_symmetric:
            state["weight_zero_point"] = library.decompress(own, ct_scheme)["weight_zero_point"]
        packed = library.compress(state, ct_scheme)
        assert torch.equal(packed["weight_packed"], own["weight_packed"])
        theirs[module] = library.decompress({**own, "weight_scale": own["weight_scale"].float()}, ct_scheme)
    checkpoint = open_checkpoint(tmp_path / "q")
    for module, state in theirs.items():
        assert torch.equal(checkpoint.tensor(f"{module}.weight", keep_packed=False), state["weight"])


def test_symmetric_groups_need_no_wider_codes(model, tmp_path):
    """A zero point in the middle is a power of two: 4 bits stay 4 bits whatever the scales are."""
    write_gptq(model, tmp_path / "q", replace(Scheme(), group_size=64))
    weight = open_checkpoint(tmp_path / "q").tensor(f"{QUERY}.weight", keep_packed=True)
    assert isinstance(weight, kernels.PackedWeight)
    assert str(weight.format) == "w4g64-f16"
