"""Copies between host and device that wait for nothing.

Pinned memory comes from torch's caching allocator, which hands it out again only after the copies that use it
are done. On the CPU (tests of the logic around the kernels) everything is done at once.
"""

import time

import numpy as np
import torch
from torch import Tensor

from engine.errors import EngineDeadError

_POLL_S = 20e-6
_DEADLINE_S = 120.0


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device, in the order of the current stream. The array may be changed afterwards."""
    host = torch.from_numpy(array)
    if device.type == "cpu":
        return host.clone()
    return host.pin_memory().to(device, non_blocking=True)


def download(tensor: Tensor) -> Tensor:
    """A host copy, filled when the current stream gets there: wait for a `Completion` recorded after it."""
    if tensor.device.type == "cpu":
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class Completion:
    """A point of the current stream that the host can wait for."""

    def __init__(self, device: torch.device) -> None:
        self._event = None
        if device.type != "cpu":
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> None:
        """Raises EngineDeadError when the device does not get there in two minutes (a hanging kernel)."""
        if self._event is None:
            return
        deadline = time.monotonic() + _DEADLINE_S
        while not self._event.query():
            if time.monotonic() > deadline:
                raise EngineDeadError(f"the GPU did not finish a step within {_DEADLINE_S:.0f} s")
            time.sleep(_POLL_S)
