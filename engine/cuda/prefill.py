"""Prompt chunks in plain torch: dequantized matrices, cuBLAS products, library attention, paged KV cache."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import kernels
from engine.cuda.decode import Caches
from engine.cuda.transfer import upload
from engine.cuda.weights import DeviceWeights, matrix_of
from engine.models.config import ModelConfig
from kernels.cuda import tables
from kernels.cuda.packing import DeviceWeight
from kernels.cuda.program import BLOCK_TOKENS
from kernels.reference import activate, add_projection, apply_rope, rms_norm

_QUERY_ROWS = 512  # that share an explicit mask: bounds what mask and scores take


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` to `start` + len(token_ids) of the sequence in row `slot` of the block table."""

    slot: int
    start: int
    token_ids: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


class Prefill:
    """bfloat16 products with float32 sums; residual stream, norms and rotation in float32.

    Every matrix is dequantized into one scratch buffer, as large as the largest matrix, right before its use.
    """

    def __init__(
        self,
        weights: DeviceWeights,
        config: ModelConfig,
        caches: Caches,
        block_table: Tensor,
        device: torch.device,
    ) -> None:
        self._weights, self._config, self._caches = weights, config, caches
        self._block_table, self._device = block_table, device
        self._scratch = torch.empty(scratch_elements(weights), dtype=torch.bfloat16, device=device)

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Residual stream after the last layer, float32 [tokens, hidden], chunk by chunk; fills the cache."""
        config = self._config
        ids = np.concatenate([np.asarray(c.token_ids, dtype=np.int32) for c in chunks])
        positions = np.concatenate([np.arange(c.start, c.end) for c in chunks])
        slots = np.repeat([c.slot for c in chunks], [len(c.token_ids) for c in chunks])
        position, slot = upload(np.stack([positions, slots]), self._device)
        x = torch.empty(len(ids), config.hidden_size, device=self._device)
        tables.embed(upload(ids, self._device), self._weights.embedding, x, config.embedding_scale)
        block = self._block_table[slot, position // BLOCK_TOKENS].long()
        where = (block, position % BLOCK_TOKENS)
        for (attention, ffn), caches in zip(self._weights.layers, self._caches, strict=True):
            self._attention(x, attention, caches, chunks, position, where)
            self._ffn(x, ffn)
        return x

    def _attention(
        self,
        x: Tensor,
        w: kernels.AttentionWeights,
        caches: tuple[Tensor, Tensor],
        chunks: Sequence[Chunk],
        position: Tensor,
        where: tuple[Tensor, Tensor],
    ) -> None:
        """x [T, hidden] += attention of x. where: block and offset in it of every token's key and value."""
        qkv = self._linear(rms_norm(x, w.norm, w.eps), w.qkv, w.qkv_bias)
        heads = qkv.view(len(x), w.num_heads + 2 * w.num_kv_heads, w.head_dim)
        query, keys, values = heads.split([w.num_heads, w.num_kv_heads, w.num_kv_heads], dim=1)
        if w.q_norm is not None:
            query = rms_norm(query, w.q_norm, w.eps)
        if w.k_norm is not None:
            keys = rms_norm(keys, w.k_norm, w.eps)
        cos, sin = w.cos[position], w.sin[position]
        query, keys = apply_rope(query, cos, sin).bfloat16(), apply_rope(keys, cos, sin)
        k_cache, v_cache = caches
        block, offset = where
        k_cache[block, :, offset] = keys.bfloat16()
        v_cache[block, :, offset] = values.bfloat16()
        attended, first = [], 0
        for chunk in chunks:
            last = first + len(chunk.token_ids)
            attended.append(self._attend(query[first:last], w, caches, chunk))
            first = last
        add_projection(x, self._linear(torch.cat(attended).flatten(1), w.o, w.o_bias), w.post_norm, w.eps)

    def _attend(
        self, query: Tensor, w: kernels.AttentionWeights, caches: tuple[Tensor, Tensor], chunk: Chunk
    ) -> Tensor:
        """bfloat16 [tokens, heads, head_dim], like query: over the chunk's sequence up to its end."""
        first_seen = 0 if w.window is None else max(chunk.start - w.window + 1, 0)
        first_block = first_seen // BLOCK_TOKENS
        blocks = self._block_table[chunk.slot, first_block : -(-chunk.end // BLOCK_TOKENS)].long()
        first_key = first_block * BLOCK_TOKENS
        keys, values = (
            c[blocks].transpose(0, 1).flatten(1, 2)[:, : chunk.end - first_key].unsqueeze(0) for c in caches
        )
        queries = query.transpose(0, 1).unsqueeze(0)  # [1, heads, tokens, head_dim]
        if chunk.start == 0 and (w.window is None or chunk.end <= w.window):
            out = scaled_dot_product_attention(
                queries, keys, values, is_causal=True, scale=w.scale, enable_gqa=True
            )
        else:
            # With a mask, kernels that do not write all scores down want as many key heads as query heads.
            group = w.num_heads // w.num_kv_heads
            keys, values = (t.repeat_interleave(group, dim=1) for t in (keys, values))
            parts = []
            for begin in range(0, len(query), _QUERY_ROWS):
                part = queries[:, :, begin : begin + _QUERY_ROWS]
                mask = self._mask(chunk.start + begin, part.shape[2], first_key, chunk.end, w.window)
                parts.append(scaled_dot_product_attention(part, keys, values, attn_mask=mask, scale=w.scale))
            out = torch.cat(parts, dim=2)
        return out[0].transpose(0, 1)

    def _mask(self, start: int, num_queries: int, first_key: int, end: int, window: int | None) -> Tensor:
        """bool [queries, keys]: the queries from position `start` on see the keys of these positions."""
        queries = torch.arange(start, start + num_queries, device=self._device).unsqueeze(1)
        distance = queries - torch.arange(first_key, end, device=self._device)
        return distance >= 0 if window is None else (distance >= 0) & (distance < window)

    def _ffn(self, x: Tensor, w: kernels.FFNWeights) -> None:
        gate, up = self._linear(rms_norm(x, w.norm, w.eps), w.gate_up, w.gate_up_bias).chunk(2, dim=-1)
        gated = activate(gate, w.activation).mul_(up)
        add_projection(x, self._linear(gated, w.down, w.down_bias), w.post_norm, w.eps)

    def _linear(self, x: Tensor, weight: object, bias: Tensor | None) -> Tensor:
        """float32 [T, n] of x [T, k] times the matrix, transposed; products of bfloat16."""
        matrix, first = matrix_of(weight), 0
        out = torch.empty(len(x), matrix.n, device=x.device)
        x = x.bfloat16()
        for part in matrix.parts:
            dense = tables.dequantize(DeviceWeight((part,)), out=self._scratch)
            out[:, first : first + part.n] = x @ dense.T
            first += part.n
        return out if bias is None else out.add_(bias)


def scratch_elements(weights: DeviceWeights) -> int:
    """Elements of the largest matrix of any layer."""
    layers = [matrix_of(w) for a, f in weights.layers for w in (a.qkv, a.o, f.gate_up, f.down)]
    return max(p.n * p.k for matrix in layers for p in matrix.parts)


def workspace_bytes(config: ModelConfig, weights: DeviceWeights, num_tokens: int, max_model_len: int) -> int:
    """What a chunk of so many tokens takes beside weights and cache, scratch buffer included; rounded up."""
    widest = max(config.q_size + 2 * config.kv_size, 2 * config.intermediate_size)
    activations = num_tokens * (4 * config.hidden_size * 4 + 2 * widest * 4)
    # Gathered keys and values of one sequence, once for every query head, and a mask in two dtypes.
    context = max_model_len * 2 * 2 * (2 * config.kv_size + config.q_size)
    return 2 * scratch_elements(weights) + activations + context + _QUERY_ROWS * max_model_len * 4
