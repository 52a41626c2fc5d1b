"""What a request's tools and choice mean: what the model reads, what it may write, how that is read."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine import Constraint, ParameterError, SamplingParams
from serving.tools.call_grammar import forced_grammar, free_grammar
from serving.tools.call_schema import call_or_answer
from serving.tools.definitions import Message, ToolChoice, ToolDefinition
from serving.tools.parser import ToolCallParser
from serving.tools.rendering import with_template, without_template
from serving.tools.syntax import CallSyntax, knows_tools, syntax_of


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """A chat request on its way to the engine.

    messages, template_tools: what `InferenceEngine.tokenize_chat` takes.
    params: the request's own, with the constraint of a call that has to come.
    """

    messages: Sequence[dict[str, Any]]
    template_tools: Sequence[dict[str, Any]] | None
    params: SamplingParams
    syntax: CallSyntax
    callable_names: frozenset[str]
    max_calls: int | None

    def parser(self, new_id: Callable[[], str] | None = None) -> ToolCallParser:
        """A parser for one choice; without callable tools everything is text to it."""
        return ToolCallParser(self.syntax, self.callable_names, max_calls=self.max_calls, new_id=new_id)


def plan_chat(
    messages: Sequence[Message],
    tools: Sequence[ToolDefinition],
    choice: ToolChoice,
    params: SamplingParams,
    chat_template: str | None,
    token_id: Callable[[str], int | None] = lambda mark: None,
) -> ChatPlan:
    """Turn a conversation with tools into what the engine needs.

    With mode "none" the model does not see the tools. A call that has to come is held to its schema while it
    is sampled, and so is every call of strict tools. With mode "auto" and an answer held to a schema, the
    output is a call or such an answer.

    chat_template: the checkpoint's, for conversations with tools.
    token_id: of a mark that the vocabulary has as one token.

    Raises:
        ParameterError: a choice without a tool to choose (`tool_choice`), or an answer's constraint that
            leaves no room for calls.
    """
    shown = () if choice.mode == "none" else tuple(tools)
    usable = tuple(t for t in shown if choice.names is None or t.name in choice.names)
    if choice.mode == "required" and not usable:
        raise ParameterError("tool_choice", "needs tools to choose from")
    syntax = syntax_of(chat_template)
    has_template = knows_tools(chat_template)
    return ChatPlan(
        messages=with_template(messages, syntax) if has_template else without_template(messages, shown),
        template_tools=[t.as_template_input() for t in shown] if has_template and shown else None,
        params=dataclasses.replace(
            params,
            constraint=_constraint(usable, choice, params, syntax, token_id),
            visible_tokens=tuple(mark for mark in (syntax.begin, syntax.end) if mark) if usable else (),
        ),
        syntax=syntax,
        callable_names=frozenset(t.name for t in usable),
        max_calls=None if choice.is_parallel else 1,
    )


def _constraint(
    usable: Sequence[ToolDefinition],
    choice: ToolChoice,
    params: SamplingParams,
    syntax: CallSyntax,
    token_id: Callable[[str], int | None],
) -> Constraint | None:
    own = params.constraint
    if not usable:
        return own
    # An error about a schema that cannot be held names the tool where there is only one.
    name = usable[0].field if len(usable) == 1 else "tools"
    # A choice of one tool by name is one call: that is what asking for it by name means in every API.
    is_one = choice.mode == "required" and choice.names is not None and len(choice.names) == 1
    is_parallel = choice.is_parallel and not is_one
    if choice.mode == "required":
        return Constraint("grammar", forced_grammar(usable, syntax, is_parallel=is_parallel), name)
    if own is None:
        if not any(tool.is_strict for tool in usable):
            return None
        return Constraint("grammar", free_grammar(usable, syntax, token_id, is_parallel=is_parallel), name)
    if own.kind == "json_object":
        return own  # a call without marks is a JSON object
    if own.kind == "json_schema":
        answer = json.loads(own.value)
        schema = call_or_answer(usable, syntax.arguments_key, answer, is_parallel=is_parallel)
        return Constraint("json_schema", json.dumps(schema), own.name)
    raise ParameterError("tool_choice", f"must be none or required where the answer is held to a {own.kind}")
