"""What a running quantization keeps on disk, so that a killed run continues where it was.

Every step's result is one file, written beside and renamed: it is there whole or not at all. The first file
is the plan; a directory with another plan (other model, budget, text or version) is refused, not mixed.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import ParameterError


class Workspace:
    """Named results in a directory; one run at a time. `parameter` is the option that names the directory.

    Raises ParameterError when the directory holds results of another plan.
    """

    def __init__(self, directory: Path, plan: Mapping[str, Any], parameter: str) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        for part in directory.rglob("*.part"):
            part.unlink()
        text = json.dumps(dict(plan), indent=1, sort_keys=True)
        path = directory / "plan.json"
        if path.exists() and path.read_text() != text:
            raise ParameterError(
                parameter,
                f"{directory} holds a run with other settings; finish or remove it",
            )
        if not path.exists():
            write_atomically(path, lambda part: part.write_text(text))

    def has(self, name: str) -> bool:
        return (self.directory / name).exists()

    def path(self, name: str) -> Path:
        return self.directory / name

    def save_json(self, name: str, value: Any) -> None:
        write_atomically(self.directory / name, lambda part: part.write_text(json.dumps(value)))

    def load_json(self, name: str) -> Any:
        return json.loads((self.directory / name).read_text())

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        contiguous = {k: v.contiguous() for k, v in tensors.items()}
        write_atomically(self.directory / name, lambda part: save_file(contiguous, part))

    def load_tensors(self, name: str) -> dict[str, Tensor]:
        return dict(load_file(self.directory / name))

    def remove(self, name: str) -> None:
        (self.directory / name).unlink(missing_ok=True)

    def close(self) -> None:
        """The run is complete: nothing of it is needed any more."""
        shutil.rmtree(self.directory)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """`write` fills a file that then takes its place at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)


class HiddenStates:
    """The residual stream before each layer: bfloat16 [count, S, T, hidden] in one mapped file."""

    def __init__(self, path: Path, count: int, shape: tuple[int, int, int]) -> None:
        size = shape[0] * shape[1] * shape[2]
        path.parent.mkdir(parents=True, exist_ok=True)
        mapped = torch.from_file(str(path), shared=True, size=count * size, dtype=torch.bfloat16)
        self._mapped = mapped.view(count, *shape)

    def __getitem__(self, index: int) -> Tensor:
        """float32 [S, T, hidden]."""
        return self._mapped[index].float()

    def __setitem__(self, index: int, value: Tensor) -> None:
        self._mapped[index] = value
