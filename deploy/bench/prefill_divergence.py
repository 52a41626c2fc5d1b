"""What e4m3 products of prompts cost: their next tokens' KL divergence to bfloat16's, on held-out text.

    python -m deploy.bench.prefill_divergence CHECKPOINT...

Needs a Hopper GPU. The checkpoint's own divergence to the model it was made of is `peregrine eval`'s.
"""

import sys
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from engine.checkpoint import open_checkpoint
from engine.cuda.prefill import Chunk, Precision, Prefill
from engine.cuda.weights import DeviceWeights, load_weights
from engine.models.config import ModelConfig
from engine.quality.divergence import compare
from engine.quality.text import heldout_documents, token_windows
from kernels.cuda import tables
from kernels.cuda.program import BLOCK_TOKENS
from kernels.reference import rms_norm

_WINDOWS, _LENGTH = 16, 512


@torch.inference_mode()
def measure(model: Path) -> dict[str, float]:
    """KL (nats a token, mean over windows), share of tokens with the same best one, bfloat16's perplexity."""
    device, checkpoint = torch.device("cuda"), open_checkpoint(model)
    weights = load_weights(checkpoint, _LENGTH, device)
    tokens = token_windows(checkpoint.load_tokenizer(), heldout_documents(), _WINDOWS, _LENGTH)
    states = [_normed_states(weights, checkpoint.config, tokens, p) for p in get_args(Precision)]
    head = tables.dequantize(weights.head, torch.float32)
    d = compare(states[0], head, states[1], head, tokens.to(device))
    return {
        "kl": float(d.kl.mean()),
        "same_top_1": float(d.agrees.float().mean()),
        "perplexity_fp8": float(d.nll.mean().exp()),
        "perplexity_bf16": float(d.reference_nll.mean().exp()),
    }


def _normed_states(
    weights: DeviceWeights, config: ModelConfig, tokens: Tensor, precision: Precision
) -> Tensor:
    """float32 [windows, tokens, hidden], each window a prompt."""
    device = weights.final_norm.device
    num_blocks = -(-tokens.shape[1] // BLOCK_TOKENS)
    shape = (num_blocks, config.num_kv_heads, BLOCK_TOKENS, config.head_dim)
    caches = [
        tuple(torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in "kv") for _ in weights.layers
    ]
    table = torch.arange(num_blocks, dtype=torch.int32, device=device).unsqueeze(0)
    prefill = Prefill(weights, config, caches, table, device, precision)  # type: ignore[arg-type]
    normed = [
        rms_norm(prefill.forward([Chunk(0, 0, window)]), weights.final_norm, config.rms_norm_eps)
        for window in tokens.tolist()
    ]
    return torch.stack(normed)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(name, measure(Path(name)))
