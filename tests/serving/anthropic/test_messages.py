"""What a request becomes, and what its answer looks like, whole and streamed; the engine is a double."""

import json
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from engine import EngineDeadError
from monitoring import Recorder
from serving.app import create_app
from serving.settings import ServingSettings
from serving.state import ReplicaState
from tests.serving.anthropic.malformed import HEADERS, MESSAGES, RESULT, TOOL, USE
from tests.serving.anthropic.scripted_engine import NUM_CACHED, ScriptedEngine
from tests.serving.malformed import HELLO

BODY = {"model": "m", "messages": HELLO, "max_tokens": 50}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


@dataclass
class Asked:
    engine: ScriptedEngine
    response: httpx.Response

    @property
    def message(self) -> dict[str, Any]:
        assert self.response.status_code == 200, self.response.text
        return self.response.json()

    @property
    def events(self) -> list[dict[str, Any]]:
        """The stream's data; every event's name is its data's type."""
        events = []
        for lines in self.response.text.strip().split("\n\n"):
            name, data = lines.split("\n")
            events.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {events[-1]['type']}"
        return events


async def ask(*pieces: str, path: str = MESSAGES, body: dict[str, Any] = BODY, **fields: Any) -> Asked:
    engine = ScriptedEngine(
        pieces, **{key: fields.pop(key) for key in ("finish_reason", "stop_reason", "error") if key in fields}
    )
    state = ReplicaState(ServingSettings(), Recorder(), replica="test")
    state.ready(engine)
    transport = httpx.ASGITransport(create_app(state), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return Asked(engine, await client.post(path, json={**body, **fields}, headers=HEADERS))


async def test_a_whole_answer():
    asked = await ask("Hello", " there.")
    message = asked.message
    assert message.pop("id").startswith("msg_")
    assert message == {
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [{"type": "text", "text": "Hello there."}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 20 - NUM_CACHED,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": NUM_CACHED,
            "output_tokens": 2,
            "service_tier": "standard",
        },
    }


async def test_a_streamed_answer():
    events = (await ask("Hello", "", " there.", stream=True)).events
    start = events.pop(0)
    assert start["message"]["content"] == []
    assert start["message"]["stop_reason"] is None
    assert start["message"]["usage"]["cache_read_input_tokens"] == NUM_CACHED
    assert events == [
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "ping"},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": " there."}},
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {
                "input_tokens": 20 - NUM_CACHED,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": NUM_CACHED,
                "output_tokens": 3,
            },
        },
        {"type": "message_stop"},
    ]


async def test_an_empty_answer_has_no_blocks():
    assert (await ask("")).message["content"] == []
    assert [e["type"] for e in (await ask("", stream=True)).events] == [
        "message_start",
        "message_delta",
        "message_stop",
    ]


@pytest.mark.parametrize(
    ("finish", "expected"),
    [
        ({"stop_reason": "END"}, ("stop_sequence", "END")),
        ({"stop_reason": 7}, ("end_turn", None)),
        ({"finish_reason": "length", "max_tokens": 2}, ("max_tokens", None)),
        ({"finish_reason": "length"}, ("model_context_window_exceeded", None)),
    ],
)
async def test_stop_reasons(finish, expected):
    message = (await ask("a", "b", **finish)).message
    assert (message["stop_reason"], message["stop_sequence"]) == expected
    delta = (await ask("a", "b", **finish, stream=True)).events[-2]["delta"]
    assert (delta["stop_reason"], delta["stop_sequence"]) == expected


async def test_calls_are_blocks_whole_and_streamed():
    pieces = ["Let me see.\n", CALL[:20], CALL[20:60], CALL[60:], "\n", CALL]
    message = (await ask(*pieces, tools=[TOOL])).message
    assert message["stop_reason"] == "tool_use"
    text, *calls = message["content"]
    assert text == {"type": "text", "text": "Let me see."}
    assert len({call["id"] for call in calls}) == 2
    for call in calls:
        assert call.pop("id").startswith("toolu_")
        assert call == {"type": "tool_use", "name": "weather", "input": {"city": "Rome"}}

    events = (await ask(*pieces, tools=[TOOL], stream=True)).events
    blocks = [e["content_block"] for e in events if e["type"] == "content_block_start"]
    assert [b["type"] for b in blocks] == ["text", "tool_use", "tool_use"]
    assert all(b["input"] == {} for b in blocks[1:])
    assert [e["index"] for e in events if e["type"] == "content_block_stop"] == [0, 1, 2]
    assert [e["type"] for e in events].count("ping") == 1
    for index in (1, 2):
        deltas = [e["delta"] for e in events if e["type"] == "content_block_delta" and e["index"] == index]
        assert {d["type"] for d in deltas} == {"input_json_delta"}
        assert json.loads("".join(d["partial_json"] for d in deltas)) == {"city": "Rome"}
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


async def test_a_call_that_was_cut_shows_what_came():
    message = (await ask(CALL[:-20], tools=[TOOL], finish_reason="length", max_tokens=1)).message
    assert message["stop_reason"] == "max_tokens"
    assert message["content"][0]["input"] in ({}, {"city": "Rom"}, {"city": "Rome"})


async def test_what_the_model_reads_of_calls_and_results():
    turns = [
        *HELLO,
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "I ask."}, USE]},
        {"role": "user", "content": [{**RESULT, "is_error": True}, {"type": "text", "text": "So?"}]},
    ]
    system = [{"type": "text", "text": "Be terse.", "cache_control": {"type": "ephemeral"}}]
    asked = await ask("x", messages=turns, system=system, thinking={"type": "disabled"})
    assert asked.engine.messages == [
        {"role": "system", "content": "Be terse."},
        {"role": "user", "content": "Hello\na\nb"},
        {
            "role": "assistant",
            "content": f"I ask.\n{CALL}",
        },
        {"role": "user", "content": "<tool_response>\nError: mild\n</tool_response>"},
        {"role": "user", "content": "So?"},
    ]


async def test_the_beginning_of_the_answer_is_read_behind_the_conversation():
    asked = await ask("x", messages=[*HELLO, {"role": "assistant", "content": "The"}])
    assert asked.engine.messages == [{"role": "user", "content": "Hello"}]
    assert asked.engine.prompt == (*range(20), *b"The")
    empty = await ask("x", messages=[*HELLO, {"role": "assistant", "content": []}])
    assert empty.engine.prompt == tuple(range(20))


async def test_sampling_and_choice():
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "stop_sequences": ["a", "b"]}
    params = (await ask("x", **fields, tools=[TOOL], tool_choice={"type": "any"})).engine.params
    assert (params.temperature, params.top_p, params.top_k, params.stop) == (0.5, 0.9, 5, ("a", "b"))
    assert params.max_tokens == 50
    assert params.constraint is not None
    default = (await ask("x", tools=[TOOL], tool_choice={"type": "none"}, metadata={"user_id": "u"})).engine
    assert default.params.temperature == 1.0
    assert default.params.constraint is None
    assert default.messages == HELLO
    shape = {"type": "json_schema", "schema": {"type": "object"}}
    held = (await ask("x", output_config={"format": shape})).engine.params
    assert held.constraint.kind == "json_schema"


@pytest.mark.parametrize(
    ("tier", "shown"),
    [
        ("auto", "standard"),
        ("standard_only", "standard"),
        ("voice", "priority"),
        ("batch", "batch"),
    ],
)
async def test_service_tiers(tier, shown):
    assert (await ask("x", service_tier=tier)).message["usage"]["service_tier"] == shown


async def test_more_tokens_than_the_context_has_are_no_error():
    assert (await ask("x", max_tokens=100_000)).engine.params.max_tokens == 100_000


async def test_counting():
    body = {"model": "m", "messages": [*HELLO, {"role": "assistant", "content": "The"}]}
    asked = await ask(path=f"{MESSAGES}/count_tokens", body=body, system="Be terse.")
    assert asked.message == {"input_tokens": 23}


async def test_a_failure_after_the_first_event_ends_the_stream_with_an_error():
    asked = await ask("Hello", error=EngineDeadError("gone"), stream=True)
    assert [e["type"] for e in asked.events][-2:] == ["content_block_delta", "error"]
    error = asked.events[-1]
    assert error["error"]["type"] == "overloaded_error"
    assert error["request_id"] == asked.response.headers["request-id"]


async def test_a_failure_before_it_has_a_status():
    asked = await ask(error=RuntimeError("boom"), stream=True)
    assert asked.response.status_code == 500
    assert asked.response.json()["error"]["type"] == "api_error"
    assert "boom" not in asked.response.text
