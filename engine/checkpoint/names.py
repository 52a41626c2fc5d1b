"""Where files have the tensors that the engine asks for, when a family's modules are fused."""

from dataclasses import dataclass

from torch import Tensor

import kernels
from engine.models.config import ModelConfig
from engine.models.families import split_name


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor, or `num_rows` rows of it from `first_row` on."""

    name: str
    first_row: int = 0
    num_rows: int | None = None

    def cut(self, whole: Tensor | kernels.PackedWeight) -> Tensor | kernels.PackedWeight:
        """The rows of the stored tensor."""
        if self.num_rows is None:
            return whole
        if isinstance(whole, Tensor):
            return whole[self.first_row : self.first_row + self.num_rows]
        return kernels.take_row_range(whole, self.first_row, self.num_rows)


def stored_tensor(name: str, config: ModelConfig) -> StoredTensor:
    """By the engine's name; the stored module's name is still the engine's."""
    parts = split_name(name)
    found = None if parts is None else config.family.fused_in(parts[1])
    if parts is None or found is None:
        return StoredTensor(name)
    layer, module, kind = parts
    stored, members = found
    first_row = 0
    for member in members:
        shape = config.matrix_shape(member)
        assert shape is not None, f"{member} is declared, but no matrix"
        if member == module:
            return StoredTensor(f"{layer}.{stored}.{kind}", first_row, shape[0])
        first_row += shape[0]
    raise AssertionError(f"{module} is in {members}")
