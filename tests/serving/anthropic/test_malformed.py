"""Every malformed request gets its status, Anthropic's error object, and the name of the field."""

import pytest

from tests.serving.anthropic.malformed import CASES, HEADERS, MESSAGES
from tests.serving.malformed import HELLO, MODEL

pytestmark = pytest.mark.model

TYPES = {
    400: "invalid_request_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
}
BODY = {"model": MODEL, "messages": HELLO, "max_tokens": 4}


def assert_anthropic_error(response, kind: str) -> str:
    """Returns the message."""
    told = response.json()
    assert set(told) == {"type", "error", "request_id"}
    assert set(told["error"]) == {"type", "message"}
    assert told["type"] == "error"
    assert told["error"]["type"] == kind
    assert told["error"]["message"]
    assert told["request_id"] == response.headers["request-id"]
    return told["error"]["message"]


def test_the_table_is_large_and_its_names_are_unique():
    assert len(CASES) >= 100
    assert len({c.name for c in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
async def test_malformed_request(make_client, case):
    async with make_client() as client:
        response = await client.request(case.method, case.path, content=case.content, headers=case.headers)
    assert response.status_code == case.status, response.text
    message = assert_anthropic_error(response, TYPES[case.status])
    assert case.words in message
    assert (case.param or "") in message


@pytest.mark.parametrize("version", ["2023-06-01", "2026-10-21"])
async def test_both_versions_are_served(make_client, version):
    async with make_client() as client:
        body = {**BODY, "temperature": 0}
        response = await client.post(MESSAGES, json=body, headers={"anthropic-version": version})
        assert response.status_code == 200
        assert response.json()["usage"]["output_tokens"] == 4


@pytest.mark.parametrize("name", ["x-api-key", "authorization"])
async def test_keys_open_the_door_under_both_names(make_client, name):
    prefix = "Bearer " if name == "authorization" else ""
    async with make_client(api_keys=("secret", "other")) as client:
        for key in ("secret", "other"):
            response = await client.get("/v1/models", headers={**HEADERS, name: prefix + key})
            assert response.status_code == 200
        both = {"x-api-key": "wrong", "authorization": "Bearer secret"}
        for headers in ({}, {name: prefix + "wrong"}, {name: prefix}, both):
            response = await client.post(MESSAGES, json=BODY, headers={**HEADERS, **headers})
            assert response.status_code == 401
            assert "secret" not in assert_anthropic_error(response, "authentication_error")


async def test_a_conversation_that_the_server_shall_keep_is_refused_by_anthropics_code(make_client):
    async with make_client() as client:
        body = {**BODY, "thread": {"type": "create"}}
        response = await client.post(MESSAGES, json=body, headers=HEADERS)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["details"] == {"error_code": "thread_unsupported_request"}


async def test_a_long_body_without_its_length_is_cut_off(make_client):
    async def chunks():
        for _ in range(100):
            yield b"x" * 1000

    async with make_client(max_body_bytes=10_000) as client:
        response = await client.post(MESSAGES, content=chunks(), headers=HEADERS)
    assert response.status_code == 413
    assert "10000 bytes" in assert_anthropic_error(response, "request_too_large")


async def test_a_draining_replica_is_overloaded(make_client, make_state):
    state = make_state()
    state.start_draining()
    async with make_client(state) as client:
        for path in (MESSAGES, f"{MESSAGES}/count_tokens"):
            body = BODY if path == MESSAGES else {"model": MODEL, "messages": HELLO}
            response = await client.post(path, json=body, headers=HEADERS)
            assert response.status_code == 529
            assert response.headers["retry-after"] == "2"
            assert_anthropic_error(response, "overloaded_error")


async def test_too_many_in_flight_are_told_when_to_retry(make_client, make_state):
    state = make_state(max_inflight_requests=1, retry_after_s=7)
    state.admission.num_inflight = 1
    async with make_client(state) as client:
        response = await client.post(MESSAGES, json=BODY, headers=HEADERS)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "7"
    assert_anthropic_error(response, "rate_limit_error")


async def test_a_request_that_takes_too_long_ends(make_client):
    story = [{"role": "user", "content": "Tell a very long story."}]
    body = {**BODY, "messages": story, "max_tokens": 4000, "temperature": 0}  # a sampled one may be short
    async with make_client(request_timeout_s=0.3) as client:
        response = await client.post(MESSAGES, json=body, headers=HEADERS)
        assert response.status_code == 504
        assert_anthropic_error(response, "timeout_error")
        response = await client.post(MESSAGES, json={**body, "stream": True}, headers=HEADERS)
        assert response.status_code == 200
        assert response.text.rstrip().rpartition("\n\n")[2].startswith('event: error\ndata: {"type":"error"')
        assert '"timeout_error"' in response.text
        assert response.headers["request-id"] in response.text


async def test_the_other_api_keeps_its_form(make_client):
    async with make_client() as client:
        response = await client.post("/v1/chat/completions", json={}, headers=HEADERS)
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert "request-id" not in response.headers
        response = await client.get("/v1/models/x")
        assert response.json()["error"]["code"] == "model_not_found"
