"""Every failure as OpenAI's error object: {"error": {"message", "type", "param", "code"}}."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from engine import EngineDeadError, ParameterError, PromptTooLongError

logger = logging.getLogger(__name__)


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The object that every failed request is answered with."""

    error: ErrorBody


_TYPE_OF_STATUS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(HTTPException):
    """A failure with a status code, and the field that caused it if there is one."""

    def __init__(
        self,
        status_code: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status_code, message, dict(headers) if headers else None)
        self.param = param
        self.code = code

    def body(self) -> ErrorResponse:
        kind = _TYPE_OF_STATUS.get(self.status_code, "invalid_request_error")
        return ErrorResponse(
            error=ErrorBody(message=str(self.detail), type=kind, param=self.param, code=self.code)
        )

    def response(self) -> JSONResponse:
        return JSONResponse(self.body().model_dump(), self.status_code, headers=self.headers)


def overloaded(message: str, retry_after_s: int) -> ApiError:
    return ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(retry_after_s)})


def not_ready(message: str) -> ApiError:
    return ApiError(503, message, code="service_unavailable", headers={"Retry-After": "2"})


def from_engine(error: Exception) -> ApiError:
    """The API's form of what the engine raised."""
    match error:
        case ApiError():
            return error
        case PromptTooLongError():
            message = (
                f"This model's maximum context length is {error.max_model_len} tokens, and the prompt alone "
                f"has {error.num_prompt_tokens}: no room is left for an answer. Shorten the prompt."
            )
            return ApiError(400, message, param=error.field, code="context_length_exceeded")
        case ParameterError():
            return ApiError(400, str(error), param=error.field, code="invalid_value")
        case EngineDeadError():
            return not_ready("The engine stopped; this replica is being replaced. Please retry.")
        case TimeoutError():
            return ApiError(408, "The request did not finish within its time limit.", code="timeout")
    logger.exception("unexpected failure", exc_info=error)
    return ApiError(500, "The server had an error while processing your request.", code="internal_error")


def install_error_handlers(app: FastAPI) -> None:
    """Make every failure of the app, its routes and its middleware its API's error object."""

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if isinstance(error, ApiError):
            return _answer(request, error)
        message = str(error.detail)
        if error.status_code == 404:
            message = f"Unknown request URL: {request.method} {request.url.path}."
        if error.status_code == 405:
            message = f"{request.method} is not allowed on {request.url.path}."
        return _answer(request, ApiError(error.status_code, message, headers=error.headers))

    async def on_validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _answer(request, from_validation(error.errors()))

    async def on_other(request: Request, error: Exception) -> JSONResponse:
        return _answer(request, from_engine(error))

    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_validation)
    for kind in (ParameterError, EngineDeadError, TimeoutError):
        app.add_exception_handler(kind, on_other)
    app.add_exception_handler(Exception, on_other)


def _answer(request: Request, error: ApiError) -> JSONResponse:
    """In the form of the API that the request speaks (`FrontDoor`)."""
    if (exchange := getattr(request.state, "exchange", None)) is not None:
        # Log and traces tell the code, never the message, which may quote the request.
        exchange.error = error.code or _TYPE_OF_STATUS.get(error.status_code, "invalid_request_error")
    answer: Callable[[ApiError], JSONResponse] = getattr(request.state, "answer_error", ApiError.response)
    return answer(error)


def from_validation(errors: Sequence[Any]) -> ApiError:
    """One error out of pydantic's list: of the first field that is wrong, the error that says most.

    A union reports one error for each of its members; the one furthest inside belongs to the member that
    was meant, and a range says more than a type.
    """
    field = _path(errors[0]["loc"][:2])
    same_field = [e for e in errors if _path(e["loc"][:2]) == field]
    first = max(same_field, key=lambda e: (len(_parts(e["loc"])), not e["type"].endswith("_type")))
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ParameterError):
        return from_engine(cause)
    param = _path(first["loc"])
    match first["type"]:
        case "extra_forbidden":
            message, code = f"Unrecognized request argument supplied: {param}", "unknown_parameter"
        case "json_invalid":
            reason = first.get("ctx", {}).get("error", "")
            return ApiError(400, f"The body is not valid JSON: {reason}", code="invalid_json")
        case "missing":
            message, code = f"Missing required parameter: '{param or 'body'}'.", "missing_required_parameter"
        case "value_error":
            message, code = (
                f"Invalid '{param}': {first['msg'].removeprefix('Value error, ')}",
                "invalid_value",
            )
        case _:
            message = f"Invalid '{param or 'body'}': {first['msg']}."
            code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    return ApiError(400, message, param=param, code=code)


def _parts(location: Sequence[str | int]) -> list[str | int]:
    """The location without "body" in front and without the names of union members."""
    return [p for p in location[1:] if isinstance(p, int) or (p.isidentifier() and p not in _UNION_MEMBERS)]


_UNION_MEMBERS = ("str", "int", "bool", "float", "dict", "list")


def _path(location: Sequence[str | int]) -> str | None:
    """("body", "messages", 0, "role") as "messages[0].role"."""
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in _parts(location))
    return path.removeprefix(".") or None
