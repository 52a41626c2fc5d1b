"""GPTQ, AWQ and compressed-tensors checkpoints: one matrix's integers from the tensors that store it.

Widths and group sizes are taken from the tensors' own shapes, so that mixed ones need no configuration:

    GPTQ            qweight int32 [K * bits / 32, N], codes along K; qzeros int32 [groups, N * bits / 32];
                    scales [groups, N]; g_idx int32 [K]. Zero points less one (v1) or as they are (v2).
    AWQ (GEMM)      qweight int32 [K, N / 8], eight columns of a word in the order 0 2 4 6 1 3 5 7; qzeros
                    int32 [groups, N / 8] likewise; scales [groups, N].
    compressed-     weight_packed int32 [N, K * bits / 32]; weight_scale [N, groups]; weight_zero_point
    tensors         int32 [N * bits / 32, groups], codes along N; weight_shape [2]; weight_g_idx int32 [K].
    (pack-quantized)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.checkpoint.bit_packing import num_words, unpack_words
from engine.checkpoint.integer_matrix import IntegerMatrix
from engine.errors import ModelLoadError
from kernels.formats import PLANES

Tensors = Callable[[str], Tensor | None]
"""A tensor of the module by its last name (`qweight`), None where the checkpoint has none."""

_AWQ_COLUMN = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # where in its word each of eight columns lies


class ForeignFormat(Protocol):
    """How a quantization method stores a matrix."""

    @property
    def codes_name(self) -> str:
        """Last name of the tensor with the codes."""
        ...

    @property
    def index_name(self) -> str | None:
        """Last name of the tensor with each column's group, where the method has one."""
        ...

    def read(self, tensors: Tensors) -> IntegerMatrix:
        """Raises ValueError when the tensors do not belong together."""
        ...


def foreign_format(section: Mapping[str, Any]) -> ForeignFormat:
    """From config.json's quantization_config. Raises ModelLoadError naming what is not supported."""
    method = section.get("quant_method")
    if method == "gptq":
        return _gptq(section)
    if method == "awq":
        return _awq(section)
    if method == "compressed-tensors":
        return _compressed_tensors(section)
    raise ModelLoadError(
        f"config: quant_method {method!r} is not supported "
        "(supported: peregrine, gptq, awq, compressed-tensors)"
    )


@dataclass(frozen=True, slots=True)
class Gptq:
    """zero_offset: what is added to a stored zero point. bits, group_size: where g_idx does not tell."""

    bits: int
    group_size: int
    zero_offset: int
    codes_name: str = "qweight"
    index_name: str | None = "g_idx"

    def read(self, tensors: Tensors) -> IntegerMatrix:
        words, scales, index = _required(tensors, "qweight"), _required(tensors, "scales"), tensors("g_idx")
        k = words.shape[0] * 32 // self.bits if index is None else index.numel()
        bits = words.shape[0] * 32 // max(k, 1)
        groups, n = scales.shape
        _check_bits(bits)
        # Less one, a zero point of 0 wraps around to the largest code.
        zeros = (unpack_words(_required(tensors, "qzeros"), bits, n).T + self.zero_offset) & ((1 << bits) - 1)
        group_size = _group_size(self.group_size, k, groups)
        matrix = IntegerMatrix(
            bits,
            group_size,
            unpack_words(words.T.contiguous(), bits, k),
            scales.T,
            zeros.to(torch.int16),
            None if index is None else index.long(),
        )
        return matrix.without_trivial_index()


@dataclass(frozen=True, slots=True)
class Awq:
    bits: int
    group_size: int
    codes_name: str = "qweight"
    index_name: str | None = None

    def read(self, tensors: Tensors) -> IntegerMatrix:
        scales = _required(tensors, "scales")
        groups, n = scales.shape
        codes = _awq_columns(_required(tensors, "qweight"), self.bits, n)
        zeros = _awq_columns(_required(tensors, "qzeros"), self.bits, n).T.to(torch.int16)
        group_size = _group_size(self.group_size, len(codes), groups)
        return IntegerMatrix(self.bits, group_size, codes.T.contiguous(), scales.T, zeros)


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    codes_name: str = "weight_packed"
    index_name: str | None = "weight_g_idx"

    def read(self, tensors: Tensors) -> IntegerMatrix:
        words, scale = _required(tensors, "weight_packed"), _required(tensors, "weight_scale")
        shape = _required(tensors, "weight_shape").tolist()
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"weight_shape is {shape}, expected two positive numbers")
        n, k = shape
        if scale.dim() != 2 or words.dim() != 2:
            raise ValueError(
                f"weight_scale {tuple(scale.shape)} is not a matrix (only group and channel scales are)"
            )
        bits = next((b for b in sorted(PLANES) if num_words(k, b) == words.shape[1]), 0)
        _check_bits(bits)
        middle, groups = 1 << (bits - 1), scale.shape[1]
        stored = tensors("weight_zero_point")
        if stored is None:
            zeros = torch.full((n, groups), middle, dtype=torch.int16)
        else:
            zeros = unpack_words(stored.T.contiguous(), bits, n).T.to(torch.int16)
        index = tensors("weight_g_idx")
        has_index = index is not None and int(index.min()) >= 0  # -1: there for the loader, not used
        matrix = IntegerMatrix(
            bits,
            _group_size(None, k, groups),
            unpack_words(words, bits, k),
            scale,
            zeros,
            index.long() if index is not None and has_index else None,
        )
        return matrix.without_trivial_index()


def _gptq(section: Mapping[str, Any]) -> Gptq:
    stored = section.get("checkpoint_format") or "gptq"
    offsets = {"gptq": 1, "gptq_v2": 0}
    if stored not in offsets:
        raise ModelLoadError(
            f"config: checkpoint_format {stored!r} of quant_method 'gptq' is not supported "
            f"(supported: {', '.join(offsets)})"
        )
    return Gptq(_integer(section, "bits"), _integer(section, "group_size"), offsets[stored])


def _awq(section: Mapping[str, Any]) -> Awq:
    version = str(section.get("version") or "gemm").lower()
    if version != "gemm":
        raise ModelLoadError(
            f"config: version {version!r} of quant_method 'awq' is not supported (supported: gemm)"
        )
    bits = _integer(section, "bits", "w_bit")
    if bits != 4:
        raise ModelLoadError(f"config: bits {bits} of quant_method 'awq' is not supported (supported: 4)")
    return Awq(bits, _integer(section, "group_size", "q_group_size"))


def _compressed_tensors(section: Mapping[str, Any]) -> CompressedTensors:
    groups = section.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ModelLoadError("config: quantization_config.config_groups is missing")
    formats = {str((g or {}).get("format") or section.get("format")) for g in groups.values()}
    if others := formats - {"pack-quantized"}:
        raise ModelLoadError(
            f"config: format {sorted(others)[0]!r} of quant_method 'compressed-tensors' is not supported "
            "(supported: pack-quantized)"
        )
    for name, group in groups.items():
        for part in ("input_activations", "output_activations"):
            if group.get(part):
                raise ModelLoadError(
                    f"config: config_groups.{name}.{part} is not supported (weights alone are)"
                )
        kind = (group.get("weights") or {}).get("type", "int")
        if kind != "int":
            raise ModelLoadError(
                f"config: config_groups.{name}.weights.type {kind!r} is not supported (int is)"
            )
    sparsity = (section.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise ModelLoadError(f"config: sparsity_config.format {sparsity!r} is not supported (dense is)")
    for name in ("transform_config", "kv_cache_scheme"):
        if section.get(name):
            raise ModelLoadError(f"config: quantization_config.{name} is not supported")
    return CompressedTensors()


def _awq_columns(words: Tensor, bits: int, n: int) -> Tensor:
    """uint8 [R, N] in the matrix's order."""
    return unpack_words(words, bits, n).unflatten(1, (-1, 8))[:, :, _AWQ_COLUMN].flatten(1)


def _required(tensors: Tensors, name: str) -> Tensor:
    tensor = tensors(name)
    if tensor is None:
        raise ValueError(f"{name} is missing")
    return tensor


def _group_size(configured: int | None, k: int, groups: int) -> int:
    """Columns a group: as configured where that makes so many, else what the scales say."""
    if groups == 1:
        return k
    if configured is not None and configured > 0 and -(-k // configured) == groups:
        return configured
    if k % groups:
        raise ValueError(f"{groups} groups do not divide {k} columns")
    return k // groups


def _check_bits(bits: int) -> None:
    if bits not in PLANES:
        raise ValueError(f"codes are not of {', '.join(map(str, sorted(PLANES)))} bits")


def _integer(section: Mapping[str, Any], *names: str) -> int:
    value = next((section[name] for name in names if name in section), None)
    if not isinstance(value, int) or isinstance(value, bool) or value == 0:
        raise ModelLoadError(f"config: quantization_config.{names[0]} must be an integer, got {value!r}")
    return value
