"""Products of 16 to some hundred tokens straight from packed weights (src/prompt.cu)."""

import ctypes
import functools
import itertools

import torch
from torch import Tensor

from kernels.cuda.build import check, library
from kernels.cuda.packing import TILE_ROWS, DeviceWeight
from kernels.cuda.program import num_blocks
from kernels.cuda.tables import fp8_units, groups, stream
from kernels.prefill import Activations, Product

MAX_SPLITS = 8
_TILES = (16, 32, 64, 128)  # of tokens, that a block may take
_NARROW = 16  # a tile of which blocks may have any number of rows up to 128
_PAIRED_TOKENS = 64  # two blocks of 128 rows share a multiprocessor up to this tile, else one
_MIN_WIDE_BLOCKS = 100  # of 256 rows
_MIN_UNITS = 2  # of a part of K
# What a block of few tokens costs, in units of weights: the activations of one unit, and its start and end.
_ACTIVATIONS, _START = 2, 8


def can_multiply(weight: DeviceWeight) -> bool:
    """Whether the parts lie as they do in one matrix of tiles of 16 rows."""
    return all(p.n % TILE_ROWS == 0 for p in weight.parts[:-1])


def units_of(weight: DeviceWeight) -> tuple[float, ...]:
    """For each part, what its float16 values are multiplied by: a power of two, 1 but for affine formats."""
    units = fp8_units(weight)
    return tuple(u if p.format.kind == "affine" else 1.0 for p, u in zip(weight.parts, units, strict=True))


def multiply(
    weight: DeviceWeight, units: tuple[float, ...], x: Activations, out: Tensor | None = None
) -> Product:
    """x times the matrix, transposed: bfloat16 [T, n], or float32 [splits, T, n] to be summed.

    x: tiled (`kernels.prefill.tiled`). units: `units_of(weight)`. out: where the product goes, undivided,
    float32 [T, n].
    """
    assert x.scale is not None
    num_tokens, n, num_units = len(x.scale), weight.n, weight.parts[0].units
    tile, rows, splits = plan(num_tokens, n, num_units)
    if out is not None:
        splits = 1
    is_wide = out is not None or splits > 1
    if out is None:
        shape, dtype = (
            ((num_tokens, n), torch.bfloat16) if splits == 1 else ((splits, num_tokens, n), torch.float32)
        )
        out = torch.empty(shape, dtype=dtype, device=x.values.device)
    pointer = ctypes.c_void_p
    for pieces, unit in groups(weight, units):
        check(
            library().peregrine_prompt(
                ctypes.byref(pieces),
                num_units,
                num_tokens,
                x.padded_tokens,
                tile,
                rows,
                n,
                splits,
                int(is_wide),
                pointer(x.values.data_ptr()),
                pointer(x.scale.data_ptr()),
                pointer(out.data_ptr()),
                ctypes.c_float(unit),
                stream(),
            )
        )
    return Product(out)


def plan(num_tokens: int, n: int, num_units: int) -> tuple[int, int, int]:
    """Tokens and rows of a block, and parts of K, none of them empty.

    By measurements on an H100 (docs/benchmarks/kernel-notes.md): as many blocks as run at once. 256 rows need
    fewer activations from L2 for each weight, which counts where the tensor cores are busiest.
    """
    tile = next((t for t in _TILES if num_tokens <= t), _TILES[-1])
    most = max(1, min(MAX_SPLITS, num_units // _MIN_UNITS))
    if tile == _NARROW:
        return tile, *_narrow_plan(n, num_units, most)
    tiles, slots = -(-num_tokens // tile), num_blocks() * (2 if tile <= _PAIRED_TOKENS else 1)
    is_wide = tile > _PAIRED_TOKENS and tiles * -(-n // 256) >= _MIN_WIDE_BLOCKS
    rows = 256 if is_wide else 128
    splits = min(most, max(1, slots // (tiles * -(-n // rows))))
    return tile, rows, -(-num_units // -(-num_units // splits))


@functools.cache
def _narrow_plan(n: int, num_units: int, most: int) -> tuple[int, int]:
    """Rows of a block and parts of K that keep two blocks on every multiprocessor equally busy."""
    slots = 2 * num_blocks()

    def cost(rows: int, splits: int) -> tuple[int, int]:
        units = -(-num_units // splits)
        waves = -(-(-(-n // rows) * splits) // slots)
        return waves * (units * (rows // TILE_ROWS + _ACTIVATIONS) + _START), splits

    sizes = itertools.product(range(128, 48, -TILE_ROWS), range(1, most + 1))
    rows, splits = min(sizes, key=lambda size: cost(*size))
    return rows, -(-num_units // -(-num_units // splits))
