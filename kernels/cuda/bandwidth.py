"""The card's read-only rate: the floor under every decode step."""

import ctypes
from collections.abc import Callable
from statistics import median

import torch

from kernels.cuda.build import check, library
from kernels.cuda.program import num_blocks

_BYTES = 4 << 30


def read_rate_gb_s(rounds: int = 9) -> float:
    """Median rate of reading 4 GiB once, in 10^9 bytes a second; the best of a few grid sizes."""
    data = torch.empty(_BYTES, dtype=torch.uint8, device="cuda").random_(0, 256)
    result = torch.zeros(1, dtype=torch.int32, device="cuda")

    def read(blocks: int) -> None:
        pointer = ctypes.c_void_p
        stream = pointer(torch.cuda.current_stream().cuda_stream)
        size = ctypes.c_int64(_BYTES)
        check(
            library().peregrine_read(
                pointer(data.data_ptr()), size, pointer(result.data_ptr()), blocks, stream
            )
        )

    best = min(device_ms(lambda b=b: read(b * num_blocks()), rounds) for b in (2, 4))  # type: ignore[misc]
    return _BYTES / best / 1e6


def device_ms(run: Callable[[], object], rounds: int = 9) -> float:
    """Median time of `run` on the device, in milliseconds, after one run to warm up."""
    run()
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return median(times)
