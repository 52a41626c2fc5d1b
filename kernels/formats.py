"""Packed weights: unsigned codes with scales per group of columns, in the order the kernels stream them.

A weight matrix W [N, K] is stored as codes u in [0, 2^bits) and, for each row and each group of `group_size`
columns (the last group may be shorter; 0 stands for the whole row), parameters of one of three kinds:

    kind     name      W =                                                stored per group and row
    affine   w4g32-f16 scale * u + offset                                 float16 scale, float16 offset
    zero     w4g64     row_scale * scale / 256 * (u - zero * 2^(bits-8))  uint8 scale, uint8 zero
    sym      w4g64-sym row_scale * scale / 256 * (u - 2^(bits-1))         uint8 scale

`affine` holds GGUF's Q4_0, Q4_1 and Q8_0 exactly. `zero` and `sym` are Peregrine's own: two bytes or one a
group instead of four, the row's float16 scale shared by its groups; a zero point in steps of 2^(bits-8)
reaches over the whole range of codes.

One row block holds 16 rows, in the order of a vector unit with sixteen 32-bit lanes: a lane is a row, a
"quad" is four neighbouring columns, which one VNNI instruction multiplies and adds at once.

    +-------------------------------------------------------------------------------------------+
    | codes: K / 32 tiles of 16 rows x 32 columns, 64 * bits bytes each                          |
    | parameters: for each group, 16 scales then (affine, zero) 16 offsets or zeros, row by row  |
    | row scales (zero, sym): 16 float16                                                         |
    +-------------------------------------------------------------------------------------------+

A tile is cut into planes of 8, 4, 2 or 1 bits, the plane of the low bits first; a plane is a row of 64-byte
vectors. Bits i*p .. i*p + p - 1 of byte j in lane r of vector v of a p-bit plane belong to column
4 * (v * 8/p + i) + j of row r:

    bits  planes   bytes a tile        one vector of the 2-bit plane, lane r (4 bytes)
    8     8        512                  byte 0      byte 1      byte 2      byte 3
    6     4 + 2    384                 +-----------+-----------+-----------+-----------+
    5     4 + 1    320                 |7 6|5 4|3 2|1 0| bit pairs: quad 4v+3 .. quad 4v|
    4     4        256                 +-----------+-----------+-----------+-----------+
    3     2 + 1    192                 byte j is column j of its quads
    2     2        128

Row blocks follow each other: data is uint8 [ceil(N / 16), block bytes]. Rows beyond N are zero. The same
bytes lie in a quantized checkpoint's safetensors, so that a CPU maps the file and computes from it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

TILE_ROWS = 16
TILE_COLUMNS = 32
PLANES = {8: (8,), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}
Kind = Literal["affine", "zero", "sym"]
_SUFFIX: dict[Kind, str] = {"affine": "-f16", "zero": "", "sym": "-sym"}
_PARAM_BYTES: dict[Kind, int] = {"affine": 4, "zero": 2, "sym": 1}


@dataclass(frozen=True, slots=True)
class Format:
    """Bits a code, columns a group (0: the whole row), kind of the parameters; see the module's text."""

    bits: int
    group_size: int
    kind: Kind

    def __post_init__(self) -> None:
        if self.bits not in PLANES:
            raise ValueError(f"bits must be one of {', '.join(map(str, sorted(PLANES)))}, got {self.bits}")
        if self.kind not in _SUFFIX:
            raise ValueError(f"kind must be one of {', '.join(_SUFFIX)}, got {self.kind!r}")
        if self.group_size < 0 or self.group_size % TILE_COLUMNS:
            raise ValueError(f"group_size must be 0 or a multiple of {TILE_COLUMNS}, got {self.group_size}")

    def __str__(self) -> str:
        group = f"g{self.group_size}" if self.group_size else "row"
        return f"w{self.bits}{group}{_SUFFIX[self.kind]}"

    @classmethod
    def parse(cls, name: str) -> "Format":
        """The inverse of `str`. Raises ValueError for anything else."""
        match = re.fullmatch(r"w(\d)(?:g([1-9]\d{0,5})|row)(-f16|-sym)?", name)
        if match is None:
            raise ValueError(f"unknown format {name!r} (examples: w4g64, w3g128-sym, w8row, w4g32-f16)")
        kind = next(k for k, suffix in _SUFFIX.items() if suffix == (match[3] or ""))
        return cls(int(match[1]), int(match[2] or 0), kind)

    def num_groups(self, k: int) -> int:
        return -(-k // (self.group_size or k))

    def block_bytes(self, k: int) -> int:
        """Bytes of one row block of K columns."""
        parameters = self.num_groups(k) * TILE_ROWS * _PARAM_BYTES[self.kind]
        return k * TILE_ROWS * self.bits // 8 + parameters + (0 if self.kind == "affine" else 2 * TILE_ROWS)

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of a packed [N, K] matrix."""
        return -(-n // TILE_ROWS) * self.block_bytes(k)


@dataclass(frozen=True, slots=True)
class IntegerWeight:
    """A quantized matrix before packing.

    codes: uint8 [N, K]. affine: scale, offset float16 [N, groups]. zero: scale, offset (the zero points)
    uint8 [N, groups], row_scale float16 [N]. sym: as zero without offset.
    """

    format: Format
    codes: Tensor
    scale: Tensor
    offset: Tensor | None = None
    row_scale: Tensor | None = None

    def __post_init__(self) -> None:
        f, (n, k) = self.format, self.codes.shape
        if k % TILE_COLUMNS:
            raise ValueError(f"{f}: K = {k} is not a multiple of {TILE_COLUMNS}")
        per_group = torch.float16 if f.kind == "affine" else torch.uint8
        groups = (n, f.num_groups(k))
        _expect(f, "codes", self.codes, torch.uint8, (n, k))
        _expect(f, "scale", self.scale, per_group, groups)
        _expect(f, "offset", self.offset, None if f.kind == "sym" else per_group, groups)
        _expect(f, "row_scale", self.row_scale, None if f.kind == "affine" else torch.float16, (n,))

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        scale, offset = self.affine()
        return scale * self.codes + offset

    def rows(self, index: Tensor) -> "IntegerWeight":
        """The matrix of these rows, by index [R]."""
        return IntegerWeight(
            self.format,
            self.codes[index],
            self.scale[index],
            None if self.offset is None else self.offset[index],
            None if self.row_scale is None else self.row_scale[index],
        )

    def affine(self) -> tuple[Tensor, Tensor]:
        """float32 scale and offset of every column, [N, K] each: W = scale * u + offset."""
        f, k = self.format, self.codes.shape[1]
        scale = self.scale.float()
        if f.kind != "affine":
            assert self.row_scale is not None
            scale = scale * (self.row_scale.float() / 256).unsqueeze(1)
        if f.kind == "sym":
            offset = -scale * float(1 << (f.bits - 1))
        else:
            assert self.offset is not None
            offset = self.offset.float()
            if f.kind == "zero":
                offset = -(scale * 2.0 ** (f.bits - 8)) * offset
        width = f.group_size or k
        return _spread(scale, width, k), _spread(offset, width, k)


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A packed [n, k] matrix. `data`: uint8 [ceil(n / 16), format.block_bytes(k)], contiguous."""

    format: Format
    n: int
    k: int
    data: Tensor

    def __post_init__(self) -> None:
        expected = (-(-self.n // TILE_ROWS), self.format.block_bytes(self.k))
        if self.k % TILE_COLUMNS or tuple(self.data.shape) != expected or self.data.dtype != torch.uint8:
            raise ValueError(
                f"{self.format} [{self.n}, {self.k}]: data is {self.data.dtype} {tuple(self.data.shape)}, "
                f"expected uint8 {expected} and columns a multiple of {TILE_COLUMNS}"
            )

    @property
    def nbytes(self) -> int:
        return self.data.numel()


@dataclass(frozen=True, slots=True)
class StackedWeight:
    """Packed matrices of one K stacked along N, each in its own format (q, k and v; gate and up)."""

    parts: tuple[PackedWeight, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.parts) <= 3 or len({p.k for p in self.parts}) != 1:
            raise ValueError(f"cannot stack {[(str(p.format), p.n, p.k) for p in self.parts]}")

    @property
    def n(self) -> int:
        return sum(p.n for p in self.parts)

    @property
    def k(self) -> int:
        return self.parts[0].k

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.parts)


def pack(weight: IntegerWeight) -> PackedWeight:
    """Pack a quantized matrix. Raises ValueError for codes beyond its bits."""
    f, (n, k) = weight.format, weight.codes.shape
    if weight.codes.numel() and int(weight.codes.max()) >= 1 << f.bits:
        raise ValueError(f"a code of {int(weight.codes.max())} does not fit into {f.bits} bits")
    blocks = -(-n // TILE_ROWS)
    quads = _pad_rows(weight.codes, blocks).view(blocks, TILE_ROWS, k // TILE_COLUMNS, 8, 4)
    quads = quads.permute(0, 2, 3, 1, 4)  # [block, tile, quad, row, column in quad]
    planes, shift = [], 0
    for width in PLANES[f.bits]:
        plane = ((quads >> shift) & ((1 << width) - 1)).reshape(*quads.shape[:2], width, 8 // width, 64)
        for i in range(1, 8 // width):
            plane[..., 0, :] |= plane[..., i, :] << (i * width)
        planes.append(plane[..., 0, :].flatten(2))
        shift += width
    parts = [torch.cat(planes, dim=2).flatten(1)]
    params = [weight.scale] if weight.offset is None else [weight.scale, weight.offset]
    by_group = [_pad_rows(p, blocks).view(blocks, TILE_ROWS, -1).transpose(1, 2) for p in params]
    parts.append(torch.stack(by_group, dim=2).flatten(1).contiguous().view(torch.uint8))
    if weight.row_scale is not None:
        parts.append(_pad_rows(weight.row_scale, blocks).view(blocks, TILE_ROWS).view(torch.uint8))
    return PackedWeight(f, n, k, torch.cat(parts, dim=1))


def unpack(packed: PackedWeight) -> IntegerWeight:
    """The exact inverse of `pack`."""
    f, k, blocks = packed.format, packed.k, packed.data.shape[0]
    code_bytes = k * TILE_ROWS * f.bits // 8
    param_bytes = f.num_groups(k) * TILE_ROWS * _PARAM_BYTES[f.kind]
    tail = packed.data.shape[1] - code_bytes - param_bytes
    codes, params, rows = packed.data.split([code_bytes, param_bytes, tail], dim=1)
    tiles = codes.view(blocks, k // TILE_COLUMNS, 64 * f.bits)
    quads = torch.zeros(blocks, k // TILE_COLUMNS, 8, 64, dtype=torch.uint8, device=codes.device)
    shift, at = 0, 0
    for width in PLANES[f.bits]:
        vectors = tiles[..., at : at + 64 * width].reshape(blocks, -1, width, 1, 64)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device).view(-1, 1)
        quads |= (((vectors >> shifts) & ((1 << width) - 1)) << shift).view(quads.shape)
        shift, at = shift + width, at + 64 * width
    by_row = quads.view(blocks, -1, 8, TILE_ROWS, 4).permute(0, 3, 1, 2, 4)
    dtype = torch.float16 if f.kind == "affine" else torch.uint8
    count = 1 if f.kind == "sym" else 2
    grouped = params.contiguous().view(dtype).view(blocks, -1, count, TILE_ROWS).permute(2, 0, 3, 1)
    grouped = grouped.reshape(count, blocks * TILE_ROWS, -1)[:, : packed.n]
    return IntegerWeight(
        f,
        by_row.reshape(-1, k)[: packed.n],
        grouped[0],
        grouped[1] if count == 2 else None,
        None if f.kind == "affine" else rows.contiguous().view(torch.float16).view(-1)[: packed.n],
    )


def dequantize(weight: PackedWeight | StackedWeight) -> Tensor:
    """float32 [N, K]."""
    if isinstance(weight, StackedWeight):
        return torch.cat([dequantize(part) for part in weight.parts])
    return unpack(weight).dequantize()


def stack(weights: Sequence[PackedWeight]) -> PackedWeight | StackedWeight:
    """Matrices of one K along N: one matrix where the formats are equal, else a stack. Raises ValueError."""
    first = weights[0]
    if len(weights) == 1:
        return first
    is_uniform = len({(w.format, w.k) for w in weights}) == 1
    if is_uniform and all(w.n % TILE_ROWS == 0 for w in weights[:-1]):
        return replace(first, n=sum(w.n for w in weights), data=torch.cat([w.data for w in weights]))
    return StackedWeight(tuple(weights))


def select_rows(weight: PackedWeight, index: Tensor) -> PackedWeight:
    """The packed matrix of these rows, by index [R]: the same values in another order or number."""
    return pack(unpack(weight).rows(index))


def take_row_range(weight: PackedWeight, first: int, count: int) -> PackedWeight:
    """The packed matrix of rows [first, first + count): a view where they are whole row blocks."""
    if first % TILE_ROWS == 0 and (count % TILE_ROWS == 0 or first + count == weight.n):
        blocks = slice(first // TILE_ROWS, -(-(first + count) // TILE_ROWS))
        return replace(weight, n=count, data=weight.data[blocks])
    return select_rows(weight, torch.arange(first, first + count))


def take_rows(weight: PackedWeight, rows: Tensor) -> Tensor:
    """Dequantized rows, float32 [R, K], for row indices [R] (an embedding lookup)."""
    # Only the touched row blocks are unpacked, as a matrix of their own.
    picked = replace(weight, n=len(rows) * TILE_ROWS, data=weight.data[rows // TILE_ROWS])
    index = torch.arange(len(rows), device=rows.device) * TILE_ROWS + rows % TILE_ROWS
    return unpack(picked).rows(index).dequantize()


def _spread(values: Tensor, width: int, k: int) -> Tensor:
    return values.repeat_interleave(width, dim=1)[:, :k]


def _expect(f: Format, name: str, tensor: Tensor | None, dtype: torch.dtype | None, shape: object) -> None:
    got = None if tensor is None else tensor.dtype
    if got != dtype or (tensor is not None and tuple(tensor.shape) != shape):
        raise ValueError(
            f"{f}: {name} must be {dtype} {shape if dtype else ''}, got {got} "
            f"{'' if tensor is None else tuple(tensor.shape)}"
        )


def _pad_rows(values: Tensor, blocks: int) -> Tensor:
    missing = blocks * TILE_ROWS - values.shape[0]
    padding = (0, missing) if values.dim() == 1 else (0, 0, 0, missing)
    return torch.nn.functional.pad(values, padding).contiguous()
