"""What the schemas of requests are made of: strict models and types whose errors say what is allowed."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MAX_STOP = 4


class Strict(BaseModel):
    """Unknown fields are errors, and so are numbers that JSON does not know."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def one_of(*kinds: str) -> BeforeValidator:
    """Refuse other JSON types with one clear sentence instead of one error for each union member."""

    def check(value: Any) -> Any:
        if not any(_IS_KIND[kind](value) for kind in kinds):
            raise ValueError(f"must be {' or '.join(kinds)}")
        return value

    return BeforeValidator(check)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list_of(check: Any) -> Any:
    return lambda v: isinstance(v, list) and bool(v) and all(check(x) for x in v)


_IS_KIND = {
    "null": lambda v: v is None,
    "a string": lambda v: isinstance(v, str),
    "a non-empty string": lambda v: isinstance(v, str) and bool(v),
    "a non-empty array of strings": _is_list_of(lambda x: isinstance(x, str)),
    "a non-empty array of token ids": _is_list_of(_is_int),
    "a non-empty array of arrays of token ids": _is_list_of(_is_list_of(_is_int)),
    f"an array of 1 to {MAX_STOP} non-empty strings": lambda v: (
        isinstance(v, list) and 1 <= len(v) <= MAX_STOP and all(isinstance(s, str) and s for s in v)
    ),
    "an array of content parts": lambda v: isinstance(v, list),
    "an object": lambda v: isinstance(v, dict),
}

StrictFloat = Annotated[float, Field(strict=True)]
StrictInt = Annotated[int, Field(strict=True)]
StrictBool = Annotated[bool, Field(strict=True)]
