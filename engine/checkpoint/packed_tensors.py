"""Packed weights in a Hugging Face directory: how config.json names them, how they are checked.

config.json carries

    "quantization_config": {
        "quant_method": "peregrine", "version": 1, "formats": {"<weight name>": "w4g64", ...}
    }

and the safetensors hold each such weight's bytes as `<weight name less .weight>.packed`, uint8
[row blocks, block bytes], exactly as `kernels.formats` lays them out. Everything else is stored as floats.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kernels
from engine.errors import ModelLoadError
from engine.models.config import ModelConfig
from kernels.formats import TILE_ROWS, Format

METHOD = "peregrine"
VERSION = 1


def packed_name(weight: str) -> str:
    return weight.removesuffix(".weight") + ".packed"


def quantization_config(formats: Mapping[str, str]) -> dict[str, Any]:
    return {"quant_method": METHOD, "version": VERSION, "formats": dict(sorted(formats.items()))}


@dataclass(frozen=True, slots=True)
class PackedTensors:
    """A `QuantizedTensors` of this project's own format.

    formats: by weight name. read_raw: reads a tensor of the files.
    """

    formats: Mapping[str, Format]
    config: ModelConfig
    read_raw: Callable[[str], Tensor]

    @property
    def weight_format(self) -> str:
        return "+".join(sorted({f"w{f.bits}" for f in self.formats.values()}))

    def names(self, stored: Collection[str]) -> set[str]:
        packed = {packed_name(name): name for name in self.formats}
        return {packed.get(name, name) for name in stored}

    def has(self, name: str) -> bool:
        return name in self.formats

    def read(self, name: str) -> kernels.PackedWeight:
        """Check and wrap a weight's bytes. Raises ValueError when they cannot be this weight."""
        data = self.read_raw(packed_name(name))
        shape = self.config.matrix_shape(name.removesuffix(".weight"))  # bytes alone do not tell
        if shape is None:
            raise ValueError(f"{name} is not a matrix of this architecture")
        n, k = shape
        weight = kernels.PackedWeight(self.formats[name], n, k, data)
        _check_parameters(weight)
        return weight

    def row_order(self, name: str) -> None:
        return None


def parse_formats(section: Mapping[str, Any]) -> dict[str, Format]:
    """Format by weight name from a quantization_config. Raises ModelLoadError."""
    if section.get("version") != VERSION:
        raise ModelLoadError(
            f"config: quantization_config.version {section.get('version')!r} is not supported "
            f"(supported: {VERSION})"
        )
    formats = section.get("formats")
    if not isinstance(formats, Mapping) or not formats:
        raise ModelLoadError("config: quantization_config.formats is missing")
    parsed = {}
    for name, value in formats.items():
        try:
            parsed[name] = Format.parse(str(value))
        except ValueError as error:
            raise ModelLoadError(f"config: quantization_config.formats[{name!r}]: {error}") from None
    return parsed


def _check_parameters(weight: kernels.PackedWeight) -> None:
    """Codes are always valid; float16 parameters may not be."""
    f, k = weight.format, weight.k
    start = k * TILE_ROWS * f.bits // 8
    if f.kind != "affine":
        start = f.block_bytes(k) - 2 * TILE_ROWS
    values = weight.data[:, start:].contiguous().view(torch.float16)
    if not torch.isfinite(values).all():
        raise ValueError(f"{f}: scales hold NaN or infinite values")
