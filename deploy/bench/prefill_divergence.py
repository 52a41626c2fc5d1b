"""What e4m3 products of prompts cost: their next tokens' KL divergence to bfloat16's, on held-out text.

The same of chunks of 256 tokens, whose products are those of large batches: float16 from packed weights.

    python -m deploy.bench.prefill_divergence CHECKPOINT...

Needs a Hopper GPU. The checkpoint's own divergence to the model it was made of is `peregrine eval`'s.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint import open_checkpoint
from engine.config import Precision
from engine.cuda.layers import DIRECT_TOKENS, Layers
from engine.cuda.prefill import Chunk, Prefill
from engine.cuda.weights import DeviceWeights, load_weights
from engine.models.config import ModelConfig
from engine.quality.divergence import compare
from engine.quality.text import heldout_documents, token_windows
from kernels.cuda import tables
from kernels.cuda.program import BLOCK_TOKENS
from kernels.kv_cache import KVFormat, allocate
from kernels.reference import rms_norm

_WINDOWS, _LENGTH = 16, 512


@torch.inference_mode()
def measure(model: Path) -> dict[str, float]:
    """KL (nats a token, mean over windows), share of tokens with the same best one, perplexity."""
    device, checkpoint = torch.device("cuda"), open_checkpoint(model)
    weights = load_weights(checkpoint, _LENGTH, device)
    tokens = token_windows(checkpoint.load_tokenizer(), heldout_documents(), _WINDOWS, _LENGTH)
    head = tables.dequantize(weights.head, torch.float32)
    reference = normed_states(weights, checkpoint.config, tokens, "bf16", _LENGTH)
    row: dict[str, float] = {}
    for name, precision, length in (("fp8", "fp8", _LENGTH), ("packed", "bf16", DIRECT_TOKENS)):
        states = normed_states(weights, checkpoint.config, tokens, precision, length)  # type: ignore[arg-type]
        d = compare(states, head, reference, head, tokens.to(device), checkpoint.config.final_softcap)
        row[f"kl_{name}"] = float(d.kl.mean())
        row[f"same_top_1_{name}"] = float(d.agrees.float().mean())
        row[f"perplexity_{name}"] = float(d.nll.mean().exp())
        row["perplexity_bf16"] = float(d.reference_nll.mean().exp())
    return row


def normed_states(
    weights: DeviceWeights,
    config: ModelConfig,
    tokens: Tensor,
    precision: Precision,
    chunk: int,
    kv_format: KVFormat = "bf16",
) -> Tensor:
    """float32 [windows, tokens, hidden], each window a prompt, computed in chunks."""
    device = weights.final_norm.device
    num_blocks = -(-tokens.shape[1] // BLOCK_TOKENS)
    of_cache = num_blocks, config.num_kv_heads, config.head_dim, kv_format, device
    caches = [(allocate(*of_cache), allocate(*of_cache)) for _ in weights.layers]
    table = torch.arange(num_blocks, dtype=torch.int32, device=device).unsqueeze(0)
    prefill = Prefill(Layers(weights, caches, device, precision), config, table, device)
    normed = []
    for window in tokens.tolist():
        parts = [
            prefill.forward([Chunk(0, i, window[i : i + chunk])]).clone()
            for i in range(0, len(window), chunk)
        ]
        normed.append(rms_norm(torch.cat(parts), weights.final_norm, config.rms_norm_eps))
    return torch.stack(normed)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(name, measure(Path(name)))
