"""What a Llama-family checkpoint says about its shape, whatever format it came in."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.errors import ModelLoadError

Activation = Literal["silu", "gelu_tanh"]
SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Gemma3ForCausalLM")
_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: base and, for `kind` other than default, the scaling's own parameters."""

    theta: float = 10_000.0
    kind: str = "default"
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a decoder-only Transformer with GQA, RoPE, RMSNorm and a gated FFN.

    windows: for each layer how many tokens back it sees (None: all); layers with a window use `local_rope`
    where it is given. norm_offset: what is added to a stored norm weight. attention_scale: of the scores.
    has_qk_norm: RMSNorm over each query and key head. has_post_norms: RMSNorm behind each block.
    """

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
    windows: tuple[int | None, ...] = ()
    local_rope: RopeConfig | None = None
    activation: Activation = "silu"
    embedding_scale: float = 1.0
    norm_offset: float = 0.0
    query_scalar: float | None = None
    has_qk_norm: bool = False
    has_post_norms: bool = False

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
        if self.windows and len(self.windows) != self.num_layers:
            raise ModelLoadError(
                f"config: layer_types has {len(self.windows)} entries for {self.num_layers} layers"
            )
        if any(window is not None and window < 1 for window in self.windows):
            raise ModelLoadError("config: sliding_window must be positive")
        if self.head_dim % 2:
            raise ModelLoadError(f"config: head_dim must be even for rotary embedding, got {self.head_dim}")

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def attention_scale(self) -> float:
        return float(self.query_scalar or self.head_dim) ** -0.5

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

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
    is_gemma = architecture == "Gemma3ForCausalLM"
    act = (
        raw.get("hidden_activation") or raw.get("hidden_act") or ("gelu_pytorch_tanh" if is_gemma else "silu")
    )
    if act not in _ACTIVATIONS:
        raise ModelLoadError(
            f"config: hidden_act {act!r} is not supported (supported: {', '.join(_ACTIVATIONS)})"
        )
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if raw.get(name):
            raise ModelLoadError(f"config: {name} is not supported")
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
            rope=_rope_from_hf(raw, "full_attention"),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", is_gemma)),
            attention_bias=bool(raw.get("attention_bias", False)),
            mlp_bias=bool(raw.get("mlp_bias", False)),
            windows=_windows_from_hf(raw, architecture),
            activation=_ACTIVATIONS[act],
            **(_gemma3_fields(raw) if is_gemma else {}),
        )
    except KeyError as error:
        raise ModelLoadError(f"config: {error.args[0]} is missing") from None
    except (TypeError, ZeroDivisionError, ValueError) as error:
        raise ModelLoadError(f"config: {error}") from None


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """A config.json that `from_hf_config` reads back to the same shape, norms stored the family's way."""
    is_gemma = config.architecture == "Gemma3ForCausalLM"
    raw: dict[str, Any] = {
        "architectures": [config.architecture],
        "model_type": {"Gemma3ForCausalLM": "gemma3_text", "MistralForCausalLM": "mistral"}.get(
            config.architecture, "llama"
        ),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "rope_parameters": _rope_to_hf(config.rope),
        ("hidden_activation" if is_gemma else "hidden_act"): next(
            name for name, own in _ACTIVATIONS.items() if own == config.activation
        ),
    }
    if config.windows:
        raw["sliding_window"] = next((w for w in config.windows if w is not None), None)
    if is_gemma:
        raw["layer_types"] = ["full_attention" if w is None else "sliding_attention" for w in config.windows]
        raw["query_pre_attn_scalar"] = config.query_scalar or config.head_dim
        assert config.local_rope is not None
        raw["rope_parameters"] = {
            "full_attention": _rope_to_hf(config.rope),
            "sliding_attention": _rope_to_hf(config.local_rope),
        }
    return raw


def _rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    return {"rope_type": rope.kind, "rope_theta": rope.theta, **rope.params}


def _windows_from_hf(raw: Mapping[str, Any], architecture: str) -> tuple[int | None, ...]:
    window, num_layers = raw.get("sliding_window"), raw["num_hidden_layers"]
    if window is None or architecture == "LlamaForCausalLM":
        return ()
    if architecture == "MistralForCausalLM":
        return (window,) * num_layers
    pattern = int(raw.get("sliding_window_pattern") or 6)
    kinds = raw.get("layer_types") or [
        "sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(num_layers)
    ]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _gemma3_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "local_rope": _rope_from_hf(raw, "sliding_attention"),
        "embedding_scale": float(raw["hidden_size"]) ** 0.5,
        "norm_offset": 1.0,
        "query_scalar": float(raw.get("query_pre_attn_scalar", 256)),
        "has_qk_norm": True,
        "has_post_norms": True,
    }


def _rope_from_hf(raw: Mapping[str, Any], layer_type: str) -> RopeConfig:
    """`layer_type` matters where local and global layers rotate differently (Gemma 3)."""
    params = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    if isinstance(params.get(layer_type), Mapping):
        params = dict(params[layer_type])
    elif layer_type == "sliding_attention":
        return RopeConfig(float(raw.get("rope_local_base_freq") or 10_000.0))
    default = 1_000_000.0 if "query_pre_attn_scalar" in raw else 10_000.0
    theta = params.pop("rope_theta", None) or raw.get("rope_theta") or default
    legacy_kind = params.pop("type", None)
    kind = params.pop("rope_type", None) or legacy_kind or "default"
    # longrope keeps its training length beside, not inside, the scaling parameters.
    if original := raw.get("original_max_position_embeddings"):
        params.setdefault("original_max_position_embeddings", original)
    return RopeConfig(float(theta), str(kind), params)
