"""A transformers model as a GGUF file, in llama.cpp's conventions; names are the gguf library's own."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

_ARCHITECTURES = {"mistral": "llama", "mixtral": "llama", "gemma3_text": "gemma3"}
"""Where GGUF's name is not Hugging Face's model_type."""
_INTERLEAVED = ("llama", "smollm3")
_WITH_OFFSET = ("gemma2", "gemma3")
_QUANTIZABLE = 32  # columns, at least
_ROPE_TYPES = {"linear": gguf.RopeScalingType.LINEAR, "yarn": gguf.RopeScalingType.YARN}


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor of the file. parameter: the model's own, whose rows the file has in `order`, plus `offset`."""

    name: str
    parameter: Tensor
    order: Tensor | None = None
    offset: float = 0.0


@torch.no_grad()
def write(model: PreTrainedModel, path: Path, kind: gguf.GGMLQuantizationType) -> None:
    """Write the file; the model's own matrices become what the file holds, rounded to `kind`."""
    config = model.config
    arch = _ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(str(path), arch)
    _write_metadata(writer, config, arch)
    for name, values in _rope_factors(config, arch).items():
        writer.add_tensor(name, np.asarray(values, dtype=np.float32))
    for entry in _entries(model, arch):
        own = entry.parameter if entry.order is None else entry.parameter[entry.order]
        data = (own + entry.offset).numpy()
        if data.ndim == 1 or kind == gguf.GGMLQuantizationType.F32 or "gate_inp" in entry.name:
            writer.add_tensor(entry.name, data)
            continue
        quantized = gguf.quants.quantize(data, kind)
        stored = torch.from_numpy(gguf.quants.dequantize(quantized, kind).copy()).view(own.shape)
        if entry.order is None:
            entry.parameter.copy_(stored)
        else:
            entry.parameter[entry.order] = stored
        writer.add_tensor(entry.name, quantized, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _entries(model: PreTrainedModel, arch: str) -> Iterator[_Entry]:
    config = model.config
    kinds = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[arch], config.num_hidden_layers)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if ".mlp.experts." in name:  # gate_up_proj, down_proj: [experts, rows, columns]
            block = f"blk.{name.split('.')[2]}.ffn"
            if name.endswith("down_proj"):
                yield _Entry(f"{block}_down_exps.weight", parameter)
            else:
                for part, rows in zip(("gate", "up"), parameter.chunk(2, dim=1), strict=True):
                    yield _Entry(f"{block}_{part}_exps.weight", rows)
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, f"gguf has no name for {name}"
        order = None
        if arch in _INTERLEAVED and (".q_proj." in name or ".k_proj." in name):
            order = torch.arange(len(parameter)).view(-1, 2, head_dim // 2).transpose(1, 2).flatten()
        yield _Entry(stored, parameter, order, float(arch in _WITH_OFFSET and "norm" in name))


def _write_metadata(writer: gguf.GGUFWriter, config: Any, arch: str) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_eos_token_id(config.eos_token_id)
    if getattr(config, "num_local_experts", None):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if arch in (*_WITH_OFFSET, "phi3") and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * (rope.get("partial_rotary_factor") or 1)))
    if (kind := rope["rope_type"]) in _ROPE_TYPES:
        writer.add_rope_scaling_type(_ROPE_TYPES[kind])
        writer.add_rope_scaling_factor(rope["factor"])
    if (original := rope.get("original_max_position_embeddings")) is not None:
        writer.add_rope_scaling_orig_ctx_len(original)


def _rope_factors(config: Any, arch: str) -> dict[str, Any]:
    """Divisors of the frequencies, which GGUF stores as tensors."""
    rope = config.rope_parameters
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{n}.weight": rope[f"{n}_factor"] for n in ("long", "short")}
    if rope.get("rope_type") == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = rope["rope_theta"] ** -(torch.arange(0, 2 * len(scaled), 2).float() / (2 * len(scaled)))
        return {"rope_freqs.weight": plain / scaled}
    return {}
