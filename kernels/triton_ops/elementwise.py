"""Glue between the matrices: RMSNorm, the gated activation, the residual sum."""
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def rms_norm_rows(x_ptr, weight_ptr, out_ptr, eps, hidden, BLOCK: tl.constexpr):
    """out [T, hidden] = x / rms(x) * weight, float32; a program a row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < hidden
    x = tl.load(x_ptr + row * hidden + at, mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / hidden + eps)
    weight = tl.load(weight_ptr + at, mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * hidden + at, x * scale * weight, mask)


@triton.jit
def add_rows(
    x_ptr,  # [T, hidden], changed in place
    out_ptr,  # float32 [T, hidden]
    post_norm_ptr,  # float32 [hidden]
    eps,
    hidden,
    HAS_POST_NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < hidden
    out = tl.load(out_ptr + row * hidden + at, mask, other=0.0)
    if HAS_POST_NORM:
        scale = tl.rsqrt(tl.sum(out * out, axis=0) / hidden + eps)
        out *= scale * tl.load(post_norm_ptr + at, mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * hidden + at, mask, other=0.0).to(tl.float32)
    tl.store(x_ptr + row * hidden + at, (x + out).to(x_ptr.dtype.element_ty), mask)


@triton.jit
def gate_rows(gate_up_ptr, out_ptr, ffn, IS_SILU: tl.constexpr, BLOCK: tl.constexpr):
    """out [T, ffn] = act(gate) * up from gate_up [T, 2 ffn], float32."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < ffn
    gate = tl.load(gate_up_ptr + row * 2 * ffn + at, mask, other=0.0)
    up = tl.load(gate_up_ptr + row * 2 * ffn + ffn + at, mask, other=0.0)
    # gelu in its tanh form is x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)).
    inner = gate if IS_SILU else 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    tl.store(out_ptr + row * ffn + at, gate * tl.sigmoid(inner) * up, mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (Zhang and Sennrich 2019) of x [T, hidden], float32."""
    num_rows, hidden = x.shape
    out = torch.empty(num_rows, hidden, device=x.device)
    rms_norm_rows[(num_rows,)](x.contiguous(), weight, out, eps, hidden, triton.next_power_of_2(hidden))
    return out


def add_projection(x: Tensor, out: Tensor, post_norm: Tensor | None, eps: float) -> None:
    """x [T, hidden] += out, through RMSNorm where the block has a norm behind it, in place."""
    if not x.is_contiguous():
        raise ValueError(f"the residual stream must be contiguous, got strides {x.stride()}")
    num_rows, hidden = x.shape
    add_rows[(num_rows,)](
        x,
        out,
        out if post_norm is None else post_norm,
        eps,
        hidden,
        post_norm is not None,
        triton.next_power_of_2(hidden),
    )


def gated_activation(gate_up: Tensor, activation: str) -> Tensor:
    """float32 [T, ffn]: silu, or gelu in its tanh form, of the gate half times the up half of [T, 2 ffn]."""
    num_rows, ffn = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_rows, ffn, device=gate_up.device)
    gate_rows[(num_rows, triton.cdiv(ffn, _BLOCK))](gate_up, out, ffn, activation == "silu", _BLOCK)
    return out
