"""Attention of one new token for each sequence, from the qkv product to the next matrix's input.

A program takes a sequence, a KV head with its query heads (GQA packed: they are rows of one product), and a
part of the context (split-KV, Dao et al. 2023). It rotates its queries itself; the first part's program also
rotates the new key, appends it with the value, and begins with them. Whichever of a head's programs ends last
merges the parts, always in the same order.
"""
# mypy: disable-error-code="no-untyped-def"

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv_cache import is_fp8
from kernels.prefill import BLOCK_TOKENS, LOG2_E, Activations, Bound, Form, Product, Tokens, empty_tiled
from kernels.triton_ops import kv_cache
from kernels.triton_ops.early_launch import early, wait_for_kernel_before
from kernels.triton_ops.kv_cache import exponent_of, power, scale_to_codes
from kernels.triton_ops.prefill_append import rope_and_append
from kernels.triton_ops.rows import FORMS, load_product, tiled_place
from kernels.types import AttentionWeights

_FP8_OPERANDS = tl.bfloat16
_KEYS = {64: 64, 128: 64, 256: 32}  # of a step, by head_dim
_PROGRAMS = 1024  # as many run at once on an H100
_MAX_SPLITS = 16
_MAX_COUNTERS = 1 << 16
_LONG, _SHORT = 256, 64  # keys of a part at least, with and without enough programs for all multiprocessors


@triton.jit
def parts_of(
    position,
    end,  # cached keys: those before the position, or with its own
    window,
    MIN_KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """First cached key that counts (a multiple of KEYS), keys of a part, number of parts."""
    begin = position * 0
    if HAS_WINDOW:
        begin = tl.maximum(position - window + 1, 0) // KEYS * KEYS
    size = ((end - begin + SPLITS - 1) // SPLITS + KEYS - 1) // KEYS * KEYS
    size = tl.maximum(size, MIN_KEYS)
    return begin, size, tl.maximum((end - begin + size - 1) // size, 1)


@triton.jit
def rotated(
    qkv_ptr, token_scale_ptr, row_scale_ptr, bias_ptr, norm_ptr, token, at, mask, width, half, cos, sin, eps,
    dtype, SPLITS: tl.constexpr, HALF: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Both halves of heads [R, HALF] whose first columns are `at`, as the cache has them."""
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
    if HAS_NORM:
        squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        inverse = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        first *= inverse * tl.load(norm_ptr + half)
        second *= inverse * tl.load(norm_ptr + HALF + half)
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)


@triton.jit
def merged(
    parts_ptr, lse_ptr, token, head, is_row, at_dim, count, num_heads, ROWS: tl.constexpr, DIM: tl.constexpr
):
    """The mean [ROWS, DIM] of all parts, in their order, past the cache that does not know of the others'."""
    largest = tl.full((ROWS, 1), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, 1), tl.float32)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    for part in range(count):
        head_at = (part * tl.num_programs(0) + token) * num_heads + head
        lse = tl.load(lse_ptr + head_at, is_row, other=0.0, cache_modifier=".cg")
        new_largest = tl.maximum(largest, lse)
        shrink, share = tl.exp2(largest - new_largest), tl.exp2(lse - new_largest)
        mean = tl.load(parts_ptr + head_at * DIM + at_dim, is_row, other=0.0, cache_modifier=".cg")
        total = total * shrink + share
        acc = acc * shrink + share * mean
        largest = new_largest
    return acc / total


@triton.jit
def store_head(out_ptr, value, token, at, mask, inverse, padded, width, FORM: tl.constexpr):
    """Columns `at` of a token's row of the next matrix's input."""
    to = tiled_place(token, at, padded) if FORM == 2 else token * width + at
    tl.store(out_ptr + to, (value * inverse).to(out_ptr.dtype.element_ty), mask)


@triton.jit
def attend_part(
    qkv_ptr,  # a product [T, (heads + 2 kv_heads) * dim]
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
    k_cache_ptr,  # of kernels.kv_cache, the new key written; exponents where it is e4m3
    k_exponent_ptr,
    v_cache_ptr,
    v_exponent_ptr,
    parts_ptr,  # float32 [parts, T, heads, dim], written: a part's weighted mean of the values
    lse_ptr,  # float32 [parts, T, heads], written: base-2 logarithm of its sum
    counters_ptr,  # int32 [T, kv_heads]: parts that are through, zero before and after
    out_ptr,  # [T, heads * dim] in the form, written
    inverse,
    padded,
    eps,
    scale,
    window,
    table_stride,
    num_kv_heads,
    HEAD_STRIDE: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a KV head
    ROWS: tl.constexpr,  # at least GROUP, and 16 for the tensor cores
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    MIN_KEYS: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_FP8: tl.constexpr,
    FP8_OPERANDS: tl.constexpr,  # what codes are multiplied as
    APPENDS: tl.constexpr,  # else a kernel before has appended the new keys
    FORM: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    wait_for_kernel_before(IS_EARLY)
    HALF: tl.constexpr = DIM // 2
    DTYPE: tl.constexpr = FP8_OPERANDS if IS_FP8 else k_cache_ptr.dtype.element_ty
    token, kv_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions_ptr + token)
    end = position if APPENDS else position + 1
    begin, size, count = parts_of(
        tl.maximum(position, 0), tl.maximum(end, 0), window, MIN_KEYS, MAX_PARTS, KEYS, HAS_WINDOW
    )
    if (position >= 0) & (part < count):
        num_heads = num_kv_heads * GROUP
        width = (num_heads + 2 * num_kv_heads) * DIM
        at_row, half, at_dim = (
            tl.arange(0, ROWS)[:, None],
            tl.arange(0, HALF)[None, :],
            tl.arange(0, DIM)[None, :],
        )
        cos = tl.load(cos_ptr + position.to(tl.int64) * HALF + half)
        sin = tl.load(sin_ptr + position.to(tl.int64) * HALF + half)
        first, second = rotated(
            qkv_ptr, token_scale_ptr, row_scale_ptr, bias_ptr, q_norm_ptr, token,
            (kv_head * GROUP + at_row) * DIM + half, (at_row < GROUP) & (half < HALF), width, half, cos, sin,
            eps, DTYPE, SPLITS, HALF, HAS_SCALES, HAS_BIAS, HAS_Q_NORM,
        )  # fmt: skip
        blocks_ptr = table_ptr + tl.load(rows_ptr + token).to(tl.int64) * table_stride
        kv_at = kv_head * HEAD_STRIDE
        block_stride = num_kv_heads * HEAD_STRIDE
        largest = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, DIM), tl.float32)
        if APPENDS and part == 0:
            new_dtype: tl.constexpr = tl.float32 if IS_FP8 else DTYPE
            key_at = (num_heads + kv_head) * DIM
            new_first, new_second = rotated(
                qkv_ptr, token_scale_ptr, row_scale_ptr, bias_ptr, k_norm_ptr, token, key_at + half,
                half < HALF, width, half, cos, sin, eps, new_dtype, SPLITS, HALF, HAS_SCALES, HAS_BIAS,
                HAS_K_NORM,
            )  # fmt: skip
            value = load_product(
                qkv_ptr, token_scale_ptr, row_scale_ptr, bias_ptr, token,
                key_at + num_kv_heads * DIM + at_dim, at_dim < DIM, width, SPLITS, HAS_SCALES, HAS_BIAS,
            ).to(new_dtype)  # fmt: skip
            block = tl.load(blocks_ptr + position // BLOCK_TOKENS).to(tl.int64)
            to_head = block * block_stride + kv_at
            to = to_head + position % BLOCK_TOKENS * DIM
            key_scale, value_scale = 1.0, 1.0
            if IS_FP8:
                largest_key = tl.maximum(
                    tl.max(tl.abs(new_first), axis=1), tl.max(tl.abs(new_second), axis=1)
                )
                key_exponent = exponent_of(largest_key)[:, None]
                value_exponent = exponent_of(tl.max(tl.abs(value), axis=1))[:, None]
                key_scale, value_scale = power(key_exponent), power(value_exponent)
                code: tl.constexpr = k_cache_ptr.dtype.element_ty
                new_first = (new_first * scale_to_codes(key_exponent)).to(code)
                new_second = (new_second * scale_to_codes(key_exponent)).to(code)
                value = (value * scale_to_codes(value_exponent)).to(code)
                at_exponent = to_head + position % BLOCK_TOKENS + tl.zeros_like(key_exponent)
                byte: tl.constexpr = k_exponent_ptr.dtype.element_ty
                tl.store(k_exponent_ptr + at_exponent, key_exponent.to(byte))
                tl.store(v_exponent_ptr + at_exponent, value_exponent.to(byte))
            tl.store(k_cache_ptr + to + half, new_first)
            tl.store(k_cache_ptr + to + HALF + half, new_second)
            tl.store(v_cache_ptr + to + at_dim, value)
            # What the cache says from now on.
            products = first.to(tl.float32) * (new_first.to(tl.float32) * key_scale)
            products += second.to(tl.float32) * (new_second.to(tl.float32) * key_scale)
            largest = tl.sum(products, axis=1) * scale
            total += 1.0
            acc += value.to(tl.float32) * value_scale
        low = begin + part * size
        for i in range(low, tl.minimum(low + size, end), KEYS):
            key = i + tl.arange(0, KEYS)
            is_key = key < end
            block = tl.load(blocks_ptr + key // BLOCK_TOKENS, is_key, other=0).to(tl.int64)
            block_at = block * block_stride + kv_at
            offset = (block_at + (key % BLOCK_TOKENS) * DIM)[:, None]
            # Beyond the end the cache holds anything, also NaN, which no probability of zero takes away.
            mask = is_key[:, None]
            keys = tl.load(k_cache_ptr + offset + half, mask, other=0.0)
            scores = tl.dot(first, tl.trans(keys.to(DTYPE)))
            keys = tl.load(k_cache_ptr + offset + HALF + half, mask, other=0.0)
            scores = tl.dot(second, tl.trans(keys.to(DTYPE)), scores) * scale
            if IS_FP8:
                at_exponent = block_at + key % BLOCK_TOKENS
                scores *= power(tl.load(k_exponent_ptr + at_exponent, is_key, other=0))[None, :]
            is_visible = is_key[None, :]
            if HAS_WINDOW:
                is_visible = is_visible & (position - key < window)[None, :]
            scores = tl.where(is_visible, scores, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(scores, axis=1))
            probs = tl.exp2(scores - new_largest[:, None])
            shrink = tl.exp2(largest - new_largest)
            total = total * shrink + tl.sum(probs, axis=1)
            values = tl.load(v_cache_ptr + offset + at_dim, mask, other=0.0)
            if IS_FP8:
                probs *= power(tl.load(v_exponent_ptr + at_exponent, is_key, other=0))[None, :]
            acc = tl.dot(probs.to(DTYPE), values.to(DTYPE), acc * shrink[:, None])
            largest = new_largest
        mean = acc / total[:, None]
        head = kv_head * GROUP + at_row
        is_row = at_row < GROUP
        is_last = count == 1
        if count > 1:
            head_at = (part * tl.num_programs(0) + token) * num_heads + head
            tl.store(parts_ptr + head_at * DIM + at_dim, mean, is_row)
            tl.store(lse_ptr + head_at, (largest + tl.log2(total))[:, None], is_row)
            tl.debug_barrier()  # all of it is written before it is told
            counter = counters_ptr + token * num_kv_heads + kv_head
            is_last = tl.atomic_add(counter, 1, sem="acq_rel") == count - 1
            if is_last:
                tl.store(counter, 0)
                mean = merged(parts_ptr, lse_ptr, token, head, is_row, at_dim, count, num_heads, ROWS, DIM)
        if is_last:
            store_head(
                out_ptr, mean, token, head * DIM + at_dim, is_row, inverse, padded, num_heads * DIM, FORM
            )
    elif (position < 0) & (part == 0):
        at_row, at_dim = tl.arange(0, ROWS)[:, None], tl.arange(0, DIM)[None, :]
        zeros = tl.zeros((ROWS, DIM), tl.float32)
        at = (kv_head * GROUP + at_row) * DIM + at_dim
        width = num_kv_heads * GROUP * DIM
        store_head(out_ptr, zeros, token, at, at_row < GROUP, inverse, padded, width, FORM)


def attend_next(
    qkv: Product,
    w: AttentionWeights,
    caches: tuple[Tensor, Tensor],
    tokens: Tokens,
    form: Form,
    bound: Bound | None = None,
    *,
    is_shared: bool = False,
) -> Activations:
    """See `kernels.prefill.attend_next`; "bf16", or "tiled" with a bound."""
    assert form == "bf16" or (form == "tiled" and bound is not None)
    if is_shared:
        rope_and_append(qkv, w, caches, tokens)
    num_tokens, device, width = qkv.values.shape[-2], qkv.values.device, w.num_heads * w.head_dim
    group = w.num_heads // w.num_kv_heads
    programs = num_tokens * w.num_kv_heads
    assert programs <= _MAX_COUNTERS
    parts = max(2, min(_MAX_SPLITS, _PROGRAMS // programs))
    sizes = {
        "DIM": w.head_dim,
        "KEYS": _KEYS[w.head_dim],
        "MIN_KEYS": _SHORT if 4 * programs <= _PROGRAMS else _LONG,
        "MAX_PARTS": parts,
        "HAS_WINDOW": w.window is not None,
        "APPENDS": not is_shared,
    }
    means = torch.empty(parts, num_tokens, w.num_heads, w.head_dim, device=device)
    lse = torch.empty(parts, num_tokens, w.num_heads, device=device)
    if bound is None:
        out = Activations(torch.empty(num_tokens, width, dtype=torch.bfloat16, device=device))
    else:
        out = Activations(empty_tiled(num_tokens, width, device), bound.scale[:num_tokens])
    attend_part[(num_tokens, w.num_kv_heads, parts)](
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
        *kv_cache.operands(caches),
        means,
        lse,
        _counters(device),
        out.values,
        1.0 if bound is None else bound.inverse,
        0 if bound is None else out.padded_tokens,
        w.eps,
        w.scale * LOG2_E,
        w.window or 0,
        tokens.block_table.stride(0),
        w.num_kv_heads,
        HEAD_STRIDE=kv_cache.head_stride(caches),
        GROUP=group,
        ROWS=max(16, triton.next_power_of_2(group)),
        BLOCK_TOKENS=BLOCK_TOKENS,
        SPLITS=qkv.num_splits,
        HAS_SCALES=qkv.row_scale is not None,
        HAS_BIAS=w.qkv_bias is not None,
        HAS_Q_NORM=w.q_norm is not None,
        HAS_K_NORM=w.k_norm is not None,
        IS_FP8=is_fp8(caches[0]),
        FP8_OPERANDS=_FP8_OPERANDS,
        FORM=FORMS[form],
        num_warps=4,
        num_stages=2,
        **sizes,
        **early(device),
    )
    return out


@functools.cache
def _counters(device: torch.device) -> Tensor:
    return torch.zeros(_MAX_COUNTERS, dtype=torch.int32, device=device)
