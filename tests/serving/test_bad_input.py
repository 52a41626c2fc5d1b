"""Every malformed request gets its status, OpenAI's error object, and the name of the field."""

import pytest

from tests.serving.malformed import CASES

pytestmark = pytest.mark.model


def test_the_table_is_large_and_its_names_are_unique():
    assert len(CASES) >= 100
    assert len({c.name for c in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
async def test_malformed_request(make_client, case):
    async with make_client() as client:
        response = await client.request(case.method, case.path, content=case.content, headers=case.headers)
    assert response.status_code == case.status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert case.words in error["message"]
    if case.param is not None:
        assert error["param"] == case.param, error


async def test_wrong_and_missing_api_keys(make_client):
    async with make_client(api_keys=("secret", "other")) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}):
            response = await client.get("/v1/models", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        for key in ("secret", "other"):
            response = await client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
            assert response.status_code == 200
        assert (await client.get("/health")).status_code == 200


async def test_a_long_body_without_its_length_is_cut_off(make_client):
    async def chunks():
        for _ in range(100):
            yield b"x" * 1000

    async with make_client(max_body_bytes=10_000) as client:
        response = await client.post("/v1/completions", content=chunks())
    assert response.status_code == 413
    assert "10000 bytes" in response.json()["error"]["message"]


async def test_not_ready_and_draining_are_503(make_client, make_state):
    from monitoring import Recorder
    from serving.settings import ServingSettings
    from serving.state import ReplicaState

    loading = ReplicaState(ServingSettings(), Recorder(), replica="test")
    draining = make_state()
    draining.start_draining()
    body = {"model": "SmolLM2-135M-Instruct", "prompt": "x"}
    for state in (loading, draining):
        async with make_client(state) as client:
            for response in (await client.get("/health"), await client.post("/v1/completions", json=body)):
                assert response.status_code == 503
                assert response.headers["retry-after"] == "2"
                assert response.json()["error"]["type"] == "service_unavailable_error"


async def test_too_many_in_flight_are_refused_at_once(make_client, make_state):
    state = make_state(max_inflight_requests=1, retry_after_s=7)
    state.admission.num_inflight = 1
    async with make_client(state) as client:
        response = await client.post(
            "/v1/completions", json={"model": "SmolLM2-135M-Instruct", "prompt": "x"}
        )
        assert response.status_code == 429
        assert response.headers["retry-after"] == "7"
        metrics = (await client.get("/metrics")).text
    assert 'peregrine_refusals_total{reason="inflight"} 1.0' in metrics


async def test_a_request_that_takes_too_long_ends(make_client, engine):
    body = {"model": "SmolLM2-135M-Instruct", "prompt": "x", "max_tokens": 4000, "ignore_eos": True}
    async with make_client(request_timeout_s=0.3) as client:
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == 408
        assert response.json()["error"]["code"] == "timeout"
        response = await client.post("/v1/completions", json={**body, "stream": True})
        assert response.status_code == 200
        assert '"code":"timeout"' in response.text
        assert response.text.endswith("data: [DONE]\n\n")
