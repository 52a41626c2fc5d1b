"""Chat completions' answers, whole and as chunks."""

import json
from typing import Any, Literal

from engine import PositionLogprobs, RequestOutput, TokenLogprob
from serving.api.generation import CollectedChoice, Job, common_fields
from serving.chat_schemas import (
    AssistantMessage,
    AssistantToolCall,
    ChatChoice,
    ChatCompletion,
    ChatLogprob,
    ChatLogprobs,
    FunctionCall,
    TopLogprob,
)
from serving.errors import ApiError
from serving.schemas import Usage
from serving.streaming import DONE, error_event, event
from serving.tools import (
    ArgumentsDelta,
    CallEnd,
    CallStart,
    ChatPlan,
    ParserEvent,
    TextDelta,
    ToolCallParser,
)


class ChatPresenter:
    """One for each request; a parser for each of its choices. `tier` is the one that it is served in."""

    def __init__(self, job: Job, plan: ChatPlan, tier: str) -> None:
        self._job = job
        self._plan = plan
        self._tier = tier
        self._parsers: dict[int, ToolCallParser] = {}
        head = json.dumps(self._common_fields("chat.completion.chunk"), separators=(",", ":"))[:-1]
        if job.include_usage:
            head += ',"usage":null'
        # The constant part of every event, serialized once.
        self._head = f"data: {head},"

    def complete(self, choices: dict[tuple[int, int], CollectedChoice], usage: Usage) -> ChatCompletion:
        return ChatCompletion(
            **self._common_fields("chat.completion"),
            choices=[self._choice(index, choice) for (_, index), choice in sorted(choices.items())],
            usage=usage,
        )

    def chunks(self, number: int, output: RequestOutput) -> bytes:
        chunk = b""
        parser = self._parsers.get(output.index)
        if parser is None:
            parser = self._parsers[output.index] = self._plan.parser()
            chunk = self._chunk(output.index, '{"role":"assistant","content":""}')
        deltas = self._deltas(parser, output)
        logprobs = "null"
        if output.logprobs is not None:
            logprobs = chat_logprobs(output.logprobs).model_dump_json()
            deltas = deltas or ['{"content":""}']
        for delta in deltas:
            chunk += self._chunk(output.index, delta, logprobs)
            logprobs = "null"
        if output.finish_reason is not None:
            finish = json.dumps(_finish_reason(output.finish_reason, parser.num_calls))
            stop_reason = f',"stop_reason":{json.dumps(output.stop_reason)}'
            chunk += self._chunk(output.index, "{}", "null", f"{finish}{stop_reason}")
        return chunk

    def end(self, usage: Usage) -> bytes:
        if not self._job.include_usage:
            return DONE
        fields = self._common_fields("chat.completion.chunk")
        return event({**fields, "choices": [], "usage": usage.model_dump()}) + DONE

    def failure(self, error: ApiError) -> bytes:
        return error_event(error) + DONE

    def _common_fields(self, object_name: str) -> dict[str, Any]:
        return {**common_fields(self._job, object_name), "service_tier": self._tier}

    def _deltas(self, parser: ToolCallParser, output: RequestOutput) -> list[str]:
        if not self._plan.callable_names:  # all is text, as the parser would find in three times the time
            return [_content(output.text)] if output.text else []
        events = parser.feed(output.text)
        if output.finish_reason is not None:
            events += parser.finish()
        return [delta for e in events if (delta := _delta(e))]

    def _choice(self, index: int, choice: CollectedChoice) -> ChatChoice:
        answer = self._plan.parser().parse(choice.text)
        calls = [
            AssistantToolCall(id=c.id, function=FunctionCall(name=c.name, arguments=c.arguments))
            for c in answer.calls
        ]
        return ChatChoice(
            index=index,
            message=AssistantMessage(
                content=None if calls and not answer.text else answer.text, tool_calls=calls or None
            ),
            logprobs=None if self._job.params.logprobs is None else chat_logprobs(choice.logprobs),
            finish_reason=_finish_reason(choice.finish_reason, len(calls)),
            stop_reason=choice.stop_reason,
        )

    def _chunk(self, index: int, delta: str, logprobs: str = "null", finish: str = "null") -> bytes:
        return (
            f'{self._head}"choices":[{{"index":{index},"delta":{delta},"logprobs":{logprobs},'
            f'"finish_reason":{finish}}}]}}\n\n'
        ).encode()


def _content(text: str) -> str:
    return f'{{"content":{json.dumps(text)}}}'


def _delta(event: ParserEvent) -> str:
    """The event as JSON; empty where a stream does not show it."""
    match event:
        case TextDelta(text):
            return _content(text)
        case CallStart(index, call_id, name):
            function = f'{{"name":{json.dumps(name)},"arguments":""}}'
            call = f'{{"index":{index},"id":"{call_id}","type":"function","function":{function}}}'
        case ArgumentsDelta(index, text):
            call = f'{{"index":{index},"function":{{"arguments":{json.dumps(text)}}}}}'
        case CallEnd():
            return ""
    return f'{{"tool_calls":[{call}]}}'


def _finish_reason(
    reason: Literal["stop", "length", "abort"], num_calls: int
) -> Literal["stop", "length", "tool_calls"]:
    """A call that was cut ends with `length`, as text does."""
    assert reason != "abort", "`respond` ends the request"
    return "tool_calls" if num_calls and reason == "stop" else reason


def chat_logprobs(positions: list[PositionLogprobs] | tuple[PositionLogprobs, ...]) -> ChatLogprobs:
    return ChatLogprobs(
        content=[
            ChatLogprob(**_token(p.token), top_logprobs=[TopLogprob(**_token(t)) for t in p.top])
            for p in positions
        ]
    )


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.raw)}
