"""Where chunks end, what they carry, and that nothing is held for ever."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import PositionLogprobs, RequestOutput, TokenLogprob
from monitoring import Recorder
from serving.app import create_app
from serving.flushing import LIMITS, HeldText, flushed, sentence_end, word_end
from serving.settings import ServingSettings
from serving.state import ReplicaState
from tests.serving.anthropic.scripted_engine import ScriptedEngine
from tests.serving.malformed import CHAT, HELLO

SPEECH = [
    " Dr",
    ".",
    " Lee",
    " paid",
    " $",
    "3",
    ".",
    "14",
    ".",
    " Why",
    "?",
    ' "',
    "Well",
    '."',
    "\n",
    "- Tea",
]


def output(number: int, text: str, *, index: int = 0, is_last: bool = False) -> RequestOutput:
    token = TokenLogprob(number, text, text.encode(), -1.0)
    logprobs = (PositionLogprobs(token, ()),)
    reason = "stop" if is_last else None
    return RequestOutput("r", index, text, (number,), 5, 2, number + 1, logprobs, finish_reason=reason)


def outputs(pieces: list[str]) -> list[RequestOutput]:
    return [output(n, text, is_last=n == len(pieces) - 1) for n, text in enumerate(pieces)]


def held(flush: str, pieces: list[str]) -> list[RequestOutput]:
    choice = HeldText(flush)
    return [piece for o in outputs(pieces) if (piece := choice.add(o, 0.0)) is not None]


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("Hello", ""),
        (" Hello", ""),
        ("Hello, wor", "Hello, "),
        ("Hello, ", "Hello, "),
        ("don't st", "don't "),
        ("3.14 e-m", "3.14 "),
        ("你好。世界", "你好。世"),
        ("カタカナで", "カタカナ"),
        ("\n\nHi", ""),
    ],
)
def test_words_end(text, end):
    assert text[: word_end(text)] == end


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("Hello.", ""),
        ("Hello. W", "Hello. "),
        ("Dr. Smith paid 3.14", ""),
        ("Is it? Yes! No", "Is it? Yes! "),
        ('He said "Stop." Then', 'He said "Stop." '),
        ('Why? "We', "Why? "),
        ("你好。世", "你好。"),
        ("वह है। और", "वह है। "),
        ("- one\n- tw", "- one\n"),
        ("\n\nHi", ""),
    ],
)
def test_sentences_end(text, end):
    assert text[: sentence_end(text)] == end


def test_each_sentence_is_given_out_with_the_token_that_shows_its_end():
    texts = [piece.text for piece in held("sentence", SPEECH)]
    assert texts == [" Dr. Lee paid $3.14. ", "Why? ", '"Well."\n', "- Tea"]
    assert [piece.text for piece in held("word", SPEECH)][:3] == [" Dr. ", "Lee ", "paid "]


def test_a_tokens_logprobs_go_with_its_first_character():
    pieces = held("sentence", SPEECH)
    assert [piece.token_ids for piece in pieces] == [tuple(range(10)), (10, 11), (12, 13, 14), (15,)]
    assert [[p.token.token_id for p in piece.logprobs] for piece in pieces] == [
        list(piece.token_ids) for piece in pieces
    ]


@given(
    st.lists(st.text(alphabet="ab .!?\n你。\"'", max_size=7), min_size=1, max_size=60),
    st.sampled_from(["word", "sentence"]),
)
def test_nothing_is_lost_changed_or_held_beyond_the_limit(pieces, flush):
    given = outputs(pieces)
    choice, shown = HeldText(flush), []
    for o in given:
        if (piece := choice.add(o, 0.0)) is not None:
            shown.append(piece)
        behind = sum(len(g.text) for g in given[: o.num_output_tokens]) - sum(len(s.text) for s in shown)
        assert behind < LIMITS[flush].chars
    assert "".join(piece.text for piece in shown) == "".join(pieces)
    assert [t for piece in shown for t in piece.token_ids] == list(range(len(pieces)))
    assert [p for piece in shown for p in piece.logprobs] == [p for o in given for p in o.logprobs]
    last = shown[-1]
    assert (last.finish_reason, last.num_output_tokens) == ("stop", len(pieces))
    assert not any(piece.finish_reason for piece in shown[:-1])


def test_text_without_an_end_goes_at_the_limit_at_the_end_of_a_word():
    pieces = [" word"] * 100
    first = held("sentence", pieces)[0]
    assert first.text == " word" * 79 + " "
    assert held("word", ["x" * 10] * 10)[0].text == "x" * 70


async def test_text_goes_in_time_though_no_output_comes():
    more = asyncio.Event()

    async def stuck() -> AsyncGenerator[tuple[int, RequestOutput], None]:
        yield 0, output(0, "Half a")
        await more.wait()
        yield 0, output(1, " sentence", is_last=True)

    async with aclosing(flushed(stuck(), "word", lambda _: None)) as pieces:
        assert (await anext(pieces))[1].text == "Half "
        assert (await anext(pieces))[1].text == "a"
        more.set()
        assert (await anext(pieces))[1].text == " sentence"


async def test_choices_are_held_apart():
    async def two() -> AsyncGenerator[tuple[int, RequestOutput], None]:
        yield 0, output(0, "One")
        yield 1, output(0, "Eins")
        yield 0, output(0, "Uno", index=1)
        yield 0, output(1, " two", is_last=True)
        yield 1, output(1, " zwei", is_last=True)
        yield 0, output(1, " dos", index=1, is_last=True)

    began: list[str] = []
    shown = [
        (n, o.index, o.text) async for n, o in flushed(two(), "sentence", lambda o: began.append(o.text))
    ]
    assert shown == [(0, 0, "One two"), (1, 0, "Eins zwei"), (0, 1, "Uno dos")]
    assert len(began) == 6


async def test_what_is_held_goes_out_before_a_failure():
    async def failing() -> AsyncGenerator[tuple[int, RequestOutput], None]:
        yield 0, output(0, "Half")
        raise ValueError("gone")

    pieces = flushed(failing(), "sentence", lambda _: None)
    assert (await anext(pieces))[1].text == "Half"
    with pytest.raises(ValueError, match="gone"):
        await anext(pieces)


async def test_closing_it_closes_what_it_reads():
    closed = asyncio.Event()

    async def endless() -> AsyncGenerator[tuple[int, RequestOutput], None]:
        try:
            yield 0, output(0, "One ")
            await asyncio.Event().wait()
        finally:
            closed.set()

    pieces = flushed(endless(), "word", lambda _: None)
    await anext(pieces)
    waiting = asyncio.ensure_future(anext(pieces))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert closed.is_set()


async def stream(path: str, pieces: list[str], **fields: object) -> httpx.Response:
    state = ReplicaState(ServingSettings(), Recorder(), replica="test")
    state.ready(ScriptedEngine(pieces))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(create_app(state)), base_url="http://t"
    ) as client:
        return await client.post(path, json={"model": "m", "stream": True, **fields})


def events(response: httpx.Response) -> list[dict]:
    lines = response.text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


OPTIONS = {"flush": "sentence", "include_usage": True}
SENTENCES = [" Dr. Lee paid $3.14. ", "Why? ", '"Well."\n', "- Tea"]


async def test_chat_and_completions_stream_sentences():
    response = await stream(CHAT, SPEECH, messages=HELLO, stream_options=OPTIONS)
    chunks = events(response)
    deltas = [c["choices"][0]["delta"].get("content") for c in chunks[:-1]]
    assert [d for d in deltas if d] == SENTENCES
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["completion_tokens"] == len(SPEECH)

    response = await stream("/v1/completions", SPEECH, prompt="x", stream_options=OPTIONS)
    chunks = events(response)
    assert [c["choices"][0]["text"] for c in chunks[:-1]] == SENTENCES
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["completion_tokens"] == len(SPEECH)


async def test_one_by_one_is_the_default():
    response = await stream("/v1/completions", SPEECH, prompt="x")
    assert [c["choices"][0]["text"] for c in events(response)] == SPEECH


@pytest.mark.parametrize("flush", ["paragraph", None, 1])
async def test_another_boundary_is_refused_by_name(flush):
    response = await stream(CHAT, SPEECH, messages=HELLO, stream_options={"flush": flush})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "stream_options.flush")
    assert "'token', 'word' or 'sentence'" in error["message"]


def test_merged_outputs_keep_what_came_once():
    first = replace(output(0, "One"), prompt_logprobs=(None,), first_scheduled_s=3.0)
    choice = HeldText("sentence")
    assert choice.add(first, 0.0) is None
    piece = choice.add(output(1, ".", is_last=True), 0.0)
    assert (piece.prompt_logprobs, piece.first_scheduled_s, piece.text) == ((None,), 3.0, "One.")
