"""Tools as the Responses API spells them: flat, where chat nests a function."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from engine import ParameterError
from serving.schema_types import Strict, StrictBool
from serving.tools import ToolChoice, ToolDefinition
from serving.tools.definitions import NO_PARAMETERS
from serving.tools.parameters import check_parameters
from serving.tools.schemas import MAX_TOOLS, ToolName


class FunctionTool(Strict):
    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


def _only_functions(value: Any) -> Any:
    for number, tool in enumerate(value if isinstance(value, list) else ()):
        kind = tool.get("type") if isinstance(tool, dict) else "function"
        if kind != "function":
            raise ParameterError(
                f"tools[{number}].type", f"must be 'function': built-in tools are not served, got {kind!r}"
            )
    return value


Tools = Annotated[list[FunctionTool], BeforeValidator(_only_functions), Field(max_length=MAX_TOOLS)]


class FunctionChoice(Strict):
    type: Literal["function"]
    name: ToolName


class AllowedTools(Strict):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionChoice], Field(min_length=1, max_length=MAX_TOOLS)]


def _kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "<mode>"
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return {"function": "<function>", "allowed_tools": "<allowed>"}.get(str(kind))


# Tags that are no identifiers stay out of the path that an error names.
Choice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<mode>")]
    | Annotated[FunctionChoice, Tag("<function>")]
    | Annotated[AllowedTools, Tag("<allowed>")],
    Discriminator(
        _kind,
        custom_error_type="tool_choice",
        custom_error_message="must be none, auto, required, or an object of type function or allowed_tools",
    ),
]


def definitions_of(tools: Sequence[FunctionTool]) -> tuple[ToolDefinition, ...]:
    """Raises ParameterError for a name that comes twice and for parameters that are no JSON schema of type
    object.
    """
    seen: set[str] = set()
    for number, tool in enumerate(tools):
        if tool.name in seen:
            raise ParameterError(f"tools[{number}].name", f"{tool.name!r} is the name of two tools")
        seen.add(tool.name)
        if tool.parameters:
            check_parameters(tool.parameters, f"tools[{number}].parameters")
    return tuple(
        ToolDefinition(
            tool.name,
            tool.description or "",
            tool.parameters or NO_PARAMETERS,
            is_strict=bool(tool.strict),
            field=f"tools[{number}]",
        )
        for number, tool in enumerate(tools)
    )


def choice_of(
    given: Literal["none", "auto", "required"] | FunctionChoice | AllowedTools | None,
    tools: Sequence[ToolDefinition],
    *,
    is_parallel: bool,
) -> ToolChoice:
    """Raises ParameterError for a choice that needs tools where there are none, or another tool."""
    match given:
        case FunctionChoice(name=name):
            _check_known(name, "tool_choice.name", tools)
            return ToolChoice("required", (name,), is_parallel=False)
        case AllowedTools():
            for number, tool in enumerate(given.tools):
                _check_known(tool.name, f"tool_choice.tools[{number}].name", tools)
            return ToolChoice(given.mode, tuple(tool.name for tool in given.tools), is_parallel)
        case "required" if not tools:
            raise ParameterError("tool_choice", "is only allowed to be 'required' when there are tools")
    return ToolChoice(given or "auto", None, is_parallel)


def _check_known(name: str, field: str, tools: Sequence[ToolDefinition]) -> None:
    if all(name != tool.name for tool in tools):
        raise ParameterError(field, f"{name!r} is not the name of one of the request's tools")
