"""Llama and its kin: GQA attention and gated FFN blocks over `kernels`' fused ops."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import kernels
from engine.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class LlamaWeights:
    """All of a checkpoint's tensors, fused the way the ops read them (no copy of any is kept elsewhere).

    `embedding` is [vocab, hidden]; `head` is the same object when the embeddings are tied.
    """

    embedding: kernels.Weight
    layers: tuple[tuple[kernels.AttentionWeights, kernels.FFNWeights], ...]
    final_norm: Tensor
    head: kernels.Weight


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
        return kernels.logits(x, weights.final_norm, self.config.rms_norm_eps, weights.head)
