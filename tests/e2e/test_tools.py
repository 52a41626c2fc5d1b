"""Tools through the official OpenAI client, against the live cluster. SmolLM2 seldom calls: it is forced."""

import json

import jsonschema
import openai
import pytest

from tests.e2e.conftest import MODEL

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(180)]

QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 40}, "unit": {"$ref": "#/$defs/unit"}},
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {"unit": {"enum": ["celsius", "fahrenheit"]}},
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": PARAMETERS,
        "strict": True,
    },
}
TIME = {"type": "function", "function": {"name": "get_time", "description": "The time of day."}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


def test_a_round_trip(client):
    """Call, result, answer."""
    messages = list(QUESTION)
    asked = client.chat.completions.create(
        model=MODEL, messages=messages, tools=[WEATHER, TIME], tool_choice=NAMED, temperature=0
    )
    choice = asked.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "get_weather"
    jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
    messages.append(choice.message)
    messages.append({"role": "tool", "tool_call_id": call.id, "content": '{"sky": "clear", "degrees": 21}'})
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, tools=[WEATHER, TIME], temperature=0, max_tokens=40
    )
    assert answer.choices[0].message.content
    assert answer.choices[0].message.tool_calls is None
    assert answer.usage.prompt_tokens > asked.usage.prompt_tokens


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_streamed_round_trip(client, temperature):
    stream = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        tools=[WEATHER, TIME],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=temperature,
        stream=True,
    )
    name, call_id, fragments, reasons = "", "", [], []
    for chunk in stream:
        choice = chunk.choices[0]
        reasons.append(choice.finish_reason)
        assert not choice.delta.content
        for delta in choice.delta.tool_calls or ():
            assert delta.index == 0
            if delta.id:
                name, call_id = delta.function.name, delta.id
                assert delta.function.arguments == ""
            else:
                assert call_id, "name and id come first"
                fragments.append(delta.function.arguments)
    assert reasons[-1] == "tool_calls"
    assert set(reasons[:-1]) == {None}
    arguments = json.loads("".join(fragments))
    if name == "get_weather":
        jsonschema.validate(arguments, PARAMETERS)
        assert len(fragments) > 3, "as they are written"
    else:
        assert (name, arguments) == ("get_time", {})
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": "".join(fragments)}}
    messages = [
        *QUESTION,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call_id, "content": [{"type": "text", "text": "clear"}]},
    ]
    chunks = client.chat.completions.create(
        model=MODEL, messages=messages, tools=[WEATHER, TIME], tool_choice="none", max_tokens=20, stream=True
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks)


def test_the_clients_own_accumulator(client):
    with client.chat.completions.stream(
        model=MODEL, messages=QUESTION, tools=[WEATHER], tool_choice=NAMED, temperature=0
    ) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_completion().choices[0].message
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    jsonschema.validate(message.tool_calls[0].function.parsed_arguments, PARAMETERS)


def test_several_calls_at_once(client):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        tools=[WEATHER, TIME],
        tool_choice="required",
        temperature=1,
        seed=5,
        n=2,
        max_tokens=1000,
    )
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls"
        calls = choice.message.tool_calls
        assert 1 <= len(calls) <= 16
        assert len({call.id for call in calls}) == len(calls)
        for call in calls:
            arguments = json.loads(call.function.arguments)
            schema = PARAMETERS if call.function.name == "get_weather" else {"maxProperties": 0}
            jsonschema.validate(arguments, schema)


def test_a_choice_of_a_strict_tool_or_text(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, tools=[WEATHER], temperature=0, max_tokens=40
    )
    message = answer.choices[0].message
    assert message.content or message.tool_calls
    for call in message.tool_calls or ():
        jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)


def test_errors_name_the_field(client):
    unsupported = {**PARAMETERS, "properties": {"city": {"not": {"type": "string"}}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": unsupported}}
    unknown = {"type": "function", "function": {"name": "x"}}
    for fields, param in (
        ({"tools": [WEATHER], "tool_choice": unknown}, "tool_choice.function.name"),
        ({"tools": [tool], "tool_choice": "required"}, "tools[0].function.parameters"),
        ({"tools": [tool], "tool_choice": "required", "stream": True}, "tools[0].function.parameters"),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(model=MODEL, messages=QUESTION, **fields)
        assert error.value.param == param
