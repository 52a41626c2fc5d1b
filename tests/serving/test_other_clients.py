"""What other vendors' clients and agent frameworks send unasked: served, or without effect."""

import json

import pytest

from tests.serving.anthropic.scripted_engine import ScriptedEngine
from tests.serving.malformed import CHAT, HELLO, calling, result
from tests.serving.tools.test_chat import post


async def test_mistrals_any_is_required():
    engine = ScriptedEngine(['[{"name": "weather", "arguments": {"city": "Rome"}}]'])
    answer = await post(engine, tool_choice="any")
    assert answer.json()["choices"][0]["finish_reason"] == "tool_calls"
    assert engine.params.constraint.kind == "grammar"


async def test_mistrals_random_seed_is_the_seed():
    engine = ScriptedEngine(["Hello"])
    assert (await post(engine, random_seed=7, safe_prompt=False)).status_code == 200
    assert engine.params.seed == 7
    refused = await post(engine, random_seed=7, seed=7)
    assert refused.json()["error"]["param"] == "random_seed"


async def test_mistrals_messages_come_back_as_its_client_keeps_them():
    said = calling("c1")
    said = {**said, "prefix": False, "tool_calls": [{**call, "index": 0} for call in said["tool_calls"]]}
    messages = [*HELLO, said, {**result("c1"), "name": "f"}]
    assert (await post(ScriptedEngine(["Ok."]), messages=messages)).status_code == 200
    refused = await post(ScriptedEngine(["Ok."]), messages=[*HELLO, {**said, "prefix": True}, result("c1")])
    assert refused.json()["error"]["param"] == "messages[1].prefix"


@pytest.mark.parametrize("arguments", ['{"city": "Ro', "[1]", "Rome"])
async def test_a_call_that_was_cut_goes_back_to_the_model_as_text(arguments):
    """LangChain's agents answer such a call with an error, and ask again."""
    engine = ScriptedEngine(["Sorry."])
    messages = [*HELLO, calling("c1", arguments=arguments), result("c1")]
    assert (await post(engine, messages=messages)).status_code == 200
    assert json.dumps(arguments) in engine.messages[2]["content"]


async def test_groqs_base_path(make_client):
    async with make_client(api_keys=["key"]) as client:
        body = {"model": "SmolLM2-135M-Instruct", "messages": HELLO, "max_tokens": 1}
        assert (await client.post(f"/openai{CHAT}", json=body)).status_code == 401
        client.headers["authorization"] = "Bearer key"
        assert (await client.post(f"/openai{CHAT}", json=body)).status_code == 200
        assert (await client.get("/openai/v1/models")).json()["data"]
        assert (await client.get("/openai/status")).status_code == 404


@pytest.mark.parametrize(("asked", "served"), [(None, "default"), ("flex", "batch"), ("agent", "agent")])
async def test_an_answer_names_its_tier(asked, served):
    """LiteLLM's Groq client fails on answers without one."""
    answer = await post(ScriptedEngine(["Hello"]), service_tier=asked)
    assert answer.json()["service_tier"] == served
    streamed = await post(ScriptedEngine(["Hello"]), service_tier=asked, stream=True)
    chunks = [json.loads(line[6:]) for line in streamed.text.split("\n\n") if line.startswith("data: {")]
    assert {chunk["service_tier"] for chunk in chunks} == {served}


@pytest.mark.parametrize(
    ("field", "neutral", "other"), [("reasoning_effort", "none", "low"), ("verbosity", "medium", "low")]
)
async def test_settings_of_reasoning_models(field, neutral, other):
    assert (await post(ScriptedEngine(["Hello"]), **{field: neutral})).status_code == 200
    refused = await post(ScriptedEngine(["Hello"]), **{field: other})
    assert refused.json()["error"]["param"] == field
