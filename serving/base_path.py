"""OpenAI's API under the base path that a client adds by itself."""

from starlette.types import ASGIApp, Receive, Scope, Send

_PREFIX = "/openai"
"""Groq's clients ask for `/openai/v1/chat/completions`, whatever their base URL."""


class WithoutPrefix:
    """Everything behind it, API keys included, sees `/openai/v1/...` as `/v1/...`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and scope["path"].startswith(f"{_PREFIX}/v1/"):
            path = scope["path"].removeprefix(_PREFIX)
            raw = scope.get("raw_path")
            scope = {**scope, "path": path, "raw_path": raw and raw.removeprefix(_PREFIX.encode())}
        await self._app(scope, receive, send)
