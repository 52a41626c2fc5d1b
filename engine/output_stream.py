"""One request's outputs on their way from the event loop's engine to whoever reads them."""

import asyncio
from collections import deque
from dataclasses import replace

from engine.outputs import RequestOutput


class OutputStream:
    """What waits for the reader is merged, so that a slow one gets larger deltas and not ever more of them.

    So a server whose event loop cannot write as many chunks a second as there are tokens still passes on all
    tokens as they come. One reader; belongs to the event loop that it is made in.

    A bare future, not an asyncio.Event: that looks its loop up for each wait, a system call on Python 3.11.
    """

    def __init__(self) -> None:
        self._items: deque[RequestOutput | Exception] = deque()
        self._loop = asyncio.get_running_loop()
        self._filled: asyncio.Future[None] | None = None  # while the reader waits

    def put(self, item: RequestOutput | Exception) -> None:
        """An exception is raised to the reader, behind what came before it."""
        last = self._items[-1] if self._items else None
        if isinstance(last, RequestOutput) and isinstance(item, RequestOutput) and _are_alike(last, item):
            self._items[-1] = _merged(last, item)
        else:
            self._items.append(item)
        if self._filled is not None and not self._filled.done():
            self._filled.set_result(None)

    async def get(self) -> RequestOutput:
        while not self._items:
            self._filled = self._loop.create_future()
            try:
                await self._filled
            finally:
                self._filled = None
        item = self._items.popleft()
        if isinstance(item, Exception):
            raise item
        return item


def _are_alike(last: RequestOutput, item: RequestOutput) -> bool:
    """Whether both are deltas of one choice."""
    return last.index == item.index and last.finish_reason is None and item.embedding is None


def _merged(last: RequestOutput, item: RequestOutput) -> RequestOutput:
    logprobs = None
    if last.logprobs is not None or item.logprobs is not None:
        logprobs = (*(last.logprobs or ()), *(item.logprobs or ()))
    return replace(
        item,
        text=last.text + item.text,
        token_ids=last.token_ids + item.token_ids,
        logprobs=logprobs,
        prompt_logprobs=last.prompt_logprobs,  # they come with the first output
    )
