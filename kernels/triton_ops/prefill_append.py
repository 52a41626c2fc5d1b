"""Rotation of a chunk's queries and keys, and what goes into the paged cache."""
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv_cache import is_fp8
from kernels.prefill import BLOCK_TOKENS, Product, Tokens
from kernels.triton_ops import kv_cache
from kernels.triton_ops.early_launch import early, wait_for_kernel_before
from kernels.triton_ops.kv_cache import exponent_of, scale_to_codes
from kernels.triton_ops.rows import load_product
from kernels.types import AttentionWeights

_HEADS = 16  # of a program


@triton.jit
def rope_append(
    qkv_ptr,  # bfloat16 [T, (heads + 2 kv_heads) * dim]
    token_scale_ptr,
    row_scale_ptr,
    bias_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,  # float32 [positions, dim / 2]
    sin_ptr,
    positions_ptr,
    rows_ptr,
    table_ptr,
    query_ptr,  # bfloat16 [T, heads, dim], written
    k_cache_ptr,  # of kernels.kv_cache, written; exponents where it is e4m3
    k_exponent_ptr,
    v_cache_ptr,
    v_exponent_ptr,
    eps,
    table_stride,
    num_heads,
    num_kv_heads,
    HEAD_STRIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    IS_FP8: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    wait_for_kernel_before(IS_EARLY)
    HALF: tl.constexpr = DIM // 2
    token = tl.program_id(0).to(tl.int64)
    all_heads = num_heads + 2 * num_kv_heads
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    half = tl.arange(0, HALF)[None, :]
    at = head * DIM + half
    mask = (head < all_heads) & (half < HALF)
    width = all_heads * DIM
    first = load_product(
        qkv_ptr,
        token_scale_ptr,
        row_scale_ptr,
        bias_ptr,
        token,
        at,
        mask,
        width,
        SPLITS,
        HAS_SCALES,
        HAS_BIAS,
    )
    second = load_product(
        qkv_ptr,
        token_scale_ptr,
        row_scale_ptr,
        bias_ptr,
        token,
        at + HALF,
        mask,
        width,
        SPLITS,
        HAS_SCALES,
        HAS_BIAS,
    )
    is_query, is_value = head < num_heads, head >= num_heads + num_kv_heads
    is_key = (head >= num_heads) & (head < num_heads + num_kv_heads)
    if HAS_Q_NORM or HAS_K_NORM:
        squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        inverse = tl.rsqrt(squares / DIM + eps)[:, None]
        if HAS_Q_NORM:
            first *= tl.where(is_query, inverse * tl.load(q_norm_ptr + half), 1.0)
            second *= tl.where(is_query, inverse * tl.load(q_norm_ptr + HALF + half), 1.0)
        if HAS_K_NORM:
            first *= tl.where(is_key, inverse * tl.load(k_norm_ptr + half), 1.0)
            second *= tl.where(is_key, inverse * tl.load(k_norm_ptr + HALF + half), 1.0)
    position = tl.load(positions_ptr + token)
    angle = tl.maximum(position, 0).to(tl.int64) * HALF + half
    cos = tl.where(is_value, 1.0, tl.load(cos_ptr + angle))
    sin = tl.where(is_value, 0.0, tl.load(sin_ptr + angle))
    left, right = first * cos - second * sin, second * cos + first * sin
    dtype = query_ptr.dtype.element_ty
    to_query = query_ptr + token * num_heads * DIM + at
    tl.store(to_query, left.to(dtype), mask & is_query)
    tl.store(to_query + HALF, right.to(dtype), mask & is_query)
    row = tl.load(rows_ptr + token).to(tl.int64)
    if (row >= 0) & (position >= 0):
        block = tl.load(table_ptr + row * table_stride + position // BLOCK_TOKENS).to(tl.int64)
        kv_head = tl.where(is_value, head - num_heads - num_kv_heads, head - num_heads)
        to_head, place = (block * num_kv_heads + kv_head) * HEAD_STRIDE, position % BLOCK_TOKENS
        if IS_FP8:
            largest = tl.maximum(tl.max(tl.abs(left), axis=1), tl.max(tl.abs(right), axis=1))
            exponent = exponent_of(largest)[:, None]
            left *= scale_to_codes(exponent)
            right *= scale_to_codes(exponent)
            byte = exponent.to(k_exponent_ptr.dtype.element_ty)
            tl.store(k_exponent_ptr + to_head + place, byte, (head < all_heads) & is_key)
            tl.store(v_exponent_ptr + to_head + place, byte, (head < all_heads) & is_value)
        to_cache = to_head + place * DIM + half
        cached: tl.constexpr = k_cache_ptr.dtype.element_ty
        tl.store(k_cache_ptr + to_cache, left.to(cached), mask & is_key)
        tl.store(k_cache_ptr + to_cache + HALF, right.to(cached), mask & is_key)
        tl.store(v_cache_ptr + to_cache, left.to(cached), mask & is_value)
        tl.store(v_cache_ptr + to_cache + HALF, right.to(cached), mask & is_value)


def rope_and_append(
    qkv: Product, w: AttentionWeights, caches: tuple[Tensor, Tensor], tokens: Tokens
) -> Tensor:
    """See `kernels.prefill.rope_and_append`."""
    num_tokens = qkv.values.shape[-2]
    query = torch.empty(num_tokens, w.num_heads, w.head_dim, dtype=torch.bfloat16, device=qkv.values.device)
    rope_append[(num_tokens, triton.cdiv(w.num_heads + 2 * w.num_kv_heads, _HEADS))](
        qkv.values,
        qkv.token_scale,
        qkv.row_scale,
        w.qkv_bias,
        w.q_norm,
        w.k_norm,
        w.cos,
        w.sin,
        tokens.positions,
        tokens.rows,
        tokens.block_table,
        query,
        *kv_cache.operands(caches),
        w.eps,
        tokens.block_table.stride(0),
        w.num_heads,
        w.num_kv_heads,
        kv_cache.head_stride(caches),
        qkv.num_splits,
        w.head_dim,
        BLOCK_TOKENS,
        _HEADS,
        qkv.row_scale is not None,
        w.qkv_bias is not None,
        w.q_norm is not None,
        w.k_norm is not None,
        is_fp8(caches[0]),
        num_warps=4,
        **early(query.device),
    )
    return query
