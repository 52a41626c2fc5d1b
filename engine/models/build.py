"""From a checkpoint to a model: fuse, place, and check every shape."""

from dataclasses import replace

import torch
from torch import Tensor

import kernels
from engine.checkpoint.loading import Checkpoint
from engine.errors import ModelLoadError
from engine.models.config import ModelConfig
from engine.models.llama import LlamaModel, LlamaWeights
from engine.models.rope import LayerRopes, rotary_order


def build_model(
    checkpoint: Checkpoint, *, max_model_len: int, dtype: torch.dtype, device: torch.device, keep_packed: bool
) -> LlamaModel:
    """Load a checkpoint's weights.

    Linear layers stay packed where `keep_packed` is set and the kernels know the format; all others become
    `dtype`. Norms and rotary tables are float32.

    Raises:
        ModelLoadError: a tensor is missing, damaged or of the wrong shape.
    """
    loader = WeightLoader(checkpoint, max_model_len, dtype, device, keep_packed)
    return LlamaModel(checkpoint.config, loader.weights())


class WeightLoader:
    """Reads a checkpoint part by part. Packed matrices stay on the CPU, where they may be a mapped file."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
        keep_packed: bool,
    ) -> None:
        self.checkpoint = checkpoint
        self.config: ModelConfig = checkpoint.config
        self.dtype, self.device, self.keep_packed = dtype, device, keep_packed
        self.ropes = LayerRopes(self.config, max_model_len, device, is_widened=True)
        self.rotary_order = rotary_order(self.config)

    def weights(self) -> LlamaWeights:
        """All of them, on the device."""
        embedding = _move(self.embedding(), self.device)
        head = self.head()
        return LlamaWeights(
            embedding=embedding,
            layers=tuple(_move_layer(self.layer(i), self.device) for i in range(self.config.num_layers)),
            final_norm=self.final_norm(),
            head=embedding if head is None else _move(head, self.device),
        )

    def embedding(self) -> kernels.Weight:
        config = self.config
        return self._linear([("model.embed_tokens", config.vocab_size)], config.hidden_size)

    def head(self) -> kernels.Weight | None:
        """None where it is the embedding."""
        config = self.config
        if config.tie_word_embeddings or not self.checkpoint.has("lm_head.weight"):
            return None
        return self._linear([("lm_head", config.vocab_size)], config.hidden_size)

    def final_norm(self) -> Tensor:
        return self._norm("model.norm", self.config.hidden_size)

    def layer(self, index: int) -> tuple[kernels.AttentionWeights, kernels.FeedForward]:
        return self._attention(index), self._experts(index) if self.config.num_experts else self._ffn(index)

    def _attention(self, layer: int) -> kernels.AttentionWeights:
        config, prefix = self.config, f"model.layers.{layer}"
        rows = [
            (f"{prefix}.self_attn.q_proj", config.q_size),
            (f"{prefix}.self_attn.k_proj", config.kv_size),
            (f"{prefix}.self_attn.v_proj", config.kv_size),
        ]
        out = [(f"{prefix}.self_attn.o_proj", config.hidden_size)]
        cos, sin = self.ropes.of(layer)
        has_qk, has_post = config.has_qk_norm, config.has_post_norms
        return kernels.AttentionWeights(
            norm=self._norm(f"{prefix}.input_layernorm", config.hidden_size),
            qkv=self._linear(rows, config.hidden_size),
            qkv_bias=self._bias(rows),
            o=self._linear(out, config.q_size),
            o_bias=self._bias(out),
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
            cos=cos,
            sin=sin,
            scale=config.attention_scale,
            window=config.window(layer),
            softcap=config.attention_softcap,
            q_norm=self._norm(f"{prefix}.self_attn.q_norm", config.head_dim) if has_qk else None,
            k_norm=self._norm(f"{prefix}.self_attn.k_norm", config.head_dim) if has_qk else None,
            post_norm=self._norm(f"{prefix}.post_attention_layernorm", config.hidden_size)
            if has_post
            else None,
        )

    def _ffn(self, layer: int) -> kernels.FFNWeights:
        config, prefix = self.config, f"model.layers.{layer}"
        gate_up, down = self._ffn_rows(f"{prefix}.mlp")
        has_post = config.has_post_norms
        norm = "pre_feedforward_layernorm" if has_post else "post_attention_layernorm"
        return kernels.FFNWeights(
            norm=self._norm(f"{prefix}.{norm}", config.hidden_size),
            gate_up=self._linear(gate_up, config.hidden_size),
            gate_up_bias=self._bias(gate_up),
            down=self._linear(down, config.intermediate_size),
            down_bias=self._bias(down),
            eps=config.rms_norm_eps,
            post_norm=self._norm(f"{prefix}.post_feedforward_layernorm", config.hidden_size)
            if has_post
            else None,
            activation=config.activation,
        )

    def _experts(self, layer: int) -> kernels.MoEWeights:
        config, prefix = self.config, f"model.layers.{layer}"

        def expert(index: int) -> kernels.ExpertWeights:
            gate_up, down = self._ffn_rows(f"{prefix}.mlp.experts.{index}")
            return kernels.ExpertWeights(
                self._linear(gate_up, config.hidden_size), self._linear(down, config.intermediate_size)
            )

        return kernels.MoEWeights(
            norm=self._norm(f"{prefix}.post_attention_layernorm", config.hidden_size),
            router=self._floats(f"{prefix}.mlp.gate.weight", (config.num_experts, config.hidden_size)),
            experts=tuple(map(expert, range(config.num_experts))),
            num_experts_per_token=config.num_experts_per_token,
            eps=config.rms_norm_eps,
            activation=config.activation,
        )

    def _ffn_rows(self, prefix: str) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
        """Modules of gate and up, and of down, with their rows."""
        gate_up = [(f"{prefix}.{name}_proj", self.config.intermediate_size) for name in ("gate", "up")]
        return gate_up, [(f"{prefix}.down_proj", self.config.hidden_size)]

    def _linear(self, modules: list[tuple[str, int]], in_features: int) -> kernels.Weight:
        """One matrix [sum of rows, in_features] from the modules' rows."""
        parts = [self._matrix(f"{name}.weight", rows, in_features) for name, rows in modules]
        packed = [p for p in parts if isinstance(p, kernels.PackedWeight)]
        if len(packed) == len(parts):
            return kernels.stack(packed)
        dense = [kernels.dequantize(p) if isinstance(p, kernels.PackedWeight) else p for p in parts]
        return torch.cat(dense).to(self.device, self.dtype).contiguous()

    def _matrix(self, name: str, rows: int, columns: int) -> Tensor | kernels.PackedWeight:
        weight = self.checkpoint.tensor(name, keep_packed=self.keep_packed)
        shape = (weight.n, weight.k) if isinstance(weight, kernels.PackedWeight) else tuple(weight.shape)
        if shape != (rows, columns):
            raise ModelLoadError(f"tensor {name} has shape {shape}, expected {(rows, columns)}")
        order = self._row_order(name, rows)
        if order is None:
            return weight
        return weight[order] if isinstance(weight, Tensor) else kernels.select_rows(weight, order)

    def _row_order(self, name: str, rows: int) -> Tensor | None:
        """Where the model reads the rows of a query's or key's projection, or its norm, in another order."""
        module = name.split(".")[-2]
        if self.rotary_order is None or module not in ("q_proj", "k_proj", "q_norm", "k_norm"):
            return None
        dim = self.config.head_dim
        return (torch.arange(0, rows, dim)[:, None] + self.rotary_order).flatten()

    def _norm(self, name: str, size: int) -> Tensor:
        weight = self._vector(f"{name}.weight", size)
        return weight + self.config.norm_offset if self.config.norm_offset else weight

    def _vector(self, name: str, size: int) -> Tensor:
        weight, order = self._floats(name, (size,)), self._row_order(name, size)
        return weight if order is None else weight[order.to(self.device)]

    def _floats(self, name: str, shape: tuple[int, ...]) -> Tensor:
        weight = self.checkpoint.tensor(name, keep_packed=False)
        assert isinstance(weight, Tensor)
        if tuple(weight.shape) != shape:
            raise ModelLoadError(f"tensor {name} has shape {tuple(weight.shape)}, expected {shape}")
        return weight.to(self.device, torch.float32)

    def _bias(self, modules: list[tuple[str, int]]) -> Tensor | None:
        present = [self.checkpoint.has(f"{name}.bias") for name, _ in modules]
        if not any(present):
            return None
        parts = [
            self._vector(f"{name}.bias", rows) if has else torch.zeros(rows, device=self.device)
            for (name, rows), has in zip(modules, present, strict=True)
        ]
        return torch.cat(parts)


def _move(weight: kernels.Weight, device: torch.device) -> kernels.Weight:
    if isinstance(weight, kernels.StackedWeight):
        return kernels.StackedWeight(tuple(replace(p, data=p.data.to(device)) for p in weight.parts))
    if isinstance(weight, kernels.PackedWeight):
        return replace(weight, data=weight.data.to(device))
    return weight.to(device)


def _move_layer(
    layer: tuple[kernels.AttentionWeights, kernels.FeedForward], device: torch.device
) -> tuple[kernels.AttentionWeights, kernels.FeedForward]:
    attention, ffn = layer
    attention = replace(attention, qkv=_move(attention.qkv, device), o=_move(attention.o, device))
    if isinstance(ffn, kernels.FFNWeights):
        return attention, replace(ffn, gate_up=_move(ffn.gate_up, device), down=_move(ffn.down, device))
    experts = (replace(e, gate_up=_move(e.gate_up, device), down=_move(e.down, device)) for e in ffn.experts)
    return attention, replace(ffn, experts=tuple(experts))
