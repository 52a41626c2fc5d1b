"""Small random checkpoints with packed weights in mixed formats."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import kernels
from engine.checkpoint.packed_tensors import packed_name, quantization_config
from engine.quantization.quantizers import choose_scales, round_to_nearest
from kernels.formats import Format
from tests.engine.helpers import save_random_llama

MIXED = {
    "embed_tokens": "w8row-sym",
    "lm_head": "w6g128",
    "q_proj": "w4g64",
    "k_proj": "w4g64",
    "v_proj": "w8row-sym",
    "o_proj": "w3g64",
    "gate_proj": "w4g64",
    "up_proj": "w3g128",
    "down_proj": "w4g64",
}
"""Formats by the last part of a matrix's name. Layer 1 differs: all of q, k, v alike, and 2 bits."""
LAYER_1 = {"q_proj": "w4g64", "k_proj": "w4g64", "v_proj": "w4g64", "gate_proj": "w2g32", "up_proj": "w2g32"}


def mixed(name: str) -> str:
    last = name.removesuffix(".weight").rsplit(".", 1)[-1]
    return LAYER_1.get(last, MIXED[last]) if ".layers.1." in name else MIXED[last]


def pack_checkpoint(directory: Path, format_of: Callable[[str], str] = mixed) -> Path:
    """Quantize a Hugging Face directory of floats in place, by rounding alone."""
    file = directory / "model.safetensors"
    tensors, formats = load_file(file), {}
    for name, weight in sorted(tensors.items()):
        if weight.dim() != 2:
            continue
        del tensors[name]
        formats[name] = format_of(name)
        w = weight.float()
        scales = choose_scales(w, torch.ones(w.shape[1]), Format.parse(formats[name]))
        tensors[packed_name(name)] = kernels.pack(round_to_nearest(w, scales)).data.contiguous()
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = quantization_config(formats)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def packed_llama(directory: Path) -> Path:
    """Grouped heads of 64, biases, a head of its own."""
    save_random_llama(
        directory,
        hidden_size=384,
        intermediate_size=416,
        head_dim=64,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.06,
        attention_bias=True,
    )
    return pack_checkpoint(directory)


def packed_gemma(directory: Path) -> Path:
    """Heads of 256, local and global layers, q and k norms, norms behind blocks, gelu."""
    config = Gemma3TextConfig(
        vocab_size=199,
        hidden_size=256,
        intermediate_size=416,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        max_position_embeddings=1024,
        sliding_window=32,
        query_pre_attn_scalar=256,
        initializer_range=0.06,
        tie_word_embeddings=False,  # tied, a random model with scaled embeddings repeats its last token
    )
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config).float().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    return pack_checkpoint(directory)
