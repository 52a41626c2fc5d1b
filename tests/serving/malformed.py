"""Malformed requests and the answers they deserve: run against the app and against a live cluster."""

import json
from dataclasses import dataclass, field
from typing import Any

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
EMBEDDINGS = "/v1/embeddings"
MODEL = "SmolLM2-135M-Instruct"
HELLO = [{"role": "user", "content": "Hello"}]
CALL_OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "x"}


@dataclass(frozen=True)
class Case:
    """One request; `param` must be the error's param (None: not checked), `words` stand in its message."""

    name: str
    path: str
    content: bytes
    status: int = 400
    param: str | None = None
    words: str = ""
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})


def chat(name: str, param: str | None, status: int = 400, words: str = "", **body: Any) -> Case:
    values = {"model": MODEL, "messages": HELLO, "max_tokens": 4, **body}
    return Case(name, CHAT, json.dumps(values).encode(), status, param, words)


def completion(name: str, param: str | None, status: int = 400, words: str = "", **body: Any) -> Case:
    values = {"model": MODEL, "prompt": "Hello", "max_tokens": 4, **body}
    return Case(name, COMPLETIONS, json.dumps(values).encode(), status, param, words)


def response(name: str, param: str | None, status: int = 400, words: str = "", **body: Any) -> Case:
    values = {"model": MODEL, "input": "Hello", "max_output_tokens": 4, **body}
    return Case(name, RESPONSES, json.dumps(values).encode(), status, param, words)


def embedding(name: str, param: str | None, status: int = 400, words: str = "", **body: Any) -> Case:
    values = {"model": MODEL, "input": "Hello", **body}
    return Case(name, EMBEDDINGS, json.dumps(values).encode(), status, param, words)


def raw(name: str, content: bytes, status: int = 400, words: str = "", **kw: Any) -> Case:
    return Case(name, kw.pop("path", CHAT), content, status, words=words, **kw)


def tool(name: str, **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def calling(*ids: str, arguments: Any = "{}") -> dict[str, Any]:
    """An assistant's message with a call of f for each id."""
    function = {"name": "f", "arguments": arguments}
    calls = [{"id": i, "type": "function", "function": function} for i in ids]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def result(call_id: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": "x"}


def schema(value: Any, **fields: Any) -> dict[str, Any]:
    """A response_format."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": value, **fields}}


def _without(*fields: str) -> bytes:
    body = {"model": MODEL, "messages": HELLO}
    return json.dumps({k: v for k, v in body.items() if k not in fields}).encode()


CASES: list[Case] = [
    # The body itself
    raw("empty body", b""),
    raw("not JSON", b"hello", words="JSON"),
    raw("half an object", b'{"model": "x", ', words="JSON"),
    raw("an array", b"[]"),
    raw("a string", b'"hello"'),
    raw("null", b"null"),
    raw("invalid UTF-8", b'{"model": "\xff\xfe", "messages": []}'),
    raw("deeply nested", b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    raw("a huge body", b'{"model": "' + b"x" * (5 * 2**20) + b'"}', status=413, words="bytes"),
    raw("wrong content type", _without(), headers={"content-type": "text/plain"}),
    # What every request has
    Case("no model", CHAT, _without("model"), param="model"),
    Case("no messages", CHAT, _without("messages"), param="messages"),
    chat("model is a number", "model", model=3),
    chat("empty model", "model", model=""),
    chat("unknown model", "model", 404, "does not exist", model="gpt-4o"),
    completion("unknown model for completions", "model", 404, "does not exist", model="gpt-4o"),
    chat("unknown field", "foo", 400, "Unrecognized request argument supplied: foo", foo=1),
    completion("unknown field for completions", "messages", messages=HELLO),
    # Messages
    chat("no message at all", "messages", messages=[]),
    chat("messages is a string", "messages", messages="hi"),
    chat("a message is a string", "messages[0]", messages=["hi"]),
    chat("unknown role", "messages[0].role", messages=[{"role": "wizard", "content": "x"}]),
    chat("no role", "messages[0].role", messages=[{"content": "x"}]),
    chat("no content", "messages[0].content", messages=[{"role": "user"}]),
    chat("content is null", "messages[0].content", messages=[{"role": "user", "content": None}]),
    chat("content is a number", "messages[0].content", messages=[{"role": "user", "content": 5}]),
    chat(
        "an image",
        "messages[0].content[0].type",
        messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    ),
    chat(
        "a text part without text",
        "messages[0].content[0].text",
        messages=[{"role": "user", "content": [{"type": "text"}]}],
    ),
    chat(
        "unknown field in a message",
        "messages[0].color",
        messages=[{"role": "user", "content": "x", "color": "red"}],
    ),
    chat(
        "the second message is wrong",
        "messages[1].content",
        messages=[*HELLO, {"role": "assistant", "content": {}}],
    ),
    raw("a lone surrogate", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', words="JSON"),
    raw("a lone surrogate in the model", b'{"model": "\\udfff", "messages": []}', words="JSON"),
    # Sampling
    chat("temperature too low", "temperature", temperature=-0.1),
    chat("temperature too high", "temperature", temperature=2.1),
    chat("temperature is a string", "temperature", temperature="1"),
    chat("temperature is a boolean", "temperature", temperature=True),
    raw("temperature is NaN", b'{"model": "m", "messages": [], "temperature": NaN}'),
    raw("temperature is infinite", b'{"model": "m", "messages": [], "temperature": Infinity}'),
    chat("top_p is zero", "top_p", top_p=0),
    chat("top_p above one", "top_p", top_p=1.5),
    chat("top_k is negative", "top_k", top_k=-1),
    chat("top_k beyond the vocabulary", "top_k", top_k=10**6),
    chat("min_p above one", "min_p", min_p=1.5),
    chat("repetition_penalty is zero", "repetition_penalty", repetition_penalty=0),
    chat("presence_penalty too low", "presence_penalty", presence_penalty=-3),
    chat("frequency_penalty too high", "frequency_penalty", frequency_penalty=3),
    chat("seed is a float", "seed", seed=1.5),
    chat("seed beyond 64 bits", "seed", seed=2**64),
    chat("n is zero", "n", n=0),
    chat("n too high", "n", n=65),
    chat("n is a string", "n", n="2"),
    chat("max_tokens is zero", "max_tokens", max_tokens=0),
    chat("max_tokens is negative", "max_tokens", max_tokens=-5),
    chat("max_tokens is a float", "max_tokens", max_tokens=1.5),
    chat("max_tokens beyond the context", "max_tokens", 400, "context", max_tokens=100_000),
    chat("max_completion_tokens is zero", "max_completion_tokens", max_completion_tokens=0),
    chat("an empty stop string", "stop", stop=""),
    chat("an empty stop string in a list", "stop", stop=["a", ""]),
    chat("too many stop strings", "stop", stop=["a", "b", "c", "d", "e"]),
    chat("stop is a number", "stop", stop=5),
    chat("stop holds a number", "stop", stop=["a", 5]),
    chat("stop_token_ids is negative", "stop_token_ids[0]", stop_token_ids=[-1]),
    chat("stop_token_ids beyond the vocabulary", "stop_token_ids", stop_token_ids=[49152]),
    chat("logit_bias is a list", "logit_bias", logit_bias=[1]),
    chat("logit_bias key is a word", "logit_bias", logit_bias={"hello": 1}),
    chat("logit_bias key is negative", "logit_bias", logit_bias={"-1": 1}),
    chat("logit_bias beyond the vocabulary", "logit_bias", logit_bias={"49152": 1}),
    chat("logit_bias value too high", "logit_bias", logit_bias={"5": 101}),
    chat("logprobs is a number", "logprobs", logprobs=5),
    chat("top_logprobs too high", "top_logprobs", logprobs=True, top_logprobs=21),
    chat("top_logprobs without logprobs", "top_logprobs", top_logprobs=2),
    completion("logprobs too high", "logprobs", logprobs=21),
    completion("logprobs is a boolean", "logprobs", logprobs=True),
    # Streaming
    chat("stream is a string", "stream", stream="yes"),
    chat("stream_options without stream", "stream_options", stream_options={"include_usage": True}),
    chat("unknown stream option", "stream_options.foo", stream=True, stream_options={"foo": 1}),
    # Tools
    chat("tools is an object", "tools", tools={}),
    chat("too many tools", "tools", tools=[tool(f"f{i}") for i in range(129)]),
    chat("a tool of another type", "tools[0].type", tools=[{"type": "custom", "custom": {"name": "f"}}]),
    chat("a tool without a function", "tools[0].function", tools=[{"type": "function"}]),
    chat("a tool without a name", "tools[0].function.name", tools=[{"type": "function", "function": {}}]),
    chat("a space in a tool's name", "tools[1].function.name", tools=[tool("f"), tool("a b")]),
    chat("a tool's name is too long", "tools[0].function.name", tools=[tool("f" * 65)]),
    chat("two tools of one name", "tools[1].function.name", 400, "'f'", tools=[tool("f"), tool("f")]),
    chat("strict is a string", "tools[0].function.strict", tools=[tool("f", strict="yes")]),
    chat("parameters is a list", "tools[0].function.parameters", tools=[tool("f", parameters=[])]),
    chat(
        "parameters of no object", "tools[0].function.parameters", 400, "of type 'object'",
        tools=[tool("f", parameters={"type": "array"})],
    ),
    chat(
        "parameters that are no schema", "tools[0].function.parameters", 400, "$.properties.x.type",
        tools=[tool("f", parameters={"type": "object", "properties": {"x": {"type": "strin"}}})],
    ),
    chat("unknown tool_choice", "tool_choice", tools=[tool("f")], tool_choice="sometimes"),
    chat("tool_choice is a number", "tool_choice", tools=[tool("f")], tool_choice=1),
    chat("tool_choice of another type", "tool_choice", tools=[tool("f")], tool_choice={"type": "x"}),
    chat("required without tools", "tool_choice", tool_choice="required"),
    chat("a choice without a name", "tool_choice.function.name", tools=[tool("f")],
         tool_choice={"type": "function", "function": {}}),
    chat("a choice that is no tool", "tool_choice.function.name", 400, "'g'", tools=[tool("f")],
         tool_choice={"type": "function", "function": {"name": "g"}}),
    chat("an allowed tool that is none",
         "tool_choice.allowed_tools.tools[0].function.name", tools=[tool("f")],
         tool_choice={"type": "allowed_tools", "allowed_tools": {
             "mode": "auto", "tools": [{"type": "function", "function": {"name": "g"}}]}}),
    chat("no allowed tools", "tool_choice.allowed_tools.tools", tools=[tool("f")],
         tool_choice={"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}),
    chat("parallel_tool_calls is a number", "parallel_tool_calls", parallel_tool_calls=1),
    chat("functions", "functions", 400, "use tools", functions=[{"name": "f"}]),
    chat("function_call", "function_call", 400, "use tools", function_call="auto"),
    chat("calls and no results", "messages", 400, "c1", messages=[*HELLO, calling("c1")]),
    chat("calls without results", "messages[3]", 400, "c2",
         messages=[*HELLO, calling("c1", "c2"), result("c1"), *HELLO]),
    chat("no calls", "messages[1].tool_calls", messages=[*HELLO, calling()]),
    chat("calls of one id", "messages[1].tool_calls", messages=[*HELLO, calling("c", "c")]),
    chat("a user's calls", "messages[0].tool_calls", messages=[{**calling("c1"), "role": "user"}]),
    chat("a result without an id", "messages[2].tool_call_id", messages=[
        *HELLO, calling("c1"), {"role": "tool", "content": "x"}]),
    chat("a result of no call", "messages[1].tool_call_id", 400, "'c1'", messages=[*HELLO, result("c1")]),
    chat("a result of another call", "messages[2].tool_call_id", 400, "'c2'", messages=[
        *HELLO, calling("c1"), result("c2")]),
    chat("two results of a call", "messages[3].tool_call_id", messages=[
        *HELLO, calling("c1"), result("c1"), result("c1")]),
    chat("a user's tool_call_id", "messages[0].tool_call_id", messages=[{**HELLO[0], "tool_call_id": "c1"}]),
    chat("arguments as an object", "messages[1].tool_calls[0].function.arguments",
         messages=[*HELLO, calling("c1", arguments={}), result("c1")]),
    # What the answer is held to
    chat("response_format of another type", "response_format.type", response_format={"type": "xml"}),
    chat("response_format without type", "response_format.type", response_format={}),
    chat("response_format is a string", "response_format", response_format="json_object"),
    chat("json_schema is missing", "response_format.json_schema", response_format={"type": "json_schema"}),
    chat("json_schema beside text", "response_format.json_schema",
         response_format={**schema({}), "type": "text"}),
    chat("a schema without name", "response_format.json_schema.name",
         response_format={"type": "json_schema", "json_schema": {"schema": {}}}),
    chat("a schema's bad name", "response_format.json_schema.name", response_format=schema({}, name="a b")),
    chat("a schema's unknown field", "response_format.json_schema.foo", response_format=schema({}, foo=1)),
    chat("a schema is a list", "response_format.json_schema.schema", response_format=schema([])),
    chat("a schema with not", "response_format.json_schema.schema", 400, '"not"',
         response_format=schema({"not": {"type": "string"}})),
    chat("a schema with uniqueItems", "response_format.json_schema.schema", 400, "uniqueItems",
         response_format=schema({"type": "array", "uniqueItems": True}), stream=True),
    chat("a schema of an unknown type", "response_format.json_schema.schema", 400, "text",
         response_format=schema({"type": "text"})),
    chat("a schema that nothing satisfies", "response_format.json_schema.schema", 400, "minimum",
         response_format=schema({"type": "integer", "minimum": 2, "maximum": 1})),
    chat("a schema elsewhere", "response_format.json_schema.schema", 400, "example.org",
         response_format=schema({"$ref": "https://example.org/schema"})),
    completion("guided_json that is no JSON", "guided_json", 400, "JSON", guided_json="{"),
    completion("guided_json is a number", "guided_json", guided_json=1),
    completion("guided_json that is refused", "guided_json", 400, "contains",
               guided_json={"type": "array", "contains": {}}),
    chat("guided_regex open", "guided_regex", 400, "unclosed", guided_regex="a("),
    chat("guided_regex looks around", "guided_regex", 400, "look-around", guided_regex="(?=a)b"),
    chat("guided_regex is empty", "guided_regex", guided_regex=""),
    chat("guided_grammar of an unknown rule", "guided_grammar", 400, "nowhere",
         guided_grammar="root ::= nowhere"),
    chat("guided_grammar that is none", "guided_grammar", guided_grammar="hello"),
    chat("guided_choice is empty", "guided_choice", guided_choice=[]),
    chat("guided_choice of numbers", "guided_choice[0]", guided_choice=[1]),
    chat("guided_choice with an empty one", "guided_choice[1]", guided_choice=["a", ""]),
    chat("guided_decoding_backend", "guided_decoding_backend", guided_decoding_backend="xgrammar"),
    chat("two forms", "guided_choice", 400, "guided_regex, guided_choice",
         guided_regex="a", guided_choice=["a"]),
    chat("two forms, old and new", "response_format", 400, "guided_json, response_format",
         guided_json={}, response_format={"type": "json_object"}),
    completion("structured_outputs is empty", "structured_outputs", structured_outputs={}),
    completion("structured_outputs with two", "structured_outputs",
               structured_outputs={"regex": "a", "choice": ["a"]}),
    completion("structured_outputs' unknown field", "structured_outputs.structural_tag",
               structured_outputs={"structural_tag": "x"}),
    completion("structured_outputs' bad regex", "structured_outputs.regex", 400, "unclosed",
               structured_outputs={"regex": "a("}),
    chat("a form without end", "ignore_eos", ignore_eos=True, guided_regex="a"),
    # What is not served
    chat("audio", "modalities[0]", modalities=["audio"]),
    chat("store", "store", store=True),
    completion("suffix of a model that knows no middle", "suffix", 400, "fill in the middle", suffix="x"),
    completion("suffix and echo", "echo", suffix="x", echo=True),
    completion("best_of below n", "best_of", n=3, best_of=2),
    completion("best_of and stream", "best_of", best_of=3, stream=True),
    # Responses, embeddings, tokens
    response("no input", "input", input=None),
    response("an empty input", "input", input=""),
    response("input is a number", "input", input=5),
    response("an item of unknown type", "input[0]", input=[{"type": "reasoning"}]),
    response("an item of unknown role", "input[0].role", input=[{"role": "wizard", "content": "x"}]),
    response("an output without its call", "input", input=[CALL_OUTPUT]),
    response("a built-in tool", "tools[0].type", 400, "web_search", tools=[{"type": "web_search"}]),
    response("a call forced without tools", "tool_choice", tool_choice="required"),
    response("in the background", "background", 400, "not supported", background=True),
    response("a conversation", "conversation", conversation="conv_1"),
    response("reasoning", "reasoning.effort", reasoning={"effort": "high"}),
    response("truncation", "truncation", truncation="auto"),
    response("a schema without one", "text.format.schema", text={"format": {"type": "json_schema"}}),
    response("a response that never was", "previous_response_id", previous_response_id="resp_1"),
    response("an input beyond the context", "input", 400, "context", input="a b " * 9000),
    raw("reading a response that never was", b"", 404, "not found", path=f"{RESPONSES}/resp_1", method="GET"),
    raw("forgetting one that never was", b"", 404, "not found", path=f"{RESPONSES}/resp_1", method="DELETE"),
    embedding("an empty text", "input", input=""),
    embedding("the second text is empty", "input[1]", input=["a", ""]),
    embedding("texts and tokens", "input", input=["a", 1]),
    embedding("a token beyond the vocabulary", "input", input=[49152]),
    embedding("too many texts", "input", input=["a"] * 2049),
    embedding("a text beyond the context", "input", 400, "context", input=[5] * 9000),
    embedding("other dimensions", "dimensions", 400, "must be 576", dimensions=64),
    embedding("another encoding", "encoding_format", encoding_format="int8"),
    embedding("another pooling", "pooling", pooling="max"),
    raw("nothing to tokenize", b"{}", words="prompt", path="/tokenize"),
    raw("words to detokenize", b'{"tokens": ["a"]}', path="/detokenize"),
    # Prompts
    completion("prompt is a number", "prompt", prompt=5),
    completion("prompt is null", "prompt", prompt=None),
    completion("prompt is an object", "prompt", prompt={"a": 1}),
    completion("prompt is an empty list", "prompt", prompt=[]),
    completion("an empty prompt", "prompt", prompt=""),
    completion("an empty list of tokens", "prompt", prompt=[[]]),
    completion("mixed prompt", "prompt", prompt=["a", 1]),
    completion("token beyond the vocabulary", "prompt", prompt=[1, 49152]),
    completion("negative token", "prompt[0]", prompt=[-1]),
    completion("too many prompts", "prompt", prompt=["a"] * 65),
    completion("prompt beyond the context", "prompt", 400, "context", prompt=[5] * 9000, max_tokens=None),
    chat(
        "conversation beyond the context", "prompt", 400, "context",
        messages=[{"role": "user", "content": "a b " * 9000}], max_tokens=None,
    ),
    completion("max_tokens is zero without echo", "max_tokens", max_tokens=0),
    # Routes
    raw("unknown route", b"{}", 404, "Unknown request URL", path="/v1/nothing"),
    raw("wrong method", b"", 405, "not allowed", method="GET"),
    raw("unknown model card", b"", 404, "does not exist", path="/v1/models/gpt-4o", method="GET"),
]  # fmt: skip
