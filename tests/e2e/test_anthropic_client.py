"""The official Anthropic client, sync and async, against the live cluster."""

import asyncio
import json
import os
import signal

import anthropic
import httpx
import pydantic
import pytest

from deploy.ray_environment import free_port
from tests.e2e.conftest import MODEL
from tests.load.faults import replica_processes
from tests.load.own_cluster import running
from tests.serving.anthropic.malformed import CASES

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(180)]

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}
ROME = [{"role": "user", "content": "What is the weather in Rome?"}]


@pytest.fixture(scope="module")
def claude(cluster):
    with anthropic.Anthropic(base_url=cluster, api_key="none", timeout=60, max_retries=0) as client:
        yield client


# The client's newer versions know no sampling parameters; the API's field goes where they put additions.
GREEDY = {"model": MODEL, "max_tokens": 50, "messages": FRANCE, "extra_body": {"temperature": 0}}


def ask(client, **fields):
    return client.messages.create(**{**GREEDY, **fields})


def test_text(claude):
    message = ask(claude)
    assert message.id.startswith("msg_")
    assert (message.type, message.role, message.model) == ("message", "assistant", MODEL)
    assert [(block.type, block.text) for block in message.content] == [("text", ANSWER)]
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    usage = message.usage
    assert usage.output_tokens == 8
    assert usage.input_tokens + usage.cache_read_input_tokens > 30
    assert message._request_id


def test_the_older_version(cluster):
    """Whose clients send sampling parameters among the others, and the key in a header of its own."""
    headers = {"anthropic-version": "2023-06-01", "X-Api-Key": "none"}
    with anthropic.Anthropic(base_url=cluster, api_key="none", default_headers=headers, timeout=60) as client:
        assert ask(client).content[0].text == ANSWER


def test_the_prefix_cache_shows_in_the_usage(claude):
    system = "You are terse. " * 40
    for _ in range(4):  # the cluster has two replicas
        usage = ask(claude, system=system).usage
    assert usage.cache_read_input_tokens > 100
    assert usage.cache_creation_input_tokens == 0


def test_stream(claude):
    with claude.messages.stream(**GREEDY) as stream:
        assert "".join(stream.text_stream) == ANSWER
        final = stream.get_final_message()
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens == 8
    events = list(ask(claude, stream=True))
    assert [e.type for e in events if e.type != "content_block_delta"] == [
        "message_start",
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[0].message.usage.input_tokens > 0


def test_system_and_turns(claude):
    turns = [
        *FRANCE,
        {"role": "assistant", "content": ask(claude).content},
        {"role": "user", "content": [{"type": "text", "text": "And of Italy?"}]},
    ]
    system = [{"type": "text", "text": "You are terse.", "cache_control": {"type": "ephemeral"}}]
    assert "Rome" in ask(claude, messages=turns, system=system, max_tokens=20).content[0].text


def test_the_beginning_of_the_answer(claude):
    begun = [*FRANCE, {"role": "assistant", "content": "The capital of"}]
    assert ask(claude, messages=begun).content[0].text.startswith(" France is Paris")


def test_stop_sequences_and_limits(claude):
    stopped = ask(claude, stop_sequences=["xyz", " Paris"])
    assert stopped.content[0].text == "The capital of France is"
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " Paris")
    with claude.messages.stream(**GREEDY, stop_sequences=[" Paris"]) as stream:
        assert stream.get_final_text() == "The capital of France is"
        assert stream.get_final_message().stop_sequence == " Paris"
    assert ask(claude, max_tokens=3).stop_reason == "max_tokens"


def test_count_tokens(claude):
    counted = claude.messages.count_tokens(model=MODEL, messages=FRANCE, system="You are terse.")
    usage = ask(claude, system="You are terse.").usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    with_tools = claude.messages.count_tokens(model=MODEL, messages=FRANCE, tools=[WEATHER])
    assert with_tools.input_tokens > counted.input_tokens


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_tools_round_trip(claude, choice):
    choice = {**choice, "disable_parallel_tool_use": True}
    called = ask(claude, messages=ROME, tools=[WEATHER], tool_choice=choice, max_tokens=100)
    assert called.stop_reason == "tool_use"
    (use,) = called.content
    assert (use.type, use.name) == ("tool_use", "get_weather")
    assert set(use.input) == {"city", "unit"}
    assert use.input["unit"] in ("celsius", "fahrenheit")
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "Sunny, 24 degrees."}
    turns = [
        *ROME,
        {"role": "assistant", "content": called.content},
        {"role": "user", "content": [result]},
    ]
    answered = ask(claude, messages=turns, tools=[WEATHER], tool_choice={"type": "none"})
    assert answered.content[0].type == "text"
    assert answered.content[0].text


def test_a_streamed_call(claude):
    fields = {**GREEDY, "messages": ROME, "max_tokens": 100}
    choice = {"type": "tool", "name": "get_weather"}
    with claude.messages.stream(**fields, tools=[WEATHER], tool_choice=choice) as stream:
        pieces = [e.partial_json for e in stream if e.type == "input_json"]
        final = stream.get_final_message()
    assert len(pieces) > 1
    assert json.loads("".join(pieces)) == final.content[-1].input
    assert final.content[-1].input.keys() == {"city", "unit"}
    assert final.stop_reason == "tool_use"


def test_the_clients_agent(claude):
    """Its tool runner asks the server to keep the conversation first, and goes on without when refused."""
    cities = []

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """The weather of a city.

        Args:
            city: The city's name.
        """
        cities.append(city)
        return "Sunny, 24 degrees."

    forced = {"type": "tool", "name": "get_weather"}
    fields = {**GREEDY, "messages": ROME, "max_tokens": 100, "tool_choice": forced}
    runner = claude.beta.messages.tool_runner(**fields, tools=[get_weather], max_iterations=2)
    assert [message.stop_reason for message in runner] == ["tool_use", "tool_use"]
    assert cities
    assert all(isinstance(city, str) for city in cities)


def test_an_answer_held_to_a_schema(claude):
    shape = {"type": "json_schema", "schema": WEATHER["input_schema"]}
    answer = ask(claude, messages=ROME, output_config={"format": shape}, max_tokens=100)
    assert json.loads(answer.content[0].text).keys() == {"city", "unit"}


class Weather(pydantic.BaseModel):
    city: str
    celsius: int


def test_a_parsed_answer(claude):
    fields = {**GREEDY, "messages": ROME, "max_tokens": 100, "output_format": Weather}
    assert isinstance(claude.messages.parse(**fields).parsed_output, Weather)
    with claude.messages.stream(**fields) as stream:
        assert isinstance(stream.get_final_message().parsed_output, Weather)


def test_models(claude):
    assert [m.id for m in claude.models.list()] == [MODEL]
    assert claude.models.retrieve(MODEL).display_name == MODEL
    with pytest.raises(anthropic.NotFoundError):
        claude.models.retrieve("claude-3-opus")


@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_clients_own_classes(claude, stream):
    with pytest.raises(anthropic.BadRequestError) as error:
        ask(claude, extra_body={"temperature": 1.5}, stream=stream)
    assert error.value.type == "invalid_request_error"
    assert "temperature" in error.value.api_message
    assert error.value.request_id == error.value.body["request_id"]
    with pytest.raises(anthropic.NotFoundError) as error:
        ask(claude, model="claude-3-opus", stream=stream)
    assert error.value.type == "not_found_error"
    with pytest.raises(anthropic.BadRequestError) as error:
        ask(claude, messages=[{"role": "user", "content": "a b " * 9000}], stream=stream)
    assert "context" in error.value.api_message


async def test_many_at_once(cluster):
    async with anthropic.AsyncAnthropic(base_url=cluster, api_key="none", timeout=60) as client:

        async def one(i: int) -> str:
            if i % 2:
                return (await client.messages.create(**GREEDY)).content[0].text
            async with client.messages.stream(**GREEDY) as stream:
                return await stream.get_final_text()

        assert await asyncio.gather(*(one(i) for i in range(24))) == [ANSWER] * 24


@pytest.mark.parametrize("case", CASES[::4], ids=lambda c: c.name)
def test_malformed_requests_through_the_whole_path(cluster, case):
    response = httpx.request(
        case.method, cluster + case.path, content=case.content, headers=case.headers, timeout=60
    )
    assert response.status_code == case.status, response.text
    told = response.json()
    assert set(told) == {"type", "error", "request_id"}
    assert set(told["error"]) == {"type", "message"}
    assert told["request_id"] == response.headers["request-id"]


def test_a_killed_replicas_stream_ends_with_an_error():
    others = set(replica_processes())
    with running("--engine", "real", "--replicas", "1", port=free_port()) as url:
        (victim,) = set(replica_processes()) - others
        with anthropic.Anthropic(base_url=url, api_key="none", timeout=60, max_retries=0) as client:
            (model,) = client.models.list()
            story = [{"role": "user", "content": "Tell me a very long story about the sea."}]
            stream = ask(client, model=model.id, messages=story, max_tokens=4000, stream=True)
            with pytest.raises(anthropic.APIStatusError) as error:  # noqa: PT012  # the first event is no error
                for event in stream:
                    if event.type == "content_block_delta" and victim.is_running():
                        os.kill(victim.pid, signal.SIGKILL)
    assert error.value.type == "overloaded_error"
    assert error.value.body["request_id"]
