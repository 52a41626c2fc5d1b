"""Packed matrices as scales, codes and whole zero points: what compressed-tensors can say of them, exactly.

Nothing is rounded. Codes may become wider and groups smaller, which changes no value: what runs as one matrix
(q, k, v; gate, up) must there have one scheme.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from engine.checkpoint.integer_matrix import IntegerMatrix
from kernels.formats import IntegerWeight, PackedWeight, unpack

NARROW, WIDE = 4, 8
"""Bits that vLLM's kernels read."""


def is_symmetric(matrix: IntegerMatrix) -> bool:
    return bool((matrix.zero == 1 << (matrix.bits - 1)).all())


def whole_zero_points(weight: PackedWeight) -> IntegerMatrix | None:
    """The matrix in 4 or 8 bits, zero points in the middle or, in 4 bits, any whole ones; else None."""
    stored = unpack(weight)
    found = _from_affine(stored) if weight.format.kind == "affine" else _from_row_scaled(stored)
    if found is None:
        return None
    matrix = with_bits(found, NARROW if found.bits <= NARROW else WIDE)
    return matrix if matrix.bits == NARROW or is_symmetric(matrix) else None


def eight_bits_with_zero_points(weight: PackedWeight) -> IntegerMatrix | None:
    """A `zero` matrix in 8 bits: its zero points are steps of those. None for other kinds."""
    stored = unpack(weight)
    if weight.format.kind != "zero":
        return None
    assert stored.offset is not None
    step = 8 - weight.format.bits
    scale = _row_scaled(stored) / (1 << step)
    return _matrix(stored, 8, stored.codes << step, scale, stored.offset.to(torch.int16))


def unify(matrices: Sequence[IntegerMatrix]) -> list[IntegerMatrix]:
    """The same values in one width and one group size, for modules that run as one."""
    bits = max(m.bits for m in matrices)
    k = matrices[0].codes.shape[1]
    # A scale for every `size` columns exactly: all groups are cut alike, the last one is not shorter.
    size = math.gcd(k, *(m.group_size for m in matrices))
    return [with_group_size(with_bits(m, bits), size) for m in matrices]


def with_bits(matrix: IntegerMatrix, bits: int) -> IntegerMatrix:
    """Codes of at least as many bits, the middle where it belongs."""
    shift = (1 << (bits - 1)) - (1 << (matrix.bits - 1))
    return replace(matrix, bits=bits, codes=matrix.codes + shift, zero=matrix.zero + shift)


def with_group_size(matrix: IntegerMatrix, size: int) -> IntegerMatrix:
    """Parameters repeated for smaller groups; `size` divides both the groups and K."""
    k = matrix.codes.shape[1]
    repeat = matrix.group_size // size

    def spread(values: Tensor) -> Tensor:
        return values.repeat_interleave(repeat, dim=1)[:, : k // size]

    return replace(matrix, group_size=size, scale=spread(matrix.scale), zero=spread(matrix.zero))


def _from_row_scaled(stored: IntegerWeight) -> IntegerMatrix | None:
    bits = stored.format.bits
    if stored.offset is None:
        zero = torch.full_like(stored.scale, 1 << (bits - 1), dtype=torch.int16)
        return _matrix(stored, bits, stored.codes, _row_scaled(stored), zero)
    if bool((stored.offset & ((1 << (8 - bits)) - 1)).any()):
        return None  # steps of a fraction of a code
    return _matrix(
        stored, bits, stored.codes, _row_scaled(stored), (stored.offset >> (8 - bits)).to(torch.int16)
    )


def _from_affine(stored: IntegerWeight) -> IntegerMatrix | None:
    """Scale * (u - zero) where -offset / scale is whole: most of what came from such a format."""
    assert stored.offset is not None
    scale, bits, top = stored.scale.double(), stored.format.bits, (1 << stored.format.bits) - 1
    if bool((scale == 0).any()):
        return None
    zero = -stored.offset.double() / scale
    mirrored = scale < 0  # see integer_matrix
    flip = mirrored.repeat_interleave(stored.format.group_size or stored.codes.shape[1], dim=1)
    flip = flip[:, : stored.codes.shape[1]]
    codes = torch.where(flip, top - stored.codes, stored.codes)
    zero = torch.where(mirrored, top - zero, zero)
    if not bool((zero == zero.round()).all()) or float(zero.min()) < 0 or float(zero.max()) > top:
        return None
    return _matrix(stored, bits, codes, scale.abs().float(), zero.to(torch.int16))


def _row_scaled(stored: IntegerWeight) -> Tensor:
    """float32 [N, groups]: 19 bits at most, so that nothing is rounded."""
    assert stored.row_scale is not None
    return stored.scale.float() * (stored.row_scale.float() / 256)[:, None]


def _matrix(stored: IntegerWeight, bits: int, codes: Tensor, scale: Tensor, zero: Tensor) -> IntegerMatrix:
    group_size = stored.format.group_size or stored.codes.shape[1]
    return IntegerMatrix(bits, group_size, codes, scale, zero)
