"""GPU metrics through NVML, where the optional nvidia-ml-py and a driver are present."""

import contextlib
import importlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client import Metric as Family
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from monitoring.metrics import METRICS

logger = logging.getLogger(__name__)

_HERTZ_PER_MHZ = 1e6


class GpuCollector(Collector):
    """Reads NVML when it is scraped, about a millisecond a GPU; a figure that a GPU lacks is left out.

    Xid errors are events: NVML keeps those since the collector was made, and each scrape takes in what came.
    """

    def __init__(self, nvml: ModuleType | Any, devices: Sequence[Any]) -> None:
        self._nvml = nvml
        self._devices = {_text(nvml.nvmlDeviceGetUUID(device)): device for device in devices}
        self._xids: Counter[tuple[str, str]] = Counter()
        self._events = None
        try:
            self._events = nvml.nvmlEventSetCreate()
            for device in self._devices.values():
                nvml.nvmlDeviceRegisterEvents(device, nvml.nvmlEventTypeXidCriticalError, self._events)
        except nvml.NVMLError as error:
            logger.warning("Xid errors are not counted: %s", error)
            self._events = None

    def collect(self) -> Iterator[Family]:
        nvml = self._nvml
        families = {name: _family(name) for name, metric in METRICS.items() if metric.source == "gpu"}

        def add(name: str, value: float, *labels: str) -> None:
            families[name].add_metric(labels, value)

        for gpu, device in self._devices.items():
            with contextlib.suppress(nvml.NVMLError):
                memory = nvml.nvmlDeviceGetMemoryInfo(device)
                add("peregrine_gpu_memory_used_bytes", memory.used, gpu)
                add("peregrine_gpu_memory_total_bytes", memory.total, gpu)
            for clock, kind in (("sm", nvml.NVML_CLOCK_SM), ("memory", nvml.NVML_CLOCK_MEM)):
                with contextlib.suppress(nvml.NVMLError):
                    mhz = nvml.nvmlDeviceGetClockInfo(device, kind)
                    add("peregrine_gpu_clock_hertz", mhz * _HERTZ_PER_MHZ, gpu, clock)
            with contextlib.suppress(nvml.NVMLError):  # milliwatts
                add("peregrine_gpu_power_watts", nvml.nvmlDeviceGetPowerUsage(device) / 1e3, gpu)
            with contextlib.suppress(nvml.NVMLError):  # millijoules
                energy = nvml.nvmlDeviceGetTotalEnergyConsumption(device)
                add("peregrine_gpu_energy_joules_total", energy / 1e3, gpu)
            with contextlib.suppress(nvml.NVMLError):  # percent
                share = nvml.nvmlDeviceGetUtilizationRates(device).gpu
                add("peregrine_gpu_utilization_ratio", share / 100, gpu)
            with contextlib.suppress(nvml.NVMLError):
                celsius = nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU)
                add("peregrine_gpu_temperature_celsius", celsius, gpu)
        self._take_xids()
        for (gpu, xid), count in self._xids.items():
            add("peregrine_gpu_xid_errors_total", count, gpu, xid)
        yield from families.values()

    def describe(self) -> Iterator[Family]:
        yield from (_family(name) for name, metric in METRICS.items() if metric.source == "gpu")

    def _take_xids(self) -> None:
        while self._events is not None:
            try:
                event = self._nvml.nvmlEventSetWait_v2(self._events, 0)
            except self._nvml.NVMLError:  # a time-out: there are no more
                return
            gpu = _text(self._nvml.nvmlDeviceGetUUID(event.device))
            self._xids[gpu, str(event.eventData)] += 1


def watch_gpus(registry: CollectorRegistry) -> float | None:
    """Register this process's GPUs. Returns the first one's memory bandwidth, bytes/s; None without NVML."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        devices = _visible_devices(nvml)
    except nvml.NVMLError as error:
        logger.info("no GPU metrics: %s", error)
        return None
    if not devices:
        return None
    registry.register(GpuCollector(nvml, devices))
    return _bandwidth(nvml, devices[0])


def _visible_devices(nvml: Any) -> list[Any]:
    """Those of CUDA_VISIBLE_DEVICES, which Ray sets to the one that a replica has; all where it is unset."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return [
        nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID(name)
        for name in names
        if name != "-1"
    ]


def _bandwidth(nvml: Any, device: Any) -> float | None:
    """Peak: the bus moves two bits a line and clock."""
    try:
        bits = nvml.nvmlDeviceGetMemoryBusWidth(device)
        mhz = nvml.nvmlDeviceGetMaxClockInfo(device, nvml.NVML_CLOCK_MEM)
    except nvml.NVMLError:
        return None
    return float(2 * mhz * _HERTZ_PER_MHZ * bits / 8)


def _family(name: str) -> Any:
    metric = METRICS[name]
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    return kind(name, metric.help, labels=metric.labels)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
