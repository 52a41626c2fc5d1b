"""Between the projections of an attention block: norms, rotation and KV append; paged attention.

Attention runs over tiles of queries: consecutive tokens of one sequence, each with the query heads of one
KV head (GQA packed). The host knows T and S alone, so it starts T // tile + S programs, which find their
sequence in query_start_loc; those beyond the last tile have nothing to do. Long contexts are split over
programs, and a second kernel merges the parts in order (split-KV, Dao et al. 2023).
"""
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.types import AttentionMetadata, AttentionWeights

_TILE_VALUES = 4096  # of a tile's queries: rows times head_dim, so that shared memory suffices (100 KB)
_KEY_VALUES = 4096
_KEYS_PER_SPLIT = 256  # at least, of the longest context that the block table has room for
_MAX_SPLITS = 16
_PROGRAMS = 256  # about two for each SM of an H100: more of them gain nothing from splits


@triton.jit
def rope_append(
    qkv_ptr,  # float32 [T, heads + 2 kv_heads, dim]
    q_norm_ptr,  # float32 [dim]
    k_norm_ptr,  # float32 [dim]
    positions_ptr,
    slots_ptr,
    cos_ptr,  # float32 [positions, dim / 2]
    sin_ptr,
    query_ptr,  # float32 [T, heads, dim], written
    k_cache_ptr,  # [blocks, kv_heads, dim, block_size], written at the slots
    v_cache_ptr,  # [blocks, kv_heads, block_size, dim], written at the slots
    eps,
    num_heads,
    num_kv_heads,
    block_size,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, HALF)
    mask = at < DIM // 2
    in_ptr = qkv_ptr + (token * (num_heads + 2 * num_kv_heads) + head) * DIM + at
    first = tl.load(in_ptr, mask, other=0.0)
    second = tl.load(in_ptr + DIM // 2, mask, other=0.0)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    block, offset = slot // block_size, slot % block_size
    is_stored = mask & (slot >= 0)  # a padding token's slot is negative
    if head < num_heads + num_kv_heads:
        inverse = tl.rsqrt((tl.sum(first * first, axis=0) + tl.sum(second * second, axis=0)) / DIM + eps)
        if HAS_Q_NORM:  # noqa: SIM102 (a branch at compile time around one at run time)
            if head < num_heads:
                first *= inverse * tl.load(q_norm_ptr + at, mask, other=0.0)
                second *= inverse * tl.load(q_norm_ptr + DIM // 2 + at, mask, other=0.0)
        if HAS_K_NORM:  # noqa: SIM102
            if head >= num_heads:
                first *= inverse * tl.load(k_norm_ptr + at, mask, other=0.0)
                second *= inverse * tl.load(k_norm_ptr + DIM // 2 + at, mask, other=0.0)
        table = tl.load(positions_ptr + token).to(tl.int64) * (DIM // 2) + at
        cos = tl.load(cos_ptr + table, mask, other=0.0)
        sin = tl.load(sin_ptr + table, mask, other=0.0)
        left = first * cos - second * sin
        right = second * cos + first * sin
        if head < num_heads:
            out_ptr = query_ptr + (token * num_heads + head) * DIM + at
            tl.store(out_ptr, left, mask)
            tl.store(out_ptr + DIM // 2, right, mask)
        else:
            row = (block * num_kv_heads + head - num_heads) * DIM
            key_ptr = k_cache_ptr + (row + at) * block_size + offset
            dtype = k_cache_ptr.dtype.element_ty
            tl.store(key_ptr, left.to(dtype), is_stored)
            tl.store(key_ptr + (DIM // 2) * block_size, right.to(dtype), is_stored)
    else:
        kv_head = head - num_heads - num_kv_heads
        value_ptr = v_cache_ptr + ((block * num_kv_heads + kv_head) * block_size + offset) * DIM + at
        dtype = v_cache_ptr.dtype.element_ty
        tl.store(value_ptr, first.to(dtype), is_stored)
        tl.store(value_ptr + DIM // 2, second.to(dtype), is_stored)


@triton.jit
def attend(
    query_ptr,  # float32 [T, heads, dim]
    k_cache_ptr,
    v_cache_ptr,
    positions_ptr,
    starts_ptr,  # int32 [S + 1]
    lens_ptr,  # int32 [S]
    table_ptr,  # int32 [S, max_blocks]
    out_ptr,  # float32 [splits, T, heads, dim], written: each part's weighted mean of the values
    lse_ptr,  # float32 [splits, T, heads], written: log of each part's sum of exp(score)
    scale,
    window,
    num_tokens,
    num_seqs,
    num_heads,
    num_kv_heads,
    max_blocks,
    block_size,
    num_splits,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a KV head
    TILE: tl.constexpr,  # tokens of a tile
    ROWS: tl.constexpr,  # at least TILE * GROUP, and 16 for the tensor cores
    SEQS: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # Sequence i's first tile is number start[i] // TILE + i: there is room for a partial tile each.
    seqs = tl.arange(0, SEQS)
    all_starts = tl.load(starts_ptr + seqs, seqs < num_seqs, other=0)
    is_begun = (seqs < num_seqs) & (all_starts // TILE + seqs <= tile)
    seq = tl.sum(is_begun.to(tl.int32), axis=0) - 1
    start, end = tl.load(starts_ptr + seq), tl.load(starts_ptr + seq + 1)
    first_token = start + (tile - start // TILE - seq) * TILE
    if first_token < end:
        row = tl.arange(0, ROWS)
        token = first_token + row // GROUP
        head = kv_head * GROUP + row % GROUP
        is_row = (row < TILE * GROUP) & (token < end)
        at_dim = tl.arange(0, BLOCK_DIM)
        is_dim = at_dim < DIM
        row_at = token.to(tl.int64) * num_heads + head
        query = tl.load(
            query_ptr + row_at[:, None] * DIM + at_dim[None, :], is_row[:, None] & is_dim[None, :], other=0.0
        )
        query *= scale
        position = tl.load(positions_ptr + token, is_row, other=0)
        last_position = tl.max(position, axis=0)
        oldest = tl.min(tl.where(is_row, position, last_position), axis=0)
        limit = tl.minimum(last_position + 1, tl.load(lens_ptr + seq))
        begin = 0
        if HAS_WINDOW:
            begin = tl.maximum(oldest - window + 1, 0) // KEYS * KEYS
        num_blocks = (limit - begin + KEYS - 1) // KEYS
        per_split = (num_blocks + num_splits - 1) // num_splits * KEYS
        low = begin + split * per_split
        high = tl.minimum(low + per_split, limit)
        largest = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, BLOCK_DIM), tl.float32)
        for i in range(low, high, KEYS):
            key = i + tl.arange(0, KEYS)
            is_key = key < high
            block = tl.load(table_ptr + seq.to(tl.int64) * max_blocks + key // block_size, is_key, other=0)
            kv_row = block.to(tl.int64) * num_kv_heads + kv_head
            k_at = (kv_row[None, :] * DIM + at_dim[:, None]) * block_size + (key % block_size)[None, :]
            keys = tl.load(k_cache_ptr + k_at, is_dim[:, None] & is_key[None, :], other=0.0)
            scores = tl.dot(query, keys.to(tl.float32), input_precision="tf32x3")
            distance = position[:, None] - key[None, :]
            is_visible = (distance >= 0) & is_key[None, :] & is_row[:, None]
            if HAS_WINDOW:
                is_visible = is_visible & (distance < window)
            scores = tl.where(is_visible, scores, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(scores, axis=1))
            # A row that has seen nothing yet stays at -inf: keep exp(-inf - -inf) out.
            base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            probs = tl.exp(scores - base[:, None])
            shrink = tl.exp(largest - base)
            total = total * shrink + tl.sum(probs, axis=1)
            v_at = (kv_row * block_size + key % block_size)[:, None] * DIM + at_dim[None, :]
            values = tl.load(v_cache_ptr + v_at, is_key[:, None] & is_dim[None, :], other=0.0)
            product = tl.dot(probs, values.to(tl.float32), input_precision="tf32x3")
            acc = acc * shrink[:, None] + product
            largest = new_largest
        is_seen = total > 0.0
        mean = acc / tl.where(is_seen, total, 1.0)[:, None]
        lse = tl.where(is_seen, largest + tl.log(tl.where(is_seen, total, 1.0)), float("-inf"))
        part_at = split.to(tl.int64) * num_tokens * num_heads + row_at
        tl.store(out_ptr + part_at[:, None] * DIM + at_dim[None, :], mean, is_row[:, None] & is_dim[None, :])
        tl.store(lse_ptr + part_at, lse, is_row)


@triton.jit
def merge_splits(
    parts_ptr,  # float32 [splits, T * heads, dim]
    lse_ptr,  # float32 [splits, T * heads]
    out_ptr,  # float32 [T * heads, dim], written
    num_rows,
    num_splits,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split, at = tl.arange(0, SPLITS), tl.arange(0, BLOCK_DIM)
    is_split, is_dim = split < num_splits, at < DIM
    part = split.to(tl.int64) * num_rows + row
    lse = tl.load(lse_ptr + part, is_split, other=float("-inf"))
    share = tl.exp(lse - tl.max(lse, axis=0))
    mask = is_split[:, None] & is_dim[None, :]
    means = tl.load(parts_ptr + part[:, None] * DIM + at[None, :], mask, other=0.0)
    merged = tl.sum(means * share[:, None], axis=0) / tl.sum(share, axis=0)
    tl.store(out_ptr + row * DIM + at, merged, is_dim)


def rope_and_append(
    qkv: Tensor, weights: AttentionWeights, k_cache: Tensor, v_cache: Tensor, metadata: AttentionMetadata
) -> Tensor:
    """The rotated queries, float32 [T, heads, dim], of qkv [T, (heads + 2 kv_heads) * dim].

    Keys and values go into the step's slots of the cache.
    """
    w, num_tokens = weights, qkv.shape[0]
    query = torch.empty(num_tokens, w.num_heads, w.head_dim, device=qkv.device)
    rope_append[(num_tokens, w.num_heads + 2 * w.num_kv_heads)](
        qkv,
        qkv if w.q_norm is None else w.q_norm,
        qkv if w.k_norm is None else w.k_norm,
        metadata.positions,
        metadata.slot_mapping,
        w.cos,
        w.sin,
        query,
        k_cache,
        v_cache,
        w.eps,
        w.num_heads,
        w.num_kv_heads,
        k_cache.shape[-1],
        w.head_dim,
        triton.next_power_of_2(w.head_dim // 2),
        w.q_norm is not None,
        w.k_norm is not None,
        num_warps=1,
    )
    return query


def paged_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Causal attention of query [T, heads, head_dim] over the cache, float32 [T, heads, head_dim]."""
    num_tokens, num_heads, dim = query.shape
    num_kv_heads, block_size = k_cache.shape[1], k_cache.shape[-1]
    num_seqs, max_blocks = metadata.block_table.shape
    group = num_heads // num_kv_heads
    block_dim = max(16, triton.next_power_of_2(dim))
    most_rows = max(16, min(64, _TILE_VALUES // block_dim))
    tile = max(1, (16 if num_tokens <= 16 * num_seqs else most_rows) // group)
    rows = max(16, triton.next_power_of_2(tile * group))
    num_tiles = num_tokens // tile + num_seqs
    splits = min(
        _MAX_SPLITS,
        triton.cdiv(max_blocks * block_size, _KEYS_PER_SPLIT),
        max(1, _PROGRAMS // (num_tiles * num_kv_heads)),
    )
    parts = torch.empty(splits, num_tokens, num_heads, dim, device=query.device)
    lse = torch.empty(splits, num_tokens, num_heads, device=query.device)
    attend[(num_tiles, num_kv_heads, splits)](
        query.float().contiguous(),
        k_cache,
        v_cache,
        metadata.positions,
        metadata.query_start_loc,
        metadata.seq_lens,
        metadata.block_table.contiguous(),
        parts,
        lse,
        scale,
        window or 0,
        num_tokens,
        num_seqs,
        num_heads,
        num_kv_heads,
        max_blocks,
        block_size,
        splits,
        DIM=dim,
        BLOCK_DIM=block_dim,
        GROUP=group,
        TILE=tile,
        ROWS=rows,
        SEQS=triton.next_power_of_2(num_seqs),
        KEYS=max(16, min(32, _KEY_VALUES // block_dim)),
        HAS_WINDOW=window is not None,
        num_stages=2,
    )
    if splits == 1:
        return parts[0]
    out = torch.empty(num_tokens, num_heads, dim, device=query.device)
    num_rows = num_tokens * num_heads
    merge_splits[(num_rows,)](
        parts, lse, out, num_rows, splits, dim, block_dim, triton.next_power_of_2(splits), num_warps=1
    )
    return out
