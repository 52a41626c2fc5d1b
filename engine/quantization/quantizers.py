"""From a float matrix to integers: scales by search, codes by rounding or by error feedback.

`choose_scales` looks for each group's scale and zero point that minimise the squared error, each column
weighted by the second moment of its input (the idea of llama.cpp's importance matrix). `gptq` then rounds
column by column and moves each column's error onto the columns not yet rounded (GPTQ, Frantar et al. 2022),
columns of large curvature first, on scales that stay fixed.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.formats import Format, IntegerWeight

_SHRINKS = torch.cat([torch.linspace(0.4, 1.0, 25), torch.tensor([1.05])])
_DAMPING = 0.01
_BLOCK = 32
_ROWS = 4096  # searched at a time: temporaries stay small


@dataclass(slots=True)
class Grid:
    """Where a matrix's values may lie: stored parameters, and what they mean for each column.

    column_scale, column_offset: float32 [N, K], W = column_scale * u + column_offset.
    """

    weight: IntegerWeight  # codes still zero
    column_scale: Tensor
    column_offset: Tensor

    def with_codes(self, codes: Tensor) -> IntegerWeight:
        return replace(self.weight, codes=codes)


def choose_scales(weight: Tensor, importance: Tensor, f: Format) -> Grid:
    """Scales of `weight` [N, K] under column weights `importance` [K], both float32."""
    n, k = weight.shape
    parts = [_search_scales(rows, importance, f) for rows in weight.split(_ROWS)]
    scale, zero = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return _stored(scale, zero, f, n, k)


def _search_scales(weight: Tensor, importance: Tensor, f: Format) -> tuple[Tensor, Tensor]:
    """Best scale and zero point, float32 [N, groups] each."""
    n, k = weight.shape
    width = f.group_size or k
    groups = f.num_groups(k)
    missing = groups * width - k
    w = torch.nn.functional.pad(weight, (0, missing)).view(n, groups, width)
    h = torch.nn.functional.pad(importance, (0, missing)).view(groups, width)
    top = float((1 << f.bits) - 1)
    if f.kind == "sym":
        half = float(1 << (f.bits - 1))
        low = -w.abs().amax(-1)
        full = 2 * -low / (2 * half - 1)
    else:
        low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
        full = (high - low) / top
    best_error = torch.full((n, groups), float("inf"))
    best_scale, best_zero = full.clone(), torch.zeros_like(full)
    step = 2.0 ** (f.bits - 8)  # resolution of stored zero points
    for shrink in _SHRINKS.tolist():
        scale = (full * shrink).clamp(min=1e-12)
        inverse = 1 / scale
        if f.kind == "sym":
            zero = torch.full_like(scale, half)
        else:
            zero = ((-low * shrink * inverse / step).round() * step).clamp(0, 255 * step)
        q = (w * inverse[..., None] + zero[..., None]).round_().clamp_(0, top).sub_(zero[..., None])
        # The scale that fits these codes best, in closed form.
        fitted = ((w * q) * h).sum(-1) / ((q * q) * h).sum(-1).clamp(min=1e-20)
        fitted = torch.where(fitted > 0, fitted, scale)
        error = ((w - q * fitted[..., None]).square_() * h).sum(-1)
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        best_scale = torch.where(is_better, fitted, best_scale)
        best_zero = torch.where(is_better, zero, best_zero)
    return best_scale, best_zero


def plain_scales(weight: Tensor, f: Format) -> Grid:
    """Scales that span each group's smallest to largest value: what the others are compared with."""
    n, k = weight.shape
    width, groups = f.group_size or k, f.num_groups(k)
    w = torch.nn.functional.pad(weight, (0, groups * width - k)).view(n, groups, width)
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    scale = ((high - low) / ((1 << f.bits) - 1)).clamp(min=1e-12)
    return _stored(scale, (-low / scale).round(), f, n, k)


def _stored(scale: Tensor, zero: Tensor, f: Format, n: int, k: int) -> Grid:
    """Round scales [N, groups] and zero points to what the format stores."""
    codes = torch.zeros(n, k, dtype=torch.uint8)
    if f.kind == "affine":
        half = scale.half()
        weight = IntegerWeight(f, codes, half, (-zero * half.float()).half())
    else:
        row_scale = (scale.amax(-1) * (256 / 255)).clamp(min=2.0**-24).half()
        byte = (scale / (row_scale.float() / 256)[:, None]).round().clamp(1, 255).to(torch.uint8)
        zeros = None if f.kind == "sym" else (zero * 2.0 ** (8 - f.bits)).round().clamp(0, 255)
        weight = IntegerWeight(f, codes, byte, None if zeros is None else zeros.to(torch.uint8), row_scale)
    return Grid(weight, *weight.affine())


def round_to_nearest(weight: Tensor, grid: Grid) -> IntegerWeight:
    """The nearest code of every value."""
    top = (1 << grid.weight.format.bits) - 1
    codes = ((weight - grid.column_offset) / grid.column_scale).round().clamp(0, top)
    return grid.with_codes(codes.to(torch.uint8))


def gptq(weight: Tensor, hessian: Tensor, grids: list[Grid]) -> list[IntegerWeight]:
    """Error feedback for several grids of one or more matrices that read the same input.

    weight: float32 [N, K], the rows of all grids' matrices one after the other. hessian: float32 [K, K],
    second moment of the input. Returns the codes of each grid.
    """
    n, k = weight.shape
    order = torch.argsort(hessian.diagonal(), descending=True)
    factor = _inverse_factor(hessian[order][:, order])
    w = weight[:, order].clone()
    scale = torch.cat([g.column_scale for g in grids])[:, order]
    offset = torch.cat([g.column_offset for g in grids])[:, order]
    top = torch.cat([torch.full((len(g.column_scale),), (1 << g.weight.format.bits) - 1.0) for g in grids])
    codes = torch.empty(n, k, dtype=torch.uint8)
    inverse_scale = scale.reciprocal()
    for begin in range(0, k, _BLOCK):
        end = min(begin + _BLOCK, k)
        # Columns as rows: every step reads and writes contiguous memory.
        block, s, inv, o = (t[:, begin:end].T.contiguous() for t in (w, scale, inverse_scale, offset))
        errors = torch.empty_like(block)
        for i in range(end - begin):
            q = ((block[i] - o[i]) * inv[i]).round_().clamp_(min=0).minimum(top)
            codes[:, begin + i] = q.to(torch.uint8)
            errors[i] = (block[i] - q.mul_(s[i]).add_(o[i])) / factor[begin + i, begin + i]
            if i + 1 < end - begin:
                block[i + 1 :].addr_(factor[begin + i, begin + i + 1 : end], errors[i], alpha=-1)
        w[:, end:].addmm_(errors.T, factor[begin:end, end:], alpha=-1)
    original = torch.empty_like(codes)
    original[:, order] = codes
    rows = [len(g.column_scale) for g in grids]
    return [g.with_codes(c.contiguous()) for g, c in zip(grids, original.split(rows), strict=True)]


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the damped Hessian's inverse, float32 [K, K]."""
    h = hessian.double()
    mean = h.diagonal().mean().clamp(min=1e-30)
    identity = torch.eye(len(h), dtype=torch.float64)
    damping = _DAMPING
    while True:
        try:
            lower = torch.linalg.cholesky(h + damping * mean * identity)
            inverse = torch.cholesky_inverse(lower)
            return torch.linalg.cholesky(inverse, upper=True).float()
        except torch.linalg.LinAlgError:
            damping *= 10  # ends: at some point the diagonal dominates
