"""One decoder layer at a time, in plain differentiable torch over whole sequences.

Quantization streams a model: a layer's weights are read, used and dropped. So the forward pass here works
on a single layer and on [B, T, hidden] activations, unlike the engine's (paged cache, in-place, all layers
loaded).
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from engine.checkpoint.loading import Checkpoint
from engine.models.config import ModelConfig
from engine.models.rope import LayerRopes
from kernels.reference import activate, rms_norm, route, soft_cap

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

Linear = Callable[[str, Tensor], Tensor]
Cached = Callable[[Tensor], Tensor]
"""What the KV cache makes of keys (rotated) or values [B, kv_heads, T, head_dim]."""


def shared_inputs(config: ModelConfig) -> tuple[tuple[str, ...], ...]:
    """Short names of a layer's linears, those together that read the same activations."""
    experts = [f"experts.{i}." for i in range(config.num_experts)] or [""]
    ffns = [((f"{e}gate_proj", f"{e}up_proj"), (f"{e}down_proj",)) for e in experts]
    return (_ATTENTION[:3], _ATTENTION[3:], *itertools.chain.from_iterable(ffns))


def linears(config: ModelConfig) -> tuple[str, ...]:
    """Short names of a layer's linears: q_proj to down_proj, or to experts.7.down_proj."""
    return tuple(itertools.chain.from_iterable(shared_inputs(config)))


def linear_name(layer: int, linear: str) -> str:
    """The engine's name of the weight, e.g. model.layers.3.mlp.up_proj.weight."""
    return f"model.layers.{layer}.{_parent(linear)}.{linear}.weight"


def _parent(linear: str) -> str:
    return "self_attn" if linear in _ATTENTION else "mlp"


def vector_names(checkpoint: Checkpoint, layer: int) -> list[str]:
    """Full names of a layer's norms and biases, and of its router, which stays in floats."""
    config, prefix = checkpoint.config, f"model.layers.{layer}"
    norms = ["input_layernorm", "post_attention_layernorm"]
    if config.has_post_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    if config.has_qk_norm:
        norms += ["self_attn.q_norm", "self_attn.k_norm"]
    if config.num_experts:
        norms.append("mlp.gate")
    biases = [f"{prefix}.{_parent(name)}.{name}.bias" for name in linears(config)]
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
        self._ropes = LayerRopes(self.config, sequence_length)

    def embedding(self) -> Tensor:
        """float32 [vocab, hidden]."""
        return self.tensor("model.embed_tokens.weight")

    def embed(self, token_ids: Tensor, table: Tensor) -> Tensor:
        return functional.embedding(token_ids, table) * self.config.embedding_scale

    def final_norm(self) -> Tensor:
        return self.tensor("model.norm.weight") + self.config.norm_offset

    def logits(self, normed: Tensor, head: Tensor) -> Tensor:
        """[..., vocab] of what `final_norm` put out."""
        return soft_cap(functional.linear(normed, head), self.config.final_softcap)

    def logit_slope(self, logits: Tensor) -> Tensor | float:
        """How far each moves when it moves before its soft cap."""
        cap = self.config.final_softcap
        return 1.0 if cap is None else 1 - (logits / cap).square()

    @property
    def is_tied(self) -> bool:
        return self.config.tie_word_embeddings or not self.checkpoint.has("lm_head.weight")

    def load(self, layer: int) -> LayerWeights:
        """Raises ModelLoadError when a tensor is missing or damaged."""
        matrices = {name: self.tensor(linear_name(layer, name)) for name in linears(self.config)}
        vectors = {}
        for name in vector_names(self.checkpoint, layer):
            parts = name.split(".")  # model.layers.<i>[.self_attn|.mlp].<name>.<weight|bias>
            short = f"{parts[-2]}.bias" if parts[-1] == "bias" else parts[-2]
            vectors[short] = self.tensor(name) + (self.config.norm_offset if "norm" in short else 0)
        return LayerWeights(matrices, vectors)

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
        out = (
            self._experts(normed, vectors["gate"], apply) if config.num_experts else self._ffn(normed, apply)
        )
        return x + (norm("post_feedforward_layernorm", out) if has_post else out)

    def _ffn(self, x: Tensor, apply: Linear, prefix: str = "") -> Tensor:
        gated = activate(apply(f"{prefix}gate_proj", x), self.config.activation)
        return apply(f"{prefix}down_proj", gated * apply(f"{prefix}up_proj", x))

    def _experts(self, x: Tensor, router: Tensor, apply: Linear) -> Tensor:
        """Every expert sees all tokens, zeros where they are not its own: so what linears read and put out
        has one shape, and tokens of others count nothing in sums over it."""
        share, chosen = route(x, router, self.config.num_experts_per_token)
        total = torch.zeros_like(x)
        for index in range(self.config.num_experts):
            is_own = chosen == index
            own = x * is_own.any(dim=-1, keepdim=True)
            weight = (share * is_own).sum(dim=-1, keepdim=True)
            total = total + weight * self._ffn(own, apply, f"experts.{index}.")
        return total

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
        cos, sin = self._ropes.of(layer)
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
        out = _attend(_rotate(query, cos, sin), keys, values, mask, config)
        return out.transpose(1, 2).reshape(batch, length, -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As many of the first dimensions as the tables have."""
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, config: ModelConfig) -> Tensor:
    """[B, heads, T, head_dim]; causal without a mask."""
    if config.attention_softcap is None:
        return functional.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            scale=config.attention_scale,
            enable_gqa=True,
        )
    group = config.num_heads // config.num_kv_heads
    keys, values = (t.repeat_interleave(group, dim=1) for t in (keys, values))
    scores = soft_cap(query @ keys.transpose(-1, -2) * config.attention_scale, config.attention_softcap)
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril() if mask is None else mask
    return scores.masked_fill(~visible, float("-inf")).softmax(dim=-1) @ values
