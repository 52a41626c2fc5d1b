"""POST /tokenize and /detokenize against the model's own tokenizer."""

import pytest

from tests.serving.conftest import MODEL

pytestmark = pytest.mark.model
HELLO = [{"role": "user", "content": "Hello"}]


async def test_a_text_there_and_back(make_client, engine):
    async with make_client() as client:
        body = {"model": MODEL, "prompt": "Bonjour, Zoë 🎉", "return_token_strs": True}
        got = (await client.post("/tokenize", json=body)).json()
        assert got["tokens"] == await engine.tokenize("Bonjour, Zoë 🎉")
        assert got["count"] == len(got["tokens"]) == len(got["token_strs"])
        assert got["max_model_len"] == engine.model.max_model_len
        back = (await client.post("/detokenize", json={"tokens": got["tokens"]})).json()
        assert back == {"prompt": "Bonjour, Zoë 🎉"}
        bare = (await client.post("/tokenize", json={"prompt": ""})).json()
        assert (bare["count"], bare["token_strs"]) == (0, None)


async def test_a_conversation_with_and_without_the_assistants_turn(make_client, engine):
    async with make_client() as client:
        open_turn = (await client.post("/tokenize", json={"messages": HELLO})).json()["tokens"]
        body = {"messages": HELLO, "add_generation_prompt": False}
        closed = (await client.post("/tokenize", json=body)).json()["tokens"]
    assert open_turn == await engine.tokenize_chat(HELLO)
    assert open_turn[: len(closed)] == closed
    assert engine.detokenize(open_turn[len(closed) :]) == "<|im_start|>assistant\n"


async def test_a_conversation_with_tools_counts_what_a_request_with_them_reads(make_client):
    tools = [{"type": "function", "function": {"name": "f", "description": "Does what f does."}}]
    async with make_client() as client:
        counted = (await client.post("/tokenize", json={"messages": HELLO, "tools": tools})).json()["count"]
        without = (await client.post("/tokenize", json={"messages": HELLO})).json()["count"]
        body = {"model": MODEL, "messages": HELLO, "tools": tools, "max_tokens": 1}
        usage = (await client.post("/v1/chat/completions", json=body)).json()["usage"]
    assert usage["prompt_tokens"] == counted > without


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools"),
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"messages": HELLO, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "return_tokens": True}, "return_tokens"),
        ("/detokenize", {"tokens": [49152]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
    ],
)
async def test_bad_input_names_its_field(make_client, path, body, param):
    async with make_client() as client:
        response = await client.post(path, json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


async def test_it_needs_the_key_and_the_model(make_client):
    async with make_client(api_keys=("secret",)) as client:
        for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
            assert (await client.post(path, json=body)).status_code == 401
            headers = {"authorization": "Bearer secret"}
            assert (await client.post(path, json=body, headers=headers)).status_code == 200
            other = await client.post(path, json={**body, "model": "gpt-4o"}, headers=headers)
            assert other.status_code == 404
