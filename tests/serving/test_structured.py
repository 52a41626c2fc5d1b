"""Answers of a form over the API, with the real model."""

import json
import re

import jsonschema
import pytest

from tests.serving.conftest import MODEL

pytestmark = pytest.mark.model

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome"]},
        "people": {"type": "integer", "minimum": 0, "maximum": 99},
        "sights": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 2},
    },
    "required": ["city", "people", "sights"],
    "additionalProperties": False,
}
QUESTION = [{"role": "user", "content": "Tell me about a city, as JSON."}]
FORMAT = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}


def is_city(text: str) -> bool:
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


FORMS = {
    "response_format": ({"response_format": FORMAT}, is_city),
    "guided_json": ({"guided_json": SCHEMA}, is_city),
    "guided_json as text": ({"guided_json": json.dumps(SCHEMA)}, is_city),
    "structured_outputs.json": ({"structured_outputs": {"json": SCHEMA}}, is_city),
    "guided_regex": ({"guided_regex": "[a-z]{2,5}[0-9]"}, lambda t: re.fullmatch("[a-z]{2,5}[0-9]", t)),
    "guided_choice": ({"guided_choice": ["yes", "not at all"]}, lambda t: t in ("yes", "not at all")),
    "guided_grammar": (
        {"guided_grammar": 'start: "<" /[a-z]{1,3}/ ">"'},
        lambda t: re.fullmatch("<[a-z]+>", t),
    ),
    "gbnf": ({"guided_grammar": 'root ::= "<" [a-z] ">"'}, lambda t: re.fullmatch("<[a-z]>", t)),
    "structured_outputs.choice": ({"structured_outputs": {"choice": ["a", "b"]}}, lambda t: t in ("a", "b")),
}


def texts_of(response, is_stream: bool) -> dict[int, str]:
    """The choices' texts; every one has ended by itself."""
    assert response.status_code == 200, response.text
    if not is_stream:
        choices = response.json()["choices"]
        assert {c["finish_reason"] for c in choices} == {"stop"}
        return {c["index"]: c["text"] if "text" in c else c["message"]["content"] for c in choices}
    texts: dict[int, str] = {}
    reasons = []
    for line in response.text.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                text = choice.get("text") or choice.get("delta", {}).get("content") or ""
                texts[choice["index"]] = texts.get(choice["index"], "") + text
                reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    assert reasons == ["stop"] * len(texts)
    return texts


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", FORMS)
async def test_answers_are_of_their_form(make_client, name, is_stream):
    fields, is_right = FORMS[name]
    common = {"model": MODEL, "max_tokens": 120, "stream": is_stream, "temperature": 1, "seed": 5, "n": 2}
    async with make_client() as client:
        chat = await client.post("/v1/chat/completions", json={**common, "messages": QUESTION, **fields})
        completion = await client.post("/v1/completions", json={**common, "prompt": "A city: ", **fields})
    for response in (chat, completion):
        texts = texts_of(response, is_stream)
        assert len(texts) == common["n"]
        assert all(is_right(text) for text in texts.values()), texts


@pytest.mark.parametrize(
    "fields",
    [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}],
    ids=["response_format", "structured_outputs"],
)
async def test_any_object(make_client, engine, fields):
    closing = [token_id for text in ('"', "}") for token_id in await engine.tokenize(text)]
    body = {
        "model": MODEL,
        "messages": QUESTION,
        "max_tokens": 150,
        "seed": 1,
        "n": 4,
        "logit_bias": dict.fromkeys(map(str, closing), 8),  # a small model does not end by itself
        **fields,
    }
    async with make_client() as client:
        texts = texts_of(await client.post("/v1/chat/completions", json=body), is_stream=False)
    assert len(texts) == 4
    assert all(isinstance(json.loads(text), dict) for text in texts.values()), texts


async def test_text_is_no_form_and_a_cut_answer_says_so(make_client):
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 5, "temperature": 0}
    async with make_client() as client:
        plain = (await client.post("/v1/chat/completions", json=body)).json()
        text = (
            await client.post("/v1/chat/completions", json={**body, "response_format": {"type": "text"}})
        ).json()
        cut = (await client.post("/v1/chat/completions", json={**body, "response_format": FORMAT})).json()
        stopped = await client.post(
            "/v1/chat/completions",
            json={**body, "response_format": FORMAT, "stop": ["city"], "max_tokens": 50},
        )
    assert text["choices"][0]["message"] == plain["choices"][0]["message"]
    assert cut["choices"][0]["finish_reason"] == "length"
    assert cut["choices"][0]["message"]["content"].startswith("{")
    choice = stopped.json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "city")
    assert re.fullmatch(r'\{\s*"', choice["message"]["content"])


async def test_a_schema_is_optional_as_openai_has_it(make_client):
    shape = {"type": "json_schema", "json_schema": {"name": "anything"}}
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 3, "response_format": shape}
    async with make_client() as client:
        answer = (await client.post("/v1/chat/completions", json=body)).json()
    assert answer["choices"][0]["message"]["content"].startswith("{")


async def test_logprobs_are_the_models_own(make_client):
    body = {
        "model": MODEL, "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0,
        "logprobs": 2, "guided_choice": [" Rome"],
    }  # fmt: skip
    async with make_client() as client:
        choice = (await client.post("/v1/completions", json=body)).json()["choices"][0]
    assert choice["text"] == " Rome"
    assert choice["logprobs"]["tokens"][0] == " Rome"
    best = choice["logprobs"]["top_logprobs"][0]
    assert max(best, key=best.__getitem__) == " Paris"
    assert choice["logprobs"]["token_logprobs"][0] == min(best.values())
