"""What a router can tell of a request from its body, without a tokenizer."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from pydantic_core import from_json

from serving.routing import RequestKind, RoutedRequest, chain_hashes, text_chain_hashes
from serving.routing.prefix_index import BYTES_PER_TOKEN
from serving.tiers import Tier, tier_named

# Whose first token may take longer than this has nobody waiting for it.
_INTERACTIVE_TTFT_S = 30.0
_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")


@dataclass(frozen=True, slots=True)
class _Prompt:
    num_tokens: int
    block_hashes: list[int]


def routed_request(flight_id: str, body: bytes, num_bytes: int, tiers: Mapping[str, Tier]) -> RoutedRequest:
    """Never fails: what the body does not say, or says wrongly, is left out; the replica refuses it.

    body: the request's body, or its beginning.
    num_bytes: the length of the whole body.
    """
    try:
        parsed = from_json(body, allow_partial="trailing-strings")
    except ValueError:
        parsed = None
    fields: dict[str, Any] = parsed if isinstance(parsed, dict) else {}
    prompt = _prompt_of(fields)
    missing = max(0, num_bytes - len(body)) // BYTES_PER_TOKEN
    tier = tier_named(tiers, fields.get("service_tier"))
    return RoutedRequest(
        flight_id,
        prompt_tokens=max(1, prompt.num_tokens + missing),
        max_output_tokens=next(filter(None, (_positive(fields.get(name)) for name in _LIMITS)), None),
        block_hashes=prompt.block_hashes,
        kind=RequestKind.BATCH if tier and tier.ttft_s > _INTERACTIVE_TTFT_S else RequestKind.INTERACTIVE,
        priority=tier.priority if tier else 0,
        ttft_budget_s=tier.ttft_s if tier else None,
    )


def _prompt_of(fields: dict[str, Any]) -> _Prompt:
    messages, prompt = fields.get("messages"), fields.get("prompt", fields.get("input"))
    if _is_items(prompt):  # the Responses API's
        instructions = [{"role": "system", "content": fields.get("instructions")}]
        return _of_text(_tools_of(fields) + "".join(_text_of(i) for i in [*instructions, *prompt]))
    if isinstance(messages, list):
        turns = messages
        if (system := fields.get("system")) is not None:  # Anthropic's form
            turns = [{"role": "system", "content": system}, *messages]
        return _of_text(_tools_of(fields) + "".join(_text_of(m) for m in turns))
    if isinstance(prompt, list) and prompt and all(isinstance(p, int) for p in prompt):
        return _Prompt(len(prompt), chain_hashes(prompt))
    if isinstance(prompt, list):
        # Several prompts run side by side; only the first one's beginning can be looked up.
        texts = [p for p in prompt if isinstance(p, str)]
        first = _of_text(texts[0]) if texts else _Prompt(0, [])
        return _Prompt(sum(map(len, texts)) // BYTES_PER_TOKEN, first.block_hashes)
    return _of_text(prompt) if isinstance(prompt, str) else _Prompt(0, [])


def _is_items(prompt: Any) -> TypeGuard[list[Any]]:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(item, dict) for item in prompt)


def _tools_of(fields: dict[str, Any]) -> str:
    """Templates show tools before the turns, so that conversations of one agent begin alike."""
    tools = fields.get("tools")
    return json.dumps(tools) if isinstance(tools, list) and tools else ""


def _text_of(message: Any) -> str:
    if not isinstance(message, dict):
        return ""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    calls = message.get("tool_calls")
    return f"\n{message.get('role')}: {content or ''}{json.dumps(calls) if calls else ''}"


def _of_text(text: str) -> _Prompt:
    data = text.encode(errors="replace")
    return _Prompt(len(data) // BYTES_PER_TOKEN, text_chain_hashes(data))


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
