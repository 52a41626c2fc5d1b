"""Which model fits which GPU at which bits, by the engine's own arithmetic and without a GPU.

`python -m deploy.sizing docs/sizing.md` rewrites the page's table; `peregrine sizing` answers for one model.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engine import EngineConfig
from engine.config import KVCacheDType
from engine.cuda.layers import workspace_bytes
from engine.cuda.prefill import padded_tokens
from engine.cuda.random_model import RandomModel
from engine.model_runner import DEFAULT_TOKEN_BUDGET, GPU_MEMORY_SHARE
from engine.models.config import ModelConfig
from engine.models.hf_config import from_hf_config
from engine.models.shapes import SHAPES
from kernels import kv_cache

# As nvidia-smi gives them, in MiB. The fused kernels are Hopper's; other cards run the torch reference.
GPUS = {"H100 80 GB": 81_559, "H100 NVL 94 GB": 95_830, "H200 141 GB": 143_771}
# CUDA's context, cuBLAS and what the allocator cannot use of its pages: an allowance, not a measurement.
_CONTEXT_BYTES = 1_500_000_000
BITS = (2.125, 3.25, 4.25, 8.0)
STREAM_TOKENS = 4096
_BLOCK_TOKENS = EngineConfig(model="").block_size
_BEGIN, _END = "<!-- table: python -m deploy.sizing docs/sizing.md -->", "<!-- /table -->"


@dataclass(frozen=True, slots=True)
class Size:
    """weight_bytes: of a checkpoint in the GPU's packing. workspace_bytes: the largest step's, scratch
    included. kv_bytes_per_token: by kv_cache_dtype.
    """

    weight_bytes: int
    workspace_bytes: int
    kv_bytes_per_token: dict[KVCacheDType, int]

    def kv_tokens(self, gpu_mib: int, dtype: KVCacheDType) -> int:
        """That the cache holds by default; 0 where the model does not fit."""
        free = gpu_mib * 2**20 - _CONTEXT_BYTES - self.weight_bytes - self.workspace_bytes
        block = self.kv_bytes_per_token[dtype] * _BLOCK_TOKENS
        return max(0, int(free * GPU_MEMORY_SHARE)) // block * _BLOCK_TOKENS


def size_of(shape: ModelConfig, bits: float, config: EngineConfig | None = None) -> Size:
    """bits: of the layers' matrices; the head has 6 and the embedding 4, as in the benchmarks.

    Raises ModelLoadError for bits outside 2.125 to 8.
    """
    config = config or EngineConfig(model="")
    budget = config.token_budget or max(DEFAULT_TOKEN_BUDGET["cuda"], config.max_num_seqs)
    limit = min(config.max_model_len or shape.max_position_embeddings, shape.max_position_embeddings)
    with FakeTensorMode():  # shapes without memory
        weights = RandomModel(shape, bits).device_weights(limit, torch.device("cpu"))
        reserved = workspace_bytes(
            shape,
            weights,
            padded_tokens(min(budget, limit)),
            config.max_num_seqs,
            config.prefill_precision,
        )
        weight_bytes = sum(m.nbytes for m in weights.matrices) + sum(v.nbytes for v in weights.vectors)
    of_layer = {
        "auto": kv_cache.bytes_per_token(shape.num_kv_heads, shape.head_dim, "bf16"),
        "fp8": kv_cache.bytes_per_token(shape.num_kv_heads, shape.head_dim, "fp8"),
    }
    return Size(weight_bytes, reserved, {k: shape.num_layers * v for k, v in of_layer.items()})  # type: ignore[misc]


def rows(shapes: dict[str, ModelConfig], bits: tuple[float, ...] = BITS) -> list[dict[str, Any]]:
    """A row for each shape, width and GPU."""
    found = []
    for name, shape in shapes.items():
        for width in bits:
            size = size_of(shape, width)
            for gpu, mib in GPUS.items():
                tokens: dict[str, int] = {d: size.kv_tokens(mib, d) for d in size.kv_bytes_per_token}
                found.append(
                    {
                        "shape": name,
                        "bits": width,
                        "weight_gb": round(size.weight_bytes / 1e9, 1),
                        "workspace_gb": round(size.workspace_bytes / 1e9, 1),
                        "kv_bytes_per_token": size.kv_bytes_per_token["auto"],
                        "gpu": gpu,
                        "kv_tokens": tokens["auto"],
                        "kv_tokens_fp8": tokens["fp8"],
                        f"streams_of_{STREAM_TOKENS}": tokens["auto"] // STREAM_TOKENS,
                    }
                )
    return found


def shape_of(path: Path) -> ModelConfig:
    """Of a config.json, or of the directory that has it. Raises OSError, ValueError, ModelLoadError."""
    file = path / "config.json" if path.is_dir() else path
    return from_hf_config(json.loads(file.read_text(encoding="utf-8")))


def table() -> str:
    """Markdown: streams of 4,096 tokens that a GPU's cache holds beside the weights."""
    lines = [
        f"| model | bits | weights | workspace | {' | '.join(GPUS)} |",
        "|---|---|---|---|" + "---|" * len(GPUS),
    ]
    every = rows(SHAPES)
    for start in range(0, len(every), len(GPUS)):
        group = every[start : start + len(GPUS)]
        first = group[0]
        cells = [_cell(row) for row in group]
        lines.append(
            f"| {first['shape'].upper()} | {first['bits']:g} | {first['weight_gb']} GB "
            f"| {first['workspace_gb']} GB | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any]) -> str:
    if row["kv_tokens"] < STREAM_TOKENS:
        return "no"
    return f"{row[f'streams_of_{STREAM_TOKENS}']} ({row['kv_tokens_fp8'] // STREAM_TOKENS})"


def page(text: str) -> str:
    begin, end = text.index(_BEGIN) + len(_BEGIN), text.index(_END)
    return f"{text[:begin]}\n{table()}{text[end:]}"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(page(target.read_text()))
