"""From Anthropic's turns of content blocks to a conversation as chat templates know it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine import ParameterError
from serving.api.anthropic.blocks import Block, TextBlock, ToolResultBlock, ToolUseBlock, text_of
from serving.api.anthropic.errors import THREAD_UNSUPPORTED
from serving.api.anthropic.requests import CountTokensRequest, InputMessage
from serving.errors import ApiError
from serving.tools import Message, ToolCall


@dataclass(frozen=True, slots=True)
class Conversation:
    """`prefill` is the beginning of the answer: the request's last turn, where that is the assistant's."""

    messages: tuple[Message, ...]
    prefill: str = ""


def conversation_of(body: CountTokensRequest) -> Conversation:
    """The request's turns, neighbours of one role combined, as Anthropic's API does.

    Raises ParameterError where results do not follow the calls that they answer, and where a turn has no
    content or has blocks that its role cannot have; ApiError 400 for a conversation that is to be kept here.
    """
    if body.thread is not None:
        reason = "thread: conversations are not kept here; send the whole of it in messages."
        raise ApiError(400, reason, param="thread", code=THREAD_UNSUPPORTED)
    messages: list[Message] = []
    if system := text_of(body.system):
        messages.append(Message("system", system))
    prefill, last = "", len(body.messages) - 1
    open_calls: frozenset[str] = frozenset()
    for number, given in enumerate(body.messages):
        field = f"messages[{number}]"
        _check_blocks(given, field, open_calls, is_last=number == last)
        open_calls = frozenset(b.id for b in given.content if isinstance(b, ToolUseBlock))
        if number == last and given.role == "assistant":
            prefill = _prefill(given.content, field)
        else:
            for message in _messages(given):
                _append(messages, message)
    if prefill and body.choice.mode == "required":
        raise ParameterError("tool_choice", "must be auto or none where the answer's beginning is given")
    if prefill and body.constraint is not None:
        raise ParameterError("output_config.format", "is not allowed where the answer's beginning is given")
    if prefill and messages and messages[-1].role == "assistant":
        raise ParameterError(f"messages[{last}]", "the beginning of the answer must follow a user's turn")
    if not any(message.role != "system" for message in messages):
        raise ParameterError("messages", "must have a turn of the user's")
    return Conversation(tuple(messages), prefill)


def _check_blocks(given: InputMessage, field: str, open_calls: frozenset[str], *, is_last: bool) -> None:
    if not given.content and not (is_last and given.role == "assistant"):
        raise ParameterError(f"{field}.content", "must not be empty")
    answered: set[str] = set()
    has_text = False
    for i, block in enumerate(given.content):
        where = f"{field}.content[{i}]"
        match block:
            case ToolUseBlock() if given.role != "assistant":
                raise ParameterError(where, "tool_use blocks belong to the assistant's turns")
            case ToolResultBlock() if given.role != "user":
                raise ParameterError(where, "tool_result blocks belong to the user's turns")
            case ToolResultBlock() if has_text:
                raise ParameterError(where, "tool_result blocks come before a turn's text")
            case ToolResultBlock(tool_use_id=call) if call not in open_calls or call in answered:
                raise ParameterError(
                    f"{where}.tool_use_id",
                    f"must be the id of one of the tool_use blocks of the turn before, got {call!r}",
                )
            case ToolResultBlock(tool_use_id=call):
                answered.add(call)
            case TextBlock():
                has_text = True
    if missing := open_calls - answered:
        raise ParameterError(f"{field}.content", f"needs a tool_result block for tool_use {min(missing)!r}")


def _prefill(blocks: Sequence[Block], field: str) -> str:
    if any(isinstance(block, ToolUseBlock) for block in blocks):
        raise ParameterError(f"{field}.content", "the results of the last turn's tool_use blocks are missing")
    text = text_of(blocks)
    if text != text.rstrip():
        # Models write a word with the space before it: after a space they go on badly.
        raise ParameterError(f"{field}.content", "the beginning of the answer must not end with whitespace")
    return text


def _messages(given: InputMessage) -> list[Message]:
    if given.role == "assistant":
        calls = [
            ToolCall(block.id, block.name, json.dumps(block.input, ensure_ascii=False))
            for block in given.content
            if isinstance(block, ToolUseBlock)
        ]
        return [Message("assistant", text_of(given.content), tuple(calls))]
    results = [
        Message("tool", _result(block), tool_call_id=block.tool_use_id)
        for block in given.content
        if isinstance(block, ToolResultBlock)
    ]
    text = text_of(given.content)
    return [*results, Message(given.role, text)] if text else results


def _result(block: ToolResultBlock) -> str:
    """Templates have no place for `is_error`: the model reads it as a word."""
    return f"Error: {text_of(block.content)}" if block.is_error else text_of(block.content)


def _append(messages: list[Message], message: Message) -> None:
    before = messages[-1] if messages else None
    if before is None or before.role != message.role or message.role == "tool":
        messages.append(message)
        return
    text = "\n".join(part for part in (before.content, message.content) if part)
    messages[-1] = replace(before, content=text, tool_calls=before.tool_calls + message.tool_calls)
