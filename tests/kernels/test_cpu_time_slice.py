"""Computing threads let others run who wake for a moment."""

import ctypes
import os
import platform
import struct
import sys
import threading
import time

import pytest
import torch

from kernels import cpu
from tests.kernels.helpers import random_packed

_SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}.get(platform.machine())
_LINUX = tuple(int(part) for part in platform.release().split(".")[:2]) if sys.platform == "linux" else (0, 0)
LONGEST_NS = 100_000_000

pytestmark = pytest.mark.skipif(
    _LINUX < (6, 12) or _SCHED_GETATTR is None, reason="time slices can be asked for since Linux 6.12"
)


def slice_ns(thread_id: int) -> int:
    attributes = ctypes.create_string_buffer(48)
    assert ctypes.CDLL(None).syscall(_SCHED_GETATTR, thread_id, attributes, 48, 0) == 0
    return struct.unpack("IIQiIQQQ", attributes.raw)[5]


def test_threads_that_compute_take_the_longest_slice_and_no_others_do():
    before = {int(name) for name in os.listdir("/proc/self/task")}
    slices = {}

    def workers() -> list[int]:
        now = {int(name) for name in os.listdir("/proc/self/task")}
        return [slice_ns(i) for i in now - before - {threading.get_native_id()}]

    def compute() -> None:
        cpu.set_num_threads(3)
        try:
            slices["before"] = slice_ns(0)
            cpu.linear(torch.ones(4, 64), random_packed(1000, 64, "w8g64"))
            slices["after"] = slice_ns(0)
            deadline = time.monotonic() + 20
            while workers().count(LONGEST_NS) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)  # a worker asks when it first runs
            slices["workers"] = workers().count(LONGEST_NS)
            child = threading.Thread(target=lambda: slices.update(child=slice_ns(0)))
            child.start()
            child.join()
        finally:
            cpu.set_num_threads(len(os.sched_getaffinity(0)))

    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    assert slices["before"] < LONGEST_NS
    assert slices["after"] == LONGEST_NS
    assert slices["workers"] == 2
    assert slices["child"] < LONGEST_NS
