"""Ease of integration, as what a client finds: each probe is a request of another API to the live server."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

_TIMEOUT_S = 60.0
_ANTHROPIC = {"anthropic-version": "2023-06-01"}  # which that API demands


@dataclass(frozen=True)
class Probe:
    """expects: a piece of text in the answer of status 200."""

    name: str
    path: str
    body: dict[str, Any] | None
    expects: str
    headers: Mapping[str, str] = field(default_factory=dict)


def probes(model: str) -> tuple[Probe, ...]:
    messages = [{"role": "user", "content": "Say yes."}]
    chat = {"model": model, "messages": messages, "max_tokens": 4}
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    tool = {"type": "function", "function": {"name": "look", "parameters": schema}}
    return (
        Probe("OpenAI models", "/v1/models", None, '"object"'),
        Probe("OpenAI chat", "/v1/chat/completions", chat, '"choices"'),
        Probe("streaming", "/v1/chat/completions", {**chat, "stream": True}, "data: [DONE]"),
        Probe("OpenAI completions", "/v1/completions", _completion(model), '"choices"'),
        Probe("OpenAI responses", "/v1/responses", _response(model), '"output"'),
        Probe("OpenAI embeddings", "/v1/embeddings", {"model": model, "input": "yes"}, '"embedding"'),
        Probe("Anthropic messages", "/v1/messages", chat, '"content"', _ANTHROPIC),
        Probe("tool calls", "/v1/chat/completions", {**chat, "tools": [tool]}, '"choices"'),
        Probe("JSON schema", "/v1/chat/completions", {**chat, "response_format": form}, '"choices"'),
        Probe("Prometheus metrics", "/metrics", None, "peregrine_"),
        Probe("health", "/health", None, "ok"),
    )


def _completion(model: str) -> dict[str, Any]:
    return {"model": model, "prompt": "yes", "max_tokens": 4}


def _response(model: str) -> dict[str, Any]:
    return {"model": model, "input": "Say yes.", "max_output_tokens": 16}


def run(url: str, model: str, timeout_s: float) -> list[dict[str, Any]]:
    """A row for each probe: `passed`, and the answer's beginning where it did not."""
    rows = []
    deadline = time.monotonic() + timeout_s
    with httpx.Client(base_url=url, timeout=_TIMEOUT_S, trust_env=False) as client:
        for probe in probes(model):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{probe.name} and what follows it were not asked within {timeout_s:.0f} s"
                )
            rows.append({"probe": probe.name, **_ask(client, probe)})
    return rows


def _ask(client: httpx.Client, probe: Probe) -> dict[str, Any]:
    try:
        method = "GET" if probe.body is None else "POST"
        answer = client.request(method, probe.path, json=probe.body, headers=probe.headers)
    except httpx.HTTPError as error:
        return {"passed": False, "answer": repr(error)}
    if answer.status_code == 200 and probe.expects in answer.text:
        return {"passed": True}
    return {"passed": False, "answer": f"{answer.status_code}: {answer.text[:200]}"}
