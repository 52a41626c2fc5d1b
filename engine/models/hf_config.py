"""Between config.json and a ModelConfig, both ways."""

from collections.abc import Mapping
from typing import Any

from engine.errors import ModelLoadError
from engine.models.config import Activation, ModelConfig, RopeConfig
from engine.models.families import SUPPORTED_ARCHITECTURES, Family, family_of, has_rope

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_OWN_LENGTH = ("llama3", "yarn", "longrope")
"""Rope types whose parameters speak of the length the model was trained at first."""


def from_hf_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Read a config.json as transformers 4 (`rope_scaling`) or 5 (`rope_parameters`) writes it.

    Raises ModelLoadError naming what is missing or not supported.
    """
    architectures = raw.get("architectures") or ["?"]
    architecture = str(architectures[0] if isinstance(architectures, list) else architectures)
    family = family_of(architecture)
    if family is None:
        raise ModelLoadError(
            f"architecture {architecture} is not supported (supported: {', '.join(SUPPORTED_ARCHITECTURES)})"
        )
    _refuse_unsupported(raw, family)
    raw = family.filled(raw)
    activation = raw[family.activation_key] or raw["hidden_act"]
    if activation not in _ACTIVATIONS:
        raise ModelLoadError(
            f"config: {family.activation_key} {activation!r} is not supported "
            f"(supported: {', '.join(_ACTIVATIONS)})"
        )
    try:
        num_heads, hidden_size = raw["num_attention_heads"], raw["hidden_size"]
        head_dim = raw["head_dim"] or hidden_size // num_heads
        rope = _rope_from_hf(raw, "full_attention")
        return ModelConfig(
            architecture=architecture,
            vocab_size=raw["vocab_size"],
            hidden_size=hidden_size,
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=raw["num_key_value_heads"] or num_heads,
            head_dim=head_dim,
            rms_norm_eps=float(raw["rms_norm_eps"]),
            max_position_embeddings=raw["max_position_embeddings"],
            rope=rope,
            tie_word_embeddings=bool(raw["tie_word_embeddings"]),
            attention_bias=bool(raw["attention_bias"]),
            mlp_bias=bool(raw["mlp_bias"]),
            windows=_windows_from_hf(raw, family),
            local_rope=_rope_from_hf(raw, "sliding_attention") if family.has_local_rope else None,
            activation=_ACTIVATIONS[activation],
            embedding_scale=float(hidden_size) ** 0.5 if family.scales_embedding else 1.0,
            norm_offset=family.norm_offset,
            query_scalar=float(raw["query_pre_attn_scalar"]) if family.has_query_scalar else None,
            has_qk_norm=family.has_qk_norm,
            has_post_norms=family.has_post_norms,
            rotary_dim=_rotary_dim(raw, head_dim),
            nope_layers=_nope_layers(raw) if family.has_nope_layers else frozenset(),
            attention_softcap=_softcap(raw, _SOFTCAPS[0]),
            final_softcap=_softcap(raw, _SOFTCAPS[1]),
            num_experts=raw["num_local_experts"] if family.has_experts else 0,
            num_experts_per_token=raw["num_experts_per_tok"] if family.has_experts else 0,
        )
    except KeyError as error:
        raise ModelLoadError(f"config: {error.args[0]} is missing") from None
    except (TypeError, ZeroDivisionError, ValueError, IndexError, OverflowError) as error:
        raise ModelLoadError(f"config: {error}") from None


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """A config.json that `from_hf_config` reads back to the same shape, norms stored the family's way."""
    family = config.family
    raw: dict[str, Any] = {
        "architectures": [config.architecture],
        "model_type": family.model_type,
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
        family.activation_key: next(name for name, own in _ACTIVATIONS.items() if own == config.activation),
        "sliding_window": next((w for w in config.windows if w is not None), None),
    }
    if original := config.rope.params.get("original_max_position_embeddings"):
        raw["original_max_position_embeddings"] = original
    if config.rotary_dim is not None:
        raw["rope_parameters"]["partial_rotary_factor"] = config.rotary_dim / config.head_dim
    if family.has_layer_types:
        raw["use_sliding_window"] = raw["sliding_window"] is not None
        kinds = (config.window(layer) for layer in range(config.num_layers))
        raw["layer_types"] = ["full_attention" if w is None else "sliding_attention" for w in kinds]
    if family.has_query_scalar:
        raw["query_pre_attn_scalar"] = config.query_scalar or config.head_dim
    if family.has_softcaps:
        raw |= dict(zip(_SOFTCAPS, (config.attention_softcap, config.final_softcap), strict=True))
    if family.has_nope_layers:
        raw["no_rope_layers"] = [int(i not in config.nope_layers) for i in range(config.num_layers)]
    if family.has_experts:
        raw["num_local_experts"] = config.num_experts
        raw["num_experts_per_tok"] = config.num_experts_per_token
    if config.local_rope is not None:
        raw["rope_parameters"] = {
            "full_attention": _rope_to_hf(config.rope),
            "sliding_attention": _rope_to_hf(config.local_rope),
        }
    return raw


def _rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    return {"rope_type": rope.kind, "rope_theta": rope.theta, **rope.params}


def _refuse_unsupported(raw: Mapping[str, Any], family: Family) -> None:
    features = ["use_bidirectional_attention", *(() if family.has_softcaps else _SOFTCAPS)]
    if not family.has_experts:
        features += ["num_local_experts", "num_experts"]
    for name in features:
        if raw.get(name):
            raise ModelLoadError(f"config: {name} is not supported for {family.architecture}")
    if not family.has_partial_rotary and _partial_rotary_factor(raw) != 1.0:
        raise ModelLoadError(f"config: partial_rotary_factor is not supported for {family.architecture}")


def _windows_from_hf(raw: Mapping[str, Any], family: Family) -> tuple[int | None, ...]:
    window, num_layers = raw["sliding_window"], raw["num_hidden_layers"]
    kinds = raw.get("layer_types") if family.has_layer_types else None
    if kinds is not None and set(kinds) - {"sliding_attention", "full_attention"}:
        raise ValueError(
            f"layer_types has {sorted(set(kinds))}, supported: full_attention, sliding_attention"
        )
    if kinds is None:
        is_windowed = [family.is_windowed(raw, layer) for layer in range(num_layers)]
    else:
        is_windowed = [kind == "sliding_attention" for kind in kinds]
    if window is None or not any(is_windowed):
        return ()
    return tuple(window if own else None for own in is_windowed)


def _nope_layers(raw: Mapping[str, Any]) -> frozenset[int]:
    return frozenset(i for i in range(raw["num_hidden_layers"]) if not has_rope(raw, i))


def _softcap(raw: Mapping[str, Any], name: str) -> float | None:
    return None if (cap := raw.get(name)) is None else float(cap)


def _partial_rotary_factor(raw: Mapping[str, Any]) -> float:
    params = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    return float(params.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0)


def _rotary_dim(raw: Mapping[str, Any], head_dim: int) -> int | None:
    factor = _partial_rotary_factor(raw)
    return None if factor == 1.0 else int(head_dim * factor)


def _rope_from_hf(raw: Mapping[str, Any], layer_type: str) -> RopeConfig:
    """`layer_type` matters where local and global layers rotate differently (Gemma 3)."""
    params = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    if isinstance(params.get(layer_type), Mapping):
        params = dict(params[layer_type])
    elif layer_type == "sliding_attention":
        return RopeConfig(float(raw["rope_local_base_freq"]))
    theta = params.pop("rope_theta", None) or raw["rope_theta"]
    legacy_kind = params.pop("type", None)
    kind = str(params.pop("rope_type", None) or legacy_kind or "default")
    params.pop("partial_rotary_factor", None)
    if kind == "su" or (kind == "yarn" and raw.get("model_type") == "phi3"):
        kind = "longrope"  # as the first Phi-3 files call it
    # Some families keep the training length beside the scaling parameters; that place comes first.
    if kind in _OWN_LENGTH and (original := raw.get("original_max_position_embeddings")):
        params["original_max_position_embeddings"] = original
    return RopeConfig(float(theta), kind, params)
