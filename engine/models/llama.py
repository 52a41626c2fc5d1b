"""Llama and its kin: blocks of GQA attention and of gated FFNs, one or routed, over `kernels`' ops."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import kernels
from engine.models.config import ModelConfig
from kernels.reference import soft_cap


@dataclass(frozen=True, slots=True)
class LlamaWeights:
    """All of a checkpoint's tensors, fused the way the ops read them (no copy of any is kept elsewhere).

    `embedding` is [vocab, hidden]; `head` is the same object when the embeddings are tied.
    """

    embedding: kernels.Weight
    layers: tuple[tuple[kernels.AttentionWeights, kernels.FeedForward], ...]
    final_norm: Tensor
    head: kernels.Weight

    def tensors(self) -> Iterator[kernels.Weight]:
        """All of them but the rotary tables, each once."""
        yield self.embedding
        yield self.final_norm
        if self.head is not self.embedding:
            yield self.head
        for a, ffn in self.layers:
            vectors: list[kernels.Weight | None]
            yield from (a.qkv, a.o, *self.ffn_matrices(ffn))
            vectors = [a.norm, a.qkv_bias, a.o_bias, a.q_norm, a.k_norm, a.post_norm, ffn.norm]
            if isinstance(ffn, kernels.FFNWeights):
                vectors += [ffn.gate_up_bias, ffn.down_bias, ffn.post_norm]
            else:
                vectors.append(ffn.router)
            yield from (v for v in vectors if v is not None)

    @staticmethod
    def ffn_matrices(ffn: kernels.FeedForward) -> list[kernels.Weight]:
        """gate_up and down, of every expert where there are several."""
        blocks = [ffn] if isinstance(ffn, kernels.FFNWeights) else ffn.experts
        return [w for block in blocks for w in (block.gate_up, block.down)]


@dataclass(frozen=True, slots=True)
class KVCache:
    """Paged keys and values of every layer.

    Keys: [num_blocks, num_kv_heads, head_dim, block_size]; values: [num_blocks, num_kv_heads, block_size,
    head_dim].
    """

    layers: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def allocate(
        cls, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> "KVCache":
        heads, dim = config.num_kv_heads, config.head_dim

        def zeros(*shape: int) -> Tensor:
            if device.type == "cpu" and dtype == torch.float32:
                # NumPy's zeros are fresh pages: memory is taken block by block as requests fill it.
                return torch.from_numpy(np.zeros(shape, dtype=np.float32))
            return torch.zeros(shape, dtype=dtype, device=device)

        def layer() -> tuple[Tensor, Tensor]:
            return zeros(num_blocks, heads, dim, block_size), zeros(num_blocks, heads, block_size, dim)

        return cls(tuple(layer() for _ in range(config.num_layers)))


class LlamaModel:
    """Forward pass over one step's tokens."""

    def __init__(self, config: ModelConfig, weights: LlamaWeights) -> None:
        self.config = config
        self.weights = weights

    def forward(self, token_ids: Tensor, kv_cache: KVCache, metadata: kernels.AttentionMetadata) -> Tensor:
        """Residual stream after the last layer, [T, hidden], for token_ids [T]; fills the KV cache."""
        x = kernels.embed(token_ids, self.weights.embedding)
        if self.config.embedding_scale != 1.0:
            x *= self.config.embedding_scale
        kernels.decoder_layers(x, self.weights.layers, kv_cache.layers, metadata)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """float32 [R, vocab] for residual rows x [R, hidden]."""
        weights = self.weights
        logits = kernels.logits(x, weights.final_norm, self.config.rms_norm_eps, weights.head)
        return soft_cap(logits, self.config.final_softcap)
