"""A conversation with calls as a chat template takes it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import from_json

from serving.tools.definitions import Message, ToolDefinition
from serving.tools.syntax import HERMES, CallSyntax

_INSTRUCTIONS = """\
You can call these functions; each line describes one as JSON:
<tools>
{tools}
</tools>
To call a function, write its name and its arguments as one JSON object between tags:
<tool_call>
{{"name": "<the function's name>", "arguments": {{<its arguments>}}}}
</tool_call>
Its result then comes between <tool_response> and </tool_response>."""


def with_template(messages: Sequence[Message], syntax: CallSyntax) -> list[dict[str, Any]]:
    """For a template that knows tools: Hugging Face's convention, where arguments are objects.

    Where a turn may have one call, each call stands before its result, and text in a turn of its own.
    """
    names = {call.id: call.name for m in messages for call in m.tool_calls}
    shown: list[dict[str, Any]] = []
    waiting: dict[
        str, dict[str, Any]
    ] = {}  # by the ids of their results, calls that come in turns of their own
    for message in messages:
        if message.role != "tool":
            shown += [_calling(call) for call in waiting.values()]
            waiting = {}
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        calls = [
            {
                "id": _template_id(call.id, syntax),
                "type": "function",
                "function": {"name": call.name, "arguments": _arguments(call.arguments)},
            }
            for call in message.tool_calls
        ]
        if calls and syntax.is_single:
            waiting = dict(zip((call.id for call in message.tool_calls), calls, strict=True))
            if message.content:
                shown.append(turn)
            continue
        if calls:
            turn["tool_calls"] = calls
        if (call_id := message.tool_call_id) is not None:
            if call_id in waiting:
                shown.append(_calling(waiting.pop(call_id)))
            turn["tool_call_id"] = _template_id(call_id, syntax)
            turn["name"] = names.get(call_id, "")
        shown.append(turn)
    return shown + [_calling(call) for call in waiting.values()]


def without_template(messages: Sequence[Message], tools: Sequence[ToolDefinition]) -> list[dict[str, Any]]:
    """For a template that knows no tools: system text, calls and results in Hermes' tags.

    Results stand in the user's turn, several of one turn in one.
    """
    shown: list[dict[str, Any]] = []
    is_result = False
    for message in messages:
        content = message.content
        if message.role == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
            if is_result:
                shown[-1]["content"] += f"\n{content}"
                continue
        parts = [content] if content else []
        for call in message.tool_calls:
            body = {"name": call.name, "arguments": _arguments(call.arguments)}
            parts.append(f"{HERMES.begin}\n{json.dumps(body, ensure_ascii=False)}\n{HERMES.end}")
        is_result = message.role == "tool"
        shown.append({"role": "user" if is_result else message.role, "content": "\n".join(parts)})
    if tools:
        lines = "\n".join(json.dumps(t.as_template_input(), ensure_ascii=False) for t in tools)
        instructions = _INSTRUCTIONS.format(tools=lines)
        if shown and shown[0]["role"] == "system":
            shown[0]["content"] = f"{shown[0]['content']}\n\n{instructions}"
        else:
            shown.insert(0, {"role": "system", "content": instructions})
    return shown


def _calling(call: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _arguments(text: str) -> Mapping[str, Any] | str:
    """An object; the text itself where it is none, which agents send back with an error as the call's result,
    so that the model may try again. Clients send an empty text for a call without arguments.
    """
    try:
        arguments = from_json(text or "{}", allow_inf_nan=False)
    except ValueError:
        return text
    return arguments if isinstance(arguments, dict) else text


def _template_id(call_id: str, syntax: CallSyntax) -> str:
    """The id, or one of the form that the template asks for, the same for the call and its result."""
    if syntax.id_pattern is None or syntax.id_pattern.fullmatch(call_id):
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]
