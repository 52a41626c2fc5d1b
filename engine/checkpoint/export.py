"""A quantized checkpoint in forms that other programs read: compressed-tensors, or plain floats.

compressed-tensors' pack-quantized holds 4- and 8-bit codes, float scales and whole zero points. A matrix that
has those goes over exactly, 2 and 3 bits as 4, 5 and 6 as 8. Zero points between two codes (`zero` formats)
have no such form in 4 bits; `OTHERS` says what becomes of those matrices. Embeddings, head and routers become
floats, because readers want them so. Scales are float32, in which they are exact.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kernels
from engine.checkpoint.bit_packing import pack_words
from engine.checkpoint.exported_matrices import (
    eight_bits_with_zero_points,
    is_symmetric,
    unify,
    whole_zero_points,
)
from engine.checkpoint.hf_directory import HfCheckpoint, read_json
from engine.checkpoint.integer_matrix import IntegerMatrix
from engine.checkpoint.writing import write_json, write_tensors
from engine.errors import ParameterError
from engine.models.families import split_name

OTHERS = ("refuse", "wide", "floats")
"""Matrices without whole zero points: refuse the export, 8 bits with zero points (exact), or floats."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_LINEARS = frozenset(
    "q_proj k_proj v_proj qkv_proj o_proj gate_proj up_proj gate_up_proj down_proj w1 w2 w3".split()
)
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt")
_NOT_COPIED = ("config.json", "report.json", "model.safetensors.index.json")
_NAMED_IN_ERRORS = 3


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: matrices by bits, matrices that became floats, bytes of the tensors' files."""

    num_matrices: dict[int, int]
    num_floats: int
    file_bytes: int


@dataclass(frozen=True, slots=True)
class _Unit:
    """Tensors that a reader runs as one (q, k and v), under the checkpoint's names.

    target: the one tensor that the family's files have for all of them, None: each its own.
    """

    names: tuple[str, ...]
    target: str | None

    @property
    def is_linear(self) -> bool:
        module, _, kind = self.names[0].rpartition(".")
        return kind == "weight" and module.rpartition(".")[2] in _LINEARS


def export_floats(source: Path, out: Path, dtype: str) -> Exported:
    """Every tensor dequantized. Raises ModelLoadError for the source, ParameterError for the rest."""
    checkpoint, kind = HfCheckpoint(source), _dtype(dtype)
    _prepare(source, out)
    units = list(_units(checkpoint))
    total = sum(t.nbytes for u in units for t in _floats(checkpoint, u, kind).values())
    written = write_tensors(out, (_floats(checkpoint, u, kind) for u in units), total)
    _write_config(source, out, dtype, None)
    return Exported({}, sum(u.is_linear for u in units), written)


def export_compressed_tensors(source: Path, out: Path, dtype: str, others: str = "refuse") -> Exported:
    """As pack-quantized, readable by vLLM and transformers. dtype: of what is not quantized.

    Raises:
        ModelLoadError: the source is damaged or not supported.
        ParameterError: `out` or an option is wrong, or matrices have no such form and `others` is refuse.
    """
    if others not in OTHERS:
        raise ParameterError("others", f"must be one of {', '.join(OTHERS)}, got {others!r}")
    checkpoint, kind = HfCheckpoint(source), _dtype(dtype)
    export = _CompressedTensors(checkpoint, kind, others)
    units = list(_units(checkpoint))
    total = sum(t.nbytes for u in units for t in export.tensors(u).values())
    if export.refused:
        listed = ", ".join(export.refused[:_NAMED_IN_ERRORS])
        rest = len(export.refused) - _NAMED_IN_ERRORS
        raise ParameterError(
            "others",
            f"{listed}{f' and {rest} more' if rest > 0 else ''} cannot be W4A16 or W8A16, having zero points "
            "between two codes or no codes: choose wide (8 bits with zero points, exact) or floats, or "
            "quantize with --symmetric",
        )
    export.schemes.clear()
    _prepare(source, out)
    written = write_tensors(out, (export.tensors(u) for u in units), total)
    _write_config(source, out, dtype, export.section() if export.schemes else None)
    counts = {bits: 0 for bits, _, _ in export.schemes.values()}
    for bits, _, _ in export.schemes.values():
        counts[bits] += 1
    return Exported(dict(sorted(counts.items())), len(export.ignored), written)


class _CompressedTensors:
    """Turns units into tensors and remembers each module's scheme (bits, group size or 0, symmetric)."""

    def __init__(self, checkpoint: HfCheckpoint, dtype: torch.dtype, others: str) -> None:
        self._checkpoint, self._dtype, self._others = checkpoint, dtype, others
        self.schemes: dict[str, tuple[int, int, bool]] = {}
        self.ignored: list[str] = []
        self.refused: list[str] = []

    def tensors(self, unit: _Unit) -> dict[str, Tensor]:
        matrices = self._matrices(unit) if unit.is_linear else None
        if matrices is None:
            floats = _floats(self._checkpoint, unit, self._dtype)
            modules = [n.removesuffix(".weight") for n, t in floats.items() if t.dim() == 2]
            self.ignored += [m for m in modules if m not in self.ignored and not m.endswith("embed_tokens")]
            return floats
        if unit.target is None:
            named = {_hf_name(self._checkpoint, n): [m] for n, m in zip(unit.names, matrices, strict=True)}
        else:
            named = {unit.target: matrices}
        symmetric = all(is_symmetric(m) for m in matrices)
        tensors: dict[str, Tensor] = {}
        for name, parts in named.items():
            module = name.removesuffix(".weight")
            n, k = sum(len(p.codes) for p in parts), parts[0].codes.shape[1]
            bits, size = parts[0].bits, parts[0].group_size
            self.schemes[module] = (bits, size if size < k else 0, symmetric)
            tensors[f"{module}.weight_packed"] = pack_words(torch.cat([p.codes for p in parts]), bits)
            tensors[f"{module}.weight_scale"] = torch.cat([p.scale for p in parts]).float()
            tensors[f"{module}.weight_shape"] = torch.tensor([n, k])
            if not symmetric:
                zero = torch.cat([p.zero for p in parts]).to(torch.uint8)
                tensors[f"{module}.weight_zero_point"] = pack_words(zero.T, bits).T.contiguous()
        return tensors

    def _matrices(self, unit: _Unit) -> list[IntegerMatrix] | None:
        """The unit's matrices in one scheme; None where they become floats."""
        stored = [self._checkpoint.tensor(name, keep_packed=True) for name in unit.names]
        packed = [w for w in stored if isinstance(w, kernels.PackedWeight)]
        if not packed and self._others != "floats" and not self._is_quantized(unit):
            return None  # floats in the source, too
        if len(packed) == len(stored):
            found = [whole_zero_points(w) for w in packed]
            if self._others == "wide":
                found = [m or eight_bits_with_zero_points(w) for m, w in zip(found, packed, strict=True)]
            matrices = [m for m in found if m is not None]
            if len(matrices) == len(stored):
                unified = unify(matrices)
                narrow_or_symmetric = unified[0].bits == 4 or all(is_symmetric(m) for m in unified)
                if narrow_or_symmetric or self._others == "wide":
                    return unified
        if self._others == "refuse":
            self.refused += [n for n in unit.names if n not in self.refused]
        return None

    def _is_quantized(self, unit: _Unit) -> bool:
        return any(self._checkpoint.is_quantized(name) for name in unit.names)

    def section(self) -> dict[str, Any]:
        """quantization_config: a group for each scheme, its modules by name."""
        groups: dict[str, Any] = {}
        for i, scheme in enumerate(sorted(set(self.schemes.values()))):
            bits, size, symmetric = scheme
            groups[f"group_{i}"] = {
                "targets": sorted(name for name, own in self.schemes.items() if own == scheme),
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": symmetric,
                    "strategy": "group" if size else "channel",
                    "group_size": size or None,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": sorted(self.ignored),
        }


def _units(checkpoint: HfCheckpoint) -> Iterator[_Unit]:
    """All tensors, those that run as one together, in the order of their names."""
    names = checkpoint.tensor_names()
    known, seen = set(names), set()
    for name in names:
        if name in seen:
            continue
        unit = _unit_of(checkpoint, name, known)
        seen |= set(unit.names)
        yield unit


def _unit_of(checkpoint: HfCheckpoint, name: str, known: set[str]) -> _Unit:
    parts = split_name(name)
    if parts is None:
        return _Unit((name,), None)
    layer, module, kind = parts
    parent, _, last = module.rpartition(".")
    for members in _TOGETHER:
        siblings = tuple(f"{layer}.{parent}.{member}.{kind}" for member in members)
        if last in members and known.issuperset(siblings):
            fused = checkpoint.config.family.fused_in(module)
            target = None if fused is None else _hf_name(checkpoint, f"{layer}.{fused[0]}.{kind}")
            return _Unit(siblings, target)
    return _Unit((name,), None)


def _floats(checkpoint: HfCheckpoint, unit: _Unit, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = [checkpoint.tensor(name, keep_packed=False) for name in unit.names]
    floats = [t.to(dtype) for t in tensors if isinstance(t, Tensor)]
    if unit.target is not None:
        return {unit.target: torch.cat(floats)}
    return {_hf_name(checkpoint, n): t for n, t in zip(unit.names, floats, strict=True)}


def _hf_name(checkpoint: HfCheckpoint, name: str) -> str:
    return checkpoint.config.family.hf_name(name)


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ParameterError("dtype", f"must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def _prepare(source: Path, out: Path) -> None:
    """Makes `out`, with the tokenizer and what else lies beside the tensors."""
    if out.exists() and any(out.iterdir()):
        raise ParameterError("out", f"{out} holds other files")
    out.mkdir(parents=True, exist_ok=True)
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if file.name not in _NOT_COPIED:
                shutil.copy(file, out)


def _write_config(source: Path, out: Path, dtype: str, section: dict[str, Any] | None) -> None:
    raw = read_json(source / "config.json")
    for name in ("quantization_config", "torch_dtype"):
        raw.pop(name, None)
    raw["dtype"] = dtype
    if section is not None:
        raw["quantization_config"] = section
    write_json(out / "config.json", raw)
