"""One decoder layer at a time, in plain differentiable torch over whole sequences.

Quantization streams a model: a layer's weights are read, used and dropped. So the forward pass here works
on a single layer and on [B, T, hidden] activations, unlike the engine's (paged cache, in-place, all layers
loaded).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from engine.checkpoint.loading import Checkpoint
from engine.models.config import ModelConfig
from engine.models.rope import rope_tables
from kernels.reference import activate, rms_norm

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_MODULE = {name: "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn" for name in LINEARS}
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Linears that read the same activations."""

Linear = Callable[[str, Tensor], Tensor]
Cached = Callable[[Tensor], Tensor]
"""What the KV cache makes of keys (rotated) or values [B, kv_heads, T, head_dim]."""


def linear_name(layer: int, linear: str) -> str:
    """Hugging Face's name of the weight, e.g. model.layers.3.mlp.up_proj.weight."""
    return f"model.layers.{layer}.{_MODULE[linear]}.{linear}.weight"


def vector_names(checkpoint: Checkpoint, layer: int) -> list[str]:
    """Full names of a layer's norms and biases."""
    config, prefix = checkpoint.config, f"model.layers.{layer}"
    norms = ["input_layernorm", "post_attention_layernorm"]
    if config.has_post_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    if config.has_qk_norm:
        norms += ["self_attn.q_norm", "self_attn.k_norm"]
    biases = [f"{prefix}.{_MODULE[name]}.{name}.bias" for name in LINEARS]
    return [f"{prefix}.{name}.weight" for name in norms] + [b for b in biases if checkpoint.has(b)]


@dataclass(frozen=True, slots=True)
class Tree:
    """Continuations that share a prompt, in one sequence. positions: int64 [T]; visible: bool [T, T], which
    tokens (columns) a token (row) may attend to."""

    positions: Tensor
    visible: Tensor

    @classmethod
    def of(cls, prompt_length: int, lengths: Sequence[int]) -> "Tree":
        """A prompt and then continuations of these lengths, each of which sees the prompt and itself."""
        branch = torch.cat(
            [torch.zeros(prompt_length), *(torch.full((n,), i + 1.0) for i, n in enumerate(lengths))]
        )
        within = [torch.arange(n) + prompt_length for n in lengths]
        visible = (branch == branch[:, None]) | (branch == 0)
        return cls(torch.cat([torch.arange(prompt_length), *within]), visible.tril())


@dataclass(slots=True)
class LayerWeights:
    """One layer in float32. linears: [N, K] by short name; vectors: norms and biases by short name."""

    linears: dict[str, Tensor]
    vectors: dict[str, Tensor]


class DecoderLayers:
    """Loads layers of a checkpoint one by one and runs them."""

    def __init__(self, checkpoint: Checkpoint, sequence_length: int) -> None:
        self.checkpoint = checkpoint
        self.config: ModelConfig = checkpoint.config
        self._rope = rope_tables(self.config, sequence_length)
        self._local_rope = self._rope
        if self.config.local_rope is not None:
            self._local_rope = rope_tables(self.config, sequence_length, self.config.local_rope)

    def embedding(self) -> Tensor:
        """float32 [vocab, hidden]."""
        return self.tensor("model.embed_tokens.weight")

    def embed(self, token_ids: Tensor, table: Tensor) -> Tensor:
        return functional.embedding(token_ids, table) * self.config.embedding_scale

    def final_norm(self) -> Tensor:
        return self.tensor("model.norm.weight") + self.config.norm_offset

    @property
    def is_tied(self) -> bool:
        return self.config.tie_word_embeddings or not self.checkpoint.has("lm_head.weight")

    def load(self, layer: int) -> LayerWeights:
        """Raises ModelLoadError when a tensor is missing or damaged."""
        linears = {name: self.tensor(linear_name(layer, name)) for name in LINEARS}
        vectors = {}
        for name in vector_names(self.checkpoint, layer):
            parts = name.split(".")  # model.layers.<i>[.self_attn|.mlp].<name>.<weight|bias>
            is_bias = parts[-1] == "bias"
            short = f"{parts[-2]}.bias" if is_bias else parts[-2]
            vectors[short] = self.tensor(name) + (0 if is_bias else self.config.norm_offset)
        return LayerWeights(linears, vectors)

    def tensor(self, name: str) -> Tensor:
        tensor = self.checkpoint.tensor(name, keep_packed=False)
        assert isinstance(tensor, Tensor)
        return tensor

    def forward(
        self,
        layer: int,
        w: LayerWeights,
        x: Tensor,
        linear: Linear | None = None,
        tree: Tree | None = None,
        cached: tuple[Cached, Cached] | None = None,
    ) -> Tensor:
        """Residual stream [B, T, hidden] after the layer; `linear(name, x)` stands in for x W^T.

        Plain causal sequences, or with `tree` a prompt and its continuations. cached: of keys and of values,
        where the cache rounds them.
        """
        config, vectors = self.config, w.vectors

        def apply(name: str, value: Tensor) -> Tensor:
            y = functional.linear(value, w.linears[name]) if linear is None else linear(name, value)
            bias = vectors.get(f"{name}.bias")
            return y if bias is None else y + bias

        def norm(name: str, value: Tensor) -> Tensor:
            return rms_norm(value, vectors[name], config.rms_norm_eps)

        normed = norm("input_layernorm", x)
        attended = apply("o_proj", self._attention(layer, normed, apply, norm, tree, cached))
        has_post = config.has_post_norms
        x = x + (norm("post_attention_layernorm", attended) if has_post else attended)
        normed = norm("pre_feedforward_layernorm" if has_post else "post_attention_layernorm", x)
        gated = activate(apply("gate_proj", normed), config.activation) * apply("up_proj", normed)
        out = apply("down_proj", gated)
        return x + (norm("post_feedforward_layernorm", out) if has_post else out)

    def _attention(
        self,
        layer: int,
        x: Tensor,
        apply: Linear,
        norm: Linear,
        tree: Tree | None,
        cached: tuple[Cached, Cached] | None,
    ) -> Tensor:
        config, (batch, length) = self.config, x.shape[:2]

        def heads(name: str) -> Tensor:
            return apply(name, x).view(batch, length, -1, config.head_dim).transpose(1, 2)

        query, keys, values = heads("q_proj"), heads("k_proj"), heads("v_proj")
        if config.has_qk_norm:
            query, keys = norm("q_norm", query), norm("k_norm", keys)
        window = config.window(layer)
        cos, sin = self._rope if window is None else self._local_rope
        positions = torch.arange(length) if tree is None else tree.positions
        cos, sin = cos[positions], sin[positions]
        mask = None if tree is None else tree.visible
        if window is not None and window < length:
            distance = positions[:, None] - positions
            near = (distance >= 0) & (distance < window)
            mask = near if mask is None else near & mask
        keys = _rotate(keys, cos, sin)
        if cached is not None:
            keys, values = cached[0](keys), cached[1](values)
        out = functional.scaled_dot_product_attention(
            _rotate(query, cos, sin),
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            scale=config.attention_scale,
            enable_gqa=True,
        )
        return out.transpose(1, 2).reshape(batch, length, -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
