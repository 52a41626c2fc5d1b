"""Products of some hundred tokens and more straight from packed weights, in e4m3 (src/prompt_fp8.cu)."""

import ctypes

import torch

from kernels.cuda.build import check, library
from kernels.cuda.packing import DeviceWeight
from kernels.cuda.program import num_blocks
from kernels.cuda.tables import groups, stream
from kernels.prefill import Activations, Product

_TILES = (256, 192, 128)  # of tokens, that a block may take
_ROWS = 256  # of a cluster of two blocks
_UNPACKING = 166  # what a tile takes beside its tokens' products, in tokens (8192 x 8192, H100)


def multiply(weight: DeviceWeight, units: tuple[float, ...], x: Activations) -> Product:
    """x times the matrix, transposed: bfloat16 [T, n].

    x: in the form "tiled_fp8". units: `tables.fp8_units(weight)`; the weights, of formats of at most 4 bits,
    are rounded to e4m3 times these. Needs `prompt.can_multiply(weight)`.
    """
    assert x.scale is not None
    num_tokens, n, pointer = len(x.scale), weight.n, ctypes.c_void_p
    out = torch.empty(num_tokens, n, dtype=torch.bfloat16, device=x.values.device)
    tile = plan(num_tokens, n)
    for pieces, unit in groups(weight, units):
        check(
            library().peregrine_prompt_fp8(
                ctypes.byref(pieces),
                weight.parts[0].units,
                num_tokens,
                x.padded_tokens,
                tile,
                n,
                pointer(x.values.data_ptr()),
                pointer(x.scale.data_ptr()),
                pointer(out.data_ptr()),
                ctypes.c_float(unit),
                stream(),
            )
        )
    return Product(out)


def plan(num_tokens: int, n: int) -> int:
    """Tokens of a block: those that end soonest, where all multiprocessors take blocks in turn."""
    slots = num_blocks()

    def cost(tile: int) -> int:
        blocks = 2 * -(-n // _ROWS) * -(-num_tokens // tile)
        return -(-blocks // slots) * (tile + _UNPACKING)

    return min(_TILES, key=cost)
