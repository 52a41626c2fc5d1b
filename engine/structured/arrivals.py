"""Requests whose constraint is being compiled: they wait outside the scheduler and hold up nobody."""

import concurrent.futures
from typing import TYPE_CHECKING

from engine.structured.compiler import GrammarCompiler

if TYPE_CHECKING:
    from concurrent.futures import Future

    from llguidance import LLMatcher

    from engine.request import Request


class ConstrainedArrivals:
    """Gives requests their grammars. Not thread-safe: belongs to the core."""

    def __init__(self, grammars: GrammarCompiler) -> None:
        self._grammars = grammars
        self._waiting: dict[str, tuple[Request, Future[LLMatcher]]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    def add(self, request: "Request") -> None:
        """Begin to compile its constraint, or find it compiled."""
        assert request.params.constraint is not None
        compiled = self._grammars.compile(request.params.constraint)
        self._waiting[request.request_id] = request, compiled

    def remove(self, request_id: str) -> "Request | None":
        """The request, which is expected no more; None for unknown ids."""
        request, _ = self._waiting.pop(request_id, (None, None))
        return request

    def take(self, timeout_s: float) -> "tuple[list[Request], list[Request]]":
        """Requests that have got their grammar; those for which there is none (`stop_reason` says why).

        Waits up to `timeout_s` for the first of them.
        """
        if timeout_s > 0:
            futures = [compiled for _, compiled in self._waiting.values()]
            concurrent.futures.wait(futures, timeout_s, concurrent.futures.FIRST_COMPLETED)
        ready: list[Request] = []
        refused: list[Request] = []
        for request_id, (request, compiled) in list(self._waiting.items()):
            if not compiled.done():
                continue
            del self._waiting[request_id]
            try:
                request.grammar = self._grammars.start(compiled.result())
                ready.append(request)
            except Exception as error:  # whatever is wrong with it or the tokenizer, the others go on
                request.stop_reason = str(error)
                refused.append(request)
        return ready, refused
