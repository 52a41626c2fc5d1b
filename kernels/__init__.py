"""Fused ops over dense and packed weights: the reference in torch, and native code for the CPU.

The backend is chosen once, at the first call: `native` where a C++ compiler is found, else `reference`;
the environment variable KERNELS_BACKEND forces one.
"""

from kernels.dispatch import (
    attention_block,
    backend_name,
    decoder_layers,
    embed,
    ffn_block,
    linear,
    logits,
    set_num_threads,
)
from kernels.formats import (
    Format,
    IntegerWeight,
    PackedWeight,
    StackedWeight,
    dequantize,
    pack,
    select_rows,
    stack,
    take_row_range,
    unpack,
)
from kernels.gguf_formats import from_gguf
from kernels.types import (
    AttentionMetadata,
    AttentionWeights,
    ExpertWeights,
    FeedForward,
    FFNWeights,
    MoEWeights,
    Weight,
)

__all__ = [
    "AttentionMetadata",
    "AttentionWeights",
    "ExpertWeights",
    "FFNWeights",
    "FeedForward",
    "Format",
    "IntegerWeight",
    "MoEWeights",
    "PackedWeight",
    "StackedWeight",
    "Weight",
    "attention_block",
    "backend_name",
    "decoder_layers",
    "dequantize",
    "embed",
    "ffn_block",
    "from_gguf",
    "linear",
    "logits",
    "pack",
    "select_rows",
    "set_num_threads",
    "stack",
    "take_row_range",
    "unpack",
]
