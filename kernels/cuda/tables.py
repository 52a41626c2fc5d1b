"""Embedding rows and dequantized matrices from weights in fragment order."""

import ctypes

import torch
from torch import Tensor

from kernels.cuda.build import check, library
from kernels.cuda.packing import DEVICE_FORMATS, DeviceMatrix, DeviceWeight
from kernels.cuda.program import _Segment


def embed(
    token_ids: Tensor, table: DeviceWeight, out: Tensor, scale: float = 1.0, advance: Tensor | None = None
) -> None:
    """out [T, k] float32 = scale * rows of the table, for token_ids int32 [T].

    `advance`: int32 positions, each not negative one of which moves on by one (a decode step's start).
    """
    (matrix,) = table.parts
    segment, pointer = _segment(matrix), ctypes.c_void_p
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
            _stream(),
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
    first = 0
    for part in weight.parts:
        segment = _segment(part)
        check(
            library().peregrine_dequantize(
                ctypes.byref(segment),
                part.units,
                k,
                ctypes.c_void_p(matrix[first:].data_ptr()),
                int(matrix.dtype == torch.float32),
                _stream(),
            )
        )
        first += part.n
    return matrix


def _segment(m: DeviceMatrix) -> _Segment:
    fields = (m.n, m.num_tiles, m.format.unit_bytes, DEVICE_FORMATS.index(m.format))
    return _Segment(m.data.data_ptr(), m.row_factor.data_ptr(), None, *fields)


def _stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
