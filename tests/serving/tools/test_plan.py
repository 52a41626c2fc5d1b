"""What tools and a choice mean for one request: schema, grammar, what the template gets."""

import json
from typing import Any

import jsonschema
import pytest

from engine import Constraint, ParameterError, SamplingParams
from serving.tools import Message, ToolCall, ToolChoice, ToolDefinition, plan_chat
from serving.tools.parameters import check_parameters
from serving.tools.syntax import HERMES, LLAMA, MISTRAL, PLAIN_JSON, syntax_of

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TREE: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "root": {"$ref": "#/$defs/node"},
        "self": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        "$ref": {"const": {"$ref": "#/$defs/node"}},
    },
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"sons": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
        },
    },
}
WEATHER = ToolDefinition("weather", "Tells the weather.", CITY)
TREES = ToolDefinition("trees", "", TREE)
AUTO = ToolChoice()
HELLO = (Message("user", "Hello"),)
KNOWS_TOOLS = "{% if tools %}<tool_call>{{ tools }}{% endif %}"
CALLS = (ToolCall("call_1", "weather", '{"city": "Rome"}'), ToolCall("call_2", "trees", ""))
ASKED = (
    *HELLO,
    Message("assistant", "", CALLS),
    Message("tool", "mild", tool_call_id="call_1"),
    Message("tool", "many", tool_call_id="call_2"),
)


ANSWER = {
    "type": "object",
    "properties": {"x": {"$ref": "#/$defs/n"}},
    "required": ["x"],
    "additionalProperties": False,
    "$defs": {"n": {"type": "integer"}},
}


def schema_of(tools, choice=AUTO, template=None) -> dict[str, Any]:
    """Of an output that is a call or ANSWER."""
    own = SamplingParams(constraint=Constraint("json_schema", json.dumps(ANSWER), "response_format"))
    constraint = plan_chat(HELLO, tools, choice, own, template).params.constraint
    assert constraint.kind == "json_schema"
    assert constraint.name == "response_format"
    schema = json.loads(constraint.value)
    jsonschema.Draft202012Validator.check_schema(schema)
    return schema


def holds(schema: dict[str, Any], value: Any) -> bool:
    return jsonschema.Draft202012Validator(schema).is_valid(value)


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


def test_references_hold_inside_the_calls():
    schema = schema_of([WEATHER, TREES])
    assert holds(schema, call("trees", root={"sons": [{"sons": []}]}, self={"root": {}}))
    assert not holds(schema, call("trees", root={"sons": [{"sons": 1}]}))
    assert not holds(schema, call("trees", self={"root": 1}))
    assert holds(schema, call("trees", **{"$ref": {"$ref": "#/$defs/node"}})), "data is left as it is"


def test_arguments_are_called_as_the_family_does():
    schema = schema_of([WEATHER], template="{% if tools %}<|python_tag|>{% endif %}")
    assert holds(schema, {"name": "weather", "parameters": {"city": "Rome"}})
    assert next(iter(schema["anyOf"][0]["properties"])) == "name", "streamed before the arguments"


def test_a_call_or_an_answer_of_the_schema_asked_for():
    schema = schema_of([WEATHER, TREES])
    assert holds(schema, {"x": 1})
    assert not holds(schema, {"x": "1"})
    assert holds(schema, call("weather", city="Rome"))
    assert not holds(schema, call("weather"))
    assert not holds(schema, call("other"))
    assert holds(schema, [call("trees"), call("weather", city="Rome")])
    assert not holds(schema, [])
    one = schema_of([WEATHER, TREES], ToolChoice(is_parallel=False))
    assert holds(one, call("trees"))
    assert not holds(one, [call("trees")])


def test_other_constraints_and_tools():
    regex = SamplingParams(constraint=Constraint("regex", "a+"))
    with pytest.raises(ParameterError, match=r"tool_choice: .*regex"):
        plan_chat(HELLO, [WEATHER], ToolChoice(), regex, None)
    for choice, tools in ((ToolChoice("none"), [WEATHER]), (ToolChoice(), [])):
        assert plan_chat(HELLO, tools, choice, regex, None).params.constraint == regex.constraint
    anything = SamplingParams(constraint=Constraint("json_object"))
    assert plan_chat(HELLO, [WEATHER], ToolChoice(), anything, None).params.constraint == anything.constraint
    assert plan_chat(HELLO, [WEATHER], ToolChoice(), SamplingParams(), None).params.constraint is None
    with pytest.raises(ParameterError, match="tool_choice"):
        plan_chat(HELLO, [], ToolChoice("required"), SamplingParams(), None)


def test_a_template_that_knows_tools_gets_them():
    plan = plan_chat(ASKED, [WEATHER, TREES], ToolChoice(), SamplingParams(), KNOWS_TOOLS)
    assert plan.template_tools == [
        {
            "type": "function",
            "function": {"name": "weather", "description": "Tells the weather.", "parameters": CITY},
        },
        {"type": "function", "function": {"name": "trees", "description": "", "parameters": TREE}},
    ]
    assert [m["role"] for m in plan.messages] == ["user", "assistant", "tool", "tool"]
    first, second = plan.messages[1]["tool_calls"]
    assert first["function"] == {"name": "weather", "arguments": {"city": "Rome"}}
    assert second["function"]["arguments"] == {}
    assert plan.messages[3] == {"role": "tool", "content": "many", "tool_call_id": "call_2", "name": "trees"}
    assert plan.params.visible_tokens == ("<tool_call>", "</tool_call>")


def test_one_call_a_turn_where_the_template_takes_no_more():
    asked = (*HELLO, Message("assistant", "Wait.", CALLS), ASKED[3], ASKED[2])
    plan = plan_chat(asked, [WEATHER], ToolChoice(), SamplingParams(), "{{ tools }}<|python_tag|>")
    assert [m["role"] for m in plan.messages] == [
        "user",
        "assistant",
        "assistant",
        "tool",
        "assistant",
        "tool",
    ]
    assert plan.messages[1] == {"role": "assistant", "content": "Wait."}
    for call, result in (plan.messages[2:4], plan.messages[4:6]):
        assert [c["id"] for c in call["tool_calls"]] == [result["tool_call_id"]]
    assert plan.messages[2]["tool_calls"][0]["function"]["name"] == plan.messages[3]["name"] == "trees"


def test_a_template_that_does_not_gets_text():
    plan = plan_chat(ASKED, [WEATHER], ToolChoice(), SamplingParams(), "{{ messages }}")
    assert plan.template_tools is None
    system, user, assistant, results = plan.messages
    assert system["role"] == "system"
    assert json.dumps(WEATHER.as_template_input()) in system["content"]
    assert user == {"role": "user", "content": "Hello"}
    shown = plan_chat((), [WEATHER, TREES], ToolChoice(), SamplingParams(), None).parser()
    calls = shown.parse(assistant["content"]).calls
    assert [c.name for c in calls] == ["weather", "trees"], "calls look as the model writes them"
    assert results["role"] == "user"
    assert results["content"] == (
        "<tool_response>\nmild\n</tool_response>\n<tool_response>\nmany\n</tool_response>"
    )


def test_the_fallback_goes_on_from_the_system_message():
    messages = (Message("system", "Be brief."), *HELLO)
    system, _ = plan_chat(messages, [WEATHER], ToolChoice(), SamplingParams(), None).messages
    assert system["content"].startswith("Be brief.\n\n")
    assert "weather" in system["content"]


def test_none_hides_the_tools():
    for template in (None, KNOWS_TOOLS):
        plan = plan_chat(HELLO, [WEATHER], ToolChoice("none"), SamplingParams(), template)
        assert plan.template_tools is None
        assert list(plan.messages) == [{"role": "user", "content": "Hello"}]
        text = "<tool_call>{}</tool_call>"
        assert plan.parser().parse(text).text == text


def test_allowed_tools_are_shown_with_the_others():
    plan = plan_chat(HELLO, [WEATHER, TREES], ToolChoice("auto", ("trees",)), SamplingParams(), KNOWS_TOOLS)
    assert len(plan.template_tools) == 2
    assert plan.callable_names == {"trees"}


def test_ids_become_what_the_template_takes():
    mistral = "{% if tools %}[TOOL_CALLS]{% endif %}"
    plan = plan_chat(ASKED, [WEATHER], ToolChoice(), SamplingParams(), mistral)
    made = [call["id"] for call in plan.messages[1]["tool_calls"]]
    assert all(len(i) == 9 and i.isalnum() for i in made)
    assert made == [m["tool_call_id"] for m in plan.messages[2:]]


@pytest.mark.parametrize(
    ("template", "syntax"),
    [
        (None, HERMES),
        ("{{ messages }}", HERMES),
        (KNOWS_TOOLS, HERMES),
        ("{{ tools }}[TOOL_CALLS]", MISTRAL),
        ("{{ tools }}<|python_tag|>", LLAMA),
        ("{{ tools }}", PLAIN_JSON),
    ],
)
def test_the_family_by_its_template(template, syntax):
    assert syntax_of(template) is syntax


@pytest.mark.parametrize(
    "schema",
    [{}, {"type": "string"}, {"type": "object", "required": "x"}, {"type": "object", "properties": []}],
)
def test_parameters_that_are_no_schema(schema):
    with pytest.raises(ParameterError, match="where"):
        check_parameters(schema, "where")


def test_parameters_nested_too_deeply():
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(450):
        schema = {"type": "object", "properties": {"a": schema}}
    with pytest.raises(ParameterError, match=r"where: .*deep"):
        check_parameters(schema, "where")
