"""Bodies parsed by the letter of RFC 8259: no NaN, no lone surrogates, bounded nesting."""

import inspect
import json
from collections.abc import Callable, Coroutine
from typing import Any, get_type_hints

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic_core import from_json

_JSON = ("application/json", "application/json; charset=utf-8")


class _StrictRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        try:
            return from_json(body, allow_inf_nan=False)
        except ValueError as error:
            # The form that FastAPI turns into a validation error.
            raise json.JSONDecodeError(str(error), "", 0) from None


class StrictJsonRoute(APIRoute):
    """Python's own parser lets NaN and lone surrogates through, which fail later, inside the server.

    An endpoint of a request and a body that makes its own response is called straight away where both are as
    they should be, for looking up dependencies takes a quarter of what a request costs before the engine. All
    the rest is FastAPI's, errors included.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle, endpoint = super().get_route_handler(), self.endpoint
        model = None if self.dependencies else _body_of(endpoint)

        async def strict(given: Request) -> Response:
            request = _StrictRequest(given.scope, given.receive)
            if model is not None and (body := await _valid(request, model)) is not None:
                response: Response = await endpoint(request, body)
                return response
            return await handle(request)

        return strict


def _body_of(endpoint: Callable[..., Any]) -> type[BaseModel] | None:
    """The body's model, of an endpoint (request, body) that makes its own response."""
    hints, names = get_type_hints(endpoint), list(inspect.signature(endpoint).parameters)
    if names != ["request", "body"] or hints.get("return") is not Response:
        return None
    model = hints["body"]
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None


async def _valid(request: Request, model: type[BaseModel]) -> BaseModel | None:
    """None: for FastAPI to say what is wrong, or to read in another way."""
    if request.headers.get("content-type") not in _JSON:
        return None
    try:
        return model.model_validate(await request.json())
    except ValueError:  # also of JSON, or of the model
        return None
