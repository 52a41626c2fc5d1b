"""Rows of products read, rows of activations written: what the kernels between the products share."""
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl

from kernels.prefill import FP8, FP8_MAX, TILED_MAX, UNIT_COLUMNS, Activations, Form, empty_tiled

_UNIT = tl.constexpr(UNIT_COLUMNS)
_FP8_MAX, _TILED_MAX = tl.constexpr(FP8_MAX), tl.constexpr(TILED_MAX)
_VALUES_PER_WARP = 512  # of a row in registers: 16 floats a lane
_FEW_ROWS = 64
FORMS = {"bf16": 0, "fp8": 1, "tiled": 2, "tiled_fp8": 3}


@triton.jit
def load_product(
    ptr,
    token_scale_ptr,
    row_scale_ptr,
    bias_ptr,
    row,
    at,
    mask,
    width,
    SPLITS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Columns `at` of a row of a product, float32. Axis 0 of the grid is the rows."""
    value = tl.load(ptr + row * width + at, mask, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        value += tl.load(ptr + (split * tl.num_programs(0) + row) * width + at, mask, other=0.0)
    if HAS_SCALES:
        value *= tl.load(token_scale_ptr + row) * tl.load(row_scale_ptr + at, mask, other=0.0)
    if HAS_BIAS:
        value += tl.load(bias_ptr + at, mask, other=0.0)
    return value


@triton.jit
def tiled_place(row, at, padded):
    """Of column `at` in the tiled form (`kernels.prefill.tiled`)."""
    place = (at & -32) | ((at >> 2 & 1) << 4) | ((at & 1) << 3) | ((at >> 3 & 3) << 1) | (at >> 1 & 1)
    piece = (place >> 3 & 7) ^ (row & 7)
    return ((place >> 6) * padded + row) * 64 + piece * 8 + (place & 7)


@triton.jit
def tiled_fp8_place(row, at, padded):
    """The same for e4m3."""
    place = (at & -32) | ((at >> 2 & 1) << 4) | ((at >> 3 & 3) << 2) | ((at & 1) << 1) | (at >> 1 & 1)
    piece = (place >> 4 & 7) ^ (row & 7)
    return ((place >> 7) * padded + row) * 128 + piece * 16 + (place & 15)


@triton.jit
def store_activations(value, row, at, width, out_ptr, scale_ptr, padded, FORM: tl.constexpr):
    """A whole row of a matrix's input; value is zero from `width` on. FORM: see FORMS."""
    largest = 0.0
    if FORM > 0:
        largest = tl.max(tl.abs(value), axis=0)
    store_known(value, largest, row, at, width, out_ptr, scale_ptr, padded, FORM)


@triton.jit
def store_known(value, largest, row, at, width, out_ptr, scale_ptr, padded, FORM: tl.constexpr):
    """The same, where the largest absolute value is known."""
    if FORM > 0:
        LIMIT: tl.constexpr = _TILED_MAX if FORM == 2 else _FP8_MAX
        largest = tl.maximum(largest, 1e-20)
        tl.store(scale_ptr + row, largest / LIMIT)
        value *= LIMIT / largest
    if FORM >= 2:
        to = tiled_place(row, at, padded) if FORM == 2 else tiled_fp8_place(row, at, padded)
        mask = at < (width + _UNIT - 1) // _UNIT * _UNIT
    else:
        to = row * width + at
        mask = at < width
    tl.store(out_ptr + to, value.to(out_ptr.dtype.element_ty), mask)


def outputs(num_tokens: int, width: int, form: Form, device: torch.device) -> Activations:
    if form == "bf16":
        return Activations(torch.empty(num_tokens, width, dtype=torch.bfloat16, device=device))
    scale = torch.empty(num_tokens, device=device)
    if form == "fp8":
        return Activations(torch.empty(num_tokens, width, dtype=FP8, device=device), scale)
    dtype = torch.float16 if form == "tiled" else FP8
    return Activations(empty_tiled(num_tokens, width, device, dtype), scale)


def row_shape(width: int, num_rows: int) -> tuple[int, int]:
    """Columns and warps of a program that holds a row.

    With few rows a program takes more warps, so that more of a row is asked for at once.
    """
    block = max(UNIT_COLUMNS, triton.next_power_of_2(width))
    values = _VALUES_PER_WARP if num_rows > _FEW_ROWS else _VALUES_PER_WARP // 4
    return block, max(4, min(32, block // values))
