"""POST /v1/embeddings through the official client, in process, against transformers in float32."""

import asyncio
import base64

import httpx
import openai
import pytest
import pytest_asyncio
import torch

from engine.async_engine import AsyncEngine
from monitoring import Recorder
from serving.app import create_app
from serving.settings import ServingSettings
from serving.state import ReplicaState
from tests.serving.small_model import NAME, save_small_model, small_engine_config

TEXTS = ["The first text.", "Un deuxième texte 🎉, plus long que l'autre.", "x"]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def small(tmp_path_factory):
    """The model in float32 and an engine that serves it."""
    directory = tmp_path_factory.mktemp("small")
    model = save_small_model(directory)
    engine = await AsyncEngine.start(small_engine_config(directory))
    yield model, engine
    await engine.shutdown()


@pytest.fixture
def state(small) -> ReplicaState:
    state = ReplicaState(ServingSettings(), Recorder(), replica="test")
    state.ready(small[1])
    return state


@pytest_asyncio.fixture(loop_scope="session")
async def client(state):
    http_client = httpx.AsyncClient(
        transport=httpx.ASGITransport(create_app(state), raise_app_exceptions=False)
    )
    async with openai.AsyncOpenAI(
        base_url="http://test/v1", api_key="none", max_retries=0, http_client=http_client
    ) as client:
        yield client


@torch.inference_mode()
def expected(model, token_ids: list[int], pooling: str = "mean") -> list[float]:
    hidden = model.model(torch.tensor([token_ids])).last_hidden_state[0]
    vector = hidden.mean(dim=0) if pooling == "mean" else hidden[-1]
    return torch.nn.functional.normalize(vector, dim=0).tolist()


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("encoding_format", ["float", "base64", None])
async def test_texts_in_every_encoding(client, small, pooling, encoding_format):
    model, engine = small
    given = {} if encoding_format is None else {"encoding_format": encoding_format}
    done = await client.embeddings.create(model=NAME, input=TEXTS, extra_body={"pooling": pooling}, **given)
    assert [e.index for e in done.data] == [0, 1, 2]
    token_ids = [await engine.tokenize(text) for text in TEXTS]
    for embedding, ids in zip(done.data, token_ids, strict=True):
        vector = embedding.embedding
        if encoding_format == "base64":  # asked for by name, the client leaves it as it is
            vector = torch.frombuffer(bytearray(base64.b64decode(vector)), dtype=torch.float32)
        assert list(vector) == pytest.approx(expected(model, ids, pooling), abs=2e-5)
    assert done.usage.prompt_tokens == done.usage.total_tokens == sum(map(len, token_ids))
    assert (done.model, done.object) == (NAME, "list")


async def test_every_kind_of_input_means_the_same(client, small):
    _, engine = small
    ids = await engine.tokenize(TEXTS[0])
    vectors = [
        (await client.embeddings.create(model=NAME, input=given, dimensions=engine.model.hidden_size)).data
        for given in (TEXTS[0], [TEXTS[0]], ids, [ids])
    ]
    assert [len(v) for v in vectors] == [1, 1, 1, 1]
    for other in vectors[1:]:
        assert other[0].embedding == pytest.approx(vectors[0][0].embedding, abs=2e-5)


async def test_many_inputs_beside_a_chat(client, small):
    """More than the engine runs at a time, and a prompt that takes several steps."""
    model, engine = small
    texts = [f"text number {i}" * (1 + 20 * (i % 100 == 7)) for i in range(256)]
    chat = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "Hi"}], max_tokens=20, temperature=0
    )
    done, _ = await asyncio.gather(client.embeddings.create(model=NAME, input=texts), chat)
    assert len(done.data) == 256
    for i in (0, 7, 107, 255):
        assert done.data[i].embedding == pytest.approx(
            expected(model, await engine.tokenize(texts[i])), abs=2e-5
        )
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


async def test_admission_and_deadline(client, state):
    state.admission.num_inflight = state.settings.max_inflight_requests
    with pytest.raises(openai.RateLimitError):
        await client.embeddings.create(model=NAME, input="x")
    state.admission.num_inflight = 0
    slow = ReplicaState(ServingSettings(request_timeout_s=1e-4), Recorder(), replica="test")
    slow.ready(state.engine)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(create_app(slow)), base_url="http://t"
    ) as http:
        answer = await http.post("/v1/embeddings", json={"model": NAME, "input": ["x" * 500] * 50})
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "timeout")
    await client.embeddings.create(model=NAME, input="x")
    assert state.engine.stats().num_free_blocks == state.engine.stats().num_blocks


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": ""}, "input", "at least one token"),
        ({"input": ["a", ""]}, "input[1]", "at least one token"),
        ({"input": []}, "input", "a non-empty array"),
        ({"input": [["a"]]}, "input", "must be"),
        ({"input": ["a", 1]}, "input", "must be"),
        ({"input": [1, 10**6]}, "input", "token ids must be in"),
        ({"input": "a" * 1025}, "input", "maximum context length is 1024"),
        ({"input": ["a"] * 2049}, "input", "at most 2048"),
        ({"input": "a", "dimensions": 16}, "dimensions", "must be 64"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "float"),
        ({"input": "a", "pooling": "max"}, "pooling", "mean"),
        ({"input": "a", "truncate": True}, "truncate", "Unrecognized"),
        ({"input": "a", "model": "gpt-4o"}, "model", "does not exist"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(state, fields, param, words):
    transport = httpx.ASGITransport(create_app(state))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        answer = await http.post("/v1/embeddings", json={"model": NAME, **fields})
    assert answer.status_code in (400, 404)
    error = answer.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


async def test_the_longest_input_fits(client):
    assert len((await client.embeddings.create(model=NAME, input="a" * 1024)).data[0].embedding) == 64
