"""Tenants' requests to two replicas: what is let in, what is refused and how, what is counted."""

import asyncio
import re
from datetime import UTC, datetime

import pytest

from serving.tenants.headers import anthropic_headers, duration
from serving.tenants.ledger import Limits, Verdict
from tests.serving.tenants.conftest import OPERATOR, until

PROMPT_TOKENS = 10  # of the double's tokenizer, for the usual body
VERSION = {"anthropic-version": "2023-06-01"}
MESSAGES = {"model": "double", "max_tokens": 5, "messages": [{"role": "user", "content": "hello"}]}


async def test_requests_are_counted_over_both_replicas(make_cluster):
    cluster = await make_cluster(acme={"requests_per_minute": 3})
    a, b = cluster.replicas
    answers = [await replica.post(cluster.keys["acme"]) for replica in (a, b, a, b)]
    assert [r.status_code for r in answers] == [200, 200, 200, 429]
    assert [r.headers["x-ratelimit-remaining-requests"] for r in answers] == ["2", "1", "0", "0"]
    refused = answers[-1]
    assert refused.headers["x-ratelimit-limit-requests"] == "3"
    assert re.fullmatch(r"(1m0|5\d(\.\d+)?)s", refused.headers["x-ratelimit-reset-requests"])
    assert 55 <= int(refused.headers["retry-after"]) <= 61
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert "requests per minute: limit 3" in error["message"]
    assert "x-ratelimit-limit-tokens" not in refused.headers


async def test_tokens_are_prompt_and_output(make_cluster):
    cluster = await make_cluster(acme={"tokens_per_minute": 2 * (PROMPT_TOKENS + 5) + PROMPT_TOKENS})
    a, b = cluster.replicas
    first = await a.post(cluster.keys["acme"])
    assert first.json()["usage"]["total_tokens"] == PROMPT_TOKENS + 5
    await b.post(cluster.keys["acme"])
    refused = await a.post(cluster.keys["acme"], max_tokens=1)
    assert refused.status_code == 429
    assert refused.headers["x-ratelimit-remaining-tokens"] == str(PROMPT_TOKENS)
    assert "tokens per minute" in refused.json()["error"]["message"]


async def test_a_prompt_above_the_limit_is_told_not_to_come_again(make_cluster):
    cluster = await make_cluster(acme={"tokens_per_minute": 5})
    refused = await cluster.replicas[0].post(cluster.keys["acme"])
    assert (refused.status_code, refused.headers["x-should-retry"]) == (429, "false")
    assert "Request too large" in refused.json()["error"]["message"]


async def test_concurrency_is_that_of_both_replicas(make_cluster):
    cluster = await make_cluster(acme={"max_concurrent_requests": 3})
    a, b = cluster.replicas
    for _ in range(2):  # the second time: all places came back
        answers = await asyncio.gather(
            *(replica.post(cluster.keys["acme"], max_tokens=50) for replica in (a, b) * 3)
        )
        codes = sorted(r.status_code for r in answers)
        assert codes == [200, 200, 200, 429, 429, 429]
    assert "concurrent requests: limit 3" in next(r.text for r in answers if r.status_code == 429)


async def test_streams_hold_their_place_and_give_it_back(make_cluster):
    cluster = await make_cluster(acme={"max_concurrent_requests": 1})
    replica = cluster.replicas[0]
    for _ in range(3):
        assert (await replica.post(cluster.keys["acme"], stream=True)).status_code == 200


async def test_limits_of_one_are_not_those_of_another(make_cluster):
    cluster = await make_cluster(acme={"requests_per_minute": 1}, beta={})
    replica = cluster.replicas[0]
    assert [(await replica.post(cluster.keys["acme"])).status_code for _ in range(2)] == [200, 429]
    answers = [await replica.post(cluster.keys["beta"]), await replica.post(OPERATOR)]
    assert [r.status_code for r in answers] == [200, 200]
    assert not [name for r in answers for name in r.headers if "ratelimit" in name]
    assert (await replica.post("pg-unknown")).status_code == 401


async def test_a_model_that_is_not_allowed_is_not_there(make_cluster):
    cluster = await make_cluster(acme={"models": ["another"]}, beta={"models": ["double"]})
    replica = cluster.replicas[0]
    refused = await replica.post(cluster.keys["acme"])
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    assert (await replica.post(cluster.keys["beta"])).status_code == 200
    for name, shown in (("acme", []), ("beta", ["double"])):
        status = 200 if shown else 404
        for version in ({}, VERSION):
            headers = {"authorization": f"Bearer {cluster.keys[name]}", **version}
            listed = (await replica.client.get("/v1/models", headers=headers)).json()["data"]
            assert [model["id"] for model in listed] == shown
            one = await replica.client.get("/v1/models/double", headers=headers)
            assert one.status_code == status
        for path, body in (
            ("/v1/messages/count_tokens", {k: v for k, v in MESSAGES.items() if k != "max_tokens"}),
            ("/tokenize", {"prompt": "hello"}),
            ("/detokenize", {"tokens": [1]}),
        ):
            answer = await replica.client.post(path, json=body, headers=headers)
            assert answer.status_code == status, path


async def test_tiers_are_refused_by_name_and_the_first_is_the_default(make_cluster):
    cluster = await make_cluster(acme={"tiers": ["batch", "agent"]}, beta={})
    replica, key = cluster.replicas[0], cluster.keys["acme"]
    refused = await replica.post(key, service_tier="voice")
    assert refused.status_code == 403
    error = refused.json()["error"]
    assert (error["code"], error["param"]) == ("service_tier_not_allowed", "service_tier")
    assert "'batch', 'agent'" in error["message"]
    seen = []
    replica.state.observers.append(lambda exchange: seen.append(exchange.generation.tier))
    for fields in ({}, {"service_tier": "auto"}, {"service_tier": "flex"}, {"service_tier": "agent"}):
        assert (await replica.post(key, **fields)).status_code == 200
    await replica.post(cluster.keys["beta"])
    assert seen == ["batch", "batch", "batch", "agent", "default"]


async def test_anthropics_api_refuses_in_its_own_way(make_cluster):
    cluster = await make_cluster(acme={"requests_per_minute": 1, "tokens_per_minute": 1000})
    replica = cluster.replicas[0]
    headers = {"x-api-key": cluster.keys["acme"], **VERSION}
    answers = [await replica.client.post("/v1/messages", json=MESSAGES, headers=headers) for _ in range(2)]
    assert [r.status_code for r in answers] == [200, 429]
    refused = answers[1]
    assert refused.json()["type"] == "error"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert refused.headers["anthropic-ratelimit-requests-remaining"] == "0"
    assert datetime.fromisoformat(refused.headers["anthropic-ratelimit-tokens-reset"]).tzinfo is UTC
    assert int(refused.headers["retry-after"]) > 0


async def test_usage_and_metrics_count_what_was_used(make_cluster):
    cluster = await make_cluster(acme={"requests_per_minute": 2}, beta={})
    a, b = cluster.replicas
    for replica in (a, b, a):
        await replica.post(cluster.keys["acme"])
    await b.post(cluster.keys["beta"], n=2, stream=True)
    text = a.state.recorder.exposition().decode() + b.state.recorder.exposition().decode()
    for line in (
        'peregrine_tenant_requests_total{tenant="acme"} 1.0',
        'peregrine_tenant_output_tokens_total{tenant="acme"} 5.0',
        'peregrine_tenant_refusals_total{reason="requests",tenant="acme"} 1.0',
        f'peregrine_tenant_prompt_tokens_total{{tenant="beta"}} {PROMPT_TOKENS}.0',
    ):
        assert line in text
    for replica in (a, b):
        replica.gate.meter.send_changed(replica.gate._link.meter)

    async def rows(key: str) -> list[dict]:
        answer = await a.client.get("/v1/usage", headers={"authorization": f"Bearer {key}"})
        return answer.json()["data"]

    await until(lambda: len(cluster.server._unwritten) == 2)
    acme, beta = await rows(OPERATOR)
    assert (acme["tenant"], acme["model"]) == ("acme", "double")
    assert (acme["requests"], acme["refusals"]) == (2, 1)
    assert (acme["prompt_tokens"], acme["output_tokens"]) == (2 * PROMPT_TOKENS, 10)
    assert await rows(cluster.keys["beta"]) == [beta]
    answer = await a.client.get("/v1/usage?format=csv", headers={"authorization": f"Bearer {OPERATOR}"})
    head, *lines = answer.text.splitlines()
    assert head == "hour,tenant,model,requests,prompt_tokens,output_tokens,refusals"
    assert lines[0] == f"{acme['hour']},acme,double,2,{2 * PROMPT_TOKENS},10,1"


async def test_usage_needs_a_key(make_cluster):
    cluster = await make_cluster(acme={})
    assert (await cluster.replicas[0].client.get("/v1/usage")).status_code == 401


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.04, "40ms"), (1, "1s"), (1.25, "1.25s"), (59.9999, "1m0s"), (366.2, "6m6.2s")],
)
def test_durations_are_go_s(seconds, text):
    assert duration(seconds) == text


def test_limits_that_there_are_not_have_no_headers():
    verdict = Verdict(None, remaining_tokens=7, reset_tokens_s=30)
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    assert anthropic_headers(Limits(tokens=10), verdict, moment) == {
        "anthropic-ratelimit-tokens-limit": "10",
        "anthropic-ratelimit-tokens-remaining": "7",
        "anthropic-ratelimit-tokens-reset": "2026-01-01T00:00:30Z",
    }
