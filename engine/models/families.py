"""The model families that are served: of each, what sets it apart from Llama, as a declaration.

Inside the engine a tensor has one name, Llama's in Hugging Face's spelling, such as
`model.layers.3.mlp.up_proj.weight`; experts are `mlp.experts.5.up_proj`, their router `mlp.gate`. A
declaration tells how a family's files name it, what a config.json may leave out, and the layers' features.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

WindowRule = Callable[[Mapping[str, Any], int], bool]
"""Whether a layer sees `sliding_window` tokens only, by config.json with its gaps filled and by its index."""


def _no_layer(raw: Mapping[str, Any], layer: int) -> bool:
    return False


def _every_layer(raw: Mapping[str, Any], layer: int) -> bool:
    return True


def _all_but_every_nth(raw: Mapping[str, Any], layer: int) -> bool:
    return (layer + 1) % int(raw["sliding_window_pattern"]) != 0


def _late_layers(raw: Mapping[str, Any], layer: int) -> bool:
    return bool(raw["use_sliding_window"]) and layer >= int(raw["max_window_layers"])


def _layers_without_rope(raw: Mapping[str, Any], layer: int) -> bool:
    return bool(raw["use_sliding_window"]) and not has_rope(raw, layer)


def has_rope(raw: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer rotates queries and keys, in a family with `has_nope_layers`."""
    rotates = raw.get("no_rope_layers")  # despite the name 1 where the layer rotates
    if rotates is not None:
        return bool(rotates[layer])
    return (layer + 1) % int(raw["no_rope_layer_interval"]) != 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What sets a family apart.

    architecture, model_type: Hugging Face's. gguf_architecture: of GGUF files. defaults: what transformers
    takes for keys that a config.json leaves out. is_windowed: which layers see a window only; `layer_types`
    comes first where has_layer_types. fused: stored modules that hold the rows of several, in this order.
    renames: replacements in Hugging Face names, where theirs are not Llama's. gguf_names: modules of a layer
    whose GGUF names are not Llama's. gguf_interleaves: GGUF files have the two rotary halves of each head's q
    and k rows interleaved. gguf_query_depth: number of layers of the one size whose attention scale is that
    of hidden_size / num_heads, not of head_dim, which GGUF does not tell. gguf_has_window: GGUF files tell
    the window; layers of other families see all tokens, as in llama.cpp.

    norm_offset: what is added to a stored norm weight (in GGUF files it has been). scales_embedding: by the
    root of hidden_size. has_query_scalar: `query_pre_attn_scalar` in place of head_dim. has_local_rope:
    windowed layers rotate with a base of their own. has_softcaps: of attention scores and logits.
    has_partial_rotary: a head's first dimensions alone may rotate. has_nope_layers: some layers do not
    rotate. has_experts: FFNs are routed.
    """

    architecture: str
    model_type: str
    gguf_architecture: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    is_windowed: WindowRule = _no_layer
    has_layer_types: bool = False
    activation_key: str = "hidden_act"
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    renames: Mapping[str, str] = field(default_factory=dict)
    gguf_names: Mapping[str, str] = field(default_factory=dict)
    gguf_interleaves: bool = False
    gguf_query_depth: int | None = None
    gguf_has_window: bool = False
    norm_offset: float = 0.0
    scales_embedding: bool = False
    has_query_scalar: bool = False
    has_qk_norm: bool = False
    has_post_norms: bool = False
    has_local_rope: bool = False
    has_softcaps: bool = False
    has_partial_rotary: bool = False
    has_nope_layers: bool = False
    has_experts: bool = False

    def filled(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """config.json with what it leaves out."""
        return {**_DEFAULTS, **self.defaults, **raw}

    def hf_name(self, name: str) -> str:
        """The Hugging Face name of a tensor."""
        for ours, theirs in self.renames.items():
            name = name.replace(ours, theirs)
        return name

    def fused_in(self, module: str) -> tuple[str, tuple[str, ...]] | None:
        """The stored module that holds a layer's module's rows, and all modules it holds; None: itself."""
        return next(((stored, parts) for stored, parts in self.fused.items() if module in parts), None)


_DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_theta": 10_000.0,
    "sliding_window": None,
    "use_sliding_window": False,
}
_POST_NORM_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_QWEN_DEFAULTS = {"sliding_window": 4096, "max_window_layers": 28}

LLAMA = Family(
    architecture="LlamaForCausalLM", model_type="llama", gguf_architecture="llama", gguf_interleaves=True
)
FAMILIES = (
    LLAMA,
    Family(
        architecture="MistralForCausalLM",
        model_type="mistral",
        gguf_architecture="mistral",
        gguf_interleaves=True,
        defaults={"sliding_window": 4096, "num_key_value_heads": 8},
        is_windowed=_every_layer,
    ),
    Family(
        architecture="MixtralForCausalLM",
        model_type="mixtral",
        gguf_architecture="llama",
        gguf_interleaves=True,
        defaults={
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        is_windowed=_every_layer,
        renames={
            ".mlp.": ".block_sparse_moe.",
            ".gate_proj.": ".w1.",
            ".up_proj.": ".w3.",
            ".down_proj.": ".w2.",
        },
        has_experts=True,
    ),
    Family(
        architecture="Phi3ForCausalLM",
        model_type="phi3",
        gguf_architecture="phi3",
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        is_windowed=_every_layer,
        fused={
            "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        },
        gguf_has_window=True,
        gguf_names={"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
        has_partial_rotary=True,
    ),
    Family(
        architecture="Qwen2ForCausalLM",
        model_type="qwen2",
        gguf_architecture="qwen2",
        defaults=_QWEN_DEFAULTS,
        is_windowed=_late_layers,
        has_layer_types=True,
    ),
    Family(
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        gguf_architecture="qwen3",
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        is_windowed=_late_layers,
        has_layer_types=True,
        has_qk_norm=True,
    ),
    Family(
        architecture="Gemma2ForCausalLM",
        model_type="gemma2",
        gguf_architecture="gemma2",
        defaults={
            "head_dim": 256,
            "tie_word_embeddings": True,
            "sliding_window": 4096,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        is_windowed=_all_but_every_nth,
        has_layer_types=True,
        activation_key="hidden_activation",
        gguf_names=_POST_NORM_NAMES,
        gguf_query_depth=46,
        gguf_has_window=True,
        norm_offset=1.0,
        scales_embedding=True,
        has_query_scalar=True,
        has_post_norms=True,
        has_softcaps=True,
    ),
    Family(
        architecture="Gemma3ForCausalLM",
        model_type="gemma3_text",
        gguf_architecture="gemma3",
        defaults={
            "head_dim": 256,
            "tie_word_embeddings": True,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10_000.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "query_pre_attn_scalar": 256,
        },
        is_windowed=_all_but_every_nth,
        has_layer_types=True,
        activation_key="hidden_activation",
        gguf_names=_POST_NORM_NAMES,
        gguf_query_depth=62,
        gguf_has_window=True,
        norm_offset=1.0,
        scales_embedding=True,
        has_query_scalar=True,
        has_qk_norm=True,
        has_post_norms=True,
        has_local_rope=True,
        has_softcaps=True,
    ),
    Family(
        architecture="SmolLM3ForCausalLM",
        model_type="smollm3",
        gguf_architecture="smollm3",
        gguf_interleaves=True,
        defaults={"tie_word_embeddings": True, "rope_theta": 2e6, "no_rope_layer_interval": 4},
        is_windowed=_layers_without_rope,
        has_layer_types=True,
        has_nope_layers=True,
    ),
)
SUPPORTED_ARCHITECTURES = tuple(family.architecture for family in FAMILIES)


def family_of(architecture: str) -> Family | None:
    """The family by Hugging Face's name; None where it is not served."""
    return next((f for f in FAMILIES if f.architecture == architecture), None)


def gguf_family(architecture: str, *, has_experts: bool) -> Family | None:
    """The family by a GGUF file's `general.architecture`; None where it is not served."""
    named = (f for f in FAMILIES if f.gguf_architecture == architecture)
    return next((f for f in named if f.has_experts == has_experts), None)


_LAYER = re.compile(r"(model\.layers\.\d+)\.(.+)\.(weight|bias)")


def split_name(name: str) -> tuple[str, str, str] | None:
    """A layer's tensor as (`model.layers.<i>`, module, weight or bias); None for all others."""
    match = _LAYER.fullmatch(name)
    return None if match is None else (match[1], match[2], match[3])
