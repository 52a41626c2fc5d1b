"""Causal attention of prompt chunks over the paged cache (FlashAttention-2, Dao 2023), without gathering it.

A program takes a tile of queries that follow each other in one sequence, and one head. Keys before the
tile's first position are seen by all of them and need no mask.
"""
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv_cache import is_fp8
from kernels.prefill import BLOCK_TOKENS, LOG2_E, Tokens
from kernels.triton_ops import kv_cache
from kernels.triton_ops.early_launch import early, wait_for_kernel_before
from kernels.triton_ops.kv_cache import power
from kernels.types import AttentionWeights

_KEYS = {64: 64, 128: 64, 256: 32}  # of a step, by head_dim


@triton.jit
def attend_keys(
    query,  # [ROWS, DIM]
    acc,
    largest,
    total,
    low,
    high,
    end,
    position,
    blocks_ptr,  # the sequence's row of the block table
    k_ptr,  # the head's part of block 0
    k_exponent_ptr,
    v_ptr,
    v_exponent_ptr,
    block_stride,
    scale,
    window,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    IS_MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_FP8: tl.constexpr,
):
    """One pass over the keys from `low` (a multiple of KEYS) to `high`, base-2 logarithms."""
    at_key, at_dim = tl.arange(0, KEYS), tl.arange(0, DIM)
    for i in range(low, high, KEYS):
        key = i + at_key
        is_key = key < end
        if IS_MASKED:
            block = tl.load(blocks_ptr + key // BLOCK_TOKENS, is_key, other=0)
        else:
            block = tl.load(blocks_ptr + key // BLOCK_TOKENS)
        block_at = block.to(tl.int64) * block_stride
        offset = (block_at + (key % BLOCK_TOKENS) * DIM)[:, None] + at_dim[None, :]
        if IS_MASKED:
            # Beyond the end the cache holds anything, also NaN, which no probability of zero takes away.
            keys = tl.load(k_ptr + offset, is_key[:, None], other=0.0)
            values = tl.load(v_ptr + offset, is_key[:, None], other=0.0)
        else:
            keys = tl.load(k_ptr + offset)
            values = tl.load(v_ptr + offset)
        scores = tl.dot(query, tl.trans(keys.to(query.dtype))) * scale
        if IS_FP8:
            at_exponent = block_at + key % BLOCK_TOKENS
            scores *= power(tl.load(k_exponent_ptr + at_exponent, is_key, other=0))[None, :]
        if IS_MASKED:
            distance = position[:, None] - key[None, :]
            is_visible = distance >= 0
            if HAS_WINDOW:
                is_visible = is_visible & (distance < window)
            scores = tl.where(is_visible, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        base = new_largest
        if HAS_WINDOW:  # a row that has seen nothing yet stays at -inf: keep -inf - -inf out
            base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        probs = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(probs, axis=1)
        if IS_FP8:
            probs *= power(tl.load(v_exponent_ptr + at_exponent, is_key, other=0))[None, :]
        acc = tl.dot(probs.to(query.dtype), values.to(query.dtype), acc * shrink[:, None])
        largest = new_largest
    return acc, largest, total


@triton.jit
def attend_tiles(
    query_ptr,  # bfloat16 [T, heads, dim]
    k_cache_ptr,  # of kernels.kv_cache; exponents where it is e4m3
    k_exponent_ptr,
    v_cache_ptr,
    v_exponent_ptr,
    tiles_ptr,  # int32 [N, 4]
    table_ptr,
    out_ptr,  # bfloat16 [T, heads, dim], written
    scale,
    window,
    table_stride,
    num_heads,
    num_kv_heads,
    HEAD_STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_FP8: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    wait_for_kernel_before(IS_EARLY)
    tile, head = tl.program_id(1), tl.program_id(0)
    first = tl.load(tiles_ptr + 4 * tile).to(tl.int64)
    count = tl.load(tiles_ptr + 4 * tile + 1)
    row = tl.load(tiles_ptr + 4 * tile + 2).to(tl.int64)
    start = tl.load(tiles_ptr + 4 * tile + 3)
    if count > 0:
        at_row, at_dim = tl.arange(0, ROWS), tl.arange(0, DIM)
        mask = (at_row < count)[:, None] & (at_dim < DIM)[None, :]
        at = ((first + at_row) * num_heads + head)[:, None] * DIM + at_dim[None, :]
        query = tl.load(query_ptr + at, mask, other=0.0)
        position, end = start + at_row, start + count
        kv_at = head // (num_heads // num_kv_heads) * HEAD_STRIDE
        block_stride = num_kv_heads * HEAD_STRIDE
        k_ptr, v_ptr, blocks_ptr = k_cache_ptr + kv_at, v_cache_ptr + kv_at, table_ptr + row * table_stride
        k_exponents, v_exponents = k_exponent_ptr, v_exponent_ptr
        if IS_FP8:
            k_exponents += kv_at
            v_exponents += kv_at
        acc = tl.zeros((ROWS, DIM), tl.float32)
        largest = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        if HAS_WINDOW:
            middle = tl.maximum(start - window + 1, 0) // KEYS * KEYS
        else:
            middle = start // KEYS * KEYS
            acc, largest, total = attend_keys(
                query, acc, largest, total, 0, middle, end, position, blocks_ptr, k_ptr, k_exponents, v_ptr,
                v_exponents, block_stride, scale, window, KEYS, DIM, BLOCK_TOKENS, False, False, IS_FP8,
            )  # fmt: skip
        acc, largest, total = attend_keys(
            query, acc, largest, total, middle, end, end, position, blocks_ptr, k_ptr, k_exponents, v_ptr,
            v_exponents, block_stride, scale, window, KEYS, DIM, BLOCK_TOKENS, True, HAS_WINDOW, IS_FP8,
        )  # fmt: skip
        # Rows beyond the tile's tokens may have seen nothing.
        out = acc / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask)


def attend(query: Tensor, w: AttentionWeights, caches: tuple[Tensor, Tensor], tokens: Tokens) -> Tensor:
    """See `kernels.prefill.attend`. tokens.tile: a power of two of at least 16."""
    out = torch.empty_like(query)
    attend_tiles[(w.num_heads, len(tokens.tiles))](
        query,
        *kv_cache.operands(caches),
        tokens.tiles,
        tokens.block_table,
        out,
        w.scale * LOG2_E,
        w.window or 0,
        tokens.block_table.stride(0),
        w.num_heads,
        w.num_kv_heads,
        HEAD_STRIDE=kv_cache.head_stride(caches),
        DIM=w.head_dim,
        ROWS=tokens.tile,
        KEYS=_KEYS[w.head_dim],
        BLOCK_TOKENS=BLOCK_TOKENS,
        HAS_WINDOW=w.window is not None,
        IS_FP8=is_fp8(caches[0]),
        num_warps=8 if tokens.tile * w.head_dim > 8192 else 4,
        num_stages=2 if w.head_dim == 256 else 3,
        **early(query.device),
    )
    return out.flatten(1)
