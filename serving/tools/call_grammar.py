"""Grammars of outputs with calls, in llguidance's Lark.

Lexemes are matched at their longest, hence the head of a call, up to its arguments, is one; and no TEXT may
stand behind a TEXT, because the second one would begin where the first one has to end.
"""

import json
import re
from collections.abc import Callable, Sequence

from serving.tools.definitions import ToolDefinition
from serving.tools.syntax import CallSyntax

MAX_FORCED_CALLS = 16
"""Of one answer that has to call: without a limit a weak model calls until the context is full."""

_THOUGHT_MARKS = ("<think>", "</think>")
# As json.dumps writes it, which is what models are trained on; free white space could go on for ever.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_TEXT = r'TEXT: /(.|\n)*/ & ~/[ \t\r\n]*\[?[ \t\r\n]*\{[ \t\r\n]*"name"(.|\n)*/'
"""Text cannot begin as a call does, so that none escapes its schema."""


def forced_grammar(tools: Sequence[ToolDefinition], syntax: CallSyntax, *, is_parallel: bool) -> str:
    """A call, or a list of 1 to MAX_FORCED_CALLS, without marks or text; every tool's schema holds."""
    start = "start: call"
    if is_parallel:
        start = f'start: "[" call (", " call){{0,{MAX_FORCED_CALLS - 1}}} "]"'
    return _grammar([start, *_call_rules(tools, syntax, is_schema_held=lambda tool: True)])


def free_grammar(
    tools: Sequence[ToolDefinition],
    syntax: CallSyntax,
    token_id: Callable[[str], int | None],
    *,
    is_parallel: bool,
) -> str:
    """Text with calls in it, or calls without marks; the schemas of strict tools hold.

    Where one call is all that may come, it ends the output.

    token_id: of a mark that is a token of its own; such tokens are no text to a grammar.
    """
    calls = "call (SEPARATOR call)*" if is_parallel else "call"
    rules = []
    thought = ""
    if thoughts := [f"<[{i}]>" for mark in _THOUGHT_MARKS if (i := token_id(mark)) is not None]:
        thought = "thought*"
        rules.append(f"thought: TEXT ({' | '.join(thoughts)})")
    rest = "TEXT"
    if syntax.begin:
        rest = "marked* TEXT" if is_parallel else "(marked | TEXT)"
        inside = f'"[" SPACE {calls} SPACE "]"' if syntax.is_list else "call"
        end = f"SPACE ({_mark(syntax.end, token_id)})" if syntax.end else ""
        begin = f"TEXT <[{i}]> | begin" if (i := token_id(syntax.begin)) is not None else "begin"
        rules.append(f"marked: ({begin}) SPACE {inside} {end}")
        rules.append(f"begin[lazy]: TEXT {json.dumps(syntax.begin)}")
    return _grammar(
        [
            f"start: {calls} | {thought} {rest}",
            *rules,
            *_call_rules(tools, syntax, is_schema_held=lambda tool: tool.is_strict),
            r"SEPARATOR: / ?[,;]? ?\n?/",
            r"SPACE: /[ \n]{0,2}/",
            _TEXT,
        ]
    )


def _grammar(rules: Sequence[str]) -> str:
    return "%llguidance {}\n" + "\n".join(rules) + "\n"


def _call_rules(
    tools: Sequence[ToolDefinition], syntax: CallSyntax, is_schema_held: Callable[[ToolDefinition], bool]
) -> list[str]:
    rules = ["call: " + " | ".join(f"call_{i}" for i in range(len(tools)))]
    for i, tool in enumerate(tools):
        schema = dict(tool.parameters) if is_schema_held(tool) else {"type": "object"}
        rules.append(f'call_{i}: HEAD_{i} %json {json.dumps({**schema, "x-guidance": _JSON_STYLE})} "}}"')
        rules.append(rf'HEAD_{i}: /\{{"name": ?"{re.escape(tool.name)}", ?"{syntax.arguments_key}": ?/')
    return rules


def _mark(mark: str, token_id: Callable[[str], int | None]) -> str:
    number = token_id(mark)
    return json.dumps(mark) if number is None else f"<[{number}]> | {json.dumps(mark)}"
