"""Failures in Anthropic's form: {"type": "error", "error": {"type", "message"}, "request_id"}."""

from collections.abc import Mapping
from typing import Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel

from serving.errors import ApiError

VERSION_HEADER = b"anthropic-version"
_MESSAGES, _MODELS = "/v1/messages", "/v1/models"

THREAD_UNSUPPORTED = "thread_unsupported_request"
"""Anthropic's code, on which its clients' agents send the whole conversation instead."""
_CODES_SHOWN = frozenset({THREAD_UNSUPPORTED})

_INVALID = "invalid_request_error"
# By the status of our own error. Where Anthropic's API has another status for the case, it is the one shown;
# its clients retry 429 and all from 500 on.
_SHOWN: Mapping[int, tuple[int, str]] = {
    401: (401, "authentication_error"),
    403: (403, "permission_error"),
    404: (404, "not_found_error"),
    408: (504, "timeout_error"),
    413: (413, "request_too_large"),
    429: (429, "rate_limit_error"),
    500: (500, "api_error"),
    503: (529, "overloaded_error"),
}


class AnthropicErrorDetails(BaseModel):
    error_code: str


class AnthropicErrorBody(BaseModel):
    type: str
    message: str
    details: AnthropicErrorDetails | None = None
    """Where Anthropic has a code for the cause; absent otherwise."""


class AnthropicErrorResponse(BaseModel):
    """The object that every failed request is answered with."""

    type: Literal["error"] = "error"
    error: AnthropicErrorBody
    request_id: str


def speaks_anthropic(path: str, headers: Mapping[bytes, bytes]) -> bool:
    """Whether a request is answered in Anthropic's forms.

    The version header decides for the paths that both APIs have.
    """
    return _is_under(path, _MESSAGES) or (VERSION_HEADER in headers and _is_under(path, _MODELS))


def anthropic_error(error: ApiError, request_id: str) -> AnthropicErrorResponse:
    """To be serialized without what is None."""
    _, kind = _SHOWN.get(error.status_code, (error.status_code, _INVALID))
    details = AnthropicErrorDetails(error_code=error.code) if error.code in _CODES_SHOWN else None
    return AnthropicErrorResponse(
        error=AnthropicErrorBody(type=kind, message=str(error.detail), details=details), request_id=request_id
    )


def anthropic_response(error: ApiError, request_id: str) -> JSONResponse:
    status, _ = _SHOWN.get(error.status_code, (error.status_code, _INVALID))
    body = anthropic_error(error, request_id).model_dump(exclude_none=True)
    return JSONResponse(body, status, headers=error.headers)


def _is_under(path: str, root: str) -> bool:
    return path == root or path.startswith(f"{root}/")
