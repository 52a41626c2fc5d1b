"""Between the products of a prompt chunk: the functions of `kernels.prefill`, each one launch.

Sums and norms are float32. A row of activations is read once: a program holds all of it.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from torch import Tensor

from kernels.prefill import Activations, Form, Product
from kernels.triton_ops.decode_attention import attend_next
from kernels.triton_ops.early_launch import early, wait_for_kernel_before
from kernels.triton_ops.prefill_append import rope_and_append
from kernels.triton_ops.prefill_attention import attend
from kernels.triton_ops.rows import (
    FORMS,
    load_product,
    outputs,
    row_shape,
    store_activations,
    store_known,
)

__all__ = ["add", "attend", "attend_next", "gate", "normalize", "quantize", "rope_and_append"]


@triton.jit
def add_and_maximum(sum_a, largest_a, sum_b, largest_b):
    return sum_a + sum_b, tl.maximum(largest_a, largest_b)


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
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < hidden
    if HAS_NORM:  # comes from memory while the kernel before ends, which does not write it
        weight = tl.load(norm_ptr + at, mask, other=0.0)
    wait_for_kernel_before(IS_EARLY)
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
        weighted = x * weight
        squares, largest = tl.reduce((x * x, tl.abs(weighted)), 0, add_and_maximum)
        scale = tl.rsqrt(squares / hidden + eps)
        store_known(weighted * scale, largest * scale, row, at, hidden, normed_ptr, scale_ptr, padded, FORM)


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


def quantize(x: Tensor, form: Form) -> Activations:
    """See `kernels.prefill.quantize`; x: bfloat16."""
    if form == "bf16":
        return Activations(x)
    num_tokens, width = x.shape
    out = outputs(num_tokens, width, form, x.device)
    block, warps = row_shape(width, num_tokens)
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
    block, warps = row_shape(width // 2, num_tokens)
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
    block, warps = row_shape(x.shape[1], len(x))
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
