"""Responses that are kept: for how long, for whom, on which replica."""

import openai
import pytest

from serving.api.responses.store import ResponseStore, StoredResponse
from serving.errors import not_ready
from serving.settings import ResponseStoreSettings
from serving.tools import Message
from tests.serving.anthropic.scripted_engine import ScriptedEngine
from tests.serving.responses.asking import TOOL, client_of
from tests.serving.responses.test_responses import CALL


def entry(name: str, owner: str | None = None, size: int = 100) -> StoredResponse:
    return StoredResponse(name, owner, b"x" * size, (Message("user", "Hi"),))


def store_of(**limits) -> tuple[ResponseStore, list[float]]:
    now = [0.0]
    return ResponseStore(ResponseStoreSettings(**limits), clock=lambda: now[0]), now


def test_the_oldest_go_first():
    store, _ = store_of(max_count=2)
    for name in "abc":
        store.put(entry(name))
    assert [store.get(name, None) is not None for name in "abc"] == [False, True, True]
    assert store.num_bytes == 2 * entry("a").num_bytes


def test_bytes_are_bounded_and_what_is_too_large_is_not_kept():
    store, _ = store_of(max_bytes=5000)
    for name in "abc":
        store.put(entry(name, size=1500))
    assert store.num_bytes <= 5000
    assert store.get("a", None) is None
    assert store.get("c", None) is not None
    store.put(entry("d", size=6000))
    assert store.get("d", None) is None
    assert len(store) == 2


def test_they_are_forgotten_with_time():
    store, now = store_of(ttl_s=10)
    store.put(entry("a"))
    now[0] = 9.0
    store.put(entry("b"))
    assert len(store) == 2
    now[0] = 10.0
    assert (store.get("a", None), len(store)) == (None, 1)
    now[0] = 19.0
    assert (len(store), store.num_bytes) == (0, 0)


def test_nobody_sees_another_tenants():
    store, _ = store_of()
    store.put(entry("a", owner="x"))
    for owner in (None, "y"):
        assert store.get("a", owner) is None
        assert store.pop("a", owner) is None
    assert store.pop("a", "x") is not None
    assert len(store) == 0


async def test_a_response_is_read_again_and_forgotten():
    async with client_of(ScriptedEngine(["Hello"])) as (client, state):
        done = await client.responses.create(model="m", input="Hi")
        assert await client.responses.retrieve(done.id) == done
        await client.responses.delete(done.id)
        assert len(state.responses) == 0
        with pytest.raises(openai.NotFoundError) as error:
            await client.responses.retrieve(done.id)
        assert error.value.code == "response_not_found"
        with pytest.raises(openai.NotFoundError):
            await client.responses.delete(done.id)
        with pytest.raises(openai.BadRequestError, match="Previous response with id"):
            await client.responses.create(model="m", input="Hi", previous_response_id=done.id)
        unkept = await client.responses.create(model="m", input="Hi", store=False)
        assert unkept.store is False
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(unkept.id)
        stream = await client.responses.create(model="m", input="Hi", stream=True)
        last = [event async for event in stream][-1].response
        assert (await client.responses.retrieve(last.id)).output_text == "Hello"


async def test_a_conversation_goes_on_without_its_earlier_instructions():
    engine = ScriptedEngine(["Hello"])
    async with client_of(engine) as (client, _):
        first = await client.responses.create(model="m", input="One", instructions="Old.")
        second = await client.responses.create(
            model="m", input="Two", instructions="New.", previous_response_id=first.id
        )
        assert second.previous_response_id == first.id
        await client.responses.create(model="m", input="Three", previous_response_id=second.id)
    assert [(m["role"], m["content"]) for m in engine.messages] == [
        ("user", "One"),
        ("assistant", "Hello"),
        ("user", "Two"),
        ("assistant", "Hello"),
        ("user", "Three"),
    ]


async def test_a_calls_output_goes_on_from_the_call():
    engine = ScriptedEngine([CALL])
    async with client_of(engine) as (client, _):
        first = await client.responses.create(model="m", input="Rome?", tools=[TOOL])
        [call] = first.output
        engine.pieces = ["Sunny."]
        given = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
        done = await client.responses.create(
            model="m", input=given, previous_response_id=first.id, tools=[TOOL]
        )
        assert done.output_text == "Sunny."
        with pytest.raises(openai.BadRequestError, match="no function_call_output follows"):
            await client.responses.create(model="m", input="Well?", previous_response_id=first.id)
        reference = [{"type": "item_reference", "id": call.id}, *given]
        again = await client.responses.create(model="m", input=reference, tools=[TOOL])
        assert again.output_text == "Sunny."
        with pytest.raises(openai.NotFoundError) as error:
            await client.responses.create(
                model="m", input=[{"type": "item_reference", "id": call.id[:-1] + "9"}, *given]
            )
        assert error.value.code == "item_not_found"


async def test_other_replicas_are_asked_for_ids_that_are_not_ones_own():
    asked: list[tuple[str, str | None, bool]] = []
    async with client_of(ScriptedEngine(["Hello"]), replica="one") as (first, one):

        async def ask(response_id: str, owner: str | None, forget: bool) -> StoredResponse | None:
            asked.append((response_id, owner, forget))
            store = one.responses
            return store.pop(response_id, owner) if forget else store.get(response_id, owner)

        engine = ScriptedEngine(["Again"])
        async with client_of(engine, replica="two", response_peers=ask) as (second, _):
            done = await first.responses.create(model="m", input="Hi")
            assert (await second.responses.retrieve(done.id)).output_text == "Hello"
            await second.responses.create(model="m", input="And?", previous_response_id=done.id)
            assert [m["content"] for m in engine.messages] == ["Hi", "Hello", "And?"]
            await second.responses.delete(done.id)
            assert len(one.responses) == 0
            for unknown in (f"resp_two_{'0' * 32}", "resp_unknown", "x"):
                with pytest.raises(openai.NotFoundError):
                    await second.responses.retrieve(unknown)
    assert asked == [(done.id, None, False), (done.id, None, False), (done.id, None, True)]


async def test_a_silent_replica_is_no_reason_to_say_not_found():
    async def ask(response_id: str, owner: str | None, forget: bool) -> None:
        raise not_ready("Not every replica could be asked.")

    async with client_of(ScriptedEngine(["Hello"]), response_peers=ask) as (client, _):
        with pytest.raises(openai.InternalServerError) as error:
            await client.responses.retrieve(f"resp_other_{'0' * 32}")
    assert error.value.status_code == 503


async def test_where_nothing_is_kept():
    async with client_of(ScriptedEngine(["Hello"]), responses={"max_count": 0}) as (client, state):
        done = await client.responses.create(model="m", input="Hi")
        assert (done.store, len(state.responses)) == (False, 0)
        with pytest.raises(openai.BadRequestError, match="keeps no responses"):
            await client.responses.create(model="m", input="Hi", store=True)
