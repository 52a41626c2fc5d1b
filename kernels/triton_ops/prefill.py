"""Between the products of a prompt chunk: the functions of `kernels.prefill`, each one launch.

Sums and norms are float32. A row of activations is read once: a program holds all of it.
"""
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.prefill import (
    BLOCK_TOKENS,
    Activations,
    Form,
    Product,
    Tokens,
)
from kernels.triton_ops.decode_attention import attend_next
from kernels.triton_ops.early_launch import early, wait_for_kernel_before
from kernels.triton_ops.prefill_attention import attend
from kernels.triton_ops.rows import FORMS, load_product, outputs, row_shape, store_activations
from kernels.types import AttentionWeights

__all__ = ["add", "attend", "attend_next", "gate", "normalize", "quantize", "rope_and_append"]
_HEADS = 16  # of a program of rope_append


@triton.jit
def normalize_rows(
    x_ptr,  # float32 [T, hidden]; the product is added in place
    out_ptr,  # bfloat16 [T, hidden]: the product
    token_scale_ptr,
    row_scale_ptr,
    bias_ptr,
    post_norm_ptr,
    norm_ptr,
    normed_ptr,  # [T, hidden] in the form, written
    scale_ptr,  # float32 [T], written
    padded,
    eps,
    hidden,
    SPLITS: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_POST_NORM: tl.constexpr,
    HAS_NORM: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    wait_for_kernel_before(IS_EARLY)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < hidden
    x = tl.load(x_ptr + row * hidden + at, mask, other=0.0)
    if HAS_OUT:
        out = load_product(
            out_ptr,
            token_scale_ptr,
            row_scale_ptr,
            bias_ptr,
            row,
            at,
            mask,
            hidden,
            SPLITS,
            HAS_SCALES,
            HAS_BIAS,
        )
        if HAS_POST_NORM:
            out *= tl.rsqrt(tl.sum(out * out, axis=0) / hidden + eps)
            out *= tl.load(post_norm_ptr + at, mask, other=0.0)
        x += out
        tl.store(x_ptr + row * hidden + at, x, mask)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / hidden + eps)
        normed = x * scale * tl.load(norm_ptr + at, mask, other=0.0)
        store_activations(normed, row, at, hidden, normed_ptr, scale_ptr, padded, FORM)


@triton.jit
def quantize_rows(
    x_ptr, out_ptr, scale_ptr, padded, width, FORM: tl.constexpr, BLOCK: tl.constexpr, IS_EARLY: tl.constexpr
):
    wait_for_kernel_before(IS_EARLY)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < width
    x = tl.load(x_ptr + row * width + at, mask, other=0.0).to(tl.float32)
    store_activations(x, row, at, width, out_ptr, scale_ptr, padded, FORM)


@triton.jit
def gate_rows(
    gate_up_ptr,  # bfloat16 [T, 2 ffn]
    token_scale_ptr,
    row_scale_ptr,
    bias_ptr,
    out_ptr,  # [T, ffn] in the form, written
    scale_ptr,  # float32 [T], written
    padded,
    ffn,
    SPLITS: tl.constexpr,
    IS_SILU: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    wait_for_kernel_before(IS_EARLY)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < ffn
    width = 2 * ffn
    gate = load_product(
        gate_up_ptr,
        token_scale_ptr,
        row_scale_ptr,
        bias_ptr,
        row,
        at,
        mask,
        width,
        SPLITS,
        HAS_SCALES,
        HAS_BIAS,
    )
    up = load_product(
        gate_up_ptr,
        token_scale_ptr,
        row_scale_ptr,
        bias_ptr,
        row,
        at + ffn,
        mask,
        width,
        SPLITS,
        HAS_SCALES,
        HAS_BIAS,
    )
    # gelu in its tanh form is x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)).
    inner = gate if IS_SILU else 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    store_activations(gate * tl.sigmoid(inner) * up, row, at, ffn, out_ptr, scale_ptr, padded, FORM)


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
    k_cache_ptr,  # bfloat16 [blocks, kv_heads, 16, dim], written
    v_cache_ptr,
    eps,
    table_stride,
    num_heads,
    num_kv_heads,
    SPLITS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
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
    angle = position.to(tl.int64) * HALF + half
    cos = tl.where(is_value, 1.0, tl.load(cos_ptr + angle))
    sin = tl.where(is_value, 0.0, tl.load(sin_ptr + angle))
    dtype = query_ptr.dtype.element_ty
    left, right = (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)
    to_query = query_ptr + token * num_heads * DIM + at
    tl.store(to_query, left, mask & is_query)
    tl.store(to_query + HALF, right, mask & is_query)
    row = tl.load(rows_ptr + token).to(tl.int64)
    if row >= 0:
        block = tl.load(table_ptr + row * table_stride + position // BLOCK_TOKENS).to(tl.int64)
        kv_head = tl.where(is_value, head - num_heads - num_kv_heads, head - num_heads)
        to_cache = ((block * num_kv_heads + kv_head) * BLOCK_TOKENS + position % BLOCK_TOKENS) * DIM + half
        tl.store(k_cache_ptr + to_cache, left, mask & is_key)
        tl.store(k_cache_ptr + to_cache + HALF, right, mask & is_key)
        tl.store(v_cache_ptr + to_cache, left, mask & is_value)
        tl.store(v_cache_ptr + to_cache + HALF, right, mask & is_value)


def quantize(x: Tensor, form: Form) -> Activations:
    """See `kernels.prefill.quantize`; x: bfloat16."""
    if form == "bf16":
        return Activations(x)
    num_tokens, width = x.shape
    out = outputs(num_tokens, width, form, x.device)
    block, warps = row_shape(width)
    quantize_rows[(num_tokens,)](
        x,
        out.values,
        out.scale,
        out.padded_tokens,
        width,
        FORMS[form],
        block,
        num_warps=warps,
        **early(x.device),
    )
    return out


def add(x: Tensor, out: Product, bias: Tensor | None, post_norm: Tensor | None, eps: float) -> None:
    """See `kernels.prefill.add`."""
    _normalize(x, None, eps, "bf16", Activations(x), out, bias, post_norm)


def normalize(
    x: Tensor,
    norm: Tensor,
    eps: float,
    form: Form,
    out: Product | None = None,
    bias: Tensor | None = None,
    post_norm: Tensor | None = None,
) -> Activations:
    """See `kernels.prefill.normalize`."""
    normed = outputs(len(x), x.shape[1], form, x.device)
    _normalize(x, norm, eps, form, normed, out, bias, post_norm)
    return normed


def gate(gate_up: Product, bias: Tensor | None, activation: str, form: Form) -> Activations:
    """See `kernels.prefill.gate`."""
    num_tokens, width = gate_up.values.shape[-2:]
    out = outputs(num_tokens, width // 2, form, gate_up.values.device)
    block, warps = row_shape(width // 2)
    gate_rows[(num_tokens,)](
        *_operands(gate_up, bias),
        out.values,
        out.scale,
        out.padded_tokens,
        width // 2,
        gate_up.num_splits,
        activation == "silu",
        gate_up.row_scale is not None,
        bias is not None,
        FORMS[form],
        block,
        num_warps=warps,
        **early(out.values.device),
    )
    return out


def rope_and_append(
    qkv: Product, w: AttentionWeights, caches: tuple[Tensor, Tensor], tokens: Tokens
) -> Tensor:
    """See `kernels.prefill.rope_and_append`."""
    num_tokens = qkv.values.shape[-2]
    query = torch.empty(num_tokens, w.num_heads, w.head_dim, dtype=torch.bfloat16, device=qkv.values.device)
    rope_append[(num_tokens, triton.cdiv(w.num_heads + 2 * w.num_kv_heads, _HEADS))](
        *_operands(qkv, w.qkv_bias),
        w.q_norm,
        w.k_norm,
        w.cos,
        w.sin,
        tokens.positions,
        tokens.rows,
        tokens.block_table,
        query,
        *caches,
        w.eps,
        tokens.block_table.stride(0),
        w.num_heads,
        w.num_kv_heads,
        qkv.num_splits,
        w.head_dim,
        BLOCK_TOKENS,
        _HEADS,
        qkv.row_scale is not None,
        w.qkv_bias is not None,
        w.q_norm is not None,
        w.k_norm is not None,
        num_warps=4,
        **early(query.device),
    )
    return query


def _normalize(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    form: Form,
    normed: Activations,
    out: Product | None,
    bias: Tensor | None,
    post_norm: Tensor | None,
) -> None:
    block, warps = row_shape(x.shape[1])
    normalize_rows[(len(x),)](
        x,
        *((None,) * 4 if out is None else _operands(out, bias)),
        post_norm,
        norm,
        normed.values,
        normed.scale,
        normed.padded_tokens,
        eps,
        x.shape[1],
        1 if out is None else out.num_splits,
        out is not None,
        out is not None and out.row_scale is not None,
        bias is not None,
        post_norm is not None,
        norm is not None,
        FORMS[form],
        block,
        num_warps=warps,
        **early(x.device),
    )


def _operands(product: Product, bias: Tensor | None) -> tuple[Tensor | None, ...]:
    return product.values, product.token_scale, product.row_scale, bias
