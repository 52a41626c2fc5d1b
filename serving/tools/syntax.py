"""How families of models write calls, by declaration."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """Where calls stand in a model's output. Each is a JSON object of name and arguments, or a list of such.

    An output that begins with a call without a mark is a call in every syntax: models forget marks, and
    constrained outputs have none.

    Args:
        begin: what opens one call or a list of calls; empty where nothing does.
        end: what closes it; empty where nothing does.
        is_list: several calls stand in one list behind the mark.
        arguments_key: the member that holds the arguments, as the family was trained to write it. Both
            spellings are read.
        template_signs: a chat template with one of them belongs to the family.
        is_single: the template takes one call in a turn.
        id_pattern: the ids that the template takes; others are mapped to such. None takes all.
    """

    name: str
    begin: str = ""
    end: str = ""
    is_list: bool = False
    is_single: bool = False
    arguments_key: str = "arguments"
    template_signs: tuple[str, ...] = ()
    id_pattern: re.Pattern[str] | None = None


HERMES = CallSyntax("hermes", "<tool_call>", "</tool_call>", template_signs=("<tool_call>",))
"""NousResearch's Hermes 2 Pro and later, Qwen 2.5 and 3, SmolLM3."""
MISTRAL = CallSyntax(
    "mistral",
    "[TOOL_CALLS]",
    is_list=True,
    template_signs=("[TOOL_CALLS]",),
    id_pattern=re.compile(r"[A-Za-z0-9]{9}"),
)
"""Mistral 7B v0.3, Mixtral, Nemo, Mistral Large 2."""
LLAMA = CallSyntax(
    "llama",
    "<|python_tag|>",
    is_single=True,
    arguments_key="parameters",
    template_signs=("<|python_tag|>", '"parameters": dictionary'),
)
"""Llama 3.1, 3.2 and 3.3: JSON, seldom with the mark; several calls are separated by semicolons."""
PLAIN_JSON = CallSyntax("json")
"""Any other template that knows tools."""

_FAMILIES = (MISTRAL, HERMES, LLAMA)


def knows_tools(chat_template: str | None) -> bool:
    """Whether a template shows tools to the model."""
    return chat_template is not None and re.search(r"\btools\b", chat_template) is not None


def syntax_of(chat_template: str | None) -> CallSyntax:
    """The family's syntax by its template; Hermes' for templates without tools, with the fallback prompt."""
    if chat_template is None or not knows_tools(chat_template):
        return HERMES
    for family in _FAMILIES:
        if any(sign in chat_template for sign in family.template_signs):
            return family
    return PLAIN_JSON
