"""Responses whole and streamed, by the official client; the engine is a double that says what it is told."""

import json

import openai
import pytest

from engine import EngineDeadError
from tests.serving.anthropic.scripted_engine import NUM_CACHED, ScriptedEngine
from tests.serving.responses.asking import TOOL, client_of

TEXT_PARTS = [{"type": "input_text", "text": "Rome"}, {"type": "input_text", "text": "?"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


async def ask(engine, **fields):
    async with client_of(engine) as (client, _):
        return await client.responses.create(**{"model": "m", "input": "Hi", **fields})


async def events_of(engine, **fields):
    return [event async for event in await ask(engine, stream=True, **fields)]


async def test_text():
    engine = ScriptedEngine(["Hel", "lo"])
    done = await ask(
        engine, instructions="Be brief.", metadata={"a": "b"}, temperature=0.5, max_output_tokens=9, user="u"
    )
    assert (done.object, done.status, done.output_text) == ("response", "completed", "Hello")
    [message] = done.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    assert done.id.startswith("resp_one_")
    assert message.id == done.id.replace("resp", "msg", 1) + "_0"
    assert (done.usage.input_tokens, done.usage.output_tokens, done.usage.total_tokens) == (20, 2, 22)
    assert done.usage.input_tokens_details.cached_tokens == NUM_CACHED
    assert (done.instructions, done.metadata, done.temperature) == ("Be brief.", {"a": "b"}, 0.5)
    assert (done.max_output_tokens, done.text.format.type, done.tool_choice) == (9, "text", "auto")
    assert engine.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]
    assert (engine.params.temperature, engine.params.max_tokens) == (0.5, 9)


async def test_a_streamed_text_tells_every_step_in_order():
    events = await events_of(ScriptedEngine(["Hel", "lo"]))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert [e.type.removeprefix("response.") for e in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert events[0].response.status == events[2].item.status == "in_progress"
    assert (events[0].response.output, events[2].item.content) == ([], [])
    assert [e.delta for e in events[4:6]] == ["Hel", "lo"]
    assert events[6].text == events[7].part.text == events[8].item.content[0].text == "Hello"
    last = events[-1].response
    assert (last.status, last.output_text, last.usage.total_tokens) == ("completed", "Hello", 22)
    assert {e.item_id for e in events[3:8]} == {last.output[0].id}


async def test_the_clients_own_accumulation():
    """`responses.stream` builds a snapshot from the events, and fails where they do not fit together."""
    async with (
        client_of(ScriptedEngine(["One ", "moment. ", CALL[:30], CALL[30:]])) as (client, _),
        client.responses.stream(model="m", input="Hi", tools=[TOOL]) as stream,
    ):
        kinds = {event.type async for event in stream}
        done = await stream.get_final_response()
    assert "response.function_call_arguments.delta" in kinds
    assert [item.type for item in done.output] == ["message", "function_call"]
    assert done.output_text == "One moment."
    assert json.loads(done.output[1].arguments) == {"city": "Rome"}


async def test_a_call_whole_and_streamed():
    done = await ask(ScriptedEngine([CALL]), tools=[TOOL])
    [call] = done.output
    assert (call.type, call.name, call.status) == ("function_call", "weather", "completed")
    assert call.call_id.startswith("call_")
    assert call.id == done.id.replace("resp", "fc", 1) + "_0"
    assert json.loads(call.arguments) == {"city": "Rome"}
    assert done.tools[0].name == "weather"
    events = await events_of(ScriptedEngine([CALL[:45], CALL[45:55], CALL[55:]]), tools=[TOOL])
    kinds = [e.type.removeprefix("response.") for e in events]
    assert kinds[:3] == ["created", "in_progress", "output_item.added"]
    assert kinds[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert len(deltas) > 1
    assert "".join(deltas) == events[-3].arguments == events[-2].item.arguments
    assert (events[2].item.arguments, events[2].item.status) == ("", "in_progress")


async def test_two_calls_are_two_items():
    done = await ask(ScriptedEngine([CALL, "\n", CALL.replace("Rome", "Oslo")]), tools=[TOOL])
    assert [json.loads(item.arguments)["city"] for item in done.output] == ["Rome", "Oslo"]
    assert len({item.call_id for item in done.output}) == len({item.id for item in done.output}) == 2


@pytest.mark.parametrize("pieces", [["Hel"], [CALL[:60]]])
async def test_an_answer_that_is_cut_is_incomplete(pieces):
    fields = {"tools": [TOOL], "max_output_tokens": 1}
    whole = await ask(ScriptedEngine(pieces, finish_reason="length"), **fields)
    last = (await events_of(ScriptedEngine(pieces, finish_reason="length"), **fields))[-1]
    assert last.type == "response.incomplete"
    for done in (whole, last.response):
        assert (done.status, done.output[-1].status) == ("incomplete", "incomplete")
        assert done.incomplete_details.reason == "max_output_tokens"


async def test_an_empty_answer_is_an_empty_message():
    done = await ask(ScriptedEngine([""]))
    assert (done.output_text, len(done.output)) == ("", 1)


async def test_a_stream_that_breaks_off_says_so():
    events = await events_of(ScriptedEngine(["Hel"], error=EngineDeadError("gone")))
    error, failed = events[-2:]
    assert (error.type, error.code) == ("error", "service_unavailable")
    assert (failed.type, failed.response.status) == ("response.failed", "failed")
    assert failed.response.error.code == "server_error"
    assert failed.response.output[0].content[0].text == "Hel"
    assert [e.sequence_number for e in events] == list(range(len(events)))


async def test_before_the_first_event_a_failure_is_an_error():
    class Dead(ScriptedEngine):
        async def generate(self, *args, **kw):
            raise EngineDeadError("gone")
            yield

    with pytest.raises(openai.InternalServerError) as error:
        await ask(Dead([]), stream=True)
    assert error.value.status_code == 503


async def test_input_tokens_are_counted_without_an_answer():
    engine = ScriptedEngine(["never said"])
    async with client_of(engine) as (client, state):
        counted = await client.responses.input_tokens.count(model="m", input="Hi", instructions="A.")
        assert len(state.responses) == 0
    assert (counted.input_tokens, counted.object) == (20, "response.input_tokens")
    assert [m["role"] for m in engine.messages] == ["system", "user"]
    assert engine.params is None


async def test_items_become_a_conversation():
    engine = ScriptedEngine(["ok"])
    await ask(
        engine,
        instructions="A.",
        input=[
            {"role": "developer", "content": "B."},
            {
                "role": "user",
                "content": TEXT_PARTS,
            },
            {
                "type": "message",
                "role": "assistant",
                "id": "msg_1",
                "status": "completed",
                "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}],
            },
            {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Rome"}'},
            {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": '{"city": "Oslo"}'},
            {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
            {
                "type": "function_call_output",
                "call_id": "c2",
                "output": TEXT_PARTS,
            },
            {"role": "user", "content": "Thanks"},
        ],
        tools=[TOOL],
        tool_choice="none",
    )
    roles = [m["role"] for m in engine.messages]
    assert roles[0] == "system"
    assert engine.messages[0]["content"].startswith("A.\n\nB.")
    text = json.dumps(engine.messages)
    for words in ("Rome?", "I look.", "sunny", "Thanks"):
        assert words in text


MESSAGE = {"role": "user", "content": "Hi"}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "x"}
CALL_ITEM = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": ""}, "input", "non-empty string"),
        ({"input": []}, "input", "non-empty array of items"),
        ({"input": 5}, "input", "non-empty string"),
        ({"input": ["Hi"]}, "input[0]", "function_call_output"),
        (
            {"input": [{"type": "reasoning", "id": "x", "summary": []}]},
            "input[0]",
            "must be an object of type",
        ),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role", "user"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
            "input_text",
        ),
        ({"input": [RESULT]}, "input", "no function_call precedes"),
        ({"input": [CALL_ITEM]}, "input", "no function_call_output follows"),
        ({"input": [CALL_ITEM, MESSAGE, RESULT]}, "input", "no function_call_output follows"),
        ({"input": [{**MESSAGE, "color": "red"}]}, "input[0].color", "Unrecognized"),
        ({"background": True}, "background", "not supported"),
        ({"conversation": "conv_1"}, "conversation", "previous_response_id"),
        ({"prompt": {"id": "p"}}, "prompt", "not supported"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", "none"),
        ({"truncation": "auto"}, "truncation", "disabled"),
        (
            {"tools": [{"type": "web_search"}]},
            "tools[0].type",
            "built-in tools are not served",
        ),
        ({"tools": [TOOL, TOOL]}, "tools[1].name", "two tools"),
        ({"tools": [{**TOOL, "parameters": {"type": "array"}}]}, "tools[0].parameters", "object"),
        ({"tool_choice": "required"}, "tool_choice", "when there are tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice.name", "'f'"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice", "must be none, auto"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema", "is required"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "medium"),
        ({"include": ["file_search_call.results"]}, "include[0]", "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs", "include"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater"),
        ({"temperature": 3}, "temperature", "less"),
        ({"metadata": {"k" * 65: "v"}}, "metadata", "64"),
        ({"metadata": {str(i): "v" for i in range(17)}}, "metadata", "16"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options", "stream is true"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
            "False",
        ),
        ({"messages": []}, "messages", "Unrecognized"),
        ({"model": "gpt-4o"}, "model", "does not exist"),
    ],
)
async def test_what_is_not_served_is_refused_by_name(fields, param, words):
    async with client_of(ScriptedEngine(["ok"])) as (client, _):
        with pytest.raises(openai.APIStatusError) as error:
            await client.post("/responses", body={"model": "m", "input": "Hi", **fields}, cast_to=object)
    assert error.value.status_code in (400, 404)
    body = error.value.response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert body["param"].startswith(param)
    assert words in body["message"]
