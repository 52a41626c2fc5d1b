"""A model folder of one of our shapes, for dummy weights in any server: config.json and a tokenizer."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.checkpoint.loading import RANDOM_BITS_KEY
from engine.models.config import ModelConfig

_BOS, _EOS = "<s>", "</s>"
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"
)
_W4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 128,
                "dynamic": False,
                "actorder": None,
            },
        }
    },
}
WEIGHTS: dict[str, dict[str, Any] | None] = {
    "w4": _W4,  # 4-bit groups of 128, 16-bit head: 4.125 bits a weight of the layers
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "bf16": None,
}
"""What a peer is told about the weights that it makes up."""


def write_folder(directory: Path, config: ModelConfig, weights: str, bits: float) -> None:
    """Write config.json and the tokenizer. weights: of WEIGHTS; bits: of Peregrine's own random weights."""
    directory.mkdir(parents=True, exist_ok=True)
    raw: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
        RANDOM_BITS_KEY: bits,
    }
    if (scheme := WEIGHTS[weights]) is not None:
        raw["quantization_config"] = scheme
    (directory / "config.json").write_text(json.dumps(raw, indent=1) + "\n")
    PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(config.vocab_size),
        bos_token=_BOS,
        eos_token=_EOS,
        chat_template=_CHAT_TEMPLATE,
    ).save_pretrained(directory)


def _tokenizer(vocab_size: int) -> Tokenizer:
    """Bytes, and made-up words for the rest of the vocabulary: each random token becomes a piece of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = (f"Ġt{i}" for i in range(vocab_size - 2 - len(alphabet)))
    vocabulary = {token: i for i, token in enumerate([_BOS, _EOS, *alphabet, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
