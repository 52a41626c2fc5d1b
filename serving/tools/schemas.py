"""Tools as OpenAI's chat API spells them."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, StringConstraints, Tag

from engine import ParameterError
from serving.schemas import Strict, StrictBool, StrictInt
from serving.tools.definitions import NO_PARAMETERS, ToolCall, ToolChoice, ToolDefinition
from serving.tools.parameters import check_parameters

MAX_TOOLS = 128

ToolName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
NonEmpty = Annotated[str, StringConstraints(min_length=1)]


class FunctionDefinition(Strict):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class ChatTool(Strict):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Strict):
    name: ToolName


class NamedTool(Strict):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedToolsChoice(Strict):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _as_openai_spells_it(mode: Any) -> Any:
    return "required" if mode == "any" else mode


def _kind_of_choice(value: Any) -> str | None:
    if isinstance(value, str):
        return "<mode>"
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return {"function": "<function>", "allowed_tools": "<allowed>"}.get(str(kind))


# Tags that are no identifiers stay out of the path that an error names.
ToolChoiceParam = Annotated[
    Annotated[
        Literal["none", "auto", "required"],
        BeforeValidator(_as_openai_spells_it),  # Mistral's clients say "any"
        Tag("<mode>"),
    ]
    | Annotated[NamedTool, Tag("<function>")]
    | Annotated[AllowedToolsChoice, Tag("<allowed>")],
    Discriminator(
        _kind_of_choice,
        custom_error_type="tool_choice",
        custom_error_message="must be none, auto, required, or an object of type function or allowed_tools",
    ),
]


class CalledFunction(Strict):
    name: ToolName
    arguments: str


class MessageToolCall(Strict):
    """A call of an earlier answer, as the client sends it back; `index` says nothing more."""

    id: NonEmpty
    type: Literal["function"]
    function: CalledFunction
    index: StrictInt | None = None

    def as_call(self) -> ToolCall:
        return ToolCall(self.id, self.function.name, self.function.arguments)


def tool_definitions(tools: Sequence[ChatTool]) -> tuple[ToolDefinition, ...]:
    """The request's tools. Raises ParameterError for a name that comes twice and for parameters that are no
    JSON schema of type object.
    """
    seen: set[str] = set()
    for number, tool in enumerate(tools):
        name = tool.function.name
        if name in seen:
            raise ParameterError(f"tools[{number}].function.name", f"{name!r} is the name of two tools")
        seen.add(name)
    return tuple(_definition(tool.function, i) for i, tool in enumerate(tools))


def tool_choice(
    param: str | NamedTool | AllowedToolsChoice | None, tools: Sequence[ToolDefinition], is_parallel: bool
) -> ToolChoice:
    """Raises ParameterError for a choice that needs tools where there are none, or another tool."""
    if param is None or isinstance(param, str):
        if param == "required" and not tools:
            raise ParameterError("tool_choice", "is only allowed to be 'required' when there are tools")
        return ToolChoice("auto" if param is None else param, None, is_parallel)  # type: ignore[arg-type]
    if isinstance(param, NamedTool):
        _check_known(param, "tool_choice.function.name", tools)
        return ToolChoice("required", (param.function.name,), is_parallel=False)
    allowed = param.allowed_tools
    for number, tool in enumerate(allowed.tools):
        _check_known(tool, f"tool_choice.allowed_tools.tools[{number}].function.name", tools)
    return ToolChoice(allowed.mode, tuple(tool.function.name for tool in allowed.tools), is_parallel)


def _definition(function: FunctionDefinition, number: int) -> ToolDefinition:
    field = f"tools[{number}].function.parameters"
    if function.parameters:
        check_parameters(function.parameters, field)
    return ToolDefinition(
        function.name,
        function.description or "",
        function.parameters or NO_PARAMETERS,
        is_strict=bool(function.strict),
        field=field,
    )


def _check_known(tool: NamedTool, field: str, tools: Sequence[ToolDefinition]) -> None:
    if all(tool.function.name != known.name for known in tools):
        raise ParameterError(field, f"{tool.function.name!r} is not the name of one of the request's tools")
