"""Malformed requests of the Messages API: run against the app and against a live cluster.

A case's `param` is the field that its message must name.
"""

import json
from typing import Any

from tests.serving.malformed import HELLO, MODEL, Case

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
HEADERS = {"content-type": "application/json", "anthropic-version": "2023-06-01"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"name": "weather", "input_schema": SCHEMA}
USE = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome"}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "mild"}
ASKED = [*HELLO, {"role": "assistant", "content": [USE]}]


def message(name: str, param: str | None, status: int = 400, words: str = "", **body: Any) -> Case:
    values = {"model": MODEL, "messages": HELLO, "max_tokens": 4, **body}
    return Case(name, MESSAGES, json.dumps(values).encode(), status, param, words, headers=HEADERS)


def count(name: str, param: str | None, status: int = 400, words: str = "", **body: Any) -> Case:
    values = {"model": MODEL, "messages": HELLO, **body}
    return Case(name, COUNT, json.dumps(values).encode(), status, param, words, headers=HEADERS)


def turns(name: str, param: str, *messages: Any, words: str = "") -> Case:
    return message(name, param, words=words, messages=list(messages))


def blocks(name: str, param: str, *content: Any, words: str = "") -> Case:
    return turns(name, param, {"role": "user", "content": list(content)}, words=words)


def tool(name: str, param: str, fields: dict[str, Any], words: str = "") -> Case:
    given = {k: v for k, v in {**TOOL, **fields}.items() if v is not ...}
    return message(name, f"tools[0].{param}", words=words, tools=[given])


def raw(name: str, content: bytes, status: int = 400, words: str = "", **kw: Any) -> Case:
    return Case(name, kw.pop("path", MESSAGES), content, status, words=words, **{"headers": HEADERS, **kw})


def _without(field: str) -> bytes:
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 4}
    return json.dumps({k: v for k, v in body.items() if k != field}).encode()


_VALID = _without("")

CASES: list[Case] = [
    # The body itself
    raw("empty body", b""),
    raw("not JSON", b"hello", words="JSON"),
    raw("half an object", b'{"model": "x", ', words="JSON"),
    raw("an array", b"[]"),
    raw("a string", b'"hello"'),
    raw("null", b"null"),
    raw("invalid UTF-8", b'{"model": "\xff\xfe", "messages": []}'),
    raw("a lone surrogate", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', words="JSON"),
    raw("deeply nested", b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    raw("a huge body", b'{"model": "' + b"x" * (5 * 2**20) + b'"}', status=413, words="bytes"),
    raw("wrong content type", _VALID, headers={**HEADERS, "content-type": "text/plain"}),
    raw("temperature is NaN", b'{"model": "m", "max_tokens": 1, "messages": [], "temperature": NaN}'),
    raw("top_p is infinite", b'{"model": "m", "max_tokens": 1, "messages": [], "top_p": Infinity}'),
    # The version
    raw("no version", _VALID, words="anthropic-version", headers={"content-type": "application/json"}),
    raw(
        "unknown version", _VALID, words="2023-06-01", headers={**HEADERS, "anthropic-version": "2020-01-01"}
    ),
    raw("an empty version", _VALID, words="2023-06-01", headers={**HEADERS, "anthropic-version": ""}),
    raw(
        "the first version",
        _VALID,
        words="2023-06-01",
        headers={**HEADERS, "anthropic-version": "2023-01-01"},
    ),
    raw(
        "no version to count",
        _VALID,
        words="anthropic-version",
        path=COUNT,
        headers={"content-type": "application/json"},
    ),
    # What every request has
    Case("no model", MESSAGES, _without("model"), param="model", headers=HEADERS),
    Case("no messages", MESSAGES, _without("messages"), param="messages", headers=HEADERS),
    Case("no max_tokens", MESSAGES, _without("max_tokens"), param="max_tokens", headers=HEADERS),
    message("model is a number", "model", model=3),
    message("empty model", "model", model=""),
    message("unknown model", None, 404, "does not exist", model="claude-3-5-sonnet-latest"),
    message("unknown field", "foo", foo=1),
    message("OpenAI's stop", "stop", stop=["x"]),
    message("OpenAI's max_completion_tokens", "max_completion_tokens", max_completion_tokens=5),
    message("OpenAI's n", "n", n=2),
    # Turns
    message("no turn at all", "messages", messages=[]),
    message("messages is a string", "messages", messages="hi"),
    message("messages is null", "messages", messages=None),
    turns("a turn is a string", "messages[0]", "hi"),
    turns("unknown role", "messages[0].role", {"role": "wizard", "content": "x"}),
    turns("OpenAI's role tool", "messages[0].role", {"role": "tool", "content": "x"}),
    turns("no role", "messages[0].role", {"content": "x"}),
    turns("no content", "messages[0].content", {"role": "user"}),
    turns("content is null", "messages[0].content", {"role": "user", "content": None}),
    turns("content is a number", "messages[0].content", {"role": "user", "content": 5}),
    turns("content is an object", "messages[0].content", {"role": "user", "content": {"type": "text"}}),
    turns("content is empty", "messages[0].content", {"role": "user", "content": ""}),
    turns("content has no blocks", "messages[0].content", {"role": "user", "content": []}),
    turns("unknown field in a turn", "messages[0].name", {"role": "user", "content": "x", "name": "Ann"}),
    turns(
        "the third turn is wrong",
        "messages[2].content",
        *HELLO,
        {"role": "assistant", "content": "a"},
        {"role": "user"},
    ),
    turns("system alone", "messages", {"role": "system", "content": "Be terse."}),
    turns("an answer's beginning alone", "messages", {"role": "assistant", "content": "The"}),
    turns(
        "a beginning with a space", "messages[1].content", *HELLO, {"role": "assistant", "content": "The "}
    ),
    turns("two beginnings", "messages[2]", *HELLO, *[{"role": "assistant", "content": "The"}] * 2),
    # Blocks
    blocks("a block is a string", "messages[0].content[0]", "hi"),
    blocks("a block without type", "messages[0].content[0].type", {"text": "x"}),
    blocks("a block's type is a number", "messages[0].content[0].type", {"type": 5, "text": "x"}),
    blocks("text without text", "messages[0].content[0].text", {"type": "text"}),
    blocks("empty text", "messages[0].content[0].text", {"type": "text", "text": ""}),
    blocks("text is null", "messages[0].content[0].text", {"type": "text", "text": None}),
    blocks("an image", "messages[0].content[0]", {"type": "image", "source": {}}, words="'image' blocks"),
    blocks(
        "a document", "messages[0].content[0]", {"type": "document", "source": {}}, words="'document' blocks"
    ),
    blocks(
        "thinking", "messages[0].content[0]", {"type": "thinking", "thinking": "x"}, words="'thinking' blocks"
    ),
    blocks(
        "a search result", "messages[0].content[0]", {"type": "search_result"}, words="'search_result' blocks"
    ),
    blocks("OpenAI's image", "messages[0].content[0]", {"type": "image_url"}, words="'image_url' blocks"),
    blocks(
        "the second block is wrong",
        "messages[0].content[1]",
        {"type": "text", "text": "x"},
        {"type": "video"},
    ),
    blocks(
        "unknown field in a block",
        "messages[0].content[0].color",
        {"type": "text", "text": "x", "color": "red"},
    ),
    blocks("citations", "messages[0].content[0].citations", {"type": "text", "text": "x", "citations": [{}]}),
    blocks(
        "unknown cache_control",
        "messages[0].content[0].cache_control.type",
        {"type": "text", "text": "x", "cache_control": {"type": "permanent"}},
    ),
    blocks(
        "unknown cache lifetime",
        "messages[0].content[0].cache_control.ttl",
        {"type": "text", "text": "x", "cache_control": {"type": "ephemeral", "ttl": "2d"}},
    ),
    # Calls and results
    blocks("a call of the user's", "messages[0].content[0]", USE, words="assistant"),
    blocks("a result without a call", "messages[0].content[0].tool_use_id", RESULT, words="toolu_1"),
    turns(
        "a result of the assistant's",
        "messages[1].content[0]",
        *HELLO,
        {"role": "assistant", "content": [RESULT]},
        *HELLO,
    ),
    turns(
        "a result in a system turn", "messages[1].content[0]", *HELLO, {"role": "system", "content": [RESULT]}
    ),
    turns("a call as the last turn", "messages[1].content", *ASKED),
    turns("a call without its result", "messages[2].content", *ASKED, *HELLO, words="toolu_1"),
    turns(
        "a result twice",
        "messages[2].content[1].tool_use_id",
        *ASKED,
        {"role": "user", "content": [RESULT, RESULT]},
    ),
    turns(
        "a result behind text",
        "messages[2].content[1]",
        *ASKED,
        {"role": "user", "content": [{"type": "text", "text": "x"}, RESULT]},
    ),
    turns(
        "an image as result",
        "messages[2].content[0].content[0]",
        *ASKED,
        {"role": "user", "content": [{**RESULT, "content": [{"type": "image"}]}]},
        words="'image' blocks",
    ),
    turns(
        "a result's content is a number",
        "messages[2].content[0].content",
        *ASKED,
        {"role": "user", "content": [{**RESULT, "content": 5}]},
    ),
    turns(
        "is_error is a string",
        "messages[2].content[0].is_error",
        *ASKED,
        {"role": "user", "content": [{**RESULT, "is_error": "no"}]},
    ),
    turns(
        "a result without an id",
        "messages[0].content[0].tool_use_id",
        {"role": "user", "content": [{"type": "tool_result"}]},
    ),
    turns(
        "a call without a name",
        "messages[1].content[0].name",
        *HELLO,
        {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "input": {}}]},
    ),
    turns(
        "a call's input is text",
        "messages[1].content[0].input",
        *HELLO,
        {"role": "assistant", "content": [{**USE, "input": "{}"}]},
    ),
    # System
    message("system is a number", "system", system=5),
    message("an image in system", "system[0]", system=[{"type": "image"}], words="'image' blocks"),
    message("system is an object", "system", system={"type": "text", "text": "x"}),
    # Sampling
    message("temperature too low", "temperature", temperature=-0.1),
    message("temperature too high", "temperature", temperature=1.1),
    message("temperature is a string", "temperature", temperature="1"),
    message("temperature is a boolean", "temperature", temperature=True),
    message("top_p is zero", "top_p", top_p=0),
    message("top_p above one", "top_p", top_p=1.5),
    message("top_k is negative", "top_k", top_k=-1),
    message("top_k is a float", "top_k", top_k=1.5),
    message("top_k beyond the vocabulary", "top_k", top_k=10**6),
    message("max_tokens is zero", "max_tokens", max_tokens=0),
    message("max_tokens is negative", "max_tokens", max_tokens=-5),
    message("max_tokens is a string", "max_tokens", max_tokens="5"),
    message("max_tokens is null", "max_tokens", max_tokens=None),
    message("stop_sequences is a string", "stop_sequences", stop_sequences="x"),
    message("an empty stop sequence", "stop_sequences[1]", stop_sequences=["a", ""]),
    message("a stop sequence is a number", "stop_sequences[0]", stop_sequences=[5]),
    message("too many stop sequences", "stop_sequences", stop_sequences=[str(i) for i in range(17)]),
    message("stream is a string", "stream", stream="yes"),
    # Tools
    message("tools is an object", "tools", tools=TOOL),
    tool("a tool without a name", "name", {"name": ...}),
    tool("a tool's name has a space", "name", {"name": "the weather"}),
    tool("a tool's name is too long", "name", {"name": "x" * 129}),
    tool("a tool without a schema", "input_schema", {"input_schema": ...}),
    tool("a schema is text", "input_schema", {"input_schema": "{}"}),
    tool("a schema of an array", "input_schema", {"input_schema": {"type": "array"}}),
    tool("a search on the server", "type", {"type": "web_search_20250305"}, "web_search_20250305"),
    tool("a shell", "type", {"type": "bash_20250124"}, "bash_20250124"),
    tool("unknown field in a tool", "parameters", {"parameters": {}}),
    tool("deferred loading", "defer_loading", {"defer_loading": True}),
    message("two tools of one name", "tools", tools=[TOOL, TOOL], words="weather"),
    message("OpenAI's tool", "tools[0]", tools=[{"type": "function", "function": {"name": "f"}}]),
    message("a choice without tools", "tool_choice", tool_choice={"type": "any"}),
    message("a choice is a string", "tool_choice", tools=[TOOL], tool_choice="auto"),
    message("an unknown choice", "tool_choice.type", tools=[TOOL], tool_choice={"type": "required"}),
    message("a choice without type", "tool_choice.type", tools=[TOOL], tool_choice={"name": "weather"}),
    message("a choice of no tool", "tool_choice.name", tools=[TOOL], tool_choice={"type": "tool"}),
    message(
        "a choice of an unknown tool",
        "tool_choice.name",
        tools=[TOOL],
        tool_choice={"type": "tool", "name": "x"},
    ),
    message(
        "any of a name", "tool_choice.name", tools=[TOOL], tool_choice={"type": "any", "name": "weather"}
    ),
    message(
        "none in parallel",
        "tool_choice.disable_parallel_tool_use",
        tools=[TOOL],
        tool_choice={"type": "none", "disable_parallel_tool_use": True},
    ),
    message(
        "a call and an answer's beginning",
        "tool_choice",
        tools=[TOOL],
        tool_choice={"type": "any"},
        messages=[*HELLO, {"role": "assistant", "content": "The"}],
    ),
    # What is not served
    message(
        "thinking enabled",
        "thinking.type",
        thinking={"type": "enabled", "budget_tokens": 1024},
        words="enabled",
    ),
    message("thinking adaptive", "thinking.type", thinking={"type": "adaptive"}, words="adaptive"),
    message("a container", "container", container="c"),
    message("MCP servers", "mcp_servers", mcp_servers=[]),
    message("an effort", "output_config.effort", output_config={"effort": "low"}),
    message(
        "an unknown format",
        "output_config.format.type",
        output_config={"format": {"type": "json_object", "schema": SCHEMA}},
    ),
    message(
        "a format without schema",
        "output_config.format.schema",
        output_config={"format": {"type": "json_schema"}},
    ),
    message(
        "a format and an answer's beginning",
        "output_config.format",
        output_config={"format": {"type": "json_schema", "schema": SCHEMA}},
        messages=[*HELLO, {"role": "assistant", "content": "The"}],
    ),
    message("unknown tier", "service_tier", service_tier="gold"),
    message("a tier is a number", "service_tier", service_tier=5),
    message("metadata is a list", "metadata", metadata=[]),
    message("unknown metadata", "metadata.team", metadata={"team": "x"}),
    message("a user's id is a number", "metadata.user_id", metadata={"user_id": 5}),
    message(
        "conversation beyond the context",
        None,
        400,
        "context",
        messages=[{"role": "user", "content": "a b " * 9000}],
    ),
    # Counting
    count("max_tokens to count", "max_tokens", max_tokens=5),
    count("temperature to count", "temperature", temperature=0.5),
    count("no turn to count", "messages", messages=[]),
    count("an unknown model's count", None, 404, "does not exist", model="claude"),
    count(
        "an image to count",
        "messages[0].content[0]",
        messages=[{"role": "user", "content": [{"type": "image"}]}],
    ),
    # Routes
    raw("wrong method", b"", 405, "not allowed", method="GET"),
    raw("unknown route", b"{}", 404, "Unknown request URL", path="/v1/messages/batches"),
    raw("unknown model card", b"", 404, "does not exist", path="/v1/models/claude-3-opus", method="GET"),
    raw("a page of none", b"", 400, "limit", path="/v1/models?limit=0", method="GET"),
    raw("an unknown page", b"", 400, "after_id", path="/v1/models?after_id=x", method="GET"),
    raw(
        "models of another version",
        b"",
        400,
        "anthropic-version",
        path="/v1/models",
        method="GET",
        headers={"anthropic-version": "1"},
    ),
]
