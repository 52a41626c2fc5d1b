"""How keys and values lie in a GPU's paged cache: bfloat16, or e4m3 with a scale for each token and head.

"bf16" is bfloat16 [blocks, kv_heads, 16, head_dim]. "fp8" is uint8 [blocks, kv_heads, 16 * head_dim + 16]:
the 16 tokens' e4m3 codes, then their exponents e, a byte each, so that one copy brings both. A value is
code * 2^(e - 127), and a head's largest code is above 224.

Why so: the bytes of a token depend on its own values alone, so that batches, chunks, preemption and prefix
hits change nothing, and no text has to be run first to find scales. A power of two costs e4m3 nothing, whose
precision is relative: only values below 2^-14 of the largest are rounded more coarsely. What is read is exact
in bfloat16, and a kernel may multiply scores and probabilities by the scales instead of keys and values, to
the same bits.
"""

from typing import Literal

import torch
from torch import Tensor

from kernels.cuda.program import BLOCK_TOKENS

KVFormat = Literal["bf16", "fp8"]

# Added to a float's bits, it carries into the exponent where the mantissa is above 1.75: 448 = 1.75 * 2^8.
CARRY, MAX_EXPONENT = 0x1FFFFF, 8
_E4M3 = torch.float8_e4m3fn
_ONE = 254  # 2^(254 - e - 127) is the inverse of 2^(e - 127)


def allocate(
    num_blocks: int, num_kv_heads: int, head_dim: int, kv_format: KVFormat, device: torch.device
) -> Tensor:
    """Keys or values of one layer, all zeros."""
    if kv_format == "fp8":
        size = BLOCK_TOKENS * (head_dim + 1)
        return torch.zeros(num_blocks, num_kv_heads, size, dtype=torch.uint8, device=device)
    shape = num_blocks, num_kv_heads, BLOCK_TOKENS, head_dim
    return torch.zeros(shape, dtype=torch.bfloat16, device=device)


def bytes_per_token(num_kv_heads: int, head_dim: int, kv_format: KVFormat) -> int:
    """Keys and values of one layer together."""
    return 2 * num_kv_heads * (head_dim + 1 if kv_format == "fp8" else 2 * head_dim)


def is_fp8(cache: Tensor) -> bool:
    return cache.dtype == torch.uint8


def codes(cache: Tensor) -> Tensor:
    """View of an "fp8" cache: e4m3 [blocks, kv_heads, 16, head_dim]."""
    head_dim = cache.shape[2] // BLOCK_TOKENS - 1
    return cache[..., : BLOCK_TOKENS * head_dim].view(_E4M3).unflatten(2, (BLOCK_TOKENS, head_dim))


def exponents(cache: Tensor) -> Tensor:
    """View of an "fp8" cache: uint8 [blocks, kv_heads, 16]."""
    return cache[..., -BLOCK_TOKENS:]


def encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 codes like x [..., head_dim], and their exponents, uint8 [...]."""
    x = x.float()
    bits = x.abs().amax(dim=-1).view(torch.int32)
    exponent = (((bits + CARRY) >> 23) - MAX_EXPONENT).clamp(min=1)
    return (x * _power(_ONE - exponent).unsqueeze(-1)).to(_E4M3), exponent.to(torch.uint8)


def decode(code: Tensor, exponent: Tensor) -> Tensor:
    """float32, what `encode` made the codes and exponents of, rounded."""
    return code.float() * _power(exponent.int()).unsqueeze(-1)


def write(cache: Tensor, block: Tensor, offset: Tensor, new: Tensor) -> None:
    """Tokens new [T, kv_heads, head_dim] into their places: int64 [T] block and place in it."""
    if is_fp8(cache):
        code, exponent = encode(new)
        codes(cache).view(torch.uint8)[block, :, offset] = code.view(torch.uint8)
        exponents(cache)[block, :, offset] = exponent
    else:
        cache[block, :, offset] = new.to(cache.dtype)


def read(cache: Tensor, blocks: Tensor) -> Tensor:
    """float32 [len(blocks), kv_heads, 16, head_dim] of the blocks int64."""
    if is_fp8(cache):
        own = cache[blocks]
        return decode(codes(own), exponents(own))
    return cache[blocks].float()


def _power(exponent: Tensor) -> Tensor:
    """2^(exponent - 127) of int32, and zero of 0."""
    return (exponent << 23).view(torch.float32)
