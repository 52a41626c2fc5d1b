"""The short way to an endpoint, for requests that are as they should be."""

import inspect
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import get_type_hints

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.strict_json import StrictJsonRoute, StrictRequest

_JSON = ("application/json", "application/json; charset=utf-8")


@dataclass(frozen=True, slots=True)
class _Direct:
    route: APIRoute
    endpoint: Callable[[Request, BaseModel], Awaitable[Response]]
    model: type[BaseModel]


class DirectRoutes:
    """Calls an endpoint of a request and a body that makes its own response straight away: looking up routes
    and dependencies, and the frames around each chunk that is sent, are a third of what a request costs
    before the engine.

    All else, what is wrong with a body included, is `app`'s, which gets the request as if it had not been
    read. Around it stands who turns an endpoint's exceptions into answers (`FrontDoor`).
    """

    def __init__(self, app: ASGIApp, routes: Iterable[BaseRoute]) -> None:
        self._app = app
        self._routes = {path: direct for route in routes for path, direct in _direct(route)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        direct = self._routes.get(scope["path"]) if scope["type"] == "http" else None
        if direct is None or scope["method"] != "POST" or scope.get("root_path"):
            await self._app(scope, receive, send)
            return
        request = StrictRequest(scope, receive, send)
        if request.headers.get("content-type") not in _JSON:
            await self._app(scope, receive, send)
            return
        try:
            body = direct.model.model_validate(await request.json())
        except ValueError:  # also of JSON, or of the model
            await self._app(scope, _again(await request.body(), receive), send)
            return
        scope["route"] = direct.route
        response = await direct.endpoint(request, body)
        await response(scope, receive, send)


def _direct(route: BaseRoute) -> list[tuple[str, _Direct]]:
    """The route by its path, where it can be called so."""
    if not isinstance(route, StrictJsonRoute) or route.dependencies or route.methods != {"POST"}:
        return []
    hints, names = get_type_hints(route.endpoint), list(inspect.signature(route.endpoint).parameters)
    if names != ["request", "body"] or hints.get("return") is not Response:
        return []
    model = hints["body"]
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return []
    return [(route.path, _Direct(route, route.endpoint, model))]


def _again(body: bytes, receive: Receive) -> Receive:
    """The request's messages from the beginning, of which the body has been read."""
    is_told = False

    async def messages() -> Message:
        nonlocal is_told
        if is_told:
            return await receive()
        is_told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return messages
