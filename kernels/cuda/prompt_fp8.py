"""Products of some hundred tokens and more straight from packed weights, in e4m3 (src/prompt_fp8.cu)."""

import ctypes
import functools

import torch

from kernels.cuda.build import check, library
from kernels.cuda.packing import DeviceWeight
from kernels.cuda.program import num_blocks
from kernels.cuda.tables import groups, stream
from kernels.prefill import Activations, Product

_TILES = (256, 192, 128)  # of tokens, that a block may take
_ROWS = 256  # of a cluster of two blocks
# Measured on an H100 (docs/benchmarks/kernel-notes.md). A round of blocks takes as long as the products of
# its tokens and so many more, for unpacking:
_COLUMN_US, _UNPACKING_TOKENS = 1.68e-5, 166  # a token and column of K
_CUBLAS_TFLOPS, _UNPACKING_GB_S = 1450, 2800
_LAUNCH_US = 4.0  # of a round of blocks, or of unpacking and cuBLAS
# Of `prompt`, by which more than so many tokens take as long as twice as many.
_FLOAT16_TOKENS, _FLOAT16_COLUMN_US = 128, 8.3e-7  # a row and column of the matrix


def multiply(weight: DeviceWeight, units: tuple[float, ...], x: Activations) -> Product:
    """x times the matrix, transposed: bfloat16 [T, n].

    x: in the form "tiled_fp8". units: `tables.fp8_units(weight)`; the weights, of formats of at most 4 bits,
    are rounded to e4m3 times these. Needs `prompt.can_multiply(weight)`.
    """
    assert x.scale is not None
    num_tokens, n, pointer = len(x.scale), weight.n, ctypes.c_void_p
    out = torch.empty(num_tokens, n, dtype=torch.bfloat16, device=x.values.device)
    tile, _ = plan(num_tokens, n, weight.k)
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


@functools.cache  # asked for every matrix of every step that is no graph
def plan(num_tokens: int, n: int, k: int) -> tuple[int, float]:
    """Tokens of a block, and about how many microseconds the product takes, where blocks take turns."""
    slots = num_blocks()

    def duration_us(tile: int) -> float:
        rounds = -(-2 * -(-n // _ROWS) * -(-num_tokens // tile) // slots)
        return rounds * ((tile + _UNPACKING_TOKENS) * k * _COLUMN_US + _LAUNCH_US)

    tile = min(_TILES, key=duration_us)
    return tile, duration_us(tile)


@functools.cache
def beats_float16(num_tokens: int, n: int, k: int) -> bool:
    """Whether e4m3 is faster than `prompt.multiply`, for up to 256 tokens."""
    float16_us = n * k * _FLOAT16_COLUMN_US + _LAUNCH_US
    return num_tokens > _FLOAT16_TOKENS and plan(num_tokens, n, k)[1] < float16_us


@functools.cache
def is_faster(num_tokens: int, n: int, k: int) -> bool:
    """Than unpacking the matrix, of some 4 bits, and multiplying it by cuBLAS."""
    unpacking_us = n * k * 1.53 / _UNPACKING_GB_S / 1e3
    product_us = 2 * num_tokens * n * k / _CUBLAS_TFLOPS / 1e6
    return plan(num_tokens, n, k)[1] < unpacking_us + product_us + _LAUNCH_US
