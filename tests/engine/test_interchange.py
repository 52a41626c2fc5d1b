"""SmolLM2's real weights, quantized and written here, in transformers and in compressed-tensors' own hands.

By rounding alone; `peregrine bench interchange` does the same with any directory of `peregrine quantize`.
"""

import json
from pathlib import Path

import pytest
import torch

import kernels
from deploy.bench import interchange
from engine.checkpoint import open_checkpoint
from engine.checkpoint.packed_tensors import packed_name, quantization_config
from engine.checkpoint.writing import write_json, write_tensors
from engine.models.hf_config import to_hf_config
from engine.quantization.quantizers import plain_scales, round_to_nearest
from kernels.formats import Format

FORMATS = {
    "embed_tokens": "w8row-sym",
    "q_proj": "w4g64-sym",
    "k_proj": "w4g64-sym",
    "v_proj": "w4g64-sym",
    "o_proj": "w6g128-sym",
    "gate_proj": "w3g64-sym",
    "up_proj": "w4g128-sym",
    "down_proj": "w8row-sym",
}
LAYER_NAMES = [
    *(f"self_attn.{p}_proj" for p in "qkvo"),
    *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
    "input_layernorm",
    "post_attention_layernorm",
]


@pytest.fixture(scope="module")
def quantized(smollm2, tmp_path_factory) -> Path:
    """Rounded to the nearest code, without the calibration that takes minutes."""
    directory, source = tmp_path_factory.mktemp("smollm2"), open_checkpoint(smollm2)
    names = ["model.embed_tokens", "model.norm"]
    names += [f"model.layers.{i}.{name}" for i in range(source.config.num_layers) for name in LAYER_NAMES]
    tensors, formats = {}, {}
    for name in (f"{n}.weight" for n in names):
        weight = source.tensor(name, keep_packed=False)
        assert isinstance(weight, torch.Tensor)
        if weight.dim() == 1:
            tensors[name] = weight
            continue
        formats[name] = FORMATS[name.removesuffix(".weight").rpartition(".")[2]]
        grid = plain_scales(weight, Format.parse(formats[name]))
        tensors[packed_name(name)] = kernels.pack(round_to_nearest(weight, grid)).data
    write_tensors(directory, [tensors], sum(t.nbytes for t in tensors.values()))
    config = to_hf_config(source.config) | {"quantization_config": quantization_config(formats)}
    write_json(directory / "config.json", config)
    source.load_tokenizer().save_pretrained(str(directory))
    return directory


@pytest.mark.model
def test_smollm2_in_transformers_and_through_compressed_tensors(quantized, tmp_path):
    """Logits within 1e-3 of the reference every way; every exported matrix has the values that it had."""
    by_way = {row["way"]: row for row in interchange.rows(quantized)}
    assert len(by_way) == 5
    for row in by_way.values():
        assert row["tokens"] == 200
        assert row["max_logit_difference"] < 1e-3
    exported = by_way["compressed-tensors by its decompressor"]
    assert exported["matrices"] == 30 * 7
    assert exported["equal_by_library"] == exported["equal_read_back"] == 30 * 7
    assert exported["bits"] == "150 x W4 60 x W8"
    assert (
        json.loads((quantized / "config.json").read_text())["quantization_config"]["quant_method"]
        == "peregrine"
    )
