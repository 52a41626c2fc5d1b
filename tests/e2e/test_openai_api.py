"""What the official client does beside chat, over two replicas: responses, embeddings, completions' rest."""

import json
import math

import httpx
import openai
import pytest
from jsonschema import validate

from tests.e2e.conftest import MODEL

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(180)]

FRANCE = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "people": {"type": "integer", "maximum": 99}},
    "required": ["city", "people"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


def test_a_response_whole_and_streamed(client):
    whole = client.responses.create(model=MODEL, input=FRANCE, temperature=0)
    assert (whole.status, whole.output_text) == ("completed", ANSWER)
    assert whole.usage.output_tokens == 8
    counted = client.responses.input_tokens.count(model=MODEL, input=FRANCE)
    assert counted.input_tokens == whole.usage.input_tokens
    with client.responses.stream(model=MODEL, input=FRANCE, temperature=0) as stream:
        events = list(stream)
        done = stream.get_final_response()
    assert done.output_text == ANSWER
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == ANSWER
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    cut = client.responses.create(model=MODEL, input=FRANCE, max_output_tokens=3)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_a_response_goes_on_whichever_replica_is_asked(client):
    """It is read and continued often enough that both replicas are asked."""
    first = client.responses.create(model=MODEL, input=FRANCE, temperature=0)
    asked = {"model": MODEL, "previous_response_id": first.id, "temperature": 0, "max_output_tokens": 20}
    answers = {client.responses.retrieve(first.id).output_text for _ in range(20)}
    assert answers == {ANSWER}
    for place in ("Italy", "Spain", "Portugal", "Austria", "Greece", "Poland"):
        second = client.responses.create(input=f"And of {place}?", **asked)
        assert place in second.output_text
        assert second.usage.input_tokens > first.usage.total_tokens
    client.responses.delete(first.id)
    for _ in range(4):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(model=MODEL, input="And?", previous_response_id=first.id)
    assert (error.value.code, error.value.param) == ("previous_response_not_found", "previous_response_id")
    unkept = client.responses.create(model=MODEL, input=FRANCE, store=False, max_output_tokens=2)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)


@pytest.mark.parametrize("temperature", [0, 1])
def test_an_answer_held_to_a_schema(client, temperature):
    text = {"format": {"type": "json_schema", "name": "city", "schema": SCHEMA, "strict": True}}
    asked = {
        "model": MODEL,
        "input": FRANCE,
        "text": text,
        "temperature": temperature,
        "max_output_tokens": 60,
    }
    validate(json.loads(client.responses.create(**asked).output_text), SCHEMA)
    with client.responses.stream(**asked) as stream:
        streamed = stream.get_final_response()
    validate(json.loads(streamed.output_text), SCHEMA)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_tools_round_trip(client, choice):
    asked = {"model": MODEL, "tools": [TOOL], "temperature": 0, "max_output_tokens": 60}
    first = client.responses.create(input="Will it rain in Rome?", tool_choice=choice, **asked)
    call = first.output[-1]
    assert (call.type, call.name, call.status) == ("function_call", "weather", "completed")
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "No rain, 25 degrees."}
    kept = client.responses.create(input=[result], previous_response_id=first.id, tool_choice="none", **asked)
    items = [{"role": "user", "content": "Will it rain in Rome?"}, *first.output, result]
    sent = client.responses.create(input=items, tool_choice="none", store=False, **asked)
    assert kept.output_text == sent.output_text != ""
    events = list(client.responses.create(input="Rome?", tool_choice=choice, stream=True, **asked))
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    [done] = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert "".join(deltas) == done.arguments == events[-1].response.output[-1].arguments


def test_logprobs_of_a_response(client):
    done = client.responses.create(
        model=MODEL, input=FRANCE, temperature=0, include=["message.output_text.logprobs"], top_logprobs=2
    )
    logprobs = done.output[0].content[0].logprobs
    assert "".join(p.token for p in logprobs).startswith(ANSWER)
    assert all(len(p.top_logprobs) == 2 and p.logprob == p.top_logprobs[0].logprob for p in logprobs)


def test_embeddings(client):
    texts = ["A cat sat on the mat.", "A cat is sitting on a mat.", "The stock market fell sharply today."]
    for pooling in ("mean", "last"):
        done = client.embeddings.create(model=MODEL, input=texts, extra_body={"pooling": pooling})
        a, b, c = (e.embedding for e in done.data)
        assert len(a) == 576
        assert math.fsum(x * x for x in a) == pytest.approx(1, abs=1e-5)
        dot = lambda x, y: math.fsum(p * q for p, q in zip(x, y, strict=True))  # noqa: E731
        assert dot(a, b) > dot(a, c)
    numbers = client.embeddings.create(model=MODEL, input=texts[0], encoding_format="float")
    again = client.embeddings.create(model=MODEL, input=texts[0])  # base64 on the wire
    assert again.data[0].embedding == pytest.approx(numbers.data[0].embedding, abs=1e-6)
    many = client.embeddings.create(model=MODEL, input=[f"text {i}" for i in range(256)])
    assert [e.index for e in many.data] == list(range(256))
    with pytest.raises(openai.BadRequestError) as error:
        client.embeddings.create(model=MODEL, input="a", dimensions=64)
    assert error.value.param == "dimensions"


def test_best_of_and_echo(client):
    best = client.completions.create(
        model=MODEL, prompt="The capital of France is", best_of=4, n=2, max_tokens=4, seed=1, logprobs=0
    )
    means = [math.fsum(c.logprobs.token_logprobs) / len(c.logprobs.tokens) for c in best.choices]
    assert len(means) == 2
    assert means == sorted(means, reverse=True)
    assert best.usage.completion_tokens <= 16
    scored = client.completions.create(
        model=MODEL, prompt="The capital of France is Paris", max_tokens=0, echo=True, logprobs=1
    )
    assert scored.usage.completion_tokens == 0
    assert scored.choices[0].logprobs.token_logprobs[-1] > -1  # it knows


def test_a_suffix_needs_a_model_that_fills_in(client):
    with pytest.raises(openai.BadRequestError, match="cannot fill in the middle") as error:
        client.completions.create(model=MODEL, prompt="def f(", suffix="return a")
    assert error.value.param == "suffix"


def test_tokenize_and_back(cluster):
    given = {"model": MODEL, "prompt": "Bonjour, Zoë 🎉"}
    tokens = httpx.post(f"{cluster}/tokenize", json=given).json()
    assert tokens["count"] == len(tokens["tokens"])
    back = httpx.post(f"{cluster}/detokenize", json={"model": MODEL, "tokens": tokens["tokens"]}).json()
    assert back == {"prompt": given["prompt"]}
