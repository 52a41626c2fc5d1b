"""Tool calls for every API: definitions, what the model reads of them, what it may write, how that is read.

An API turns its request into `Message`, `ToolDefinition` and `ToolChoice`, calls `plan_chat`, and shows the
events of `ChatPlan.parser`.
"""

from serving.tools.definitions import ChoiceMode, Message, Role, ToolCall, ToolChoice, ToolDefinition
from serving.tools.events import ArgumentsDelta, CallEnd, CallStart, ParserEvent, TextDelta
from serving.tools.parser import ParsedAnswer, ToolCallParser, collect
from serving.tools.plan import ChatPlan, plan_chat

__all__ = [
    "ArgumentsDelta",
    "CallEnd",
    "CallStart",
    "ChatPlan",
    "ChoiceMode",
    "Message",
    "ParsedAnswer",
    "ParserEvent",
    "Role",
    "TextDelta",
    "ToolCall",
    "ToolCallParser",
    "ToolChoice",
    "ToolDefinition",
    "collect",
    "plan_chat",
]
