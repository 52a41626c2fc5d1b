"""Every op in plain torch: the executable specification, and the fallback on any device."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from kernels.formats import PackedWeight, dequantize, take_rows
from kernels.types import AttentionMetadata, AttentionWeights, ExpertWeights, FFNWeights, MoEWeights, Weight

Linear = Callable[[Tensor, Weight, Tensor | None], Tensor]


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x [T, K] times weight [N, K] transposed, float32 [T, N]; computed in the weight's dtype."""
    dense = weight if isinstance(weight, Tensor) else dequantize(weight)
    out = functional.linear(x.to(dense.dtype), dense).float()
    return out if bias is None else out + bias


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (Zhang and Sennrich 2019) over the last dimension, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, heads, head_dim] by the tables' rows cos, sin [T, head_dim / 2] (rotate-half)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def append_kv(keys: Tensor, values: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write keys, values [T, kv_heads, head_dim] into their slots of the paged cache."""
    block_size = k_cache.shape[-1]
    block, offset = slot_mapping.long() // block_size, slot_mapping.long() % block_size
    k_cache[block, :, :, offset] = keys.to(k_cache.dtype)
    v_cache[block, :, offset] = values.to(v_cache.dtype)


def paged_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of query [T, heads, head_dim] over the cache, float32 [T, heads, head_dim]."""
    num_heads, num_kv_heads = query.shape[1], k_cache.shape[1]
    out = torch.empty_like(query, dtype=torch.float32)
    starts = metadata.query_start_loc.tolist()
    for i, seq_len in enumerate(metadata.seq_lens.tolist()):
        begin, end = starts[i], starts[i + 1]
        num_blocks = -(-seq_len // k_cache.shape[-1])
        blocks = metadata.block_table[i, :num_blocks].long()
        keys = k_cache[blocks].permute(1, 0, 3, 2).flatten(1, 2)[:, :seq_len].float()
        values = v_cache[blocks].transpose(0, 1).flatten(1, 2)[:, :seq_len].float()
        keys, values = (t.repeat_interleave(num_heads // num_kv_heads, dim=0) for t in (keys, values))
        distance = metadata.positions[begin:end, None] - torch.arange(seq_len, device=query.device)
        visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        scores = soft_cap(query[begin:end].transpose(0, 1).float() @ keys.transpose(1, 2) * scale, softcap)
        probs = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
        out[begin:end] = (probs @ values).transpose(0, 1)
    return out


def attention_block(
    x: Tensor, weights: AttentionWeights, k_cache: Tensor, v_cache: Tensor, metadata: AttentionMetadata
) -> None:
    """x [T, hidden] += attention(norm(x)), in place; the step's keys and values go into the cache.

    k_cache: [blocks, kv_heads, head_dim, block_size]; v_cache: [blocks, kv_heads, block_size, head_dim].
    """
    w, num_tokens = weights, x.shape[0]
    qkv = linear(rms_norm(x, w.norm, w.eps), w.qkv, w.qkv_bias)
    heads = qkv.view(num_tokens, w.num_heads + 2 * w.num_kv_heads, w.head_dim)
    query, keys, values = heads.split([w.num_heads, w.num_kv_heads, w.num_kv_heads], dim=1)
    if w.q_norm is not None:
        query = rms_norm(query, w.q_norm, w.eps)
    if w.k_norm is not None:
        keys = rms_norm(keys, w.k_norm, w.eps)
    positions = metadata.positions.long()
    cos, sin = w.cos[positions], w.sin[positions]
    query, keys = apply_rope(query, cos, sin), apply_rope(keys, cos, sin)
    append_kv(keys, values, k_cache, v_cache, metadata.slot_mapping)
    out = paged_attention(query, k_cache, v_cache, metadata, w.scale, w.window, w.softcap)
    add_projection(x, linear(out.flatten(1), w.o, w.o_bias), w.post_norm, w.eps)


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(x / cap); x itself without a cap."""
    return x if cap is None else (x / cap).tanh() * cap


def ffn_block(x: Tensor, weights: FFNWeights, linear: Linear = linear) -> None:
    """x [T, hidden] += down(act(gate(norm(x))) * up(norm(x))), in place (Shazeer 2020)."""
    w = weights
    gate, up = linear(rms_norm(x, w.norm, w.eps), w.gate_up, w.gate_up_bias).chunk(2, dim=-1)
    add_projection(x, linear(activate(gate, w.activation) * up, w.down, w.down_bias), w.post_norm, w.eps)


def moe_block(x: Tensor, weights: MoEWeights, linear: Linear = linear) -> None:
    """x [T, hidden] += each token's experts' outputs by their shares, in place, expert by expert."""
    normed = rms_norm(x, weights.norm, weights.eps)
    share, chosen = route(normed, weights.router, weights.num_experts_per_token)
    for index in chosen.unique().tolist():
        token, place = (chosen == index).nonzero(as_tuple=True)
        out = _expert(normed[token], weights.experts[index], weights.activation, linear)
        x.index_add_(0, token, (out * share[token, place, None]).to(x.dtype))


def route(x: Tensor, router: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Shares, which add up to 1, and indices of each token's experts, both [..., num_experts]."""
    share, chosen = functional.linear(x, router).softmax(dim=-1).topk(num_experts, dim=-1)
    return share / share.sum(dim=-1, keepdim=True), chosen


def _expert(x: Tensor, expert: ExpertWeights, activation: str, linear: Linear) -> Tensor:
    gate, up = linear(x, expert.gate_up, None).chunk(2, dim=-1)
    return linear(activate(gate, activation) * up, expert.down, None)


def activate(gate: Tensor, activation: str) -> Tensor:
    """silu, or gelu in its tanh form."""
    return functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")


def add_projection(x: Tensor, out: Tensor, post_norm: Tensor | None, eps: float) -> None:
    """x += out, through RMSNorm where the block has a norm behind it, in place."""
    x += out if post_norm is None else rms_norm(out, post_norm, eps)


def logits(x: Tensor, norm: Tensor, eps: float, head: Weight) -> Tensor:
    """float32 [R, vocab] for residual rows x [R, hidden]."""
    return linear(rms_norm(x, norm, eps), head)


def embed(token_ids: Tensor, table: Weight) -> Tensor:
    """float32 rows [T, hidden] of the embedding table for token_ids int64 [T]."""
    if isinstance(table, PackedWeight):
        return take_rows(table, token_ids)
    assert isinstance(table, Tensor), "an embedding table is one matrix"
    return functional.embedding(token_ids, table).float()
