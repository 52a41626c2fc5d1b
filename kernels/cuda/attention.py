"""Attention of one new token each of a few sequences (src/row_attention.cu)."""

import ctypes
import functools

import torch
from torch import Tensor

from kernels.cuda.build import check, library
from kernels.cuda.program import num_blocks
from kernels.cuda.tables import stream
from kernels.kv_cache import is_fp8
from kernels.prefill import LOG2_E, Activations, Bound, Product, Tokens, empty_tiled
from kernels.types import AttentionWeights

_HEAD_DIMS = (64, 128)
_MAX_GROUP = 8  # query heads of a KV head
_MAX_TOKENS = 64
_MAX_PARTS = 16
_MAX_COUNTERS = 1 << 12


def can_attend(w: AttentionWeights, caches: tuple[Tensor, Tensor], num_tokens: int) -> bool:
    """Whether the kernel knows such attention, and the tokens are few enough for it to be the faster one."""
    return (
        w.head_dim in _HEAD_DIMS
        and w.num_heads // w.num_kv_heads <= _MAX_GROUP
        and not is_fp8(caches[0])
        and w.q_norm is w.k_norm is w.window is w.softcap is None
        and num_tokens <= _MAX_TOKENS
        and num_tokens * w.num_kv_heads <= min(2 * num_blocks(), _MAX_COUNTERS)
    )


def attend_next(
    qkv: Product, w: AttentionWeights, caches: tuple[Tensor, Tensor], tokens: Tokens, bound: Bound
) -> Activations:
    """See `kernels.prefill.attend_next`: in the tiled form, of tokens of different sequences.

    Needs `can_attend(...)`.
    """
    assert qkv.row_scale is None
    num_tokens, device, pointer = qkv.values.shape[-2], qkv.values.device, ctypes.c_void_p
    out = Activations(empty_tiled(num_tokens, w.num_heads * w.head_dim, device), bound.scale[:num_tokens])
    means = torch.empty(_MAX_PARTS, num_tokens, w.num_heads, w.head_dim, device=device)
    lse = torch.empty(_MAX_PARTS, num_tokens, w.num_heads, device=device)
    check(
        library().peregrine_row_attention(
            pointer(qkv.values.data_ptr()),
            qkv.num_splits,
            pointer(None if w.qkv_bias is None else w.qkv_bias.data_ptr()),
            pointer(w.cos.data_ptr()),
            pointer(w.sin.data_ptr()),
            pointer(tokens.positions.data_ptr()),
            pointer(tokens.rows.data_ptr()),
            pointer(tokens.block_table.data_ptr()),
            tokens.block_table.stride(0),
            pointer(caches[0].data_ptr()),
            pointer(caches[1].data_ptr()),
            pointer(means.data_ptr()),
            pointer(lse.data_ptr()),
            pointer(_counters(device).data_ptr()),
            pointer(out.values.data_ptr()),
            num_tokens,
            out.padded_tokens,
            w.num_kv_heads,
            w.num_heads // w.num_kv_heads,
            w.head_dim,
            ctypes.c_float(w.scale * LOG2_E),
            ctypes.c_float(bound.inverse),
            2 * num_blocks(),
            stream(),
        )
    )
    return out


@functools.cache
def _counters(device: torch.device) -> Tensor:
    return torch.zeros(_MAX_COUNTERS, dtype=torch.int32, device=device)
