"""Strict tools where the model may choose: which outputs the grammar lets through, token by token."""

import json

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken

from engine import Constraint, SamplingParams
from engine.structured.grammar import grammar_of
from serving.tools import Message, ToolChoice, ToolDefinition, plan_chat
from serving.tools.syntax import HERMES, LLAMA, MISTRAL

EOS = 2
STRICT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}},
    "required": ["x"],
    "additionalProperties": False,
    "description": 'a ::= "b"',
}
TOOLS = [ToolDefinition("f", parameters=STRICT, is_strict=True), ToolDefinition("free-2")]
TEMPLATES = {
    "plain": None,
    "hermes": "tools <tool_call>",
    "mistral": "tools [TOOL_CALLS]",
    "llama": "tools <|python_tag|>",
}
MARKS = [HERMES.begin, HERMES.end, MISTRAL.begin, LLAMA.begin, "<think>", "</think>"]

pytestmark = pytest.mark.model


@pytest.fixture(scope="module", params=["marks are tokens", "marks are text"])
def tokenizer(request, smollm2):
    from engine.checkpoint import open_checkpoint

    backend = open_checkpoint(smollm2).load_tokenizer().backend_tokenizer
    if request.param == "marks are tokens":
        backend.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    return backend


@pytest.fixture(scope="module")
def allows(tokenizer):
    vocabulary = LLTokenizer(tokenizer.to_str(), n_vocab=49200, eos_token=[EOS])

    def allows(family: str, text: str, *, answer: Constraint | None = None, **choice) -> bool:
        """Whether the output may be this, and may end so. answer: what its text is held to."""
        chosen, template = ToolChoice(**choice), TEMPLATES[family]
        params = SamplingParams(constraint=answer)
        plan = plan_chat([Message("user")], TOOLS, chosen, params, template, tokenizer.token_to_id)
        matcher = LLMatcher(vocabulary, grammar_of(plan.params.constraint))
        assert not matcher.is_error(), matcher.get_error()
        ids = [*tokenizer.encode(text, add_special_tokens=False).ids, EOS]
        return matcher.validate_tokens(ids) == len(ids)

    return allows


def call(family: str, name: str = "f", **arguments) -> str:
    key = "parameters" if family == "llama" else "arguments"
    return json.dumps({"name": name, key: arguments})


def marked(family: str, *calls: str) -> str:
    match family:
        case "mistral":
            return f"[TOOL_CALLS] [{', '.join(calls)}]"
        case "llama":
            return f"<|python_tag|>{calls[0]}"
    return "\n".join(f"<tool_call>\n{c}\n</tool_call>" for c in calls)


@pytest.mark.parametrize("family", TEMPLATES)
def test_text_is_free_and_calls_are_not(allows, family):
    good, free = call(family, x=1), call(family, "free-2", any=["thing", None])
    for text in (
        "",
        "Hello, world.\n",
        '{"a": 1}',
        good,
        free,
        f"{good}; {free}",
        f"Wait.\n{marked(family, good)}",
        marked(family, good, free),
    ):
        assert allows(family, text), text
    for bad in (call(family), call(family, x="1"), call(family, x=1, y=2), call(family, "other", x=1)):
        assert not allows(family, bad), bad
        assert not allows(family, f"[{bad}"), bad
        assert not allows(family, f"Wait.\n{marked(family, bad)}"), bad
        assert not allows(family, f"{good}; {bad}"), bad


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_call_that_has_to_come(allows, family):
    good, free = call(family, x=1), call(family, "free-2", y=1)
    for choice in ({"mode": "required"}, {"mode": "required", "is_parallel": False}):
        is_list = choice.get("is_parallel", True)
        assert allows(family, f"[{good}]", **choice) == is_list
        assert allows(family, f"[{good}, {good}]", **choice) == is_list
        assert allows(family, good, **choice) != is_list
    for bad in ("", "Hello", "[]", f"[{call(family, x='1')}]", f"[{good}, ]", f"[{', '.join([good] * 17)}]"):
        assert not allows(family, bad, mode="required"), bad
    assert allows(family, good, mode="required", names=("f",)), "a tool by its name is one call"
    assert not allows(family, f"[{good}]", mode="required", names=("f",))
    assert not allows(family, free, mode="required", names=("f",))
    assert not allows(family, f"[{free}]", mode="required"), "strict or not: free-2 has no parameters"


def test_one_call_where_several_are_not_wanted(allows):
    good = call("hermes", x=1)
    assert allows("hermes", marked("hermes", good), is_parallel=False)
    assert not allows("hermes", marked("hermes", good, good), is_parallel=False)
    assert not allows("hermes", f"{good}; {good}", is_parallel=False)


def test_thoughts_come_before(allows):
    assert allows("hermes", f"<think>\nHm.\n</think>\n\n{marked('hermes', call('hermes', x=1))}")
    assert not allows("hermes", f"<think>\nHm.\n</think>\n\n{marked('hermes', call('hermes', x='1'))}")


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_call_or_an_answer_of_a_form_of_its_own(allows, family):
    schema = {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "required": ["y"]}}}
    answer = Constraint("json_schema", json.dumps(schema))
    good = call(family, x=1)
    for text in ('{"y": 1}', good, f"[{good}, {good}]"):
        assert allows(family, text, answer=answer), text
    for text in ("Hello", "[]", call(family, x="1"), marked(family, good)):
        assert not allows(family, text, answer=answer), text
