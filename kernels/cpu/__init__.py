"""The native CPU ops: fused blocks over packed weights, paged attention.

Importing this module builds the library if need be and raises OSError when it cannot. ctypes releases the
interpreter lock for the time of a call. Argument structs are built once for each weight object, so that
a call costs about two microseconds of Python.
"""

import ctypes
import os
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_float, c_int32, c_int64, c_void_p, pointer
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kernels import reference
from kernels.cpu.build import build
from kernels.formats import Kind, PackedWeight, StackedWeight
from kernels.types import AttentionMetadata, AttentionWeights, FeedForward, FFNWeights, MoEWeights, Weight

_BLOCK_SIZE = 16
_LANES = 16
_MAX_HEAD_DIM = 256
_KINDS: tuple[Kind, ...] = ("affine", "zero", "sym")  # enum Kind of src/gemm.h


class _Matrix(ctypes.Structure):
    _fields_ = (("data", c_void_p), *((name, c_int32) for name in ("n", "k", "bits", "group_size", "kind")))


class _Weight(ctypes.Structure):
    _fields_ = (("parts", _Matrix * 3), ("count", c_int32), ("n", c_int32), ("k", c_int32))


class _Shape(ctypes.Structure):
    _fields_ = (
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("window", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *(
            (name, c_void_p)
            for name in ("positions", "slot_mapping", "query_start", "seq_lens", "block_table")
        ),
        *((name, c_int32) for name in ("num_tokens", "num_seqs", "max_blocks")),
    )


class _AttentionBlock(ctypes.Structure):
    _fields_ = (
        ("qkv", _Weight),
        ("o", _Weight),
        *(
            (name, c_void_p)
            for name in ("norm", "qkv_bias", "o_bias", "q_norm", "k_norm", "post_norm", "cos", "sin")
        ),
        ("shape", _Shape),
        ("eps", c_float),
    )


class _FfnBlock(ctypes.Structure):
    _fields_ = (
        ("gate_up", _Weight),
        ("down", _Weight),
        *((name, c_void_p) for name in ("norm", "gate_up_bias", "down_bias", "post_norm")),
        ("eps", c_float),
        ("is_gelu", c_int32),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("attention", POINTER(_AttentionBlock)),
        ("ffn", POINTER(_FfnBlock)),
        ("k_cache", c_void_p),
        ("v_cache", c_void_p),
    )


def _load() -> Any:
    library = ctypes.CDLL(str(build()))
    library.pg_set_threads.argtypes = [c_int32]
    library.pg_isa.restype = c_char_p
    library.pg_linear.argtypes = [POINTER(_Weight), c_void_p, c_int64, c_void_p, c_void_p]
    library.pg_paged_attention.argtypes = [
        POINTER(_Shape),
        POINTER(_Step),
        c_void_p,
        c_int64,
        *[c_void_p] * 3,
    ]
    library.pg_attention_block.argtypes = [POINTER(_AttentionBlock), POINTER(_Step), *[c_void_p] * 3]
    library.pg_ffn_block.argtypes = [POINTER(_FfnBlock), c_void_p, c_int64]
    library.pg_layers.argtypes = [POINTER(_Layer), c_int32, POINTER(_Step), c_void_p]
    library.pg_logits.argtypes = [POINTER(_Weight), c_void_p, c_float, c_void_p, c_int64, c_void_p]
    library.pg_embed.argtypes = [POINTER(_Matrix), c_void_p, c_int64, c_void_p]
    for name in (
        "pg_embed",
        "pg_set_threads",
        "pg_linear",
        "pg_paged_attention",
        "pg_attention_block",
        "pg_ffn_block",
        "pg_layers",
        "pg_logits",
    ):
        getattr(library, name).restype = None
    return library


_lib = _load()
_structs: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_last_step: tuple[AttentionMetadata, _Step] | None = None
_layers: WeakKeyDictionary[AttentionWeights, tuple[Any, Any]] = WeakKeyDictionary()  # by the first block


def set_num_threads(num_threads: int) -> None:
    """Threads that work on one op, the calling one included. Raises ValueError below 1."""
    if num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, got {num_threads}")
    _lib.pg_set_threads(num_threads)


def isa() -> str:
    """Instruction set that the library was built for: avx512vnni, avx2 or generic."""
    name: bytes = _lib.pg_isa()
    return name.decode()


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """See `reference.linear`; packed weights see x rounded to 16 bits per token and group of 32."""
    if isinstance(weight, Tensor):
        return reference.linear(x, weight, bias)
    x = _float_rows(x)
    out = torch.empty(x.shape[0], weight.n)
    _lib.pg_linear(byref(_weight(weight)), x.data_ptr(), x.shape[0], _address(bias), out.data_ptr())
    return out


def logits(x: Tensor, norm: Tensor, eps: float, head: Weight) -> Tensor:
    """See `reference.logits`."""
    if isinstance(head, Tensor):
        return reference.logits(x, norm, eps, head)
    x = _float_rows(x)
    out = torch.empty(x.shape[0], head.n)
    _lib.pg_logits(byref(_weight(head)), norm.data_ptr(), eps, x.data_ptr(), x.shape[0], out.data_ptr())
    return out


def embed(token_ids: Tensor, table: Weight) -> Tensor:
    """See `reference.embed`."""
    if not isinstance(table, PackedWeight):
        return reference.embed(token_ids, table)
    out = torch.empty(token_ids.shape[0], table.k)
    ids = _address(token_ids, torch.int64)
    _lib.pg_embed(byref(_matrix(table)), ids, token_ids.shape[0], out.data_ptr())
    return out


def run_layers(
    x: Tensor,
    layers: Sequence[tuple[AttentionWeights, FeedForward]],
    caches: Sequence[tuple[Tensor, Tensor]],
    metadata: AttentionMetadata,
) -> bool:
    """`dispatch.decoder_layers` in one native call; False, with nothing done, where a block has none."""
    key = layers[0][0]
    known = _layers.get(key)
    if known is None or known[0] is not caches:
        known = _layers[key] = (caches, _layer_structs(x, layers, caches))
    structs = known[1]
    if structs is None or not (x.dtype == torch.float32 and x.is_contiguous()):
        return False
    _lib.pg_layers(structs, len(structs), byref(_step(metadata)), x.data_ptr())
    return True


def attention_block(
    x: Tensor, weights: AttentionWeights, k_cache: Tensor, v_cache: Tensor, metadata: AttentionMetadata
) -> None:
    """See `reference.attention_block`."""
    if not _can_run(x, k_cache, weights):
        reference.attention_block(x, weights, k_cache, v_cache, metadata)
        return
    struct = _attention_struct(weights)
    if isinstance(struct, _AttentionBlock):
        _lib.pg_attention_block(
            byref(struct), byref(_step(metadata)), x.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr()
        )
        return
    _dense_attention_block(x, weights, struct, k_cache, v_cache, metadata)


def ffn_block(x: Tensor, weights: FFNWeights) -> None:
    """See `reference.ffn_block`."""
    struct = _ffn_struct(weights)
    if struct is None or not (x.dtype == torch.float32 and x.is_contiguous()):
        reference.ffn_block(x, weights, linear)
        return
    _lib.pg_ffn_block(byref(struct), x.data_ptr(), x.shape[0])


def paged_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """See `reference.paged_attention`; query float32, head_dim a multiple of 16 up to 256."""
    shape = _Shape(query.shape[1], k_cache.shape[1], query.shape[2], window or 0, scale, softcap or 0)
    return _attend(query.contiguous(), shape, k_cache, v_cache, metadata)


def _dense_attention_block(
    x: Tensor,
    w: AttentionWeights,
    shape: _Shape,
    k_cache: Tensor,
    v_cache: Tensor,
    metadata: AttentionMetadata,
) -> None:
    qkv = linear(reference.rms_norm(x, w.norm, w.eps), w.qkv, w.qkv_bias)
    heads = qkv.view(len(x), w.num_heads + 2 * w.num_kv_heads, w.head_dim)
    query, keys, values = heads.split([w.num_heads, w.num_kv_heads, w.num_kv_heads], dim=1)
    if w.q_norm is not None:
        query = reference.rms_norm(query, w.q_norm, w.eps)
    if w.k_norm is not None:
        keys = reference.rms_norm(keys, w.k_norm, w.eps)
    cos, sin = w.cos[metadata.positions], w.sin[metadata.positions]
    keys = reference.apply_rope(keys, cos, sin)
    reference.append_kv(keys, values, k_cache, v_cache, metadata.slot_mapping)
    out = _attend(reference.apply_rope(query, cos, sin).contiguous(), shape, k_cache, v_cache, metadata)
    reference.add_projection(x, linear(out.flatten(1), w.o, w.o_bias), w.post_norm, w.eps)


def _attend(
    query: Tensor, shape: _Shape, k_cache: Tensor, v_cache: Tensor, metadata: AttentionMetadata
) -> Tensor:
    out = torch.empty_like(query)
    _lib.pg_paged_attention(
        byref(shape),
        byref(_step(metadata)),
        query.data_ptr(),
        query.shape[1] * query.shape[2],
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        out.data_ptr(),
    )
    return out


def _can_run(x: Tensor, k_cache: Tensor, w: AttentionWeights) -> bool:
    return (
        x.dtype == k_cache.dtype == torch.float32
        and x.is_contiguous()
        and k_cache.shape[-1] == _BLOCK_SIZE
        and w.head_dim % _LANES == 0
        and w.head_dim <= _MAX_HEAD_DIM
    )


def _attention_struct(w: AttentionWeights) -> _AttentionBlock | _Shape:
    struct = _structs.get(w)
    if struct is None:
        shape = _Shape(w.num_heads, w.num_kv_heads, w.head_dim, w.window or 0, w.scale, w.softcap or 0)
        if isinstance(w.qkv, Tensor) or isinstance(w.o, Tensor):
            struct = shape
        else:
            tensors = (w.norm, w.qkv_bias, w.o_bias, w.q_norm, w.k_norm, w.post_norm, w.cos, w.sin)
            struct = _AttentionBlock(_weight(w.qkv), _weight(w.o), *map(_address, tensors), shape, w.eps)
        _structs[w] = struct
    return struct


def _ffn_struct(w: FFNWeights) -> _FfnBlock | None:
    if isinstance(w.gate_up, Tensor) or isinstance(w.down, Tensor):
        return None
    struct = _structs.get(w)
    if struct is None:
        pointers = map(_address, (w.norm, w.gate_up_bias, w.down_bias, w.post_norm))
        is_gelu = int(w.activation == "gelu_tanh")
        struct = _FfnBlock(_weight(w.gate_up), _weight(w.down), *pointers, w.eps, is_gelu)
        _structs[w] = struct
    return struct


def _layer_structs(
    x: Tensor,
    layers: Sequence[tuple[AttentionWeights, FeedForward]],
    caches: Sequence[tuple[Tensor, Tensor]],
) -> Any | None:
    structs = []
    for (attention, ffn), (k_cache, v_cache) in zip(layers, caches, strict=True):
        first = _attention_struct(attention)
        second = None if isinstance(ffn, MoEWeights) else _ffn_struct(ffn)
        is_native = isinstance(first, _AttentionBlock) and second is not None
        if not (is_native and _can_run(x, k_cache, attention)):
            return None
        structs.append(_Layer(pointer(first), pointer(second), k_cache.data_ptr(), v_cache.data_ptr()))
    return (_Layer * len(structs))(*structs)


def _step(metadata: AttentionMetadata) -> _Step:
    # All layers of a step share one metadata object.
    global _last_step
    last = _last_step
    if last is not None and last[0] is metadata:
        return last[1]
    fields = (
        metadata.positions,
        metadata.slot_mapping,
        metadata.query_start_loc,
        metadata.seq_lens,
        metadata.block_table,
    )
    step = _Step(
        *(_address(t, torch.int32) for t in fields),
        metadata.positions.shape[0],
        metadata.seq_lens.shape[0],
        metadata.block_table.shape[1],
    )
    _last_step = (metadata, step)
    return step


def _matrix(weight: PackedWeight) -> _Matrix:
    f = weight.format
    group_size = f.group_size or weight.k
    address = _address(weight.data, torch.uint8)
    return _Matrix(address, weight.n, weight.k, f.bits, group_size, _KINDS.index(f.kind))


def _weight(weight: PackedWeight | StackedWeight) -> _Weight:
    parts = (weight,) if isinstance(weight, PackedWeight) else weight.parts
    return _Weight((_Matrix * 3)(*map(_matrix, parts)), len(parts), weight.n, weight.k)


def _address(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
    if tensor is None:
        return None
    if tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(
            f"expected a contiguous {dtype} tensor on the CPU, got {tensor.dtype} on {tensor.device}, "
            f"stride {tensor.stride()}"
        )
    return tensor.data_ptr()


def _float_rows(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


set_num_threads(len(os.sched_getaffinity(0)))
