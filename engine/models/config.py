"""What a Llama-family checkpoint says about its shape, whatever format it came in."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.errors import ModelLoadError

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: base and, for `kind` other than default, the scaling's own parameters."""

    theta: float = 10_000.0
    kind: str = "default"
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a decoder-only Transformer with GQA, RoPE, RMSNorm and SwiGLU."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    tie_word_embeddings: bool
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ModelLoadError(f"config: {name} must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ModelLoadError(
                f"config: num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ModelLoadError(f"config: head_dim must be even for rotary embedding, got {self.head_dim}")

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def num_kv_bytes_per_token(self, element_bytes: int) -> int:
        return 2 * self.num_layers * self.kv_size * element_bytes


def from_hf_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Read a config.json as transformers 4 (`rope_scaling`) or 5 (`rope_parameters`) writes it.

    Raises ModelLoadError naming what is missing or not supported.
    """
    architectures = raw.get("architectures") or ["?"]
    architecture = str(architectures[0])
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise ModelLoadError(
            f"architecture {architecture} is not supported (supported: {', '.join(SUPPORTED_ARCHITECTURES)})"
        )
    if (act := raw.get("hidden_act", "silu")) != "silu":
        raise ModelLoadError(f"config: hidden_act {act!r} is not supported (supported: silu)")
    try:
        num_heads = raw["num_attention_heads"]
        hidden_size = raw["hidden_size"]
        return ModelConfig(
            architecture=architecture,
            vocab_size=raw["vocab_size"],
            hidden_size=hidden_size,
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=raw.get("num_key_value_heads") or num_heads,
            head_dim=raw.get("head_dim") or hidden_size // num_heads,
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=raw["max_position_embeddings"],
            rope=_rope_from_hf(raw),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=bool(raw.get("attention_bias", False)),
            mlp_bias=bool(raw.get("mlp_bias", False)),
            sliding_window=raw.get("sliding_window") if architecture == "MistralForCausalLM" else None,
        )
    except KeyError as error:
        raise ModelLoadError(f"config: {error.args[0]} is missing") from None
    except (TypeError, ZeroDivisionError, ValueError) as error:
        raise ModelLoadError(f"config: {error}") from None


def _rope_from_hf(raw: Mapping[str, Any]) -> RopeConfig:
    params = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = params.pop("rope_theta", None) or raw.get("rope_theta") or 10_000.0
    legacy_kind = params.pop("type", None)
    kind = params.pop("rope_type", None) or legacy_kind or "default"
    # longrope keeps its training length beside, not inside, the scaling parameters.
    if original := raw.get("original_max_position_embeddings"):
        params.setdefault("original_max_position_embeddings", original)
    return RopeConfig(float(theta), str(kind), params)
