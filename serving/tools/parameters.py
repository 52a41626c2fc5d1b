"""Whether a tool's parameters are a schema."""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from engine import ParameterError


def check_parameters(schema: Mapping[str, Any], field: str) -> None:
    """Raises ParameterError naming `field` unless it is a JSON schema (draft 2020-12) of type object."""
    if schema.get("type") != "object":
        raise ParameterError(field, f"must be a JSON schema of type 'object', got {schema.get('type')!r}")
    if (reason := _schema_error(json.dumps(schema))) is not None:
        raise ParameterError(field, f"is not a JSON schema: {reason}")


@lru_cache(maxsize=1024)
def _schema_error(schema: str) -> str | None:
    """Agents send the same tools again and again; a check takes about a millisecond."""
    try:
        Draft202012Validator.check_schema(json.loads(schema))
    except SchemaError as error:
        return f"{error.json_path}: {error.message}"
    except RecursionError:
        return "it is nested too deeply"
    return None
