"""Programmatic dependent launch: a kernel's blocks start while the kernel before still runs, and wait there.

So a launch's latency is hidden, and a product (src/prompt.cu) reads its first weights meanwhile. Every kernel
of such a chain waits before it writes, and before it reads what a kernel wrote, also a block with nothing to
do: a kernel that has ended then tells that all before it have.
"""
# mypy: disable-error-code="no-untyped-def"

import functools
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def wait_for_kernel_before(IS_EARLY: tl.constexpr):
    """To be called first."""
    if IS_EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@functools.cache
def early(device: torch.device) -> dict[str, Any]:
    """Arguments of a launch: IS_EARLY, and what has Triton ask for it."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"IS_EARLY": True, "launch_pdl": True}
    return {"IS_EARLY": False}
