"""GPU metrics over a double of NVML: units, what a GPU lacks, Xid events."""

from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from monitoring import METRICS, gpu


class NVMLError(Exception):
    pass


class Nvml:
    """Two H100s in NVML's own units; the second one has no energy counter."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU, nvmlEventTypeXidCriticalError = 1, 2, 0, 8

    def __init__(self) -> None:
        self.xids = []

    def nvmlInit(self):
        pass

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetHandleByUUID(self, name):
        return int(name.removeprefix("GPU-"))

    def nvmlDeviceGetUUID(self, device):
        return f"GPU-{device}"

    def nvmlDeviceGetMemoryInfo(self, device):
        return SimpleNamespace(used=60 * 2**30, total=80 * 2**30)

    def nvmlDeviceGetClockInfo(self, device, kind):
        return {1: 1980, 2: 2619}[kind]

    nvmlDeviceGetMaxClockInfo = nvmlDeviceGetClockInfo

    def nvmlDeviceGetMemoryBusWidth(self, device):
        return 5120

    def nvmlDeviceGetPowerUsage(self, device):
        return 412_500

    def nvmlDeviceGetTotalEnergyConsumption(self, device):
        if device == 1:
            raise NVMLError("Not Supported")
        return 7_000_000

    def nvmlDeviceGetUtilizationRates(self, device):
        return SimpleNamespace(gpu=87)

    def nvmlDeviceGetTemperature(self, device, kind):
        return 61

    def nvmlEventSetCreate(self):
        return object()

    def nvmlDeviceRegisterEvents(self, device, kinds, events):
        assert kinds == self.nvmlEventTypeXidCriticalError

    def nvmlEventSetWait_v2(self, events, timeout_ms):
        assert timeout_ms == 0
        if not self.xids:
            raise NVMLError("Timeout")
        device, xid = self.xids.pop(0)
        return SimpleNamespace(device=device, eventData=xid)


@pytest.fixture
def nvml(monkeypatch):
    double = Nvml()
    monkeypatch.setattr(gpu.importlib, "import_module", lambda name: double)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return double


def test_every_gpu_metric_in_base_units(nvml):
    registry = CollectorRegistry()
    assert gpu.watch_gpus(registry) == pytest.approx(3.352e12, rel=1e-3)  # an H100's HBM3
    nvml.xids = [(0, 79), (0, 79), (1, 31)]
    generate_latest(registry)
    nvml.xids = [(1, 31)]
    text = generate_latest(registry).decode()
    found = {
        (s.name.removeprefix("peregrine_gpu_"), *sorted(s.labels.values())): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }
    assert found["memory_used_bytes", "GPU-0"] == 60 * 2**30
    assert found["clock_hertz", "GPU-0", "sm"] == 1.98e9
    assert found["power_watts", "GPU-1"] == 412.5
    assert found["energy_joules_total", "GPU-0"] == 7000
    assert ("energy_joules_total", "GPU-1") not in found
    assert found["utilization_ratio", "GPU-0"] == 0.87
    assert found["temperature_celsius", "GPU-0"] == 61
    assert found["xid_errors_total", "79", "GPU-0"] == 2
    assert found["xid_errors_total", "31", "GPU-1"] == 2
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert names == {name for name, metric in METRICS.items() if metric.source == "gpu"}


@pytest.mark.parametrize("visible", ["1", "GPU-1"])
def test_a_replica_reads_its_own_gpu_alone(nvml, monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    registry = CollectorRegistry()
    gpu.watch_gpus(registry)
    text = generate_latest(registry).decode()
    assert 'gpu="GPU-1"' in text
    assert 'gpu="GPU-0"' not in text


def test_the_double_has_the_packages_names():
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    names = [name for name in dir(Nvml()) if name.startswith(("nvml", "NVML"))]
    assert [name for name in names if not hasattr(pynvml, name)] == []


def test_nothing_is_registered_without_nvml_or_without_a_driver(nvml, monkeypatch):
    registry = CollectorRegistry()

    def no_driver():
        raise NVMLError("Driver Not Loaded")

    nvml.nvmlInit = no_driver
    assert gpu.watch_gpus(registry) is None

    def no_package(name):
        raise ImportError(name)

    monkeypatch.setattr(gpu.importlib, "import_module", no_package)
    assert gpu.watch_gpus(registry) is None
    assert generate_latest(registry) == b""
