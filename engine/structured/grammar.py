"""From a constraint to the grammar library's own form."""

from typing import TYPE_CHECKING

from engine.constraint import Constraint
from engine.errors import ParameterError

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# Between JSON's tokens: nothing, a space, or a new line with its indentation. The library's default has no
# limit, and a small model that samples may go on with white space until its tokens are used up.
WHITESPACE = r"(\n {0,20}| )?"

# Given last, so that a schema's own "x-guidance" cannot turn refusals into silence.
_JSON_OPTIONS: "JsonCompileOptions" = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_pattern": WHITESPACE,
    "whitespace_flexible": True,
    "coerce_one_of": False,
    "lenient": False,
}


def grammar_of(constraint: Constraint) -> str:
    """llguidance's form of the constraint, not checked yet.

    Raises:
        ParameterError: a grammar that is neither Lark nor GBNF, or a schema nested too deeply.
    """
    from llguidance import LLMatcher, grammar_from

    try:
        match constraint.kind:
            case "json_object":
                return LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides=_JSON_OPTIONS)
            case "json_schema":
                schema = {"true": "{}", "false": '{"enum": []}'}.get(
                    constraint.value.strip(), constraint.value
                )
                return LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)
            case kind:
                return grammar_from(kind, constraint.value)
    except ValueError as error:
        raise ParameterError(constraint.name, str(error)) from None
