"""The grammar of an output that may call, where arguments are held to their schemas and text is free."""

import json
import re
from collections.abc import Callable, Sequence

from serving.tools.definitions import ToolDefinition
from serving.tools.syntax import CallSyntax

_THOUGHT_MARKS = ("<think>", "</think>")
# As json.dumps writes it, which is what models are trained on; free white space could go on for ever.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def call_grammar(
    tools: Sequence[ToolDefinition],
    syntax: CallSyntax,
    token_id: Callable[[str], int | None],
    *,
    is_parallel: bool,
) -> str:
    """llguidance's Lark: text with calls in it, or calls without marks. One call alone ends the output.

    Text cannot begin as a call does, so that none escapes its schema. Lexemes are matched at their longest,
    hence the head of a call, up to its arguments, is one.

    token_id: of a mark that is a token of its own; such tokens are no text to a grammar.
    """
    rules = []
    thought = ""
    if thoughts := [f"<[{i}]>" for mark in _THOUGHT_MARKS if (i := token_id(mark)) is not None]:
        thought = "thought*"
        rules.append(f"thought: TEXT ({' | '.join(thoughts)})")
    calls = "call (SEPARATOR call)*" if is_parallel else "call"
    if syntax.begin:
        inside = f'"[" SPACE {calls} SPACE "]"' if syntax.is_list else "call"
        end = f"SPACE ({_mark(syntax.end, token_id)})" if syntax.end else ""
        begin = f"TEXT <[{i}]> | begin" if (i := token_id(syntax.begin)) is not None else "begin"
        rules += [f"marked: ({begin}) SPACE {inside} {end}"]
        rules += [f"begin[lazy]: TEXT {json.dumps(syntax.begin)}"]
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
    for i, tool in enumerate(tools):
        schema = dict(tool.parameters) if tool.is_strict else {"type": "object"}
        rules += [f'call_{i}: HEAD_{i} %json {json.dumps({**schema, "x-guidance": _JSON_STYLE})} "}}"']
        rules += [rf'HEAD_{i}: /\{{"name": ?"{re.escape(tool.name)}", ?"{syntax.arguments_key}": ?/']
    rules += [
        r"SEPARATOR: / ?[,;]? ?\n?/",
        r"SPACE: /[ \n]{0,2}/",
        r'TEXT: /(.|\n)*/ & ~/[ \t\r\n]*\[?[ \t\r\n]*\{[ \t\r\n]*"name"(.|\n)*/',
    ]
    rest = "TEXT"
    if syntax.begin:
        # Never a TEXT behind a TEXT: where the first one has to end, the second one would begin.
        rest = "marked* TEXT" if is_parallel else "(marked | TEXT)"
    rules.insert(0, f"start: {calls} | {thought} {rest}")
    return "%llguidance {}\n" + "\n".join(rules) + "\n"


def _mark(mark: str, token_id: Callable[[str], int | None]) -> str:
    number = token_id(mark)
    return json.dumps(mark) if number is None else f"<[{number}]> | {json.dumps(mark)}"
