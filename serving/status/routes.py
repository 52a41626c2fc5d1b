"""GET /: the page and its files, which need no other host; GET /status.json: what it shows."""

import hashlib
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serving.status.board import StatusBoard
from serving.status.overview import Overview

_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/status/page.css": ("page.css", "text/css; charset=utf-8"),
    "/status/status.js": ("status.js", "text/javascript; charset=utf-8"),
    "/status/chat.js": ("chat.js", "text/javascript; charset=utf-8"),
    "/status/format.js": ("format.js", "text/javascript; charset=utf-8"),
    "/status/icon.svg": ("icon.svg", "image/svg+xml"),
}
_HEADERS = {
    "Cache-Control": "no-cache",  # asked again each time, by ETag: an upgrade shows at once
    # Nothing but its own files and the API: what a model answers cannot become part of the page.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def status_router(board: StatusBoard, responses: dict[int | str, dict[str, Any]]) -> APIRouter:
    router = APIRouter()
    for path, (name, media_type) in _FILES.items():
        router.add_api_route(path, _file(name, media_type), methods=["GET", "HEAD"], include_in_schema=False)

    @router.get("/status.json", tags=["operations"], responses=responses)
    async def status(response: Response) -> Overview:
        """All replicas: percentiles, throughput, tiers and the latest requests, without any of their text."""
        response.headers["Cache-Control"] = "no-store"
        return await board.overview()

    return router


def _file(name: str, media_type: str) -> Any:
    content = (Path(__file__).parent / "static" / name).read_bytes()
    headers = {**_HEADERS, "ETag": f'"{hashlib.sha256(content).hexdigest()[:16]}"'}

    async def file(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return file
