"""Matrices times tokens, and embedding rows, from the packed bytes of `kernels.formats`.

One generic kernel for every width and kind dequantizes as it goes. A code's byte is found from its row and
column by the layout's own formula; the four columns of a quad are neighbouring bytes. The products run on the
tensor cores as three TF32 passes, which keep float32's accuracy, and are added up in the order of K whatever
the number of tokens.
"""
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from kernels.formats import PLANES, PackedWeight, StackedWeight
from kernels.types import Weight

_KINDS = {"affine": 0, "zero": 1, "sym": 2}
_BLOCK_N = 16
_BLOCK_K = 128


@triton.jit
def _plane_codes(data_ptr, plane, lane, column, mask, WIDTH: tl.constexpr):
    """The WIDTH bits of a tile's plane, at offset `plane`, of column (0 to 31) and lane (0 to 15), int32."""
    quad = column // 4
    byte = plane + (quad // (8 // WIDTH)) * 64 + lane * 4 + column % 4
    # The compiler does not see that a quad's bytes are one aligned word, and would load them one by one.
    byte = tl.max_contiguous(tl.multiple_of(byte, (1, 4)), (1, 4))
    bits = tl.load(data_ptr + byte, mask, other=0).to(tl.int32)
    return (bits >> (quad % (8 // WIDTH) * WIDTH)) & ((1 << WIDTH) - 1)


@triton.jit
def dequantize_tile(
    data_ptr,  # uint8 [blocks, block_bytes]
    row,  # int [A, B], as column and mask; columns are neighbours along B, from a multiple of 4
    column,
    mask,
    k,
    block_bytes,
    group_size,
    BITS: tl.constexpr,
    LOW: tl.constexpr,
    KIND: tl.constexpr,
):
    """float32 W at row and column, but for the row scale of `zero` and `sym`. LOW: bits of the low plane.

    Where the mask is off, the value is finite.
    """
    block = (row // 16).to(tl.int64) * block_bytes
    lane = row % 16
    tile = block + (column // 32) * (64 * BITS)
    code = _plane_codes(data_ptr, tile, lane, column % 32, mask, LOW)
    if BITS > LOW:
        code |= _plane_codes(data_ptr, tile + 64 * LOW, lane, column % 32, mask, BITS - LOW) << LOW
    code = code.to(tl.float32)
    group = column // group_size
    param_ptr = data_ptr + block + k * (2 * BITS)
    if KIND == 0:
        half_ptr = param_ptr.to(tl.pointer_type(tl.float16)) + group * 32 + lane
        scale = tl.load(half_ptr, mask, other=0.0).to(tl.float32)
        value = scale * code + tl.load(half_ptr + 16, mask, other=0.0).to(tl.float32)
    else:
        byte_ptr = param_ptr + group * (16 * (3 - KIND)) + lane
        scale = tl.load(byte_ptr, mask, other=0).to(tl.float32)
        if KIND == 1:
            zero = tl.load(byte_ptr + 16, mask, other=0).to(tl.float32)
            value = scale * (code - zero / (1 << (8 - BITS)))
        else:
            value = scale * (code - (1 << (BITS - 1)))
    return value


@triton.jit
def row_scales(data_ptr, row, mask, block_bytes):
    """float32 factor of the rows of a `zero` or `sym` weight: the last 16 float16 of each block."""
    scale_ptr = data_ptr + (row // 16).to(tl.int64) * block_bytes + block_bytes - 32 + row % 16 * 2
    return tl.load(scale_ptr.to(tl.pointer_type(tl.float16)), mask, other=0.0).to(tl.float32) / 256.0


@triton.jit
def linear_packed(
    x_ptr,  # float32, bfloat16 or float16 [T, K], contiguous
    data_ptr,
    bias_ptr,  # float32 [N]
    out_ptr,  # float32 [T, out_stride], written at columns 0 to N
    num_tokens,
    n,
    k,
    out_stride,
    block_bytes,
    group_size,
    BITS: tl.constexpr,
    LOW: tl.constexpr,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row, is_token = row < n, token < num_tokens
    x_row_ptr = x_ptr + token.to(tl.int64)[:, None] * k
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, k, BLOCK_K):
        column = begin + tl.arange(0, BLOCK_K)
        is_column = column < k
        x = tl.load(x_row_ptr + column[None, :], is_token[:, None] & is_column[None, :], other=0.0)
        w = dequantize_tile(
            data_ptr,
            tl.broadcast_to(row[:, None], (BLOCK_N, BLOCK_K)),
            tl.broadcast_to(column[None, :], (BLOCK_N, BLOCK_K)),
            is_row[:, None] & is_column[None, :],
            k,
            block_bytes,
            group_size,
            BITS,
            LOW,
            KIND,
        )
        acc = tl.dot(x.to(tl.float32), tl.trans(w), acc, input_precision="tf32x3")
    if KIND > 0:
        acc *= row_scales(data_ptr, row, is_row, block_bytes)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + row, is_row, other=0.0).to(tl.float32)[None, :]
    out = token.to(tl.int64)[:, None] * out_stride + row[None, :]
    tl.store(out_ptr + out, acc, is_token[:, None] & is_row[None, :])


@triton.jit
def embed_packed(
    ids_ptr,  # int64 or int32 [T]
    data_ptr,
    out_ptr,  # float32 [T, K], written
    k,
    block_bytes,
    group_size,
    BITS: tl.constexpr,
    LOW: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(ids_ptr + token).to(tl.int32)
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    mask = column < k
    rows = tl.full((1, BLOCK_K), 0, tl.int32) + row
    values = dequantize_tile(data_ptr, rows, column, mask, k, block_bytes, group_size, BITS, LOW, KIND)
    if KIND > 0:
        values *= row_scales(data_ptr, row, row >= 0, block_bytes)
    tl.store(out_ptr + token * k + column, values, mask)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x [T, K] times weight [N, K] transposed, float32 [T, N]."""
    if isinstance(weight, Tensor):
        out = functional.linear(x.to(weight.dtype), weight).float()
        return out if bias is None else out + bias
    num_tokens, k = x.shape
    if k != weight.k:
        raise ValueError(f"x has {k} columns, the weight {weight.k}")
    x = x.contiguous()
    out = torch.empty(num_tokens, weight.n, device=x.device)
    block_m = 16 if num_tokens <= 16 else 32
    first = 0
    for part in weight.parts if isinstance(weight, StackedWeight) else (weight,):
        part_out = out[:, first:]
        linear_packed[(triton.cdiv(part.n, _BLOCK_N), triton.cdiv(num_tokens, block_m))](
            x,
            part.data,
            part.data if bias is None else bias[first:],
            part_out,
            num_tokens,
            part.n,
            k,
            weight.n,
            *_layout(part),
            HAS_BIAS=bias is not None,
            BLOCK_M=block_m,
            BLOCK_N=_BLOCK_N,
            BLOCK_K=_BLOCK_K,
        )
        first += part.n
    return out


def embed(token_ids: Tensor, table: Weight) -> Tensor:
    """float32 rows [T, hidden] of the embedding table for token_ids [T]."""
    if isinstance(table, Tensor):
        return functional.embedding(token_ids, table).float()
    assert isinstance(table, PackedWeight), "an embedding table is one matrix"
    out = torch.empty(len(token_ids), table.k, device=token_ids.device)
    block_k = 512
    embed_packed[(len(token_ids), triton.cdiv(table.k, block_k))](
        token_ids.contiguous(), table.data, out, table.k, *_layout(table), BLOCK_K=block_k
    )
    return out


def _layout(weight: PackedWeight) -> tuple[int, int, int, int, int]:
    """block_bytes, group_size, BITS, LOW and KIND of the kernels."""
    f = weight.format
    return f.block_bytes(weight.k), f.group_size or weight.k, f.bits, PLANES[f.bits][0], _KINDS[f.kind]
