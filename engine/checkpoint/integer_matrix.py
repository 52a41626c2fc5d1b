"""Other tools' quantized matrices, and the packed formats that hold the same values.

Group-wise integer quantization stores W = scale * (u - zero) with a whole zero point of the codes' own width.
Three ways hold such a matrix exactly, tried in this order (`kernels.formats` has the kinds):

1. `affine` of the same width. Its offset, -scale * zero, must be a float16. Where it is not, the group is
   mirrored: -scale * ((top - u) - (top - zero)) has the same values, and often a zero point of fewer bits.
   Together this reaches every symmetric matrix, every one of 2 or 3 bits, and 4 bits with bfloat16 scales.
2. `affine` of one bit more: with u - zero + 2^bits as its code, the offset is a power of two times the scale.
   That is what a float16 scale with any 4-bit zero point (AWQ) needs.
3. `sym` or `zero`, where each row's scales are one float16 times bytes: what Peregrine exports.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import kernels
from kernels.formats import PLANES, TILE_COLUMNS, Format, IntegerWeight

_MAX_BYTE = 255


@dataclass(frozen=True, slots=True)
class IntegerMatrix:
    """W [N, K] = scale * (codes - zero) by group of columns.

    codes: uint8 [N, K]. scale: float [N, groups]. zero: int16 [N, groups]. group_size: columns, K for a whole
    row; the last group may be shorter. group_of_column: int64 [K] where groups are not runs of columns.
    """

    bits: int
    group_size: int
    codes: Tensor
    scale: Tensor
    zero: Tensor
    group_of_column: Tensor | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for shapes that do not belong together, and for scales that are not finite."""
        n, k = self.codes.shape
        groups = -(-k // self.group_size)
        for name, tensor in (("scales", self.scale), ("zero points", self.zero)):
            if tuple(tensor.shape) != (n, groups):
                raise ValueError(f"{name} are {tuple(tensor.shape)}, expected {(n, groups)}")
        if not torch.isfinite(self.scale).all():
            raise ValueError("scales hold NaN or infinite values")
        if (index := self.group_of_column) is not None:
            if tuple(index.shape) != (k,):
                raise ValueError(f"group indices are {tuple(index.shape)}, expected {(k,)}")
            if int(index.min()) < 0 or int(index.max()) >= groups:
                raise ValueError(f"group indices reach beyond the {groups} groups")

    def take_rows(self, order: Tensor) -> "IntegerMatrix":
        return replace(self, codes=self.codes[order], scale=self.scale[order], zero=self.zero[order])

    def sorted_columns(self) -> tuple["IntegerMatrix", Tensor]:
        """The matrix with its columns ordered by group, and that order [K].

        Raises ValueError where the groups have other sizes than a matrix of runs would.
        """
        index = self.group_of_column
        assert index is not None
        order = torch.argsort(index, stable=True)
        if not torch.equal(index[order], _runs(len(index), self.group_size)):
            raise ValueError(f"groups of columns are not of {self.group_size} columns each")
        return replace(self, codes=self.codes[:, order], group_of_column=None), order

    def without_trivial_index(self) -> "IntegerMatrix":
        """Without `group_of_column` where it names runs of columns anyway."""
        index = self.group_of_column
        is_trivial = index is not None and torch.equal(index, _runs(len(index), self.group_size))
        return replace(self, group_of_column=None) if is_trivial else self

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        k = self.codes.shape[1]
        group = _runs(k, self.group_size) if self.group_of_column is None else self.group_of_column
        scale, zero = self.scale.float()[:, group], self.zero[:, group]
        return scale * (self.codes.to(torch.int16) - zero)


def pack_exactly(matrix: IntegerMatrix) -> kernels.PackedWeight | None:
    """The packed matrix of exactly the same values; None where no format holds them."""
    k = matrix.codes.shape[1]
    if matrix.group_of_column is not None or k % TILE_COLUMNS or matrix.bits not in PLANES:
        return None
    if matrix.scale.shape[1] > 1 and matrix.group_size % TILE_COLUMNS:
        return None
    for attempt in (_affine, _wider, _row_scaled):
        if (weight := attempt(matrix)) is not None:
            return kernels.pack(weight)
    return None


def _affine(m: IntegerMatrix) -> IntegerWeight | None:
    scale, top = m.scale.double(), (1 << m.bits) - 1
    plain, mirrored = -scale * m.zero, scale * (top - m.zero)
    is_mirrored = plain.half() != plain
    offset = torch.where(is_mirrored, mirrored, plain)
    if not (_is_half(scale) and _is_half(offset)):
        return None
    flip = is_mirrored[:, _runs(m.codes.shape[1], m.group_size)]
    return IntegerWeight(
        _format(m, m.bits, "affine"),
        torch.where(flip, top - m.codes, m.codes),
        torch.where(is_mirrored, -scale, scale).half(),
        offset.half(),
    )


def _wider(m: IntegerMatrix) -> IntegerWeight | None:
    reach = 1 << m.bits
    scale = m.scale.double()
    offset = -scale * reach
    is_in_reach = int(m.zero.min()) >= 0 and int(m.zero.max()) <= reach
    if m.bits + 1 not in PLANES or not is_in_reach or not (_is_half(scale) and _is_half(offset)):
        return None
    shift = (reach - m.zero)[:, _runs(m.codes.shape[1], m.group_size)]
    codes = (m.codes + shift).to(torch.uint8)
    return IntegerWeight(_format(m, m.bits + 1, "affine"), codes, scale.half(), offset.half())


def _row_scaled(m: IntegerMatrix) -> IntegerWeight | None:
    zeros = m.zero.int() << (8 - m.bits)
    if int(zeros.min()) < 0 or int(zeros.max()) > _MAX_BYTE:
        return None
    found = _split_scales(m.scale)
    if found is None:
        return None
    scale, row_scale = found
    if bool((m.zero == 1 << (m.bits - 1)).all()):
        return IntegerWeight(_format(m, m.bits, "sym"), m.codes, scale, None, row_scale)
    return IntegerWeight(_format(m, m.bits, "zero"), m.codes, scale, zeros.to(torch.uint8), row_scale)


def _split_scales(scale: Tensor) -> tuple[Tensor, Tensor] | None:
    """Bytes uint8 [N, groups] and row scales float16 [N] with scale = row * byte / 256 exactly, or None."""
    wanted = scale.double() * 256
    if bool((wanted <= 0).any()):
        return None
    largest, row = wanted.amax(dim=1), torch.zeros(len(wanted), dtype=torch.float64)
    for byte in range(_MAX_BYTE, _MAX_BYTE // 2, -1):  # of the row's largest scale: as a rule the first
        guess = (largest / byte).half().double()
        rows = torch.nonzero((row == 0) & (guess > 0) & (guess * byte == largest)).flatten()
        steps = wanted[rows] / guess[rows, None]
        rows = rows[(steps == steps.round()).all(dim=1)]
        row[rows] = guess[rows]
        if bool((row > 0).all()):
            return (wanted / row[:, None]).to(torch.uint8), row.half()
    return None


def _format(m: IntegerMatrix, bits: int, kind: kernels.formats.Kind) -> Format:
    return Format(bits, m.group_size if m.scale.shape[1] > 1 else 0, kind)


def _runs(k: int, group_size: int) -> Tensor:
    """Group of each column, int64 [K]."""
    return torch.arange(k) // group_size


def _is_half(values: Tensor) -> bool:
    return bool((values.half() == values).all())
