"""What the router reads out of a body."""

import json

import pytest

from serving.dispatch.prompts import routed_request
from serving.routing import RequestKind, chain_hashes, text_chain_hashes
from serving.tiers import TIERS


def read(num_bytes: int | None = None, **body):
    data = json.dumps(body).encode()
    return routed_request("f", data, num_bytes or len(data), TIERS)


def test_a_conversation_that_goes_on_begins_with_the_same_blocks():
    turns = [{"role": "user", "content": "word " * 100}]
    first = read(messages=turns)
    turns += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": [{"text": "more"}]}]
    second = read(messages=turns)
    assert len(first.block_hashes) >= 7
    assert second.block_hashes[: len(first.block_hashes) - 1] == first.block_hashes[:-1]
    assert first.prompt_tokens == pytest.approx(127, abs=5)


def test_a_system_prompt_beside_the_turns_comes_first():
    turns = [{"role": "user", "content": "Hello"}]
    system = "rule " * 100
    beside = read(messages=turns, system=system)
    assert beside.block_hashes == read(messages=[{"role": "system", "content": system}, *turns]).block_hashes
    assert beside == read(messages=turns, system=[{"type": "text", "text": system}])


def test_tools_stand_before_the_turns():
    tools = [
        {"type": "function", "function": {"name": f"tool_{i}", "description": "x" * 50}} for i in range(9)
    ]
    one, two = (read(messages=[{"role": "user", "content": c}], tools=tools) for c in ("Hello", "Good day"))
    plain = read(messages=[{"role": "user", "content": "Hello"}])
    assert len(one.block_hashes) > 5
    assert one.block_hashes[:-1] == two.block_hashes[: len(one.block_hashes) - 1]
    assert one.prompt_tokens > plain.prompt_tokens + 100
    assert read(messages=[{"role": "user", "content": "Hello"}], tools="nonsense") == plain


def test_token_ids_are_counted_and_hashed_as_they_are():
    ids = list(range(40))
    assert read(prompt=ids).prompt_tokens == 40
    assert read(prompt=ids).block_hashes == chain_hashes(ids)
    assert len(chain_hashes(ids)) == 2


def test_several_prompts_count_together():
    assert read(prompt=["a" * 400, "b" * 400]).prompt_tokens == 200
    assert read(prompt=["a" * 400, "b" * 400]).block_hashes == text_chain_hashes(b"a" * 400)


def test_the_beginning_of_a_long_body_is_enough():
    whole = json.dumps({"messages": [{"role": "user", "content": "x" * 8000}]}).encode()
    request = routed_request("f", whole[:4000], len(whole), TIERS)
    assert request.prompt_tokens == pytest.approx(2000, abs=20)
    assert len(request.block_hashes) > 50


def test_tier_and_limit():
    assert read(prompt="a", service_tier="voice").ttft_budget_s == TIERS["voice"].ttft_s
    assert read(prompt="a", service_tier="flex").kind is RequestKind.BATCH
    assert read(prompt="a", service_tier="standard_only").ttft_budget_s == TIERS["default"].ttft_s
    assert read(prompt="a").kind is RequestKind.INTERACTIVE
    assert read(prompt="a", service_tier="gold").ttft_budget_s is None  # the replica refuses it
    assert read(prompt="a", max_tokens=7).max_output_tokens == 7
    assert read(prompt="a", max_completion_tokens=8).max_output_tokens == 8
    assert read(prompt="a", max_tokens="many").max_output_tokens is None
