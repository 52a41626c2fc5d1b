"""The router's simulation in events: a time and a call, in a heap."""

import heapq
import itertools
from collections.abc import Callable


class Clock:
    """Simulated seconds and what is to happen in them."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[], object]]] = []

    def __call__(self) -> float:
        return self.now_s

    def after(self, delay_s: float, call: Callable[[], object]) -> None:
        heapq.heappush(self._events, (self.now_s + delay_s, next(self._order), call))

    def run(self, is_done: Callable[[], bool]) -> None:
        while self._events and not is_done():
            self.now_s, _, call = heapq.heappop(self._events)
            call()
