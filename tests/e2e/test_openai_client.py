"""The official OpenAI client, sync and async, against the live cluster."""

import asyncio
import json
import math
import subprocess

import httpx
import openai
import pytest

from tests.e2e.conftest import MODEL

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(120)]

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."


def test_chat(client):
    answer = client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_chat_stream_with_usage(client):
    stream = client.chat.completions.create(
        model=MODEL, messages=FRANCE, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert all(c.usage is None for c in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 8
    assert len({c.id for c in chunks}) == 1


def test_system_and_several_turns(client):
    messages = [
        {"role": "system", "content": "You are terse."},
        *FRANCE,
        {"role": "assistant", "content": ANSWER},
        {
            "role": "user",
            "content": [{"type": "text", "text": "And of "}, {"type": "text", "text": "Italy?"}],
        },
    ]
    answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=20)
    assert "Rome" in answer.choices[0].message.content


def test_completion_and_echo(client):
    done = client.completions.create(
        model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=4
    )
    assert done.object == "text_completion"
    assert done.choices[0].text.startswith(" Paris")
    assert done.choices[0].finish_reason == "length"
    echoed = client.completions.create(
        model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=1, echo=True, logprobs=2
    )
    assert echoed.choices[0].text == "The capital of France is Paris"
    logprobs = echoed.choices[0].logprobs
    assert "".join(logprobs.tokens) == echoed.choices[0].text
    assert logprobs.token_logprobs[0] is None
    assert all(p < 0 for p in logprobs.token_logprobs[1:])
    assert logprobs.text_offset[:2] == [0, len(logprobs.tokens[0])]
    only = client.completions.create(model=MODEL, prompt="Hello world", max_tokens=0, echo=True, logprobs=0)
    assert only.choices[0].text == "Hello world"
    assert len(only.choices[0].logprobs.tokens) == 2


def test_several_prompts_and_token_prompts(client):
    prompts = ["One, two,", "Red, green,"]
    together = client.completions.create(model=MODEL, prompt=prompts, temperature=0, max_tokens=5, n=1)
    alone = [client.completions.create(model=MODEL, prompt=p, temperature=0, max_tokens=5) for p in prompts]
    assert [c.text for c in together.choices] == [a.choices[0].text for a in alone]
    assert [c.index for c in together.choices] == [0, 1]
    assert client.completions.create(model=MODEL, prompt=[1, 2, 3], max_tokens=2).usage.prompt_tokens == 3
    streamed: dict[int, str] = {}
    for chunk in client.completions.create(
        model=MODEL, prompt=prompts, temperature=0, max_tokens=5, stream=True
    ):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + choice.text
    assert streamed == {c.index: c.text for c in together.choices}


def test_chat_logprobs(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=FRANCE, temperature=0, logprobs=True, top_logprobs=3, max_tokens=5
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 5
    for position in content:
        assert len(position.top_logprobs) == 3
        assert position.logprob == position.top_logprobs[0].logprob
        assert sum(math.exp(t.logprob) for t in position.top_logprobs) <= 1 + 1e-6
        assert bytes(position.bytes).decode() == position.token
    stream = client.chat.completions.create(
        model=MODEL, messages=FRANCE, temperature=0, logprobs=True, top_logprobs=3, max_tokens=5, stream=True
    )
    streamed = [p for c in stream if c.choices[0].logprobs for p in c.choices[0].logprobs.content]
    assert [p.token for p in streamed] == [p.token for p in content]


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [("Paris", "The capital of France is ", "Paris"), (["xyz", " of"], "The capital", " of")],
)
def test_stop_strings(client, stop, text, reason):
    answer = client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0, stop=stop)
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == (text, "stop")
    assert choice.model_extra["stop_reason"] == reason
    stream = client.chat.completions.create(
        model=MODEL, messages=FRANCE, temperature=0, stop=stop, stream=True
    )
    assert "".join(c.choices[0].delta.content or "" for c in stream) == text


def test_n_and_seed(client):
    def ask(**kw):
        body = {"model": MODEL, "messages": FRANCE, "temperature": 1.5, "max_tokens": 12, "n": 3, **kw}
        return [c.message.content for c in client.chat.completions.create(**body).choices]

    first = ask(seed=7)
    assert len(set(first)) > 1
    assert ask(seed=7) == first
    assert ask(seed=8) != first
    assert len(ask()) == 3
    indices = {c.choices[0].index for c in client.chat.completions.create(
        model=MODEL, messages=FRANCE, max_tokens=4, n=3, stream=True
    )}  # fmt: skip
    assert indices == {0, 1, 2}


def test_bias_and_extensions(client):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=FRANCE,
        max_tokens=3,
        logit_bias={"504": -100},
        extra_body={"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True},
    )
    assert not answer.choices[0].message.content.startswith("The")
    assert answer.usage.completion_tokens == 3


def test_unicode_is_never_cut(client):
    messages = [{"role": "user", "content": "Reply with emojis only: 🎉🚀🌍"}]
    body = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 24, "logit_bias": {}}
    whole = client.chat.completions.create(**body).choices[0].message.content
    parts = [c.choices[0].delta.content or "" for c in client.chat.completions.create(**body, stream=True)]
    assert "".join(parts) == whole


def test_models(client):
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-4o")
    assert error.value.code == "model_not_found"


def test_errors_are_the_clients_own_classes(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=5)
    assert error.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4o", messages=FRANCE)
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=MODEL, prompt=[5] * 9000, max_tokens=5)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=5, stream=True)
    assert error.value.param == "temperature"


async def test_async_client_many_at_once(cluster):
    async with openai.AsyncOpenAI(base_url=f"{cluster}/v1", api_key="none", timeout=60) as client:

        async def ask(i: int) -> str:
            if i % 2:
                answer = await client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0)
                return answer.choices[0].message.content
            stream = await client.chat.completions.create(
                model=MODEL, messages=FRANCE, temperature=0, stream=True
            )
            return "".join([c.choices[0].delta.content or "" async for c in stream])

        assert await asyncio.gather(*(ask(i) for i in range(24))) == [ANSWER] * 24


def test_curl(cluster):
    body = json.dumps({"model": MODEL, "messages": FRANCE, "temperature": 0})
    command = ["curl", "-sS", "--max-time", "60", f"{cluster}/v1/chat/completions"]
    command += ["-H", "Content-Type: application/json", "-d", body]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == ANSWER
    streamed = subprocess.run(
        [*command[:-1], body[:-1] + ', "stream": true}'],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    assert streamed.stdout.endswith("data: [DONE]\n\n")


def test_operations(cluster):
    assert httpx.get(f"{cluster}/health").json() == {"status": "ok"}
    metrics = httpx.get(f"{cluster}/metrics").text
    for name in ("peregrine_ttft_seconds_count", "peregrine_itl_seconds_count", "peregrine_requests_running"):
        assert name in metrics
    response = httpx.get(f"{cluster}/version", headers={"x-request-id": "my-id"})
    assert response.headers["x-request-id"] == "my-id"


def test_both_replicas_answer(cluster):
    seen = {httpx.get(f"{cluster}/stats").json()["replica"] for _ in range(20)}
    assert len(seen) == 2
