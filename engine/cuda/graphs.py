"""CUDA graphs by key, captured when wanted for the second time."""

import contextlib
import gc
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch


class Graphs:
    """The first run of a kind is not captured: it compiles and loads what it needs.

    Graphs hold the addresses of what they read and write: `clear` when those are new ones. On a CPU
    everything is just run.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._seen: set[Hashable] = set()
        self._pool = torch.cuda.graph_pool_handle() if self._is_gpu else None

    def run(self, kind: Hashable, key: Hashable, compute: Callable[[], object]) -> None:
        """`compute` on the current stream. kind: of keys whose runs load the same code."""
        if kind not in self._seen or not self._is_gpu:
            self._seen.add(kind)
            compute()
            return
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = torch.cuda.CUDAGraph()
            with capture(graph, self._pool):
                compute()
        graph.replay()

    def clear(self) -> None:
        self._graphs.clear()
        self._seen.clear()


@contextlib.contextmanager
def capture(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """What is launched on the current stream becomes `graph`.

    No garbage is collected meanwhile: the end of another engine of this process may lie in it, whose calls
    to the driver a capture may not outlive (suspected where two became invalid in a long test run, not seen).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            yield
    finally:
        if was_enabled:
            gc.enable()
