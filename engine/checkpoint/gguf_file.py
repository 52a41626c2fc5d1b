"""GGUF files (format: ggml's GGUF specification, version 3); what they call things is in `gguf_names`."""

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
from engine.checkpoint.gguf_names import GgufTensor, locate, read_config
from engine.errors import ModelLoadError
from engine.models.config import ModelConfig
from engine.models.layerwise import linear_name, linears
from kernels.cache import cache_directory


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
        return read_config(self._field, self._tensors, self.path)

    @cached_property
    def weight_format(self) -> str:
        first = linear_name(0, linears(self.config)[-1])
        return str(self._get(self._locate(first)).tensor_type.name)

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
        return frozenset(int(v) for k in keys if (v := self._field(k)) is not None)

    def has(self, name: str) -> bool:
        return self._locate(name).name in self._tensors

    def tensor(self, name: str, *, keep_packed: bool) -> Tensor | kernels.PackedWeight:
        where = self._locate(name)
        tensor = self._get(where)
        if (scale := where.name.removesuffix("weight") + "scale") in self._tensors:  # NVFP4 files have them
            raise ModelLoadError(f"{self.path}: tensor {scale}: scales beside a weight are not supported")
        shape = tuple(int(n) for n in reversed(tensor.shape))
        data = tensor.data
        if where.expert is not None:
            if where.expert >= shape[0]:
                raise ModelLoadError(f"{self.path}: tensor {where.name} has {shape[0]} experts")
            data, shape = data[where.expert], shape[1:]
        if where.num_rows is not None:  # rows are contiguous in every GGUF type
            rows = slice(where.first_row, where.first_row + where.num_rows)
            data, shape = data[rows], (where.num_rows, *shape[1:])
        data = self._to_hf_row_order(name, data)
        if keep_packed and len(shape) == 2:
            packed = kernels.from_gguf(data, tensor.tensor_type.name, (shape[0], shape[1]))
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

    def _locate(self, name: str) -> GgufTensor:
        found = locate(name, self.config)
        if found.expert is not None and found.name not in self._tensors:
            return found.apart()
        return found

    def _get(self, where: GgufTensor) -> Any:
        try:
            return self._tensors[where.name]
        except KeyError:
            raise ModelLoadError(f"{self.path}: tensor {where.name} is missing") from None

    def _to_hf_row_order(self, name: str, data: np.ndarray) -> np.ndarray:
        # Some converters interleave the two rotary halves of each head's q and k rows; undo it. Rows are
        # contiguous in every GGUF type, so that this works on packed bytes too.
        if not self.config.family.gguf_interleaves:
            return data
        if "q_proj" in name:
            num_heads = self.config.num_heads
        elif "k_proj" in name:
            num_heads = self.config.num_kv_heads
        else:
            return data
        heads = data.reshape(num_heads, self.config.head_dim // 2, 2, *data.shape[1:])
        return np.ascontiguousarray(heads.swapaxes(1, 2).reshape(data.shape))

    def _field(self, key: str) -> Any:
        field = self._reader.get_field(key)
        return None if field is None else field.contents()


def _save_atomically(tokenizer: Any, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        part = Path(directory) / "tokenizer"
        tokenizer.save_pretrained(str(part))
        with contextlib.suppress(OSError):  # another process was first, with the same contents
            os.rename(part, target)
