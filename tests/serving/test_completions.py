"""Completions through the official client, in process: logprobs by transformers, suffix, echo, best_of."""

import math

import httpx
import openai
import pytest
import pytest_asyncio
import torch

from engine.async_engine import AsyncEngine
from monitoring import Recorder
from serving.api.completion_logprobs import LogprobsWriter
from serving.app import create_app
from serving.settings import ServingSettings
from serving.state import ReplicaState
from tests.serving.small_model import NAME, save_small_model, small_engine_config

FIM_TOKENS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|endoftext|>")
PROMPT = "def add(a, b): # 🎉"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def small(tmp_path_factory):
    """The model in float32 and an engine that serves it."""
    directory = tmp_path_factory.mktemp("small")
    model = save_small_model(directory, FIM_TOKENS)
    engine = await AsyncEngine.start(small_engine_config(directory))
    yield model, engine
    await engine.shutdown()


@pytest_asyncio.fixture(loop_scope="session")
async def client(small):
    state = ReplicaState(ServingSettings(), Recorder(), replica="test")
    state.ready(small[1])
    transport = httpx.ASGITransport(create_app(state), raise_app_exceptions=False)
    http_client = httpx.AsyncClient(transport=transport)
    async with openai.AsyncOpenAI(
        base_url="http://test/v1", api_key="none", max_retries=0, http_client=http_client
    ) as client:
        yield client


@torch.inference_mode()
def reference_logprobs(model, token_ids: list[int]) -> torch.Tensor:
    """[T, vocab]: what transformers makes of every position in float32."""
    return model(torch.tensor([token_ids])).logits[0].log_softmax(dim=-1)


def check_positions(expected: torch.Tensor, token_ids: list[int], got: list[float]) -> None:
    own = [expected[i, token].item() for i, token in enumerate(token_ids)]
    assert got == pytest.approx(own, abs=2e-4)


async def test_echo_alone_scores_the_prompt_to_the_digit(client, small):
    model, engine = small
    token_ids = await engine.tokenize(PROMPT)
    done = await client.completions.create(model=NAME, prompt=PROMPT, max_tokens=0, echo=True, logprobs=5)
    choice, expected = done.choices[0], reference_logprobs(model, token_ids)
    assert (choice.text, choice.finish_reason) == (PROMPT, "length")
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(token_ids), 0)
    shown = choice.logprobs
    assert len(shown.tokens) == len(token_ids)
    assert shown.token_logprobs[0] is None
    assert shown.top_logprobs[0] is None
    check_positions(expected[:-1], token_ids[1:], shown.token_logprobs[1:])
    for row, top, own in zip(expected[:-1], shown.top_logprobs[1:], shown.token_logprobs[1:], strict=True):
        best = row.topk(5).values.tolist()
        assert sorted(top.values(), reverse=True)[:5] == pytest.approx(best, abs=2e-4)
        assert own in top.values()
    # Each byte is a token: the emoji's have no text of their own, and their place is where it begins.
    assert shown.tokens[-4:] == ["bytes:\\xf0", "bytes:\\x9f", "bytes:\\x8e", "bytes:\\x89"]
    assert shown.text_offset[-4:] == [len(PROMPT) - 1] * 4
    assert shown.text_offset[:3] == [0, 1, 2]


async def test_output_logprobs_to_the_digit_whole_and_streamed(client, small):
    model, engine = small
    token_ids = await engine.tokenize(PROMPT)
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": 12, "logprobs": 3, "temperature": 0, "echo": True}
    whole = (await client.completions.create(**body)).choices[0].logprobs
    streamed = [c.choices[0].logprobs async for c in await client.completions.create(**body, stream=True)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [x for part in streamed if part for x in getattr(part, name)] == getattr(whole, name)
    alone = await client.completions.create(**{**body, "echo": False, "prompt": token_ids})
    assert alone.choices[0].logprobs.token_logprobs == pytest.approx(
        whole.token_logprobs[len(token_ids) :], abs=2e-4
    )
    output = []
    for _ in range(12):
        row = reference_logprobs(model, token_ids + output)[-1]
        output.append(int(row.argmax()))
    expected = reference_logprobs(model, token_ids + output)
    check_positions(expected[:-1], (token_ids + output)[1:], whole.token_logprobs[1:])


async def test_chat_logprobs_to_the_digit(client, small):
    model, engine = small
    messages = [{"role": "user", "content": "Hi"}]
    token_ids = await engine.tokenize_chat(messages)
    done = await client.chat.completions.create(
        model=NAME, messages=messages, max_tokens=8, temperature=0, logprobs=True, top_logprobs=4
    )
    content = done.choices[0].logprobs.content
    output: list[int] = []
    for position in content:
        row = reference_logprobs(model, token_ids + output)[-1]
        output.append(int(row.argmax()))
        assert position.logprob == pytest.approx(row.max().item(), abs=2e-4)
        assert [t.logprob for t in position.top_logprobs] == pytest.approx(
            row.topk(4).values.tolist(), abs=2e-4
        )
        assert bytes(position.bytes) == engine.token_bytes(output[-1])


async def test_echo_of_several_choices_streamed(client):
    stream = await client.completions.create(
        model=NAME, prompt="ab", max_tokens=2, echo=True, logprobs=0, n=2, stream=True, seed=1
    )
    tokens: dict[int, list[str]] = {0: [], 1: []}
    async for chunk in stream:
        for choice in chunk.choices:
            tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
    assert tokens[0][:2] == tokens[1][:2] == ["a", "b"]
    assert (len(tokens[0]), len(tokens[1])) == (4, 4)


async def test_best_of_chooses_by_mean_logprob(client):
    body = {
        "model": NAME,
        "prompt": ["ab", "cd"],
        "max_tokens": 6,
        "seed": 3,
        "temperature": 1.5,
        "extra_body": {"ignore_eos": True},
    }
    every = await client.completions.create(**body, n=6, logprobs=0)
    best = await client.completions.create(**body, n=2, best_of=6)
    assert [c.index for c in best.choices] == [0, 1, 2, 3]
    assert best.choices[0].logprobs is None
    assert best.usage.completion_tokens == every.usage.completion_tokens == 2 * 6 * 6
    for prompt in range(2):
        candidates = every.choices[prompt * 6 : prompt * 6 + 6]
        ranked = sorted(candidates, key=lambda c: -math.fsum(c.logprobs.token_logprobs))
        assert [c.text for c in best.choices[prompt * 2 : prompt * 2 + 2]] == [c.text for c in ranked[:2]]


async def test_suffix_fills_in_the_middle(client, small):
    _, engine = small
    pre, suf, mid, end = (engine.token_id(t) for t in FIM_TOKENS)
    asked = {"model": NAME, "temperature": 0, "max_tokens": 8}
    prefix, suffix = await engine.tokenize("return a"), await engine.tokenize("b\n")
    by_hand = [pre, *prefix, suf, *suffix, mid]
    expected = await client.completions.create(prompt=by_hand, extra_body={"stop_token_ids": [end]}, **asked)
    for prompt in ("return a", prefix):
        done = await client.completions.create(prompt=prompt, suffix="b\n", **asked)
        assert done.choices[0].text == expected.choices[0].text
        assert done.usage.prompt_tokens == len(by_hand)
    stream = await client.completions.create(prompt=["return a"], suffix="b\n", stream=True, **asked)
    assert "".join([c.choices[0].text async for c in stream]) == expected.choices[0].text
    biased = await client.completions.create(
        prompt="return a", suffix="b\n", logit_bias={str(end): 100}, **asked
    )
    assert (biased.choices[0].text, biased.choices[0].finish_reason) == ("", "stop")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 65}, "best_of"),
        ({"suffix": "a", "echo": True}, "echo"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(client, fields, param):
    with pytest.raises(openai.BadRequestError) as error:
        await client.completions.create(model=NAME, prompt="a", **fields)
    assert error.value.param == param


def test_an_empty_writer_has_empty_lists():
    assert LogprobsWriter().write([]).model_dump() == {
        "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []
    }  # fmt: skip
