"""The memory bandwidth that a decode step is held against."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from prometheus_client import CollectorRegistry

from monitoring.gpu import watch_gpus

_BYTES = 128 * 2**20  # more than the caches hold
_ROUNDS = 3
_GPU_DRIVER = Path("/dev/nvidiactl")


def device_bandwidth(device: str, num_threads: int | None, registry: CollectorRegistry) -> float | None:
    """Bytes/s of the memory that an engine on `device` (auto, cpu, cuda) reads its weights from.

    Registers the GPU's metrics by the way. None where it cannot be known: a GPU without nvidia-ml-py.
    """
    if device != "cpu":
        bandwidth = watch_gpus(registry)
        if bandwidth is not None or _GPU_DRIVER.exists():
            return bandwidth
    return measure_bandwidth(num_threads or 1)


def measure_bandwidth(num_threads: int) -> float:
    """Bytes/s that so many threads of this machine read together, the best of a few rounds (about 0.1 s)."""
    parts = np.array_split(np.ones(_BYTES // 8, np.int64), num_threads)
    best_s = float("inf")
    with ThreadPoolExecutor(num_threads) as pool:  # numpy's sum lets go of the interpreter lock
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            list(pool.map(np.sum, parts))
            best_s = min(best_s, time.perf_counter() - start)
    return _BYTES / best_s
