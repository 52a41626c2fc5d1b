"""What a request's output must be: JSON, a schema's JSON, a pattern, a grammar or one of some strings."""

import json
from dataclasses import dataclass
from typing import Literal, get_args

from engine.errors import ParameterError

ConstraintKind = Literal["json_object", "json_schema", "regex", "grammar", "choice"]


@dataclass(frozen=True, slots=True)
class Constraint:
    """The language that a request's output belongs to. Hashable: compiled grammars are kept by it.

    Args:
        kind: how `value` is to be read.
        value: `json_object`: empty, any JSON object; `json_schema`: the schema's JSON text; `regex`: a
            pattern that the whole output matches; `grammar`: a context-free grammar in Lark's notation or
            GBNF (llama.cpp's EBNF); `choice`: a JSON list of strings.
        name: what the API calls it; errors name it.

    Whether schema, pattern and grammar can be held is found out by the engine that compiles them.

    Raises:
        ParameterError: the value is not of its kind's form.
    """

    kind: ConstraintKind
    value: str = ""
    name: str = "constraint"

    def __post_init__(self) -> None:
        if self.kind not in get_args(ConstraintKind):
            allowed = ", ".join(get_args(ConstraintKind))
            raise ParameterError(self.name, f"the kind must be one of {allowed}, got {self.kind!r}")
        if not isinstance(self.value, str):
            raise ParameterError(self.name, f"must be a string, got {type(self.value).__name__}")
        match self.kind:
            case "json_object":
                if self.value:
                    raise ParameterError(self.name, "must be empty for json_object")
            case "json_schema":
                if not isinstance(_parsed(self.value, self.name), dict | bool):
                    raise ParameterError(self.name, "a JSON schema is an object or a boolean")
            case "choice":
                choices = _parsed(self.value, self.name)
                if (
                    not isinstance(choices, list)
                    or not choices
                    or not all(isinstance(choice, str) and choice for choice in choices)
                ):
                    raise ParameterError(self.name, "must be a JSON list of non-empty strings")
            case "regex" | "grammar":
                if not self.value.strip():
                    raise ParameterError(self.name, f"must not be empty for {self.kind}")


def _parsed(text: str, name: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ParameterError(name, f"must be JSON: {error}") from None
