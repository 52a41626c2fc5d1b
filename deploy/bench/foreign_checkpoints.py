"""Small checkpoints as GPTQ, AWQ, compressed-tensors and llama.cpp write them, for parity tables and tests.

Written from the formats' published definitions with NumPy's bit packing, not with the engine's reader. Each
writer takes a Hugging Face directory of floats, rounds its linear layers, writes the quantized directory, and
beside it the same model with the rounded values as floats, which `transformers` can run.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
_FILE = "model.safetensors"
_FLOATS = ("embed_tokens", "lm_head", "gate")
"""Last parts of modules that these tools leave alone; `gate` is a router."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a matrix is rounded. group_size: -1 for the whole row. is_ordered: desc_act, columns grouped in an
    order of their own. scale_dtype: what scales are stored as."""

    bits: int = 4
    group_size: int = 32
    is_symmetric: bool = True
    is_ordered: bool = False
    scale_dtype: torch.dtype = torch.float16


@dataclass(frozen=True, slots=True)
class Rounded:
    """codes: int64 [N, K]; scale: [N, groups]; zero: int64 [N, groups]; group: int64 [K]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group: Tensor

    def dequantize(self) -> Tensor:
        """float64 [N, K]."""
        return self.scale.double()[:, self.group] * (self.codes - self.zero[:, self.group])


def round_matrix(weight: Tensor, scheme: Scheme) -> Rounded:
    """To the nearest code of each group's range."""
    n, k = weight.shape
    size = k if scheme.group_size == -1 else scheme.group_size
    group = torch.arange(k) // size
    if scheme.is_ordered:
        group = group[torch.randperm(k, generator=torch.Generator().manual_seed(n + k))]
    top, w = (1 << scheme.bits) - 1, weight.double()
    scales, zeros = [], []
    for g in range(int(group.max()) + 1):
        columns = w[:, group == g]
        low, high = columns.amin(1).clamp(max=0), columns.amax(1).clamp(min=0)
        if scheme.is_symmetric:
            reach = torch.maximum(-low, high)
            low, high = -reach, reach
        scale = ((high - low) / top).clamp(min=1e-5).to(scheme.scale_dtype)
        zeros.append(
            torch.full((n,), (top + 1) // 2.0) if scheme.is_symmetric else (-low / scale.double()).round()
        )
        scales.append(scale)
    scale, zero = torch.stack(scales, 1), torch.stack(zeros, 1).long().clamp(0, top)
    codes = (w / scale.double()[:, group] + zero[:, group]).round().long().clamp(0, top)
    return Rounded(codes, scale, zero, group)


def write_gptq(model: Path, out: Path, scheme: Scheme, *, version: int = 1) -> Path:
    """qweight, qzeros, scales, g_idx; version 1 stores zero points less 1. Returns the twin's path."""

    def store(r: Rounded) -> dict[str, Tensor]:
        stored_zero = (r.zero - (1 if version == 1 else 0)) & ((1 << scheme.bits) - 1)
        return {
            "qweight": _pack(r.codes.T, scheme.bits, along=0),
            "qzeros": _pack(stored_zero.T, scheme.bits, along=1),
            "scales": r.scale.T.contiguous(),
            "g_idx": r.group.to(torch.int32),
        }

    section = {
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "desc_act": scheme.is_ordered,
        "sym": scheme.is_symmetric,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    return _write(model, out, scheme, section, store)


def write_awq(model: Path, out: Path, scheme: Scheme) -> Path:
    """The GEMM version: 4 bits, zero points, eight columns of a word interleaved. Returns the twin's path."""

    def interleaved(codes: Tensor) -> Tensor:
        return codes.unflatten(1, (-1, 8))[:, :, _AWQ_ORDER].flatten(1)

    def store(r: Rounded) -> dict[str, Tensor]:
        return {
            "qweight": _pack(interleaved(r.codes.T), 4, along=1),
            "qzeros": _pack(interleaved(r.zero.T), 4, along=1),
            "scales": r.scale.T.contiguous(),
        }

    section = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": scheme.group_size,
        "zero_point": True,
        "version": "gemm",
    }
    return _write(model, out, scheme, section, store)


def write_compressed_tensors(model: Path, out: Path, scheme: Scheme) -> Path:
    """pack-quantized, weights alone. Returns the twin's path."""

    def store(r: Rounded) -> dict[str, Tensor]:
        tensors = {
            "weight_packed": _pack(r.codes, scheme.bits, along=1),
            "weight_scale": r.scale,
            "weight_shape": torch.tensor(r.codes.shape),
        }
        if not scheme.is_symmetric:
            tensors["weight_zero_point"] = _pack(r.zero, scheme.bits, along=0)
        if scheme.is_ordered:
            tensors["weight_g_idx"] = r.group.to(torch.int32)
        return tensors

    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.is_symmetric,
        "strategy": "channel" if scheme.group_size == -1 else "group",
        "group_size": None if scheme.group_size == -1 else scheme.group_size,
    }
    section = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
    }
    return _write(model, out, scheme, section, store)


def _form(
    model: PreTrainedModel, directory: Path, *, write: Callable[[Path, Path, Scheme], Path], scheme: Scheme
) -> Path:
    """The model rounded and stored so; its own weights become the stored ones. Returns the checkpoint."""
    source, out = directory / "floats", directory / "quantized"
    model.save_pretrained(source)
    twin = write(source, out, scheme)
    model.load_state_dict(type(model).from_pretrained(twin, dtype=torch.float32).state_dict())
    return out


_BF16 = torch.bfloat16
FORMS: dict[str, Callable[[PreTrainedModel, Path], Path]] = {
    "GPTQ 4 bits": partial(_form, write=write_gptq, scheme=Scheme(4, 32, is_symmetric=False)),
    "GPTQ 3 bits desc_act": partial(_form, write=write_gptq, scheme=Scheme(3, 32, is_ordered=True)),
    "AWQ 4 bits": partial(_form, write=write_awq, scheme=Scheme(4, 32, is_symmetric=False)),
    "compressed-tensors W4A16": partial(
        _form, write=write_compressed_tensors, scheme=Scheme(4, 32, is_symmetric=False, scale_dtype=_BF16)
    ),
    "compressed-tensors W8A16": partial(
        _form, write=write_compressed_tensors, scheme=Scheme(8, -1, scale_dtype=_BF16)
    ),
}
"""For tables of parity: a transformers model and a directory to the checkpoint in it."""


def _write(
    model: Path,
    out: Path,
    scheme: Scheme,
    section: Mapping[str, Any],
    store: Callable[[Rounded], Mapping[str, Tensor]],
) -> Path:
    twin = out.with_name(f"{out.name}-floats")
    quantized, floats = {}, {}
    for name, weight in load_file(model / _FILE).items():
        module = name.removesuffix(".weight")
        if weight.dim() != 2 or module.rpartition(".")[2] in _FLOATS:
            quantized[name] = floats[name] = weight
            continue
        rounded = round_matrix(weight, scheme)
        quantized |= {f"{module}.{last}": t.contiguous() for last, t in store(rounded).items()}
        floats[name] = rounded.dequantize().float()
    for directory, tensors in ((out, quantized), (twin, floats)):
        directory.mkdir(parents=True, exist_ok=True)
        for file in model.iterdir():
            if file.suffix in (".json", ".jinja"):
                shutil.copy(file, directory)
        save_file(tensors, directory / _FILE, {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    return twin


def _pack(codes: Tensor, bits: int, along: int) -> Tensor:
    """int32 words of codes [R, C] whose bits follow each other along a dimension, lowest first."""
    lines = codes.numpy() if along == 1 else codes.numpy().T
    stream = (lines[:, :, None] >> np.arange(bits)) & 1
    stream = stream.reshape(len(lines), -1).astype(np.uint8)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    words = np.packbits(stream, axis=1, bitorder="little").view(np.int32)
    return torch.from_numpy(np.ascontiguousarray(words if along == 1 else words.T))
