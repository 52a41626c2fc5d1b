"""How large values can become that matrices make of normalized inputs, whatever the inputs are."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from kernels.cuda.packing import TILE_ROWS, DeviceMatrix, dequantize

_ROUNDING = 1.04  # of weights, inputs and results
_ROWS = 1024  # unpacked at a time


def largest_output(matrix: DeviceMatrix, norm: Tensor, bias: Tensor | None = None) -> float:
    """No |value| of matrix @ RMSNorm(x) + bias is larger.

    By Cauchy and Schwarz: RMSNorm's output, before its weights `norm` (float32 [K]), is at most sqrt(K) long.
    """
    limits = matrix.k**0.5 * torch.cat([(rows * norm).norm(dim=1) for rows in _rows(matrix)])
    if bias is not None:
        limits = limits + bias.abs()
    return _ROUNDING * float(limits.max())


def largest_gated(gate: DeviceMatrix, up: DeviceMatrix, norm: Tensor) -> float:
    """No |value| of act(gate @ y) * (up @ y), y = RMSNorm(x), is larger; act(v) is no larger than v.

    (g y)(u y) is a quadratic form in y; half of |g| |u| + |g u| is the larger of its two eigenvalues.
    """
    limits = []
    for gate_rows, up_rows in zip(_rows(gate), _rows(up), strict=True):
        g, u = gate_rows * norm, up_rows * norm
        limits.append(g.norm(dim=1) * u.norm(dim=1) + (g * u).sum(dim=1).abs())
    return _ROUNDING * gate.k * float(torch.cat(limits).max()) / 2


def _rows(matrix: DeviceMatrix) -> Iterator[Tensor]:
    """float32 [rows, K], a part of the matrix at a time."""
    for first in range(0, matrix.n, _ROWS):
        num_rows = min(_ROWS, matrix.n - first)
        end = -(-(first + num_rows) // TILE_ROWS)
        data = matrix.data[first // TILE_ROWS : end]
        yield dequantize(
            replace(matrix, n=num_rows, data=data, row_factor=matrix.row_factor[first : end * TILE_ROWS])
        )
