"""What the fused ops take: weights of a block, and where a step's tokens lie in the KV cache."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kernels.formats import PackedWeight, StackedWeight

Weight = Tensor | PackedWeight | StackedWeight
"""A linear layer's [N, K] matrix, dense or packed, or packed matrices of different formats along N."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class AttentionWeights:
    """One attention block: norm, fused QKV (rows of q, k, v), rotary tables, output projection.

    norm: float32 [hidden]. qkv: [(heads + 2 kv_heads) * head_dim, hidden]. o: [hidden, heads * head_dim].
    cos, sin: float32 [max positions, head_dim / 2], for the rotate-half convention. window: keys further
    back than this many tokens are not seen (None: all are). softcap: c, where scores s (scaled) become
    c tanh(s / c). q_norm, k_norm: float32 [head_dim], RMSNorm
    over each head before the rotation. post_norm: float32 [hidden], RMSNorm of the block's output before it
    is added to the residual stream.
    """

    norm: Tensor
    qkv: Weight
    o: Weight
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    cos: Tensor
    sin: Tensor
    scale: float
    qkv_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    post_norm: Tensor | None = None
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class FFNWeights:
    """One gated block: norm, fused gate and up (rows of gate, then up), down projection.

    norm: float32 [hidden]. gate_up: [2 ffn, hidden]. down: [hidden, ffn]. post_norm: as in AttentionWeights.
    """

    norm: Tensor
    gate_up: Weight
    down: Weight
    eps: float
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    post_norm: Tensor | None = None
    activation: Literal["silu", "gelu_tanh"] = "silu"


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert: gate_up [2 ffn, hidden], rows of gate, then up; down [hidden, ffn]."""

    gate_up: Weight
    down: Weight


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class MoEWeights:
    """One block of routed experts (Jiang et al. 2024): each token's FFN is the mean of its best experts'.

    norm: float32 [hidden]. router: float32 [experts, hidden]. num_experts_per_token: how many are taken, by
    the router's softmax, which weighs them in proportion.
    """

    norm: Tensor
    router: Tensor
    experts: tuple[ExpertWeights, ...]
    num_experts_per_token: int
    eps: float
    activation: Literal["silu", "gelu_tanh"] = "silu"


FeedForward = FFNWeights | MoEWeights
"""What follows a layer's attention."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class AttentionMetadata:
    """One step over S sequences and T tokens, all int32; decodes and prefill chunks mix freely.

    positions [T]; slot_mapping [T]: block_id * block_size + offset where each token's key and value go;
    query_start_loc [S + 1]: first token of each sequence; seq_lens [S]: context length, this step's tokens
    included; block_table [S, max blocks].
    """

    positions: Tensor
    slot_mapping: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
