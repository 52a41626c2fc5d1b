"""Requests take the short way where they are as they should be, and the whole app's where not."""

import pytest
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.testclient import TestClient
from pydantic import BaseModel

from serving.direct_routes import DirectRoutes
from serving.strict_json import StrictJsonRoute


class Body(BaseModel):
    number: int


@pytest.fixture
def client():
    """Its answers name the frames that the request passed; `app.state.routes` collects what `scope` named."""
    router = APIRouter(route_class=StrictJsonRoute)

    @router.post("/direct")
    async def direct(request: Request, body: Body) -> Response:
        frames = "direct" if "starlette.exception_handlers" not in request.scope else "app"
        return Response(f"{frames} {body.number} {request.scope['route'].path}")

    @router.post("/plain")
    async def plain(body: Body) -> dict[str, int]:
        return {"number": body.number}

    app = FastAPI()
    app.include_router(router)
    app.add_middleware(DirectRoutes, routes=router.routes)
    with TestClient(app) as client:
        yield client


def test_a_well_formed_body_goes_straight_to_its_endpoint(client):
    assert client.post("/direct", json={"number": 3}).text == "direct 3 /direct"


def test_a_body_of_another_type_is_read_by_the_app(client):
    headers = {"content-type": "application/vnd.api+json"}
    assert client.post("/direct", content=b'{"number": 3}', headers=headers).text == "app 3 /direct"


@pytest.mark.parametrize("content", [b'{"number": "x"}', b"{", b'{"number": NaN}', b"", b"[]"])
def test_what_is_wrong_with_a_body_is_said_by_the_app(client, content):
    answer = client.post("/direct", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["detail"]


def test_other_endpoints_methods_and_paths_are_the_apps(client):
    assert client.post("/plain", json={"number": 4}).json() == {"number": 4}
    assert client.get("/direct").status_code == 405
    assert client.post("/nowhere", json={}).status_code == 404
