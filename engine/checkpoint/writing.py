"""Writes a quantized checkpoint: safetensors (in shards where it is large), config.json, tokenizer."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

MAX_SHARD_BYTES = 2 * 10**9  # a shard is held in memory while it is written
_HEADER_BYTES_PER_TENSOR = 160
_HEADER_BYTES = 1024


def header_bytes(num_tensors: int) -> int:
    """Upper bound of what safetensors adds to the tensors' own bytes."""
    return _HEADER_BYTES + _HEADER_BYTES_PER_TENSOR * num_tensors


def write_tensors(directory: Path, groups: Iterable[Mapping[str, Tensor]], total_bytes: int) -> int:
    """Write groups of tensors (a layer's each) in order; returns the bytes of all files.

    One file `model.safetensors` where `total_bytes` fit into a shard, else shards with an index.
    """
    directory.mkdir(parents=True, exist_ok=True)
    num_shards = max(1, -(-total_bytes // MAX_SHARD_BYTES))
    limit = total_bytes / num_shards
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    written = 0

    def flush() -> None:
        nonlocal pending, written
        path = directory / f"model-{len(shards) + 1:05}.safetensors.part"
        save_file({k: v.contiguous() for k, v in sorted(pending.items())}, path, {"format": "pt"})
        path.chmod(0o644)  # the library creates it for the owner alone
        written += path.stat().st_size
        shards.append(list(pending))
        pending = {}

    for group in groups:
        pending.update(group)
        if sum(t.nbytes for t in pending.values()) >= limit and len(shards) + 1 < num_shards:
            flush()
    if pending or not shards:
        flush()
    _name_shards(directory, shards, written)
    return written


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _name_shards(directory: Path, shards: list[list[str]], written: int) -> None:
    count = len(shards)
    names = [
        f"model-{i + 1:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"
        for i in range(count)
    ]
    for i, name in enumerate(names):
        (directory / f"model-{i + 1:05}.safetensors.part").rename(directory / name)
    if count > 1:
        weight_map = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
        write_json(
            directory / "model.safetensors.index.json",
            {"metadata": {"total_size": written}, "weight_map": dict(sorted(weight_map.items()))},
        )
