"""How large values can become that a matrix makes of normalized inputs, whatever the inputs are."""

from dataclasses import replace

import torch
from torch import Tensor

from kernels.cuda.packing import TILE_ROWS, DeviceMatrix, DeviceWeight
from kernels.cuda.tables import dequantize

_ROUNDING = 1.02  # of weights, inputs and results
_ROWS = 1024  # unpacked at a time


def largest_output(matrix: DeviceMatrix, norm: Tensor, bias: Tensor | None = None) -> float:
    """No |value| of matrix @ RMSNorm(x) + bias is larger.

    By Cauchy and Schwarz: RMSNorm's output, before its weights `norm` (float32 [K]), is at most sqrt(K) long.
    """
    squares = norm.float().square()
    rows = []
    for first in range(0, matrix.n, _ROWS):
        num_rows = min(_ROWS, matrix.n - first)
        tiles = slice(first // TILE_ROWS, -(-(first + num_rows) // TILE_ROWS))
        factors = matrix.row_factor[first : tiles.stop * TILE_ROWS]
        part = replace(matrix, n=num_rows, data=matrix.data[tiles], row_factor=factors)
        rows.append(dequantize(DeviceWeight((part,)), torch.float32).square() @ squares)
    limits = (matrix.k * torch.cat(rows)).sqrt()
    if bias is not None:
        limits = limits + bias.abs()
    return _ROUNDING * float(limits.max())
