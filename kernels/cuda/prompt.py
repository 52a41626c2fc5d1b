"""Products of some to some hundred tokens straight from packed weights (src/prompt.cu)."""

import ctypes
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.cuda.build import check, library
from kernels.cuda.packing import TILE_ROWS, DeviceWeight
from kernels.cuda.program import ACTIVATIONS, num_blocks
from kernels.cuda.tables import Pieces, fp8_units, groups, stream
from kernels.prefill import Activations, Bound, Product, empty_tiled

MAX_SPLITS = 8
_TILES = (16, 32, 64, 128)  # of tokens, that a block may take
_PAIRED_TOKENS = 64  # two blocks of 128 rows share a multiprocessor up to this tile, else one
_MIN_WIDE_BLOCKS = 100  # of 256 rows
_MIN_UNITS = 2  # of a part of K
# Of a block of 16 tokens that has a multiprocessor for itself: two tiles a warp, three stages in its ring.
_BALANCED_ROWS = range(257, 513)
_BALANCED_BYTES = 66_000  # of a stage's weights


def can_multiply(weight: DeviceWeight) -> bool:
    """Whether the parts lie as they do in one matrix of tiles of 16 rows."""
    return all(p.n % TILE_ROWS == 0 for p in weight.parts[:-1])


def units_of(weight: DeviceWeight) -> tuple[float, ...]:
    """For each part, what its float16 values are multiplied by: a power of two, 1 but for affine formats."""
    units = fp8_units(weight)
    return tuple(u if p.format.kind == "affine" else 1.0 for p, u in zip(weight.parts, units, strict=True))


def can_gate(weight: DeviceWeight, units: tuple[float, ...]) -> bool:
    """Whether gate and up are alike, so that one kernel takes both."""
    own = weight.parts
    return len(own) == 2 and own[0].n % TILE_ROWS == 0 and len(list(groups(weight, units))) == 1


def multiply(
    weight: DeviceWeight, units: tuple[float, ...], x: Activations, out: Tensor | None = None
) -> Product:
    """x times the matrix, transposed: bfloat16 [T, n], or float32 [splits, T, n] to be summed.

    x: tiled (`kernels.prefill.tiled`). units: `units_of(weight)`. out: where the product goes, undivided,
    float32 [T, n].
    """
    assert x.scale is not None
    num_tokens, n, num_units = len(x.scale), weight.n, weight.parts[0].units
    cut = plan(num_tokens, n, num_units, _unit_bytes(weight))
    if out is not None:
        cut = replace(cut, splits=1)
    is_wide = out is not None or cut.splits > 1
    if out is None:
        shape, dtype = (
            ((num_tokens, n), torch.bfloat16)
            if cut.splits == 1
            else ((cut.splits, num_tokens, n), torch.float32)
        )
        out = torch.empty(shape, dtype=dtype, device=x.values.device)
    for pieces, unit in groups(weight, units):
        _launch(pieces, unit, num_units, x, cut, n, out, is_wide=is_wide)
    return Product(out)


def multiply_gated(
    weight: DeviceWeight, units: tuple[float, ...], x: Activations, activation: str, bound: Bound
) -> Activations:
    """act(gate) * up of x times both matrices, which `can_gate`: the next product's input.

    bound: of the values. activation: "silu" or "gelu_tanh".
    """
    assert x.scale is not None
    num_tokens, n, num_units = len(x.scale), weight.parts[0].n, weight.parts[0].units
    cut = plan(num_tokens, 2 * n, num_units, _unit_bytes(weight), is_gated=True)
    out = empty_tiled(num_tokens, n, x.values.device)
    ((pieces, unit),) = groups(weight, units)
    _launch(pieces, unit, num_units, x, cut, n, out, activation=activation, out_factor=bound.inverse)
    return Activations(out, bound.scale[:num_tokens])


def _unit_bytes(weight: DeviceWeight) -> int:
    return max(p.format.unit_bytes for p in weight.parts)


def _launch(
    pieces: Pieces,
    unit: float,
    num_units: int,
    x: Activations,
    cut: "Cut",
    n: int,
    out: Tensor,
    *,
    is_wide: bool = False,
    activation: str | None = None,
    out_factor: float = 1.0,
) -> None:
    assert x.scale is not None
    pointer = ctypes.c_void_p
    check(
        library().peregrine_prompt(
            ctypes.byref(pieces),
            num_units,
            len(x.scale),
            x.padded_tokens,
            cut.tile,
            cut.rows,
            n,
            cut.splits,
            int(is_wide),
            pointer(x.values.data_ptr()),
            pointer(x.scale.data_ptr()),
            pointer(out.data_ptr()),
            ctypes.c_float(unit),
            int(activation is not None),
            0 if activation is None else ACTIVATIONS[activation],
            ctypes.c_float(out_factor),
            stream(),
        )
    )


@dataclass(frozen=True, slots=True)
class Cut:
    """Tokens and rows of a block, and parts of K, none of them empty."""

    tile: int
    rows: int
    splits: int


def plan(num_tokens: int, n: int, num_units: int, unit_bytes: int, *, is_gated: bool = False) -> Cut:
    """How a product is cut into blocks. is_gated: K is in one part. unit_bytes: of the largest format.

    By measurements on an H100 and an H200 (docs/benchmarks/kernel-notes.md): as many blocks as run at once.
    256 rows need fewer activations from L2 for each weight, which counts where the tensor cores are busiest.
    Few tokens of a matrix of several rounds of blocks: as many rows for each multiprocessor, in one round.
    """
    tile = next((t for t in _TILES if num_tokens <= t), _TILES[-1])
    most = 1 if is_gated else max(1, min(MAX_SPLITS, num_units // _MIN_UNITS))
    tiles, processors = -(-num_tokens // tile), num_blocks()
    slots = processors * (2 if tile <= _PAIRED_TOKENS else 1)
    is_wide = tile > _PAIRED_TOKENS and tiles * -(-n // 256) >= _MIN_WIDE_BLOCKS
    rows = 256 if is_wide else 128
    splits = min(most, max(1, slots // (tiles * -(-n // rows))))
    step = 2 * TILE_ROWS if is_gated else TILE_ROWS
    share = -(-n // (processors * step)) * step
    if tile == _TILES[0] and share in _BALANCED_ROWS and share // TILE_ROWS * unit_bytes <= _BALANCED_BYTES:
        return Cut(tile, share, 1)
    return Cut(tile, rows, -(-num_units // -(-num_units // splits)))  # as even as they can be
