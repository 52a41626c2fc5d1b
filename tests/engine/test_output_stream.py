import asyncio

import pytest

from engine import EngineDeadError, PositionLogprobs, RequestOutput, TokenLogprob
from engine.output_stream import OutputStream


def output(text: str, number: int, index: int = 0, **more: object) -> RequestOutput:
    values = {"num_prompt_tokens": 3, "num_cached_tokens": 0, "num_output_tokens": number, **more}
    return RequestOutput("a", index, text, (number,), **values)  # type: ignore[arg-type]


def position(token: str) -> PositionLogprobs:
    return PositionLogprobs(TokenLogprob(1, token, token.encode(), -0.5), ())


async def test_a_reader_that_keeps_up_gets_every_delta():
    stream, got = OutputStream(), []
    reader = asyncio.create_task(read(stream, 3, got))
    for i, text in enumerate(("one", " two", " three")):
        stream.put(output(text, i + 1))
        await asyncio.sleep(0.01)
    await reader
    assert [o.text for o in got] == ["one", " two", " three"]


async def read(stream: OutputStream, count: int, got: list[RequestOutput]) -> None:
    for _ in range(count):
        got.append(await asyncio.wait_for(stream.get(), 5))


async def test_what_waits_is_merged_choice_by_choice():
    stream = OutputStream()
    stream.put(output("He", 1, prompt_logprobs=(None,), logprobs=(position("He"),)))
    stream.put(output("llo", 2, logprobs=(position("llo"),)))
    stream.put(output("!", 3, finish_reason="stop", stop_reason="!", logprobs=(position("!"),)))
    stream.put(output("Other", 1, index=1))
    stream.put(output("Another", 1, index=0))
    whole = await stream.get()
    assert (whole.text, whole.token_ids, whole.num_output_tokens) == ("Hello!", (1, 2, 3), 3)
    assert whole.logprobs == (position("He"), position("llo"), position("!"))
    assert (whole.prompt_logprobs, whole.finish_reason, whole.stop_reason) == ((None,), "stop", "!")
    assert [(await stream.get()).text for _ in range(2)] == ["Other", "Another"]
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(stream.get(), 0.01)


async def test_an_error_comes_behind_what_there_was():
    stream = OutputStream()
    stream.put(output("text", 1))
    stream.put(EngineDeadError("the core has stopped"))
    assert (await stream.get()).text == "text"
    with pytest.raises(EngineDeadError):
        await stream.get()
