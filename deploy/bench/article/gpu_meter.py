"""Energy and memory of the GPU by NVML, where nvidia-ml-py and a driver are present."""

import contextlib
import importlib
from typing import Any


class GpuMeter:
    """Of the first GPU."""

    def __init__(self, nvml: Any) -> None:
        self._nvml, self._device = nvml, nvml.nvmlDeviceGetHandleByIndex(0)

    def joules(self) -> float | None:
        """Since the driver was loaded; None where the GPU does not count it."""
        with contextlib.suppress(self._nvml.NVMLError):
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device)) / 1e3
        return None

    def used_bytes(self) -> int | None:
        with contextlib.suppress(self._nvml.NVMLError):
            return int(self._nvml.nvmlDeviceGetMemoryInfo(self._device).used)
        return None


def open_meter() -> GpuMeter | None:
    """None without NVML."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        return GpuMeter(nvml)
    except nvml.NVMLError:
        return None
