"""Structured output from the live cluster, by OpenAI's client: two schemas of each feature, both ways."""

from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from engine.checkpoint import open_checkpoint
from tests.e2e.conftest import MODEL
from tests.structured.collection import PART
from tests.structured.runs import HttpRun, complete_all

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(240)]

HELLO = [{"role": "user", "content": "Is Rome in Italy?"}]


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "streamed"])
async def test_completions_are_of_their_schemas(cluster, smollm2, is_stream):
    backend = open_checkpoint(smollm2).load_tokenizer().backend_tokenizer
    async with openai.AsyncOpenAI(base_url=f"{cluster}/v1", api_key="none", max_retries=0) as client:
        run = HttpRun(client, MODEL, lambda text: backend.encode(text).ids, is_stream=is_stream)
        outcomes = await complete_all(run, PART, num_at_once=12)
    assert len(outcomes) == 2 * len(PART)
    assert [o for o in outcomes if not o.is_valid] == []


class Answer(BaseModel):
    verdict: Literal["yes", "no"]
    confidence: Literal[1, 2, 3]


def test_the_clients_own_parsing(client):
    parsed = client.chat.completions.parse(model=MODEL, messages=HELLO, response_format=Answer, max_tokens=60)
    assert isinstance(parsed.choices[0].message.parsed, Answer)


def test_vllms_extra_fields(client):
    choice = client.chat.completions.create(
        model=MODEL, messages=HELLO, extra_body={"guided_choice": ["yes", "no"]}, max_tokens=8
    )
    assert choice.choices[0].message.content in ("yes", "no")
    digits = client.completions.create(
        model=MODEL,
        prompt="A number: ",
        extra_body={"structured_outputs": {"regex": "[0-9]{4}"}},
        max_tokens=8,
    )
    assert digits.choices[0].text.isdigit()


def test_what_cannot_be_held_is_a_400_that_names_it(client):
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {"type": "null"}}}}
    with pytest.raises(openai.BadRequestError, match='"not"') as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO, response_format=shape, stream=True)
    assert caught.value.param == "response_format.json_schema.schema"
