"""Time of the sensitivity analysis against depth, on random models of equal width."""

import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file

from engine.checkpoint import open_checkpoint
from engine.models.config import ModelConfig, RopeConfig
from engine.models.hf_config import to_hf_config
from engine.models.layerwise import DecoderLayers, linear_name
from engine.quantization.candidates import DEFAULT_BITS, candidate_formats
from engine.quantization.sensitivity import SensitivityAnalysis
from engine.quantization.workspace import Workspace

_SEQUENCES, _LENGTH = 8, 256


def random_checkpoint(directory: Path, num_layers: int) -> None:
    """A random Llama of 256 wide layers, in bfloat16, without a tokenizer."""
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=768,
        num_layers=num_layers,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        rms_norm_eps=1e-5,
        max_position_embeddings=_LENGTH,
        rope=RopeConfig(),
        tie_word_embeddings=True,
    )
    generator = torch.Generator().manual_seed(num_layers)

    def matrix(n: int, k: int) -> torch.Tensor:
        return (torch.randn(n, k, generator=generator) * k**-0.5).bfloat16()

    h, f = config.hidden_size, config.intermediate_size
    tensors = {
        "model.embed_tokens.weight": matrix(config.vocab_size, h),
        "model.norm.weight": torch.ones(h).bfloat16(),
    }
    shapes = {
        "q_proj": (config.q_size, h),
        "k_proj": (config.kv_size, h),
        "v_proj": (config.kv_size, h),
        "o_proj": (h, config.q_size),
        "gate_proj": (f, h),
        "up_proj": (f, h),
        "down_proj": (h, f),
    }
    for layer in range(num_layers):
        tensors |= {linear_name(layer, name): matrix(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(h).bfloat16()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(to_hf_config(config)))


def run(depths: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """A row for each depth (median seconds), then the exponent of time = a * layers ^ exponent."""
    _time(depths[0])  # the first run pays for loading libraries
    rows: list[dict[str, Any]] = []
    for depth in depths:
        seconds = median(_time(depth) for _ in range(rounds))
        rows.append({"layers": depth, "seconds": round(seconds, 3), "s_per_layer": round(seconds / depth, 4)})
        Console(stderr=True).print(rows[-1])
    exponent = _slope([math.log(r["layers"]) for r in rows], [math.log(r["seconds"]) for r in rows])
    return [{**row, "fitted_exponent": round(exponent, 3)} for row in rows]


def _time(depth: int) -> float:
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        random_checkpoint(directory, depth)
        tokens = torch.randint(0, 1024, (_SEQUENCES, _LENGTH), generator=torch.Generator().manual_seed(0))
        layers = DecoderLayers(open_checkpoint(directory), _LENGTH)
        workspace = Workspace(directory / "work", {}, "work")
        formats = candidate_formats(DEFAULT_BITS)
        start = time.perf_counter()
        SensitivityAnalysis(layers, tokens, formats, workspace).run()
        return time.perf_counter() - start


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least squares."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)
