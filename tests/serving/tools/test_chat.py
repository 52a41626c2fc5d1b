"""Chat completions with tools: what the engine is asked, and what the client gets; the engine is a double."""

import json
from typing import Any

import httpx
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from monitoring import Recorder
from serving.app import create_app
from serving.settings import ServingSettings
from serving.state import ReplicaState
from tests.serving.anthropic.scripted_engine import ScriptedEngine
from tests.serving.malformed import CHAT, HELLO, calling, result, tool

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [tool("weather", description="Tells it.", parameters=CITY), tool("time")]
CALL = '{"name": "weather", "arguments": {"city": "Rome"}}'
TWO = f'<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{{"name": "time", "arguments": {{}}}}\n</tool_call>'


async def post(engine: ScriptedEngine, **fields: Any) -> httpx.Response:
    state = ReplicaState(ServingSettings(), Recorder(), replica="test")
    state.ready(engine)
    transport = httpx.ASGITransport(create_app(state), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post(CHAT, json={"model": "m", "messages": HELLO, "tools": TOOLS, **fields})


async def ask(*pieces: str, finish_reason: str = "stop", **fields: Any) -> Any:
    response = await post(ScriptedEngine(pieces, finish_reason), **fields)
    assert response.status_code == 200, response.text
    ChatCompletion.model_validate(response.json())
    return response.json()["choices"][0]


async def stream(*pieces: str, finish_reason: str = "stop", **fields: Any) -> list[Any]:
    """The one choice of each chunk."""
    response = await post(ScriptedEngine(pieces, finish_reason), stream=True, **fields)
    lines = response.text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
    return [chunk["choices"][0] for chunk in chunks]


async def test_calls_of_a_whole_answer():
    choice = await ask("Wait.\n", TWO)
    message = choice["message"]
    assert message["content"] == "Wait."
    assert [c["function"] for c in message["tool_calls"]] == [
        {"name": "weather", "arguments": '{"city": "Rome"}'},
        {"name": "time", "arguments": "{}"},
    ]
    assert {c["type"] for c in message["tool_calls"]} == {"function"}
    ids = [c["id"] for c in message["tool_calls"]]
    assert len(set(ids)) == 2
    assert all(i.startswith("call_") for i in ids)
    assert choice["finish_reason"] == "tool_calls"


async def test_an_answer_of_calls_alone_has_no_content():
    assert (await ask(TWO))["message"]["content"] is None


async def test_an_answer_without_calls_has_no_tool_calls():
    choice = await ask("Hello.")
    assert choice["message"] == {"role": "assistant", "content": "Hello.", "refusal": None}
    assert choice["finish_reason"] == "stop"


async def test_calls_of_a_stream():
    choices = await stream(
        "Wait.\n", "<tool_", 'call>{"name": "wea', 'ther", "arguments": {"ci', 'ty": "Rome"}', "}"
    )
    deltas = [c["delta"] for c in choices]
    call_id = deltas[2]["tool_calls"][0].pop("id")
    assert call_id.startswith("call_")
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"content": "Wait."},
        {"tool_calls": [{"index": 0, "type": "function", "function": {"name": "weather", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"ci'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": 'ty": "Rome"}'}}]},
        {},
    ]
    assert [c["finish_reason"] for c in choices] == [None] * 5 + ["tool_calls"]


async def test_the_second_call_of_a_stream_has_its_own_index_and_id():
    choices = await stream(*TWO)
    calls = [call for c in choices for call in c["delta"].get("tool_calls", ())]
    assert [c["index"] for c in calls] == sorted(c["index"] for c in calls)
    assert len({c["id"] for c in calls if "id" in c}) == 2
    for index, name, arguments in ((0, "weather", '{"city": "Rome"}'), (1, "time", "{}")):
        own = [c["function"] for c in calls if c["index"] == index]
        assert own[0] == {"name": name, "arguments": ""}
        assert "".join(f["arguments"] for f in own) == arguments


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_cut_call_ends_with_length(is_stream):
    if is_stream:
        assert (await stream(CALL[:-5], finish_reason="length"))[-1]["finish_reason"] == "length"
    else:
        choice = await ask(CALL[:-5], finish_reason="length")
        assert choice["finish_reason"] == "length"
        assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Ro'


async def test_one_call_where_several_are_not_wanted():
    choice = await ask(TWO, parallel_tool_calls=False)
    assert [c["function"]["name"] for c in choice["message"]["tool_calls"]] == ["weather"]


async def test_none_lets_the_model_write_what_it_likes():
    choice = await ask(TWO, tool_choice="none")
    assert choice["message"]["content"] == TWO
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("choice", "names", "is_list"),
    [
        ("required", ["weather", "time"], True),
        ({"type": "function", "function": {"name": "time"}}, ["time"], False),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "weather"}}],
                },
            },
            ["weather"],
            False,
        ),
    ],
)
async def test_a_forced_call_is_constrained(choice, names, is_list):
    engine = ScriptedEngine([f"[{CALL}]"])
    assert (await post(engine, tool_choice=choice)).status_code == 200
    grammar = engine.params.constraint.value
    assert engine.params.constraint.kind == "grammar"
    assert [name for name in ("weather", "time") if f'"{name}"' in grammar] == names
    assert ('start: "["' in grammar) == is_list


async def test_auto_is_free_unless_a_tool_is_strict():
    engine = ScriptedEngine(["Hello"])
    await post(engine)
    assert engine.params.constraint is None
    await post(engine, tools=[tool("weather", parameters=CITY, strict=True)])
    assert engine.params.constraint.kind == "grammar"
    assert "TEXT" in engine.params.constraint.value


async def test_calls_and_results_come_to_the_model():
    engine = ScriptedEngine(["Mild."])
    messages = [
        *HELLO,
        calling("c1", "c2", arguments=""),
        result("c2"),
        result("c1"),
        {"role": "user", "content": "So?"},
    ]
    assert (await post(engine, messages=messages)).status_code == 200
    roles = [m["role"] for m in engine.messages]
    assert roles == ["system", "user", "assistant", "user", "user"]
    assert engine.messages[2]["content"].count('{"name": "f", "arguments": {}}') == 2


async def test_an_answer_can_be_sent_back_as_it_came():
    message = (await ask(TWO))["message"]
    results = [{"role": "tool", "tool_call_id": c["id"], "content": "x"} for c in message["tool_calls"]]
    assert (await post(ScriptedEngine(["Ok."]), messages=[*HELLO, message, *results])).status_code == 200
