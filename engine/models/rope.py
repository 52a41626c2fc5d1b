"""Rotary position embedding: tables of all layers, and the scaling variants.

Sources: RoFormer (Su et al. 2021); position interpolation (Chen et al. 2023) for `linear`; YaRN (Peng et
al. 2023); LongRoPE (Ding et al. 2024); Llama 3.1's frequency bands, as published with its checkpoints.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from engine.errors import ModelLoadError
from engine.models.config import ModelConfig, RopeConfig

SUPPORTED_ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "stretch")


def rope_limit(config: ModelConfig) -> int:
    """Longest context the rotary embedding is defined for.

    `dynamic` (NTK) changes the frequencies of tokens already cached once its original length is passed,
    which no paged cache can follow; it is served up to that length, where it equals `default`.
    """
    if config.rope.kind == "dynamic":
        original = config.rope.params.get("original_max_position_embeddings")
        return int(original or config.max_position_embeddings)
    return config.max_position_embeddings


def rope_tables(
    config: ModelConfig, max_model_len: int, rope: RopeConfig | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [max_model_len, rotary_dim / 2], with the variant's attention factor folded in.

    `rope` stands in for the config's own, for layers that rotate differently.

    Raises ModelLoadError for an unknown variant or missing parameters.
    """
    inv_freq, factor = _frequencies(config, rope or config.rope, max_model_len)
    angles = torch.outer(torch.arange(max_model_len, dtype=torch.float32), inv_freq.float())
    return (angles.cos() * factor).contiguous(), (angles.sin() * factor).contiguous()


class LayerRopes:
    """cos and sin of every layer, float32 [max_model_len, dimensions / 2] on the device; layers share them.

    They cover the dimensions that rotate, none in a layer without rotary embedding; with `is_widened` all of
    head_dim, by angles of 0, for heads in `rotary_order`.
    """

    def __init__(
        self,
        config: ModelConfig,
        max_model_len: int,
        device: torch.device | None = None,
        *,
        is_widened: bool = False,
    ) -> None:
        self._config = config

        def tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            if is_widened:
                missing = (0, config.head_dim // 2 - cos.shape[1])
                cos, sin = functional.pad(cos, missing, value=1.0), functional.pad(sin, missing)
            return cos.to(device), sin.to(device)

        self._all = self._windowed = tables(*rope_tables(config, max_model_len))
        if config.local_rope is not None:
            self._windowed = tables(*rope_tables(config, max_model_len, config.local_rope))
        if config.nope_layers:
            self._none = tables(torch.empty(max_model_len, 0), torch.empty(max_model_len, 0))

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        if layer in self._config.nope_layers:
            return self._none
        return self._all if self._config.window(layer) is None else self._windowed


def rotary_order(config: ModelConfig) -> Tensor | None:
    """Order of a head's dimensions, int64 [head_dim], in which kernels can rotate its first rotary_dim alone.

    They rotate dimension i with i + head_dim / 2, a partial rotary embedding i with i + rotary_dim / 2; and
    scores do not change when queries and keys are reordered alike. None: as it is.
    """
    if config.rotary_dim is None or config.rotary_dim == config.head_dim:
        return None
    rotated, rest = torch.arange(config.rotary_dim), torch.arange(config.rotary_dim, config.head_dim)
    halves = zip(rotated.chunk(2), rest.chunk(2), strict=True)
    return torch.cat([part for half in halves for part in half])


def _frequencies(config: ModelConfig, rope: RopeConfig, max_model_len: int) -> tuple[Tensor, float]:
    dim = config.rotary_dim or config.head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    inv_freq = 1.0 / (rope.theta**exponents)
    match rope.kind:
        case "default" | "dynamic":
            return inv_freq, 1.0
        case "linear":
            return inv_freq / _number(rope.params, "factor"), 1.0
        case "stretch":  # GGUF stores llama3 and longrope as one divisor per frequency
            return inv_freq / _divisors(rope.params, "divisors", exponents), 1.0
        case "llama3":
            return _llama3(inv_freq, rope.params), 1.0
        case "yarn":
            return _yarn(inv_freq, rope.theta, dim, config.max_position_embeddings, rope.params)
        case "longrope":
            return _longrope(
                exponents, rope.theta, config.max_position_embeddings, max_model_len, rope.params
            )
    raise ModelLoadError(
        f"rope type {rope.kind!r} is not supported (supported: {', '.join(SUPPORTED_ROPE_KINDS)})"
    )


def _llama3(inv_freq: Tensor, params: Mapping[str, Any]) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, the band between interpolated."""
    factor = _number(params, "factor")
    low, high = _number(params, "low_freq_factor"), _number(params, "high_freq_factor")
    turns = _number(params, "original_max_position_embeddings") * inv_freq / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return inv_freq * keep + inv_freq / factor * (1 - keep)


def _yarn(
    inv_freq: Tensor, theta: float, dim: int, max_positions: int, params: Mapping[str, Any]
) -> tuple[Tensor, float]:
    original = float(params.get("original_max_position_embeddings") or max_positions)
    factor = _number(params, "factor")
    beta_fast, beta_slow = float(params.get("beta_fast") or 32), float(params.get("beta_slow") or 1)

    def dim_of(num_rotations: float) -> float:
        return dim * math.log(original / (num_rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim_of(beta_fast), dim_of(beta_slow)
    if params.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    interpolated = ramp.clamp(0.0, 1.0)
    scaled = inv_freq / factor * interpolated + inv_freq * (1 - interpolated)
    if (attention_factor := params.get("attention_factor")) is not None:
        return scaled, float(attention_factor)
    mscale, mscale_all = params.get("mscale"), params.get("mscale_all_dim")
    if mscale and mscale_all:
        return scaled, _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all)
    return scaled, _yarn_mscale(factor, 1.0)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(
    exponents: Tensor, theta: float, max_positions: int, max_model_len: int, params: Mapping[str, Any]
) -> tuple[Tensor, float]:
    """Per-dimension stretch; the long list serves contexts beyond the training length.

    One table serves all requests, so the list is chosen by `max_model_len`, not by each request's length.
    """
    original = _number(params, "original_max_position_embeddings")
    name = "long_factor" if max_model_len > original else "short_factor"
    stretch = _divisors(params, name, exponents)
    attention_factor = params.get("attention_factor")
    if attention_factor is None:
        scale = float(params.get("factor") or max_positions / original)
        attention_factor = 1.0 if scale <= 1 else math.sqrt(1 + math.log(scale) / math.log(original))
    return 1.0 / (stretch * theta**exponents), float(attention_factor)


def _divisors(params: Mapping[str, Any], name: str, exponents: Tensor) -> Tensor:
    values = torch.tensor(params.get(name) or [], dtype=torch.float32)
    if values.shape != exponents.shape:
        raise ModelLoadError(
            f"rope scaling: {name} must have {exponents.numel()} values, has {values.numel()}"
        )
    return values


def _number(params: Mapping[str, Any], name: str) -> float:
    value = params.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise ModelLoadError(f"rope scaling: {name} must be a positive number, got {value!r}")
    return float(value)
