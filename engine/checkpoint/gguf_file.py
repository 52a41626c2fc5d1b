"""GGUF files of the llama and gemma3 architectures (format: ggml's GGUF specification, version 3)."""

import contextlib
import hashlib
import os
import tempfile
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

import kernels
from engine.errors import ModelLoadError
from engine.models.config import ModelConfig, RopeConfig
from kernels.cache import cache_directory

_TENSOR_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
_LLAMA_NAMES = {**_LAYER_NAMES, "post_attention_layernorm": "ffn_norm"}
_GEMMA3_NAMES = {
    **_LAYER_NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_GEMMA3_27B_LAYERS = 62  # the one size whose attention scale is not that of head_dim
_GEMMA3_GLOBAL_EVERY = 6
_GEMMA3_LOCAL_ROPE = RopeConfig(10_000.0)


class GgufCheckpoint:
    """Tensors under Hugging Face's names, in Hugging Face's row order."""

    def __init__(self, path: Path) -> None:
        self.path = path

    # Reading the header takes seconds (every token is an entry), so that it waits until it is needed.
    @cached_property
    def _reader(self) -> gguf.GGUFReader:
        try:
            return gguf.GGUFReader(str(self.path))
        except Exception as error:  # the reader raises ValueError, KeyError, IndexError, ... on damage
            raise ModelLoadError(f"{self.path}: not a readable GGUF file: {error}") from None

    @cached_property
    def _tensors(self) -> dict[str, Any]:
        return {t.name: t for t in self._reader.tensors}

    @cached_property
    def config(self) -> ModelConfig:
        return self._read_config()

    @cached_property
    def weight_format(self) -> str:
        return str(self._get("model.layers.0.mlp.down_proj.weight").tensor_type.name)

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
        return frozenset(int(v) for k in keys if (v := self._field(k)) is not None)

    def has(self, name: str) -> bool:
        return self._gguf_name(name) in self._tensors

    def tensor(self, name: str, *, keep_packed: bool) -> Tensor | kernels.PackedWeight:
        tensor = self._get(name)
        shape = tuple(int(n) for n in reversed(tensor.shape))
        data = self._to_hf_row_order(name, tensor.data)
        if keep_packed and len(shape) == 2:
            packed = kernels.from_gguf(data, tensor.tensor_type.name, shape)
            if packed is not None:
                return packed
        try:
            dense = gguf.quants.dequantize(data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise ModelLoadError(f"{self.path}: tensor {tensor.name}: {error}") from None
        return torch.from_numpy(np.array(dense, dtype=np.float32)).reshape(shape)

    def load_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        converted = self._converted_tokenizer()
        try:
            if not converted.exists():
                tokenizer = AutoTokenizer.from_pretrained(
                    str(self.path.parent), gguf_file=self.path.name, local_files_only=True
                )
                _save_atomically(tokenizer, converted)
            return AutoTokenizer.from_pretrained(str(converted), local_files_only=True)
        except Exception as error:  # the library raises many kinds
            raise ModelLoadError(f"{self.path}: the tokenizer cannot be loaded: {error}") from None

    def _converted_tokenizer(self) -> Path:
        """Where the tokenizer lies in Hugging Face's form: converting takes ten times as long as loading."""
        stat = self.path.stat()
        identity = f"{self.path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{version('transformers')}"
        key = hashlib.sha256(identity.encode()).hexdigest()[:16]
        return cache_directory() / "tokenizers" / key

    def _get(self, name: str) -> Any:
        try:
            return self._tensors[self._gguf_name(name)]
        except KeyError:
            raise ModelLoadError(f"{self.path}: tensor {self._gguf_name(name)} is missing") from None

    def _to_hf_row_order(self, name: str, data: np.ndarray) -> np.ndarray:
        # The llama converter interleaves the two rotary halves of each head's q and k rows; undo it. Rows are
        # contiguous in every GGUF type, so that this works on packed bytes too.
        if self.config.architecture != "LlamaForCausalLM":
            return data
        if "q_proj" in name:
            num_heads = self.config.num_heads
        elif "k_proj" in name:
            num_heads = self.config.num_kv_heads
        else:
            return data
        heads = data.reshape(num_heads, self.config.head_dim // 2, 2, *data.shape[1:])
        return np.ascontiguousarray(heads.swapaxes(1, 2).reshape(data.shape))

    def _gguf_name(self, name: str) -> str:
        if name in _TENSOR_NAMES:
            return _TENSOR_NAMES[name]
        names = _GEMMA3_NAMES if self.config.architecture.startswith("Gemma3") else _LLAMA_NAMES
        parts = name.split(".")  # model.layers.<i>.<module...>.<weight|bias>
        return f"blk.{parts[2]}.{names.get('.'.join(parts[3:-1]), '?')}.{parts[-1]}"

    def _field(self, key: str) -> Any:
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    def _read_config(self) -> ModelConfig:
        arch = self._field("general.architecture")
        if arch not in ("llama", "gemma3"):
            raise ModelLoadError(
                f"{self.path}: GGUF architecture {arch!r} is not supported (supported: llama, gemma3)"
            )

        def optional(key: str) -> Any:
            return self._field(f"{arch}.{key}")

        def required(key: str) -> Any:
            if (value := optional(key)) is None:
                raise ModelLoadError(f"{self.path}: metadata {arch}.{key} is missing")
            return value

        num_heads, hidden_size = int(required("attention.head_count")), int(required("embedding_length"))
        num_layers = int(required("block_count"))
        head_dim = int(optional("attention.key_length") or hidden_size // num_heads)
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None:
            raise ModelLoadError(f"{self.path}: tensor token_embd.weight is missing")
        extra: dict[str, Any] = {}
        if arch == "gemma3":
            window = int(required("attention.sliding_window"))
            is_global = ((i + 1) % _GEMMA3_GLOBAL_EVERY == 0 for i in range(num_layers))
            extra = {
                "windows": tuple(None if is_full else window for is_full in is_global),
                "local_rope": _GEMMA3_LOCAL_ROPE,
                "activation": "gelu_tanh",
                "embedding_scale": hidden_size**0.5,
                "query_scalar": hidden_size / num_heads if num_layers == _GEMMA3_27B_LAYERS else None,
                "has_qk_norm": True,
                "has_post_norms": True,  # norm_offset stays 0: the converter has added the 1
            }
        return ModelConfig(
            architecture="Gemma3ForCausalLM" if arch == "gemma3" else "LlamaForCausalLM",
            vocab_size=int(embedding.shape[1]),
            hidden_size=hidden_size,
            intermediate_size=int(required("feed_forward_length")),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=int(optional("attention.head_count_kv") or num_heads),
            head_dim=head_dim,
            rms_norm_eps=float(required("attention.layer_norm_rms_epsilon")),
            max_position_embeddings=int(required("context_length")),
            rope=self._read_rope(arch),
            tie_word_embeddings="output.weight" not in self._tensors,
            attention_bias="blk.0.attn_q.bias" in self._tensors,
            mlp_bias="blk.0.ffn_gate.bias" in self._tensors,
            **extra,
        )

    def _read_rope(self, arch: str) -> RopeConfig:
        theta = float(self._field(f"{arch}.rope.freq_base") or 10_000.0)
        if (divisors := self._tensors.get("rope_freqs.weight")) is not None:
            return RopeConfig(theta, "stretch", {"divisors": [float(d) for d in divisors.data]})
        kind = self._field(f"{arch}.rope.scaling.type") or "none"
        if kind == "none":
            return RopeConfig(theta)
        params = {
            "factor": self._field(f"{arch}.rope.scaling.factor"),
            "original_max_position_embeddings": self._field(f"{arch}.rope.scaling.original_context_length"),
            "attention_factor": self._field(f"{arch}.rope.scaling.attn_factor"),
        }
        return RopeConfig(theta, str(kind), {k: v for k, v in params.items() if v is not None})


def _save_atomically(tokenizer: Any, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        part = Path(directory) / "tokenizer"
        tokenizer.save_pretrained(str(part))
        with contextlib.suppress(OSError):  # another process was first, with the same contents
            os.rename(part, target)
