"""Hugging Face directories: config.json, safetensors (one file or shards), tokenizer; packed weights too."""

import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import kernels
from engine.checkpoint.names import StoredTensor, stored_tensor
from engine.checkpoint.quantized_tensors import quantized_tensors
from engine.errors import ModelLoadError
from engine.models.config import ModelConfig
from engine.models.hf_config import from_hf_config

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class HfCheckpoint:
    """Reads tensors shard by shard; pickle files are never opened."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        raw = read_json(directory / "config.json")
        self.config: ModelConfig = from_hf_config(raw)
        self._open: dict[str, Any] = {}
        self._file_of = self._locate_tensors()
        self._quantized = quantized_tensors(raw, self.config, self._file_of.keys(), self._raw)

    @cached_property
    def weight_format(self) -> str:
        if self._quantized is not None:
            return self._quantized.weight_format
        dtype = self._slice("model.embed_tokens.weight").get_dtype()
        return {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}.get(dtype, dtype)

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        for name in ("generation_config.json", "config.json"):
            path = self.directory / name
            eos = read_json(path).get("eos_token_id") if path.exists() else None
            if eos is not None:
                return frozenset(eos if isinstance(eos, list) else [eos])
        return frozenset()

    def has(self, name: str) -> bool:
        return self._is_stored(name) or self._is_stored(self._locate(name).name)

    def tensor(self, name: str, *, keep_packed: bool) -> Tensor | kernels.PackedWeight:
        """A tensor under the engine's name, which may be what the family's files call it, or rows of that."""
        where = self._locate(name)
        if where.num_rows is None or self.is_quantized(where.name):
            return where.cut(self._stored_tensor(where.name, keep_packed=keep_packed))
        order = self._row_order(where.name)
        if order is not None:
            return where.cut(self._floats(where.name)[order])
        return self._floats(where.name, slice(where.first_row, where.first_row + where.num_rows))

    def tensor_names(self) -> list[str]:
        """Of all tensors, as they are stored; quantized ones under their weights' names."""
        if self._quantized is None:
            return sorted(self._file_of)
        return sorted(self._quantized.names(self._file_of.keys()))

    def _locate(self, name: str) -> StoredTensor:
        if self._is_stored(name):  # quantized here: apart, under the engine's names
            return StoredTensor(name)
        where = stored_tensor(name, self.config)
        return replace(where, name=self.config.family.hf_name(where.name))

    def is_quantized(self, name: str) -> bool:
        """Whether the weight is stored quantized under this very name."""
        return self._quantized is not None and self._quantized.has(name)

    def _is_stored(self, name: str) -> bool:
        return name in self._file_of or self.is_quantized(name)

    def _stored_tensor(self, name: str, *, keep_packed: bool) -> Tensor | kernels.PackedWeight:
        if self._quantized is not None and self._quantized.has(name):
            try:
                weight = self._quantized.read(name)
            except ValueError as error:
                raise ModelLoadError(f"{self.directory}: tensor {name} is damaged: {error}") from None
            if isinstance(weight, Tensor) or keep_packed:
                return weight
            return kernels.dequantize(weight)
        data, order = self._floats(name), self._row_order(name)
        return data if order is None else data[order]

    def _row_order(self, name: str) -> Tensor | None:
        return None if self._quantized is None else self._quantized.row_order(name)

    def _floats(self, name: str, rows: slice | None = None) -> Tensor:
        data = self._raw(name, rows)
        if not data.is_floating_point():
            raise ModelLoadError(f"{self.directory}: tensor {name} has dtype {data.dtype}, expected floats")
        data = data.to(torch.float32)
        if not torch.isfinite(data).all():
            raise ModelLoadError(f"{self.directory}: tensor {name} holds NaN or infinite values")
        return data

    def _raw(self, name: str, rows: slice | None = None) -> Tensor:
        try:
            file = self._file(name)
            data: Tensor = file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelLoadError(f"{self.directory}: tensor {name} is damaged: {error}") from None
        return data

    def load_tokenizer(self) -> Any:
        return load_tokenizer(self.directory)

    def _locate_tensors(self) -> dict[str, str]:
        if (index := self.directory / _INDEX).exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ModelLoadError(f"{index}: weight_map is missing")
            for shard in set(weight_map.values()):
                if (
                    not isinstance(shard, str)
                    or Path(shard).name != shard
                    or not shard.endswith(".safetensors")
                ):
                    raise ModelLoadError(
                        f"{index}: {shard!r} is not the name of a safetensors file beside it"
                    )
                if not (self.directory / shard).is_file():
                    raise ModelLoadError(f"{self.directory}: shard {shard} is missing")
            return dict(weight_map)
        if not (self.directory / _SINGLE).is_file():
            raise ModelLoadError(f"{self.directory}: neither {_SINGLE} nor {_INDEX} is there")
        return dict.fromkeys(self._shard(_SINGLE).keys(), _SINGLE)

    def _file(self, name: str) -> Any:
        if name not in self._file_of:
            raise ModelLoadError(f"{self.directory}: tensor {name} is missing")
        return self._shard(self._file_of[name])

    def _slice(self, name: str) -> Any:
        return self._file(name).get_slice(name)

    def _shard(self, shard: str) -> Any:
        if shard not in self._open:
            try:
                self._open[shard] = safe_open(str(self.directory / shard), framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelLoadError(
                    f"{self.directory / shard}: not a readable safetensors file: {error}"
                ) from None
        return self._open[shard]


def load_tokenizer(directory: Path) -> Any:
    """The directory's transformers tokenizer. Raises ModelLoadError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds
        raise ModelLoadError(f"{directory}: the tokenizer cannot be loaded: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadError(f"{path.parent}: {path.name} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelLoadError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path}: expected a JSON object")
    return value
