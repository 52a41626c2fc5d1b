"""Packed weights: unsigned codes with a scale and an offset per group, in the order the kernels stream them.

A weight matrix W [N, K] is stored as codes u in [0, 2^bits) with, for each row and each group of
`group_size` = 32 columns, W = scale * u + offset. Every grouped integer format of GGUF maps onto this
exactly (Q4_0, Q4_1, Q8_0), and so do symmetric ones (offset = -scale * 2^(bits - 1)).

One tile holds 16 rows x 32 columns, in the order of a vector unit with sixteen 32-bit lanes. A lane is a
row; a "quad" is four neighbouring columns, which one VNNI instruction multiplies and adds at once:

    w4, 320 bytes a tile                            w8, 576 bytes a tile
    +--------------------------------------+        +--------------------------------------+
    | codes  256 B: 4 vectors of 64 B      |        | codes  512 B: 8 vectors of 64 B      |
    |   vector v, lane r, byte j:          |        |   vector v, lane r, byte j:          |
    |     low  nibble: column 8v     + j   |        |     column 4v + j of row r           |
    |     high nibble: column 8v + 4 + j   |        |                                      |
    +--------------------------------------+        +--------------------------------------+
    | scale   32 B: float16 of 16 rows     |        | scale   32 B                         |
    | offset  32 B: float16 of 16 rows     |        | offset  32 B                         |
    +--------------------------------------+        +--------------------------------------+

Tiles of one row block lie next to each other along K, row blocks follow each other: [ceil(N / 16), K / 32,
tile bytes]. Rows beyond N are zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TILE_ROWS = 16
GROUP_SIZE = 32
_SCALE_BYTES = TILE_ROWS * 2
BITS_OF_FORMAT = {"w4": 4, "w8": 8}


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A packed [n, k] matrix. `data`: uint8 [ceil(n / 16), k / 32, tile bytes], contiguous."""

    format: str
    n: int
    k: int
    data: Tensor

    def __post_init__(self) -> None:
        if self.format not in BITS_OF_FORMAT:
            raise ValueError(f"unknown format {self.format!r} (known: {', '.join(BITS_OF_FORMAT)})")
        expected = (-(-self.n // TILE_ROWS), self.k // GROUP_SIZE, tile_bytes(self.bits))
        if self.k % GROUP_SIZE or tuple(self.data.shape) != expected or self.data.dtype != torch.uint8:
            raise ValueError(
                f"{self.format} [{self.n}, {self.k}]: data is {self.data.dtype} {tuple(self.data.shape)}, "
                f"expected uint8 {expected}"
            )

    @property
    def bits(self) -> int:
        return BITS_OF_FORMAT[self.format]

    @property
    def nbytes(self) -> int:
        return self.data.numel()


def tile_bytes(bits: int) -> int:
    """Bytes of one 16 x 32 tile, scales and offsets included."""
    return TILE_ROWS * GROUP_SIZE * bits // 8 + 2 * _SCALE_BYTES


def pack(codes: Tensor, scale: Tensor, offset: Tensor, bits: int) -> PackedWeight:
    """Pack codes uint8 [N, K] with scale and offset float16 [N, K / 32].

    Raises ValueError for shapes and dtypes that do not belong together, or codes beyond `bits`.
    """
    n, k = codes.shape
    if codes.dtype != torch.uint8 or {scale.dtype, offset.dtype} != {torch.float16}:
        raise ValueError(
            f"codes must be uint8, scale and offset float16; got {codes.dtype}, {scale.dtype}, {offset.dtype}"
        )
    if k % GROUP_SIZE or scale.shape != (n, k // GROUP_SIZE) or offset.shape != scale.shape:
        raise ValueError(
            f"codes {tuple(codes.shape)} need scale and offset [{n}, {k / GROUP_SIZE:g}], "
            f"got {tuple(scale.shape)} and {tuple(offset.shape)}"
        )
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise ValueError(f"a code of {int(codes.max())} does not fit into {bits} bits")
    blocks, groups = -(-n // TILE_ROWS), k // GROUP_SIZE
    quads = _pad_rows(codes, blocks).view(blocks, TILE_ROWS, groups, GROUP_SIZE // 4, 4)
    quads = quads.permute(0, 2, 3, 1, 4)  # [block, group, quad, row, column in quad]
    if bits == 4:
        quads = quads[:, :, 0::2] | (quads[:, :, 1::2] << 4)
    params = [
        _pad_rows(p, blocks).view(blocks, TILE_ROWS, groups).transpose(1, 2).contiguous().view(torch.uint8)
        for p in (scale, offset)
    ]
    data = torch.cat([quads.reshape(blocks, groups, -1), *params], dim=-1)
    return PackedWeight(f"w{bits}", n, k, data.contiguous())


def unpack(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """The exact inverse of `pack`: codes uint8 [N, K], scale and offset float16 [N, K / 32]."""
    blocks, groups, size = weight.data.shape
    codes, scale, offset = weight.data.split([size - 2 * _SCALE_BYTES, _SCALE_BYTES, _SCALE_BYTES], dim=-1)
    if weight.bits == 4:
        pairs = codes.reshape(blocks, groups, GROUP_SIZE // 8, 1, TILE_ROWS, 4)
        quads = torch.cat([pairs & 15, pairs >> 4], dim=3)
    else:
        quads = codes
    quads = quads.reshape(blocks, groups, GROUP_SIZE // 4, TILE_ROWS, 4).permute(0, 3, 1, 2, 4)
    rows = blocks * TILE_ROWS
    scale, offset = (
        p.contiguous().view(torch.float16).transpose(1, 2).reshape(rows, groups)[: weight.n]
        for p in (scale, offset)
    )
    return quads.reshape(rows, weight.k)[: weight.n], scale, offset


def dequantize(weight: PackedWeight) -> Tensor:
    """float32 [N, K]."""
    codes, scale, offset = unpack(weight)
    return _affine(codes, scale, offset)


def concat_rows(weights: Sequence[PackedWeight]) -> PackedWeight:
    """Stack matrices of one format and K along N. Raises ValueError when they differ."""
    if len({(w.format, w.k) for w in weights}) != 1:
        raise ValueError(f"cannot stack {[(w.format, w.n, w.k) for w in weights]}")
    if all(w.n % TILE_ROWS == 0 for w in weights[:-1]):
        data = torch.cat([w.data for w in weights])
        return PackedWeight(weights[0].format, sum(w.n for w in weights), weights[0].k, data)
    parts = [torch.cat(part) for part in zip(*(unpack(w) for w in weights), strict=True)]
    return pack(parts[0], parts[1], parts[2], weights[0].bits)


def take_rows(weight: PackedWeight, rows: Tensor) -> Tensor:
    """Dequantized rows, float32 [R, K], for row indices [R] (an embedding lookup)."""
    blocks, row_in_block = rows // TILE_ROWS, rows % TILE_ROWS
    # Only the touched row blocks are unpacked, as a matrix of their own.
    picked = PackedWeight(weight.format, len(rows) * TILE_ROWS, weight.k, weight.data[blocks])
    index = torch.arange(len(rows), device=rows.device) * TILE_ROWS + row_in_block
    codes, scale, offset = (part[index] for part in unpack(picked))
    return _affine(codes, scale, offset)


def _affine(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    n, k = codes.shape
    groups = codes.reshape(n, -1, GROUP_SIZE).float()
    return (groups * scale.float().unsqueeze(-1) + offset.float().unsqueeze(-1)).view(n, k)


def _pad_rows(matrix: Tensor, blocks: int) -> Tensor:
    missing = blocks * TILE_ROWS - matrix.shape[0]
    return torch.nn.functional.pad(matrix, (0, 0, 0, missing)).contiguous()
