"""Input items, and the conversation that they are."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag

from engine import ParameterError
from serving.schema_types import Strict
from serving.tools import Message, ToolCall
from serving.tools.schemas import NonEmpty, ToolName

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class TextPart(Strict):
    """`output_text` is what an answer's text comes back as; its logprobs and annotations say nothing new."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class MessageItem(Strict):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[TextPart]
    id: str | None = None
    status: ItemStatus | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCallItem(Strict):
    type: Literal["function_call"]
    call_id: NonEmpty
    name: ToolName
    arguments: str
    id: str | None = None
    status: ItemStatus | None = None


class FunctionCallOutputItem(Strict):
    type: Literal["function_call_output"]
    call_id: NonEmpty
    output: str | list[TextPart]
    id: str | None = None
    status: ItemStatus | None = None


class ItemReference(Strict):
    """An item of an answer that is kept."""

    type: Literal["item_reference"]
    id: NonEmpty


def _kind(value: Any) -> str | None:
    given = value.get("type", "message") if isinstance(value, dict) else getattr(value, "type", None)
    return {
        "message": "<message>",
        "function_call": "<call>",
        "function_call_output": "<output>",
        "item_reference": "<reference>",
    }.get(str(given))


# Tags that are no identifiers stay out of the path that an error names.
Item = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<call>")]
    | Annotated[FunctionCallOutputItem, Tag("<output>")]
    | Annotated[ItemReference, Tag("<reference>")],
    Discriminator(
        _kind,
        custom_error_type="item_type",
        custom_error_message=(
            "must be an object of type message, function_call, function_call_output or item_reference"
        ),
    ),
]

KnownItem = MessageItem | FunctionCallItem | FunctionCallOutputItem


def conversation_of(before: Sequence[Message], items: Iterable[KnownItem]) -> tuple[Message, ...]:
    """What was said before, and the items: calls that follow one another are one turn's.

    Raises ParameterError("input", ...) where calls and their outputs do not belong together.
    """
    messages = list(before)
    for item in items:
        _append(messages, item)
    _check_calls(messages)
    return tuple(messages)


def with_instructions(instructions: str | None, said: Sequence[Message]) -> tuple[Message, ...]:
    """Instructions and leading system messages as one: templates take one, where they take any."""
    num_leading = next((i for i, m in enumerate(said) if m.role != "system"), len(said))
    system = [message.content for message in said[:num_leading]]
    if instructions is not None:
        system.insert(0, instructions)
    return (Message("system", "\n\n".join(system)), *said[num_leading:]) if system else tuple(said)


def text_of(content: str | Sequence[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _append(messages: list[Message], item: KnownItem) -> None:
    match item:
        case MessageItem():
            # Templates know "system"; "developer" is OpenAI's newer name for it.
            role = "system" if item.role == "developer" else item.role
            messages.append(Message(role, text_of(item.content)))
        case FunctionCallItem():
            call = ToolCall(item.call_id, item.name, item.arguments)
            last = messages[-1] if messages else None
            if last is not None and last.role == "assistant":
                messages[-1] = Message("assistant", last.content, (*last.tool_calls, call))
            else:
                messages.append(Message("assistant", tool_calls=(call,)))
        case FunctionCallOutputItem():
            messages.append(Message("tool", text_of(item.output), tool_call_id=item.call_id))


def _check_calls(messages: Sequence[Message]) -> None:
    open_calls: list[str] = []
    for message in messages:
        if message.role == "tool":
            if message.tool_call_id not in open_calls:
                raise ParameterError(
                    "input",
                    f"no function_call precedes the output of {message.tool_call_id!r}",
                )
            open_calls.remove(message.tool_call_id)
            continue
        if open_calls:
            break
        open_calls = [call.id for call in message.tool_calls]
    if open_calls:
        raise ParameterError("input", f"no function_call_output follows the function_call {open_calls[0]!r}")
