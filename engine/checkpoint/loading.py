"""What every checkpoint format offers, and the choice of the format."""

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

import kernels
from engine.errors import ModelLoadError
from engine.models.config import ModelConfig
from engine.models.hf_config import from_hf_config

RANDOM_BITS_KEY = "peregrine_random_bits"
"""In a config.json: the weights are not there, random ones of so many bits are made up (benchmarks)."""


class Checkpoint(Protocol):
    """An opened checkpoint. Tensors are read when asked for, under Hugging Face's Llama names."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def weight_format(self) -> str:
        """How the linear layers are stored, e.g. "Q4_1" or "bfloat16"."""
        ...

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    def has(self, name: str) -> bool: ...

    def tensor(self, name: str, *, keep_packed: bool) -> Tensor | kernels.PackedWeight:
        """The tensor, float32 on the CPU; packed when it is stored so, the kernels know the format and
        `keep_packed` is set. Raises ModelLoadError when it is missing or damaged."""
        ...

    def load_tokenizer(self) -> Any:
        """The checkpoint's own tokenizer (a transformers fast tokenizer)."""
        ...


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a GGUF file, or a directory with config.json and safetensors (or, for benchmarks, without them).

    Raises ModelLoadError when there is nothing that can be loaded.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelLoadError(f"{path}: not a .gguf file, and not a directory")
        from engine.checkpoint.gguf_file import GgufCheckpoint

        return GgufCheckpoint(path)
    if path.is_dir():
        from engine.checkpoint.hf_directory import HfCheckpoint, read_json

        if RANDOM_BITS_KEY in (raw := read_json(path / "config.json")):
            from engine.cuda.random_model import RandomModel

            return RandomModel(from_hf_config(raw), float(raw[RANDOM_BITS_KEY]), directory=path)
        return HfCheckpoint(path)
    raise ModelLoadError(f"{path}: no such file or directory")
