"""Compiles the attention kernels for an H100 without one: the interpreter accepts what the compiler refuses.

    python -m tests.kernels.compile_for_hopper

To be run in a process of its own, without TRITON_INTERPRET: it takes the driver's place.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kernels import kv_cache
from kernels.prefill import Bound, Product, Tokens
from kernels.triton_ops import decode_attention, prefill_append, prefill_attention
from tests.kernels.helpers import rope

CPU = torch.device("cpu")
SHAPES = [(9, 3, 64), (8, 2, 128)]  # query heads, KV heads, head_dim
KERNELS: list[tuple[ModuleType, str]] = [
    (decode_attention, "attend_part"),
    (prefill_append, "rope_append"),
    (prefill_attention, "attend_tiles"),
]


class Driver:
    """What the compiler asks of a GPU's."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """A kernel that is compiled with the arguments of a launch, as an early one, and not launched."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile_with(*args: object, **options: object) -> None:
            options |= {"IS_EARLY": True, "launch_pdl": True}
            self._kernel.warmup(*args, grid=grid, **options)

        return compile_with


@contextmanager
def compiled_only() -> Iterator[None]:
    own = [(module, name, getattr(module, name)) for module, name in KERNELS]
    for module, name, kernel in own:
        setattr(module, name, Compiled(kernel))
    try:
        yield
    finally:
        for module, name, kernel in own:
            setattr(module, name, kernel)


def compile_all(heads: int, kv_heads: int, dim: int, kv_format: kv_cache.KVFormat) -> None:
    """Raises triton's CompilationError."""
    cos, sin = rope(16, dim)
    w: Any = SimpleNamespace(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, scale=0.1, window=None, eps=1e-6,
        cos=cos, sin=sin, qkv_bias=None, q_norm=None, k_norm=None,
    )  # fmt: skip
    caches = (
        kv_cache.allocate(4, kv_heads, dim, kv_format, CPU),
        kv_cache.allocate(4, kv_heads, dim, kv_format, CPU),
    )
    ints = torch.zeros(16, dtype=torch.int32)
    tokens = Tokens(ints, ints, ints.view(4, 4), ints[:8].view(2, 4), 64)
    qkv = Product(torch.zeros(2, 16, (heads + 2 * kv_heads) * dim))
    bound = Bound.of(50.0, 16, CPU)
    with compiled_only():
        for is_shared in (False, True):
            decode_attention.attend_next(qkv, w, caches, tokens, "tiled", bound, is_shared=is_shared)
        query = prefill_append.rope_and_append(qkv, w, caches, tokens)
        prefill_attention.attend(query, w, caches, tokens)


def main() -> None:
    driver.set_active(Driver())  # type: ignore[arg-type]
    formats: tuple[kv_cache.KVFormat, ...] = ("bf16", "fp8")
    for shape in SHAPES:
        for kv_format in formats:
            compile_all(*shape, kv_format)
            print("compiled", *shape, kv_format, flush=True)


if __name__ == "__main__":
    main()
