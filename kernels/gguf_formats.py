"""GGUF's grouped integer types as packed weights: a change of order, never of value.

Scales are float16 in both; the offsets are exact in float16 as well (a power of two times a scale).

Block layouts: ggml's quantization types (group of 32): Q4_0 {f16 d; 16 B}, Q4_1 {f16 d, f16 m; 16 B},
Q5_0 {f16 d; u32 fifth bits; 16 B}, Q5_1 {f16 d, f16 m; u32 fifth bits; 16 B}, Q8_0 {f16 d; 32 x i8}. In the
4- and 5-bit types byte j holds column j in its low and column j + 16 in its high nibble.
"""

import numpy as np
import torch

from kernels.formats import Format, IntegerWeight, PackedWeight, pack

GROUP_SIZE = 32
_BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34}


def from_gguf(raw: np.ndarray, gguf_type: str, shape: tuple[int, int]) -> PackedWeight | None:
    """Pack the raw bytes (uint8) of a GGUF tensor [N, K]; None when its type has no packed form here.

    Raises ValueError when the number of bytes does not belong to the shape.
    """
    block_bytes = _BLOCK_BYTES.get(gguf_type)
    n, k = shape
    if block_bytes is None or k % GROUP_SIZE:
        return None
    if raw.size != n * (k // GROUP_SIZE) * block_bytes:
        raise ValueError(f"{gguf_type} {shape}: {raw.size} bytes do not make this shape")
    blocks = np.ascontiguousarray(raw).view(np.uint8).reshape(n, k // GROUP_SIZE, block_bytes)
    scale = _half(blocks, 0)
    if gguf_type == "Q8_0":
        codes, offset, bits = blocks[..., 2:] + np.uint8(128), scale * np.float16(-128), 8  # wraps: i8 + 128
    else:
        nibbles = blocks[..., -16:]
        codes, bits = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1), int(gguf_type[1])
        if bits == 5:
            fifth = np.unpackbits(blocks[..., -20:-16], axis=-1, bitorder="little")
            codes |= fifth << 4
        offset = _half(blocks, 2) if gguf_type.endswith("_1") else scale * np.float16(-(1 << (bits - 1)))
    return pack(
        IntegerWeight(
            Format(bits, GROUP_SIZE, "affine"),
            torch.from_numpy(codes.reshape(n, k)),
            torch.from_numpy(scale),
            torch.from_numpy(offset),
        )
    )


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    return blocks[..., at : at + 2].copy().view(np.float16)[..., 0]
