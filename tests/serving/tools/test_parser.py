"""From output text to events: every family's form, and the same events however the text is cut."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.tools import ArgumentsDelta, CallEnd, CallStart, ParserEvent, TextDelta, ToolCallParser, collect
from serving.tools.syntax import HERMES, LLAMA, MISTRAL, PLAIN_JSON, CallSyntax

NAMES = ("f", "get_weather")
CALL = '{"name": "f", "arguments": {"a": 1}}'
HARD = '{"name": "f", "arguments": {"a": "}{\\" \\\\é</tool_call>", "b": [1, {"c": null}]}}'


def parser(syntax: CallSyntax = HERMES, **kw) -> ToolCallParser:
    ids = itertools.count()
    return ToolCallParser(syntax, NAMES, new_id=lambda: f"id{next(ids)}", **kw)


def joined(events: list[ParserEvent]) -> list[ParserEvent]:
    """Neighbouring deltas of one kind as one."""
    whole: list[ParserEvent] = []
    for event in events:
        match (whole[-1] if whole else None), event:
            case TextDelta(before), TextDelta(text):
                whole[-1] = TextDelta(before + text)
            case ArgumentsDelta(index, before), ArgumentsDelta(_, text):
                whole[-1] = ArgumentsDelta(index, before + text)
            case _:
                whole.append(event)
    return whole


def events_of(syntax: CallSyntax, fragments: list[str], **kw) -> list[ParserEvent]:
    p = parser(syntax, **kw)
    events = [event for fragment in fragments for event in p.feed(fragment)]
    return joined(events + p.finish())


def call(index: int, arguments: str, name: str = "f", *, is_cut: bool = False) -> list[ParserEvent]:
    deltas = [ArgumentsDelta(index, arguments)] if arguments else []
    return [CallStart(index, f"id{index}", name), *deltas, CallEnd(index, is_cut)]


def text(said: str) -> list[ParserEvent]:
    return [TextDelta(said)]


CASES: dict[str, tuple[CallSyntax, str, list[ParserEvent]]] = {
    "text": (HERMES, "Hello,  world \n", [TextDelta("Hello,  world \n")]),
    "nothing": (HERMES, "", []),
    "blanks": (HERMES, " \n", [TextDelta(" \n")]),
    "hermes": (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", call(0, '{"a": 1}')),
    "hermes, text around": (
        HERMES,
        f"Let me see.\n<tool_call>{CALL}</tool_call>\n\nDone. ",
        [TextDelta("Let me see."), *call(0, '{"a": 1}'), TextDelta("Done. ")],
    ),
    "hermes, two calls": (
        HERMES,
        f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{HARD}\n</tool_call>",
        [*call(0, '{"a": 1}'), *call(1, HARD[len('{"name": "f", "arguments": ') : -1])],
    ),
    "hermes, no end": (HERMES, f"<tool_call>{CALL}", call(0, '{"a": 1}')),
    "hermes, half an end": (HERMES, f"<tool_call>{CALL}</tool_", call(0, '{"a": 1}')),
    "hermes, no mark": (HERMES, CALL, call(0, '{"a": 1}')),
    "members in another order": (
        HERMES,
        '<tool_call>{"id": 7, "arguments": {"a":[1]}, "name": "get_weather"}</tool_call>',
        call(0, '{"a": [1]}', "get_weather"),
    ),
    "more members": (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {}, "id": "x{"}</tool_call>.',
        [*call(0, "{}"), TextDelta(".")],
    ),
    "encoded twice": (
        HERMES,
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
        call(0, '{"a": 1}'),
    ),
    "no arguments": (HERMES, '<tool_call>{"name": "f"}</tool_call>', call(0, "{}")),
    "mistral": (
        MISTRAL,
        f'[TOOL_CALLS] [{CALL}, {{"name": "get_weather", "arguments": {{}}, "id": "abc"}}]',
        [*call(0, '{"a": 1}'), *call(1, "{}", "get_weather")],
    ),
    "llama": (LLAMA, '{"name": "f", "parameters": {"a": 1}}', call(0, '{"a": 1}')),
    "llama with mark": (LLAMA, '<|python_tag|>{"name": "f", "parameters": {}}', call(0, "{}")),
    "llama, two calls": (
        LLAMA,
        '{"name": "f", "parameters": {}}; {"name": "f", "parameters": {"b":2}}',
        [*call(0, "{}"), *call(1, '{"b":2}')],
    ),
    "a list": (PLAIN_JSON, f"[{CALL}, {CALL}]", [*call(0, '{"a": 1}'), *call(1, '{"a": 1}')]),
    "cut in the arguments": (HERMES, CALL[:-3], call(0, '{"a": ', is_cut=True)),
    "cut behind the arguments": (HERMES, CALL[:-1], call(0, '{"a": 1}')),
    "cut before the arguments": (HERMES, '<tool_call>{"name": "f"', [TextDelta('<tool_call>{"name": "f"')]),
    "half a mark": (HERMES, "a <tool", [TextDelta("a <tool")]),
    "another tool": (HERMES, '{"name": "g", "arguments": {}}', [TextDelta('{"name": "g", "arguments": {}}')]),
    "no call in the mark": (HERMES, "<tool_call>no</tool_call> x", text("<tool_call>no</tool_call> x")),
    "a mark in a mark": (
        HERMES,
        f"<tool_call> <tool_call>{CALL}</tool_call>",
        [TextDelta("<tool_call>"), *call(0, '{"a": 1}')],
    ),
    "JSON that is no call": (HERMES, '{"a": {"name": "f"}} x', [TextDelta('{"a": {"name": "f"}} x')]),
    "a list that is no call": (HERMES, "[1, 2]", [TextDelta("[1, 2]")]),
    "a call later, without a mark": (HERMES, f"So: {CALL}", [TextDelta(f"So: {CALL}")]),
    "broken JSON": (HERMES, '<tool_call>{"name": f}</tool_call>', text('<tool_call>{"name": f}</tool_call>')),
    "nested too deeply": (
        HERMES,
        '<tool_call>{"x": ' + "[" * 5000 + "]" * 5000 + "}",
        [TextDelta('<tool_call>{"x": ' + "[" * 5000 + "]" * 5000 + "}")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_events_of_a_text(name):
    syntax, text, expected = CASES[name]
    assert events_of(syntax, [text]) == expected
    assert events_of(syntax, list(text)) == expected


@pytest.mark.parametrize("name", [n for n in CASES if len(CASES[n][1]) < 200])
def test_every_cut_into_three_gives_the_same_events(name):
    syntax, text, expected = CASES[name]
    for i, j in itertools.combinations_with_replacement(range(len(text) + 1), 2):
        assert events_of(syntax, [text[:i], text[i:j], text[j:]]) == expected


_PIECES = st.sampled_from([
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", CALL, HARD, '{"name": "f", ',
    '"arguments": ', "{", "}", "[", "]", ",", ";", '"', "\\", " ", "\n", "text", "<", "é",
])  # fmt: skip


@given(st.lists(_PIECES, max_size=12), st.sampled_from([HERMES, MISTRAL, LLAMA, PLAIN_JSON]), st.data())
def test_any_text_in_any_fragments(pieces, syntax, data):
    text = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    fragments = [text[i:j] for i, j in itertools.pairwise([0, *cuts, len(text)])]
    events = events_of(syntax, [text])
    assert events_of(syntax, fragments) == events
    for made in collect(events).calls:
        assert made.name in NAMES
    if not any(isinstance(e, CallStart) for e in events):
        assert collect(events).text == text


def test_arguments_come_as_they_are_written():
    p = parser()
    assert p.feed('<tool_call>{"name": "f", "arg') == []
    assert p.feed('uments": {"ci') == [CallStart(0, "id0", "f"), ArgumentsDelta(0, '{"ci')]
    assert p.feed('ty": "Ro') == [ArgumentsDelta(0, 'ty": "Ro')]
    assert p.feed('me"}') == [ArgumentsDelta(0, 'me"}')]
    assert p.feed("}") == [CallEnd(0)]
    assert p.finish() == []


def test_no_half_mark_is_given_out():
    p = parser()
    assert p.feed("Wait. <tool") == [TextDelta("Wait.")]
    assert p.feed("_box> <tool_call") == [TextDelta(" <tool_box>")]
    assert p.feed(">") == []


def test_what_follows_the_last_allowed_call_is_dropped():
    text = f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call> text"
    assert events_of(HERMES, [text], max_calls=1) == call(0, '{"a": 1}')
    assert events_of(HERMES, list(text), max_calls=1) == call(0, '{"a": 1}')


def test_without_tools_all_is_text():
    p = ToolCallParser(HERMES, ())
    assert p.feed("<tool_") == [TextDelta("<tool_")]
    assert p.feed(f"call>{CALL}") == [TextDelta(f"call>{CALL}")]
    assert p.finish() == []


def test_a_whole_answer():
    answer = parser().parse(f"Wait. <tool_call>{HARD}</tool_call>")
    assert answer.text == "Wait."
    assert [c.name for c in answer.calls] == ["f"]
    assert json.loads(answer.calls[0].arguments) == json.loads(HARD)["arguments"]
