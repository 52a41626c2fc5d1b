"""Every format a tensor may get: its bytes, and the weights it would have."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from engine.quantization.quantizers import choose_scales, gptq
from kernels.formats import Format, IntegerWeight

DEFAULT_BITS = (2, 3, 4, 5, 6, 8)
_NAMES = {
    2: ("w2g64", "w2g32"),
    3: ("w3g128", "w3g64"),
    4: ("w4g128", "w4g64"),
    5: ("w5g128",),
    6: ("w6g128-sym",),
    8: ("w8row-sym",),
}
ALLOWED_BITS = tuple(_NAMES)


def candidate_formats(bits: Sequence[int], *, symmetric: bool = False) -> list[Format]:
    """Formats of these widths, from small to large; `symmetric`: without zero points."""
    formats = [Format.parse(name) for b in sorted(bits) for name in _NAMES[b]]
    return [replace(f, kind="sym") for f in formats] if symmetric else formats


def quantize_all(
    weights: Sequence[Tensor], hessian: Tensor, formats: Sequence[Sequence[Format]]
) -> list[list[IntegerWeight]]:
    """Error feedback for matrices [N, K] that read one input, each in each of its formats."""
    importance = hessian.diagonal()
    grids = [[choose_scales(w, importance, f) for f in own] for w, own in zip(weights, formats, strict=True)]
    rows = [w for w, own in zip(weights, formats, strict=True) for _ in own]
    flat = gptq(torch.cat(rows), hessian, [g for own in grids for g in own])
    results, at = [], 0
    for own in grids:
        results.append(flat[at : at + len(own)])
        at += len(own)
    return results
