"""Products of prompt chunks straight from packed weights (src/prompt.cu)."""

import ctypes
import itertools

import torch

from kernels.cuda.build import check, library
from kernels.cuda.packing import DeviceWeight
from kernels.cuda.program import num_blocks
from kernels.cuda.tables import groups, stream
from kernels.prefill import Activations, Product

MAX_SPLITS = 8
# In the time that a block of 128 rows takes for a unit of 256 columns:
_UNIT_COST = {128: 1.0, 256: 1.7}
_START_COST = 3.0
_SPLIT_COST = 1.0 / (128 * 4096)  # for each token and row, to write and read once more


def multiply(weight: DeviceWeight, units: tuple[float, ...], x: Activations) -> Product:
    """x times the matrix, transposed: bfloat16 [T, n], or float32 [splits, T, n] to be summed.

    x: tiled (`kernels.prefill.tiled`). units: `tables.fp8_units(weight)`. The parts have at most 4 bits, and
    rows that are a multiple of 16.
    """
    assert x.scale is not None
    lines, padded, _ = x.values.shape
    num_tokens, num_units, n = len(x.scale), lines // 2, weight.n
    tile = 64 if padded == 64 else 128
    rows, splits = plan(num_tokens, padded // tile, n, num_units)
    shape, dtype = (
        ((num_tokens, n), torch.bfloat16) if splits == 1 else ((splits, num_tokens, n), torch.float32)
    )
    out, pointer = torch.empty(shape, dtype=dtype, device=x.values.device), ctypes.c_void_p
    for pieces, unit in groups(weight, units):
        check(
            library().peregrine_prompt(
                ctypes.byref(pieces),
                num_units,
                num_tokens,
                padded,
                tile,
                rows,
                n,
                splits,
                pointer(x.values.data_ptr()),
                pointer(x.scale.data_ptr()),
                pointer(out.data_ptr()),
                ctypes.c_float(unit),
                stream(),
            )
        )
    return Product(out)


def plan(num_tokens: int, token_tiles: int, n: int, num_units: int) -> tuple[int, int]:
    """Rows of a block, and parts of K: what keeps the multiprocessors busy, by a rough model of the time."""

    def cost(choice: tuple[int, int]) -> float:
        rows, splits = choice
        rounds = -(-token_tiles * -(-n // rows) * splits // num_blocks())
        work = rounds * (-(-num_units // splits) + _START_COST) * _UNIT_COST[rows]
        return work + (splits * num_tokens * n * _SPLIT_COST if splits > 1 else 0.0)

    return min(itertools.product(_UNIT_COST, range(1, min(MAX_SPLITS, num_units) + 1)), key=cost)
