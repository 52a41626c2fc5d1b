"""Small random models of every family, with all of the family's features on."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 199
WINDOW = 32
ORIGINAL_LENGTH = 64
"""What scaled rotary embeddings were trained for; prompts are longer, than the window too."""

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,  # wide enough that the logits differ clearly
    "pad_token_id": None,  # its embedding would be zero, at which RMSNorm is all but a step
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_THETA = 10_000.0
_EMBEDDING_SHARE = 8.0


@dataclass(frozen=True, slots=True)
class SmallModel:
    """A model to be. name: as people call the family; kind: transformers' config class without "Config".

    features: what sets it apart, for the table. values: of the config.
    """

    name: str
    kind: str
    features: str
    values: dict[str, Any] = field(default_factory=dict)

    def build(self, *, for_gguf: bool = False) -> PreTrainedModel:
        """float32, attention in plain torch; norms and biases random as well.

        for_gguf: without what GGUF files do not tell: windows of most families, the scale of scores.
        """
        values = {**_SIZES, **self.values}
        if for_gguf and self.kind not in _WINDOWED_GGUF:
            values |= {"sliding_window": None, "use_sliding_window": False}
        if for_gguf and "query_pre_attn_scalar" in values:
            values["query_pre_attn_scalar"] = values["head_dim"]
        config_class = getattr(transformers, f"{self.kind}Config")
        model_class = getattr(transformers, f"{_MODEL_KIND.get(self.kind, self.kind)}ForCausalLM")
        torch.manual_seed(0)
        config = config_class(**values)
        config._attn_implementation = "eager"  # the others leave out soft caps
        model: PreTrainedModel = model_class(config).float().eval()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                center = 0.0 if self.kind.startswith("Gemma") else 1.0
                torch.nn.init.normal_(parameter, center, 0.3)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
        if config.tie_word_embeddings:  # else the last token's own row wins, whatever the layers say
            model.get_input_embeddings().weight.data /= _EMBEDDING_SHARE
            model.get_decoder().norm.weight.data += _EMBEDDING_SHARE - 1
        return model


_MODEL_KIND = {"Gemma3Text": "Gemma3"}
_WINDOWED_GGUF = ("Phi3", "Gemma2", "Gemma3Text")


def _scaled(kind: str, **params: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": _THETA, **params}}


def _longrope(num_factors: int, **others: Any) -> dict[str, Any]:
    scaling = _scaled(
        "longrope",
        short_factor=[1.0 + 0.05 * i for i in range(num_factors)],
        long_factor=[1.5 + 0.5 * i for i in range(num_factors)],
        **others,
    )
    return {**scaling, "original_max_position_embeddings": ORIGINAL_LENGTH}


_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL_LENGTH,
}
_YARN = {"factor": 8.0, "original_max_position_embeddings": ORIGINAL_LENGTH}
_SOME_WINDOWED = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}

MODELS = (
    SmallModel("Llama 2", "Llama", "multi-head attention", {"num_key_value_heads": 4}),
    SmallModel("Llama 3", "Llama", "grouped heads", _scaled("default", rope_theta=500_000.0)),
    SmallModel(
        "Llama 3.1, 3.2",
        "Llama",
        "llama3 rope, tied embeddings",
        {**_scaled("llama3", factor=8.0, **_LLAMA3), "tie_word_embeddings": True},
    ),
    SmallModel(
        "Llama (linear)",
        "Llama",
        "linear rope, biases",
        _scaled("linear", factor=4.0) | {"attention_bias": True, "mlp_bias": True},
    ),
    SmallModel(
        "Llama (dynamic)", "Llama", "dynamic rope up to the first length", _scaled("dynamic", factor=2.0)
    ),
    SmallModel("Llama (yarn)", "Llama", "yarn rope", _scaled("yarn", **_YARN)),
    SmallModel(
        "SmolLM2",
        "Llama",
        "three heads a group, tied embeddings",
        {"hidden_size": 96, "num_attention_heads": 6, "tie_word_embeddings": True},
    ),
    SmallModel("Mistral", "Mistral", "sliding window", {"sliding_window": WINDOW}),
    SmallModel(
        "Mistral Large 2",
        "Mistral",
        "heads wider than hidden / heads",
        {
            "sliding_window": None,
            "head_dim": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    SmallModel(
        "Mixtral",
        "Mixtral",
        "8 experts, 2 a token, sliding window",
        {"sliding_window": WINDOW, "num_hidden_layers": 2},
    ),
    SmallModel(
        "Phi-3 mini",
        "Phi3",
        "fused projections, LongRoPE, sliding window",
        {"num_key_value_heads": 4, "sliding_window": WINDOW, **_longrope(8)},
    ),
    SmallModel("Phi-3 medium", "Phi3", "fused projections, LongRoPE, grouped heads", _longrope(8)),
    SmallModel(
        "Phi-4 mini",
        "Phi3",
        "fused projections, LongRoPE over 3/4 of a head, tied",
        {"tie_word_embeddings": True, **_longrope(6, partial_rotary_factor=0.75)},
    ),
    SmallModel("Qwen2", "Qwen2", "q, k, v biases, window in the later layers", _SOME_WINDOWED),
    SmallModel(
        "Qwen2.5",
        "Qwen2",
        "q, k, v biases, yarn rope, tied embeddings",
        {"tie_word_embeddings": True, **_scaled("yarn", **_YARN)},
    ),
    SmallModel(
        "Qwen3",
        "Qwen3",
        "q and k norms, wide heads, window in the later layers",
        {"head_dim": 32, **_SOME_WINDOWED},
    ),
    SmallModel(
        "Gemma 2",
        "Gemma2",
        "soft caps, window in every other layer, norms behind blocks",
        {
            "head_dim": 32,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    SmallModel(
        "Gemma 3",
        "Gemma3Text",
        "q and k norms, five local layers to a global one, two rope bases",
        {"head_dim": 32, "sliding_window": WINDOW, "query_pre_attn_scalar": 24, "num_hidden_layers": 7},
    ),
    SmallModel(
        "SmolLM3",
        "SmolLM3",
        "layers without rope, windowed",
        {"use_sliding_window": True, "sliding_window": WINDOW, "tie_word_embeddings": True},
    ),
)


def save(model: PreTrainedModel, directory: Path) -> Path:
    """A Hugging Face directory, its tokenizer one of single bytes, the printable ones of ASCII first."""
    model.save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:VOCAB_SIZE]
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    return directory
