"""Quantized matrices of a Hugging Face directory under their weights' names, whoever quantized them."""

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

import kernels
from engine.checkpoint.foreign_tensors import ForeignFormat, foreign_format
from engine.checkpoint.integer_matrix import IntegerMatrix, pack_exactly
from engine.checkpoint.packed_tensors import METHOD, PackedTensors, parse_formats
from engine.errors import ModelLoadError
from engine.models.config import ModelConfig

logger = logging.getLogger(__name__)

Read = Callable[[str], Tensor]
_ROWS_OF = {
    "gate_proj": "down_proj",
    "up_proj": "down_proj",
    "gate_up_proj": "down_proj",
    "w1": "w2",
    "w3": "w2",
}
"""Modules whose output channels are another's input channels, in any order that both agree on."""


class QuantizedTensors(Protocol):
    """The quantized ones among a checkpoint's tensors."""

    @property
    def weight_format(self) -> str: ...

    def names(self, stored: Collection[str]) -> set[str]:
        """Of the checkpoint's tensors, from those of all `stored` ones: a weight's parts are that weight."""
        ...

    def has(self, name: str) -> bool:
        """Whether the weight `name` (<module>.weight) is stored quantized."""
        ...

    def read(self, name: str) -> kernels.PackedWeight | Tensor:
        """Packed, or float32 where no packed format holds the same values. Raises ValueError on damage."""
        ...

    def row_order(self, name: str) -> Tensor | None:
        """Order in which the model needs the rows of `name`, quantized or not; None: as they are stored.
        `read` has applied it."""
        ...


def quantized_tensors(
    raw: Mapping[str, Any], config: ModelConfig, names: Collection[str], read: Read
) -> QuantizedTensors | None:
    """From a config.json and the tensors beside it; None for plain floats. Raises ModelLoadError."""
    section = raw.get("quantization_config")
    if section is None:
        return None
    if not isinstance(section, Mapping):
        raise ModelLoadError(f"config: quantization_config must be an object, got {section!r}")
    if section.get("quant_method") == METHOD:
        return PackedTensors(parse_formats(section), config, read)
    return ForeignTensors(str(section.get("quant_method")), foreign_format(section), names, read)


class ForeignTensors:
    """GPTQ's, AWQ's and compressed-tensors' matrices, packed without rounding anything again."""

    def __init__(self, method: str, stored: ForeignFormat, names: Collection[str], read: Read) -> None:
        self.weight_format = method
        self._stored, self._names, self._read = stored, names, read
        self._told: set[str] = set()

    def names(self, stored: Collection[str]) -> set[str]:
        codes = f".{self._stored.codes_name}"
        modules = {name.removesuffix(codes) for name in stored if name.endswith(codes)}
        floats = {name for name in stored if name.rpartition(".")[0] not in modules or name.endswith(".bias")}
        return floats | {f"{module}.weight" for module in modules}

    def has(self, name: str) -> bool:
        module, _, kind = name.rpartition(".")
        return kind == "weight" and f"{module}.{self._stored.codes_name}" in self._names

    def read(self, name: str) -> kernels.PackedWeight | Tensor:
        module = name.removesuffix(".weight")
        matrix = self._stored.read(lambda last: self._optional(f"{module}.{last}"))
        if matrix.group_of_column is not None and module.rpartition(".")[2] in _ROWS_OF.values():
            matrix, _ = matrix.sorted_columns()  # `row_order` has the modules before it follow
        if (order := self.row_order(name)) is not None:
            matrix = matrix.take_rows(order)
        packed = pack_exactly(matrix)
        return self._dense(name, matrix) if packed is None else packed

    def row_order(self, name: str) -> Tensor | None:
        """Groups of scattered columns (desc_act) become runs where the columns can move: behind a gated FFN,
        whose gate and up rows move along. In front of attention and FFN they cannot, because the residual
        stream is everybody's."""
        module = name.rpartition(".")[0]
        parent, _, last = module.rpartition(".")
        follower = _ROWS_OF.get(last)
        if follower is None or self._stored.index_name is None:
            return None
        index = self._optional(f"{parent}.{follower}.{self._stored.index_name}")
        if index is None or bool((index[1:] >= index[:-1]).all()):
            return None
        order = torch.argsort(index.long(), stable=True)
        return torch.cat([order, order + len(order)]) if last == "gate_up_proj" else order

    def _optional(self, name: str) -> Tensor | None:
        return self._read(name) if name in self._names else None

    def _dense(self, name: str, matrix: IntegerMatrix) -> Tensor:
        if matrix.group_of_column is not None:
            reason = "groups of scattered columns (desc_act)"
        else:
            reason = f"{matrix.bits} bits in groups of {matrix.group_size} with its scales and zero points"
        if reason not in self._told:
            self._told.add(reason)
            logger.warning(
                "%s and any like it become floats of the same values, which take more memory: "
                "no packed format holds %s",
                name,
                reason,
            )
        return matrix.dequantize()
