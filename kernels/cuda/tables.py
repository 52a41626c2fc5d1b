"""Embedding rows and dequantized matrices from weights in fragment order."""

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.cuda.build import check, library
from kernels.cuda.packing import UNIT_COLUMNS, DeviceMatrix, DeviceWeight
from kernels.cuda.program import _Segment, segment_of

_MAX_PIECES = 3
_ZERO_UNIT = 256.0  # |scale * (u * 2^(8 - bits) - zero)| < 2^16: 254 at most, in this unit


class Pieces(ctypes.Structure):
    """Up to three matrices of one format and K: src/values.cuh."""

    _fields_ = (
        ("segments", _Segment * _MAX_PIECES),
        ("first_rows", ctypes.c_int32 * _MAX_PIECES),
        ("count", ctypes.c_int32),
    )


def embed(
    token_ids: Tensor, table: DeviceWeight, out: Tensor, scale: float = 1.0, advance: Tensor | None = None
) -> None:
    """out [T, k] float32 = scale * rows of the table, for token_ids int32 [T].

    `advance`: int32 positions, each not negative one of which moves on by one (a decode step's start).
    """
    (matrix,) = table.parts
    segment, pointer = segment_of(matrix), ctypes.c_void_p
    check(
        library().peregrine_embed(
            ctypes.byref(segment),
            matrix.units,
            matrix.k,
            pointer(token_ids.data_ptr()),
            ctypes.c_float(scale),
            pointer(out.data_ptr()),
            pointer(None if advance is None else advance.data_ptr()),
            int(advance is not None),
            out.shape[0],
            stream(),
        )
    )


def dequantize(
    weight: DeviceWeight, dtype: torch.dtype = torch.bfloat16, out: Tensor | None = None
) -> Tensor:
    """[n, k], bfloat16 or float32; into the first n * k elements of `out` if that is given."""
    n, k = weight.n, weight.k
    if out is None:
        out = torch.empty(n * k, dtype=dtype, device=weight.parts[0].data.device)
    matrix = out[: n * k].view(n, k)
    _launch(weight, matrix, None, (1.0,) * len(weight.parts))
    return matrix


def dequantize_fp8(
    weight: DeviceWeight, units: tuple[float, ...], out: Tensor, row_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """e4m3 values [n, k] and float32 scales [n]: W = scale * value, rounded to nearest.

    They lie in the first elements of `out` (e4m3) and `row_scale` (float32). units: `fp8_units(weight)`. A
    value has 15 binades before it loses bits, so a unit that lets nothing overflow is all that a row needs.
    """
    n, k = weight.n, weight.k
    matrix, scale = out[: n * k].view(n, k), row_scale[:n]
    _launch(weight, matrix, scale, units)
    return matrix, scale


def fp8_units(weight: DeviceWeight) -> tuple[float, ...]:
    """For each part, a power of two such that |W| / (row_factor * unit) is within e4m3's 448."""
    return tuple(_affine_unit(p) if p.format.kind == "affine" else _ZERO_UNIT for p in weight.parts)


def _affine_unit(m: DeviceMatrix) -> float:
    codes = 16 * UNIT_COLUMNS * m.format.bits // 8
    params = m.data[..., codes:].contiguous().view(torch.float16).view(-1, 2).float()
    scale, offset = params.unbind(-1)
    ends = torch.maximum(offset.abs(), (offset + ((1 << m.format.bits) - 1) * scale).abs())
    _, exponent = torch.frexp(ends.max() / 448)  # of a mantissa below 1
    return float(2.0 ** int(exponent))


def groups(weight: DeviceWeight, units: tuple[float, ...]) -> Iterator[tuple[Pieces, float]]:
    """Neighbouring parts of one format and unit, which one kernel takes."""
    first, at, parts = 0, 0, weight.parts
    while at < len(parts):
        pieces = Pieces()
        for part, unit in zip(parts[at : at + _MAX_PIECES], units[at : at + _MAX_PIECES], strict=True):
            if pieces.count and (part.format, unit) != (parts[at].format, units[at]):
                break
            pieces.segments[pieces.count] = segment_of(part)
            pieces.first_rows[pieces.count] = first
            pieces.count += 1
            first += part.n
        yield pieces, units[at]
        at += pieces.count


def _launch(weight: DeviceWeight, out: Tensor, row_scale: Tensor | None, units: tuple[float, ...]) -> None:
    for pieces, unit in groups(weight, units):
        check(
            library().peregrine_dequantize(
                ctypes.byref(pieces),
                weight.parts[0].units,
                weight.k,
                8 * out.element_size(),
                ctypes.c_void_p(out.data_ptr()),
                ctypes.c_void_p(None if row_scale is None else row_scale.data_ptr()),
                ctypes.c_float(unit),
                stream(),
            )
        )


def stream() -> ctypes.c_void_p:
    """The current stream."""
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
