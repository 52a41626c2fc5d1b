"""What GGUF files call tensors and hyperparameters, as config.json would have them."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.checkpoint.names import stored_tensor
from engine.errors import ModelLoadError
from engine.models.config import ModelConfig
from engine.models.families import FAMILIES, gguf_family, split_name
from engine.models.hf_config import from_hf_config

_TENSOR_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_MODULE_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj")

_REQUIRED = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
}
_OPTIONAL = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
}
_ROPE_PARAMS = {
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.attn_factor": "attention_factor",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}

Field = Callable[[str], Any]
"""Value of a metadata key, None where there is none."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies: all of `name`, `num_rows` rows of it from `first_row` on; or its expert."""

    name: str
    first_row: int = 0
    num_rows: int | None = None
    expert: int | None = None

    def apart(self) -> "GgufTensor":
        """An expert as the first converters stored it, a tensor of its own."""
        return GgufTensor(self.name.replace("_exps.", f".{self.expert}."))


def locate(name: str, config: ModelConfig) -> GgufTensor:
    """By the engine's name."""
    if name in _TENSOR_NAMES:
        return GgufTensor(_TENSOR_NAMES[name])
    where = stored_tensor(name, config)
    parts = split_name(where.name)
    if parts is None:
        return GgufTensor(name)
    layer, module, kind = parts
    block = f"blk.{layer.rpartition('.')[2]}"
    if expert := _EXPERT.fullmatch(module):
        return GgufTensor(f"{block}.ffn_{expert[2]}_exps.{kind}", expert=int(expert[1]))
    names = {**_MODULE_NAMES, **config.family.gguf_names}
    return GgufTensor(f"{block}.{names.get(module, '?')}.{kind}", where.first_row, where.num_rows)


def read_config(field: Field, tensors: Mapping[str, Any], path: Path) -> ModelConfig:
    """From metadata, and from tensors (by GGUF's names) whose presence tells what metadata does not.

    Raises ModelLoadError naming what is missing or not supported.
    """
    arch = field("general.architecture")
    family = gguf_family(str(arch), has_experts=bool(field(f"{arch}.expert_count")))
    if family is None:
        supported = ", ".join(dict.fromkeys(f.gguf_architecture for f in FAMILIES))
        with_experts = " with experts" if field(f"{arch}.expert_count") else ""
        raise ModelLoadError(
            f"{path}: GGUF architecture {arch!r}{with_experts} is not supported (supported: {supported})"
        )
    raw: dict[str, Any] = {"architectures": [family.architecture]}
    for key, name in _REQUIRED.items():
        if (value := field(f"{arch}.{key}")) is None:
            raise ModelLoadError(f"{path}: metadata {arch}.{key} is missing")
        raw[name] = value
    for key, name in _OPTIONAL.items():
        if (value := field(f"{arch}.{key}")) is not None:
            raw[name] = value
    if (embedding := tensors.get("token_embd.weight")) is None:
        raise ModelLoadError(f"{path}: tensor token_embd.weight is missing")
    raw["vocab_size"] = int(embedding.shape[1])
    raw["tie_word_embeddings"] = "output.weight" not in tensors
    raw["attention_bias"] = "blk.0.attn_q.bias" in tensors
    raw["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    head_dim = raw.setdefault("head_dim", raw["hidden_size"] // raw["num_attention_heads"])
    window = field(f"{arch}.attention.sliding_window") if family.gguf_has_window else None
    raw["sliding_window"] = window or None
    if family.has_query_scalar:
        is_odd_size = raw["num_hidden_layers"] == family.gguf_query_depth
        share = raw["hidden_size"] / raw["num_attention_heads"]
        raw["query_pre_attn_scalar"] = share if is_odd_size else head_dim
    raw["rope_scaling"] = scaling = _rope_scaling(field, arch, tensors)
    raw["original_max_position_embeddings"] = scaling.get("original_max_position_embeddings")
    rotary_dim = field(f"{arch}.rope.dimension_count")
    if family.has_partial_rotary and rotary_dim is not None:
        raw["partial_rotary_factor"] = rotary_dim / head_dim
    try:
        return replace(from_hf_config(raw), norm_offset=0.0)  # the converter has added it
    except ModelLoadError as error:
        raise ModelLoadError(f"{path}: {error}") from None


def _rope_scaling(field: Field, arch: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """As config.json has it; llama3's and LongRoPE's factors are tensors of divisors."""

    def values(name: str) -> list[float]:
        return [float(d) for d in tensors[name].data]

    params = {name: v for key, name in _ROPE_PARAMS.items() if (v := field(f"{arch}.{key}")) is not None}
    if "rope_freqs.weight" in tensors:
        return {"rope_type": "stretch", "divisors": values("rope_freqs.weight")}
    if "rope_factors_long.weight" in tensors:
        factors = {f"{n}_factor": values(f"rope_factors_{n}.weight") for n in ("long", "short")}
        params.pop("factor", None)  # LongRoPE's attention factor follows from the lengths
        return {"rope_type": "longrope", **params, **factors}
    kind = field(f"{arch}.rope.scaling.type") or "none"
    return {"rope_type": "default"} if kind == "none" else {"rope_type": str(kind), **params}
