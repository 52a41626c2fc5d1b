"""Answers to clients that may leave at any time."""

import asyncio

import pytest

from serving.streaming import ClientGone, SseResponse, unless_client_leaves

DEADLINE_S = 10.0


class Client:
    """Sends nothing, and leaves when it is told to."""

    def __init__(self) -> None:
        self.has_left = asyncio.Event()
        self.got: list[dict] = []

    async def receive(self) -> dict:
        await self.has_left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict) -> None:
        self.got.append(message)


class Work:
    """Waits for `may_end`; knows whether it was cancelled."""

    def __init__(self) -> None:
        self.may_end, self.was_cancelled = asyncio.Event(), False

    async def run(self) -> str:
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        return "done"


async def test_work_that_ends_leaves_nobody_waiting_for_the_client():
    before, work = asyncio.all_tasks(), Work()
    work.may_end.set()
    assert await unless_client_leaves(Client().receive, work.run()) == "done"
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


async def test_a_client_that_leaves_ends_the_work():
    client, work = Client(), Work()
    asyncio.get_running_loop().call_later(0.01, client.has_left.set)
    with pytest.raises(ClientGone):
        async with asyncio.timeout(DEADLINE_S):
            await unless_client_leaves(client.receive, work.run())
    assert work.was_cancelled


async def test_a_deadline_that_passes_is_no_client_that_left():
    work = Work()
    with pytest.raises(TimeoutError):
        await unless_client_leaves(Client().receive, work.run(), asyncio.get_running_loop().time() + 0.01)
    assert work.was_cancelled


async def test_whoever_ends_the_task_ends_the_work():
    work = Work()
    task = asyncio.create_task(unless_client_leaves(Client().receive, work.run()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.was_cancelled


async def test_a_first_chunk_that_is_there_goes_out_with_the_head():
    client, may_go_on, closed = Client(), asyncio.Event(), []

    async def chunks():
        try:
            yield b"data: 1\n\n"
            await may_go_on.wait()
            yield b"data: 2\n\n"
        finally:
            closed.append(True)

    answer = SseResponse(chunks())
    task = asyncio.create_task(answer({"type": "http"}, client.receive, client.send))
    await asyncio.sleep(0)  # one turn of the loop
    assert [m.get("body", m["type"]) for m in client.got] == ["http.response.start", b"data: 1\n\n"]
    assert (b"content-type", b"text/event-stream; charset=utf-8") in client.got[0]["headers"]
    client.has_left.set()
    async with asyncio.timeout(DEADLINE_S):
        await task
    assert closed == [True]
    assert len(client.got) == 2


async def test_a_stream_that_is_whole_has_an_end():
    client = Client()

    async def chunks():
        yield b"data: 1\n\n"

    await SseResponse(chunks())({"type": "http"}, client.receive, client.send)
    assert client.got[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
