"""Packed weights in tensor-core fragment order: what the CUDA kernels stream.

Made from a checkpoint's bytes (`kernels.formats`) at load. A matrix [N, K] becomes tiles of 16 rows; a tile
is a row of units of 256 columns, each contiguous, so that any run of units is one bulk copy:

    unit    | plane of low bits | plane of high bits | parameters |

A lane l = 4 g + q of the warp holds, for every 32 columns (one mma.m16n8k32, operand A), rows g and g + 8
at columns 8 q .. 8 q + 7: registers (h, r) = columns 4 h .. 4 h + 3 of row g + 8 r. So for 64 columns (tile
t, mma m):

    8-bit plane   [t][m][lane][h][r][byte]                             16 bytes a lane: one mma
    4-bit plane   [t][lane][m][h][byte], nibble r                      16 bytes a lane: two
    2-bit plane   [t / 2][lane][t % 2][m][byte], bits 2 (2 h + r)      16 bytes a lane: four
    1-bit plane   [lane][t / 2][t % 2][byte], bit _PLANE_BIT[m][h][r]  16 bytes a lane: the unit

Parameters of a group of columns: [g][group][r] pairs of bytes (scale, zero), or of float16 (scale, offset)
for `affine` formats; none where the row is the group. Row factors (float32 [N]) stay outside:

    zero, sym   W = row_factor * scale * (u * 2^(8 - bits) - zero)
    row         W = row_factor * (u - 128), stored as the signed byte u - 128
    affine      W = scale * u + offset

The kernel multiplies by 16-bit activations q = 256 high + low, |q| <= 32512, and sums codes times high and
codes times low over a group (for `row`, over a unit) as integers of at most 2^22: 240 * 128 * 128 for the
second rows of a 4-bit plane, which are left in the high nibble; 128 * 128 * 256 for signed bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.formats import Format, IntegerWeight, PackedWeight, StackedWeight, unpack

UNIT_COLUMNS = 256
TILE_ROWS = 16
_PLANES = {8: (8,), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}
_PLANE_BIT = (((2, 4), (3, 5)), ((0, 6), (1, 7)))  # few steps from where a 3-bit code needs its bit
_ROWS_AT_A_TIME = 8192  # packed together: temporaries stay small


@dataclass(frozen=True, slots=True)
class DeviceFormat:
    """Bits a code; columns a group (0: the row); kind of the group's parameters."""

    bits: int
    group: int
    kind: Literal["zero", "affine"]

    @property
    def unit_bytes(self) -> int:
        per_group = 4 if self.kind == "affine" else 2
        groups = UNIT_COLUMNS // self.group if self.group else 0
        return TILE_ROWS * (UNIT_COLUMNS * self.bits // 8 + groups * per_group)


# In the order of `unit_dot` in src/units.cuh.
DEVICE_FORMATS = (
    DeviceFormat(2, 32, "zero"),
    DeviceFormat(2, 64, "zero"),
    DeviceFormat(3, 64, "zero"),
    DeviceFormat(3, 128, "zero"),
    DeviceFormat(4, 64, "zero"),
    DeviceFormat(4, 128, "zero"),
    DeviceFormat(5, 128, "zero"),
    DeviceFormat(6, 128, "zero"),
    DeviceFormat(8, 0, "zero"),
    DeviceFormat(4, 32, "affine"),
    DeviceFormat(5, 32, "affine"),
    DeviceFormat(8, 32, "affine"),
    DeviceFormat(2, 128, "zero"),
)


def device_format(f: Format) -> DeviceFormat | None:
    """The format that holds `f` exactly, its groups repeated where there are only narrower ones, or None."""
    kind = "affine" if f.kind == "affine" else "zero"
    if f.bits == 8 and f.kind == "sym" and f.group_size == 0:
        return DeviceFormat(8, 0, "zero")
    fitting = [
        d
        for d in DEVICE_FORMATS
        if d.bits == f.bits and d.kind == kind and d.group and f.group_size % d.group == 0
    ]
    return max(fitting, key=lambda d: d.group, default=None)


@dataclass(frozen=True, slots=True, eq=False)
class DeviceMatrix:
    """A packed [n, k] matrix. data: uint8 [tiles, units, unit_bytes]; row_factor: float32 [16 * tiles]."""

    format: DeviceFormat
    n: int
    k: int
    data: Tensor
    row_factor: Tensor

    @property
    def units(self) -> int:
        return self.data.shape[1]

    @property
    def num_tiles(self) -> int:
        return self.data.shape[0]

    @property
    def nbytes(self) -> int:
        return self.data.numel() + 4 * self.row_factor.numel()


@dataclass(frozen=True, slots=True, eq=False)
class DeviceWeight:
    """Matrices of one K along N, as a fused projection reads them (q, k, v; gate, up; or a single one)."""

    parts: tuple[DeviceMatrix, ...]

    @property
    def n(self) -> int:
        return sum(p.n for p in self.parts)

    @property
    def k(self) -> int:
        return self.parts[0].k

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.parts)


def to_device(
    weight: PackedWeight | StackedWeight, device: torch.device, rows: Sequence[int] | None = None
) -> DeviceWeight:
    """Repack for the GPU. `rows` cuts a matrix that was fused of several (multiples of 16 rows but the last).

    Raises:
        ValueError: a format that the kernels do not know.
    """
    parts = weight.parts if isinstance(weight, StackedWeight) else (weight,)
    if rows is not None and len(parts) == 1 and len(rows) > 1:
        parts = _cut(parts[0], rows)
    return DeviceWeight(tuple(_pack(p, device) for p in parts))


def is_supported(weight: object) -> bool:
    """Whether `to_device` takes it."""
    if isinstance(weight, StackedWeight):
        return all(is_supported(p) for p in weight.parts)
    return isinstance(weight, PackedWeight) and device_format(weight.format) is not None


def dequantize(matrix: DeviceMatrix) -> Tensor:
    """float32 [n, k], in plain torch: the specification of the layout, the inverse of `to_device`."""
    f, shape = matrix.format, (matrix.num_tiles, matrix.units)
    codes, at, shift = torch.zeros((*shape, 16, 256), dtype=torch.uint8, device=matrix.data.device), 0, 0
    for width in _PLANES[f.bits]:
        size = TILE_ROWS * UNIT_COLUMNS * width // 8
        codes |= _unplane(matrix.data[..., at : at + size], width, shape) << shift
        at, shift = at + size, shift + width
    u = codes.float()
    factor = matrix.row_factor.view(-1, 1, 16, 1)
    if f.group == 0:
        w = factor * codes.view(torch.int8).float()
    else:
        dtype = torch.float16 if f.kind == "affine" else torch.uint8
        params = matrix.data[..., at:].contiguous().view(dtype).view(*shape, 8, 256 // f.group, 2, 2)
        params = params.permute(0, 1, 4, 2, 3, 5).reshape(*shape, 16, 256 // f.group, 2).float()
        scale, second = (p.repeat_interleave(f.group, dim=-1) for p in params.unbind(-1))
        if f.kind == "affine":
            w = scale * u + second
        else:
            w = factor * (scale * (u * float(1 << (8 - f.bits)) - second))
    return w.permute(0, 2, 1, 3).reshape(16 * matrix.num_tiles, -1)[: matrix.n, : matrix.k].contiguous()


def _cut(weight: PackedWeight, rows: Sequence[int]) -> tuple[PackedWeight, ...]:
    if any(r % TILE_ROWS for r in rows[:-1]) or sum(rows) != weight.n:
        raise ValueError(f"cannot cut {weight.n} rows into {list(rows)}")
    blocks = weight.data.split([-(-r // TILE_ROWS) for r in rows])
    return tuple(
        PackedWeight(weight.format, r, weight.k, b.contiguous()) for r, b in zip(rows, blocks, strict=True)
    )


def _pack(weight: PackedWeight, device: torch.device) -> DeviceMatrix:
    f = device_format(weight.format)
    if f is None:
        raise ValueError(f"{weight.format} has no form for the GPU")
    n, k, blocks = weight.n, weight.k, weight.data.shape[0]
    units = -(-k // UNIT_COLUMNS)
    data = torch.empty(blocks, units, f.unit_bytes, dtype=torch.uint8, device=device)
    row_factor = torch.zeros(blocks * TILE_ROWS, device=device)
    step = _ROWS_AT_A_TIME // TILE_ROWS
    for begin in range(0, blocks, step):
        end = min(begin + step, blocks)
        rows = min(n, end * TILE_ROWS) - begin * TILE_ROWS
        piece = unpack(PackedWeight(weight.format, rows, k, weight.data[begin:end].to(device)))
        data[begin:end] = _units(piece, f, end - begin, units)
        row_factor[begin * TILE_ROWS : begin * TILE_ROWS + rows] = _row_factor(piece, f)
    return DeviceMatrix(f, n, k, data, row_factor)


def _row_factor(piece: IntegerWeight, f: DeviceFormat) -> Tensor:
    if f.kind == "affine":
        return torch.ones(len(piece.codes), device=piece.codes.device)
    assert piece.row_scale is not None
    factor = piece.row_scale.float() / 256
    return factor * piece.scale[:, 0] if f.group == 0 else factor * 2.0 ** (f.bits - 8)


def _units(piece: IntegerWeight, f: DeviceFormat, tiles: int, units: int) -> Tensor:
    """uint8 [tiles, units, unit_bytes]."""
    n, k = piece.codes.shape
    padding = (0, units * UNIT_COLUMNS - k, 0, tiles * TILE_ROWS - n)
    signed = piece.codes ^ 128 if f.group == 0 else piece.codes
    codes = torch.nn.functional.pad(signed, padding).view(tiles, 2, 8, units, 4, 2, 4, 2, 4)
    shift, parts = 0, []
    for width in _PLANES[f.bits]:
        parts.append(_plane((codes >> shift) & ((1 << width) - 1), width).reshape(tiles, units, -1))
        shift += width
    if f.group:
        parts.append(_parameters(piece, f, tiles, units))
    return torch.cat(parts, dim=-1)


# Axes of codes: tile, r, g, unit, t, m, q, h, byte.
def _plane(codes: Tensor, width: int) -> Tensor:
    if width == 8:
        return codes.permute(0, 3, 4, 5, 2, 6, 7, 1, 8)
    if width == 4:
        return (codes[:, 0] | codes[:, 1] << 4).permute(0, 2, 3, 1, 5, 4, 6, 7)
    # Bits of a byte from its axes: h and r (and m) become shifts.
    weights = codes.permute(0, 3, 4, 2, 6, 5, 8, 7, 1)  # tile, unit, t, g, q, m, byte, h, r
    if width == 2:
        shifts = torch.tensor([[0, 2], [4, 6]], dtype=torch.uint8, device=codes.device)
        packed = (weights << shifts).sum(dim=(-1, -2), dtype=torch.uint8)  # tile, unit, t, g, q, m, byte
        two = packed.unflatten(2, (2, 2))  # tile, unit, t / 2, t % 2, g, q, m, byte
        return two.permute(0, 1, 2, 4, 5, 3, 6, 7)
    moved = weights.permute(0, 1, 3, 4, 2, 6, 5, 7, 8)  # tile, unit, g, q, t, byte, m, h, r
    shifts = torch.tensor(_PLANE_BIT, dtype=torch.uint8, device=codes.device)
    return (moved << shifts).sum(dim=(-1, -2, -3), dtype=torch.uint8)


def _unplane(data: Tensor, width: int, shape: tuple[int, int]) -> Tensor:
    """Inverse of `_plane`: codes [tiles, units, 16, 256]."""
    device = data.device
    if width == 8:
        codes = data.reshape(*shape, 4, 2, 8, 4, 2, 2, 4).permute(0, 1, 7, 4, 2, 3, 5, 6, 8)
    elif width == 4:
        both = data.reshape(*shape, 4, 8, 4, 2, 2, 4)  # t, g, q, m, h, byte
        codes = torch.stack([both & 15, both >> 4], dim=2).permute(0, 1, 2, 4, 3, 6, 5, 7, 8)
    elif width == 2:
        two = (
            data.reshape(*shape, 2, 8, 4, 2, 2, 4)
            .permute(0, 1, 2, 5, 3, 4, 6, 7)
            .reshape(*shape, 4, 8, 4, 2, 4)
        )
        shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=device)
        spread = ((two.unsqueeze(-1) >> shifts) & 3).unflatten(-1, (2, 2))  # t, g, q, m, byte, h, r
        codes = spread.permute(0, 1, 8, 3, 2, 5, 4, 7, 6)
    else:
        one = data.reshape(*shape, 8, 4, 4, 4)  # g, q, t, byte
        shifts = torch.tensor(_PLANE_BIT, dtype=torch.uint8, device=device).flatten()
        bits = ((one.unsqueeze(-1) >> shifts) & 1).unflatten(-1, (2, 2, 2))  # g, q, t, byte, m, h, r
        codes = bits.permute(0, 1, 8, 2, 4, 6, 3, 7, 5)
    return codes.reshape(*shape, 16, 256)


def _parameters(piece: IntegerWeight, f: DeviceFormat, tiles: int, units: int) -> Tensor:
    n, k = piece.codes.shape
    repeat = (piece.format.group_size or units * UNIT_COLUMNS) // f.group
    groups = units * UNIT_COLUMNS // f.group
    scale, second = piece.scale, piece.offset
    if second is None:  # sym: the zero point in the middle
        second = torch.full_like(scale, 128)
    both = torch.stack([scale, second], dim=-1).repeat_interleave(repeat, dim=1)
    used = -(-k // f.group)
    both = both[:, :used]
    both = torch.nn.functional.pad(both, (0, 0, 0, groups - used, 0, tiles * TILE_ROWS - n))
    both = both.view(tiles, 2, 8, units, groups // units, 2).permute(0, 3, 2, 4, 1, 5).contiguous()
    return both.view(torch.uint8).view(tiles, units, -1)


def random_matrix(
    n: int, k: int, f: DeviceFormat, device: torch.device, generator: torch.Generator
) -> DeviceMatrix:
    """Random codes and parameters, values of about k^-1/2: for benchmarks and tests, no `affine` formats."""
    if f.kind == "affine":
        raise ValueError("random bytes are no float16 scales")
    tiles, units = -(-n // TILE_ROWS), -(-k // UNIT_COLUMNS)
    data = torch.empty(tiles, units, f.unit_bytes, dtype=torch.uint8, device=device)
    data.random_(0, 256, generator=generator)
    # A uniform byte has a deviation of 74; times a scale byte (root mean square 148) that of two such bytes.
    spread = 74.0 if f.group == 0 else 148.0 * 105.0
    return DeviceMatrix(f, n, k, data, torch.full((tiles * TILE_ROWS,), k**-0.5 / spread, device=device))
