"""An exchange as spans, made at its end from the times that were taken anyway: the token path knows no spans.

    POST /v1/chat/completions   server; HTTP's conventions; the client's trace goes on in it
      route                     the router's decision, by the times it sent along
      chat MODEL                GenAI's conventions (github.com/open-telemetry/semantic-conventions-genai)
        queue                   until the first step that computes some of the prompt
        prefill                 until the first token
        decode                  until the last one

No attribute holds text of a prompt or an answer; stop strings count as such.
"""

from collections.abc import Mapping
from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serving.dispatch.headers import DECIDED, ROUTE, read_decided, read_route
from serving.telemetry.exchange import Exchange, Generation

_PREFIX = "/v1/"


class SpanWriter:
    """Of the API's requests; probes and pages leave none."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("peregrine")
        self._propagator = TraceContextTextMapPropagator()

    def write(self, exchange: Exchange) -> None:
        if not exchange.route.startswith(_PREFIX):
            return
        parent = self._propagator.extract(exchange.trace_headers, Context())
        server = self._tracer.start_span(
            f"{exchange.method} {exchange.route}",
            parent,
            SpanKind.SERVER,
            _server_attributes(exchange),
            start_time=exchange.arrival_ns,
        )
        exchange.trace_id = format_trace_id(server.get_span_context().trace_id)
        if server.is_recording():
            if exchange.outcome == "failed":
                server.set_status(Status(StatusCode.ERROR, exchange.error))
            inside = set_span_in_context(server, Context())
            self._route(exchange, inside)
            if exchange.generation is not None:
                self._generation(exchange, exchange.generation, inside)
        server.end(exchange.ns_at(exchange.ended_s))

    def shutdown(self) -> None:
        """Sends what waits; takes as long as the collector makes it, up to the exporter's timeout."""
        self._provider.shutdown()

    def _route(self, exchange: Exchange, parent: Context) -> None:
        if (decided := read_decided(exchange.routing.get(DECIDED, ""))) is None:
            return
        start_ns, length_ns = decided
        parts = read_route(exchange.routing.get(ROUTE, ""))
        attributes = {f"peregrine.route.{name.replace('-', '_')}": value for name, value in parts.items()}
        self._span("route", parent, start_ns, start_ns + length_ns, attributes)

    def _generation(self, exchange: Exchange, made: Generation, parent: Context) -> None:
        start_s = exchange.arrival_s if made.queued_s is None else made.queued_s
        end_s = exchange.ended_s if made.last_token_s is None else made.last_token_s
        span = self._tracer.start_span(
            f"{made.operation} {made.model}",
            parent,
            SpanKind.INTERNAL,
            _generation_attributes(exchange, made),
            start_time=exchange.ns_at(start_s),
        )
        if exchange.outcome == "failed":
            span.set_status(Status(StatusCode.ERROR, exchange.error))
        inside = set_span_in_context(span, Context())
        if made.queued_s is not None:
            # Where nothing was computed, or the engine does not say when it began, all of it is queue.
            scheduled_s = made.first_scheduled_s or made.first_token_s or end_s
            self._span(
                "queue", inside, exchange.ns_at(start_s), exchange.ns_at(max(start_s, scheduled_s)), {}
            )
            if made.first_scheduled_s is not None and made.first_token_s is not None:
                tokens = made.num_prompt_tokens - made.num_cached_tokens
                self._span(
                    "prefill",
                    inside,
                    exchange.ns_at(made.first_scheduled_s),
                    exchange.ns_at(made.first_token_s),
                    {"peregrine.prefill.tokens": tokens},
                )
            if made.first_token_s is not None:
                self._span(
                    "decode",
                    inside,
                    exchange.ns_at(made.first_token_s),
                    exchange.ns_at(end_s),
                    {"peregrine.decode.tokens": made.num_output_tokens},
                )
        span.end(exchange.ns_at(end_s))

    def _span(
        self, name: str, parent: Context, start_ns: int, end_ns: int, attributes: Mapping[str, Any]
    ) -> Span:
        span = self._tracer.start_span(name, parent, SpanKind.INTERNAL, attributes, start_time=start_ns)
        span.end(end_ns)
        return span


def _server_attributes(exchange: Exchange) -> dict[str, Any]:
    return _given(
        {
            "http.request.method": exchange.method,
            "http.route": exchange.route,
            "http.response.status_code": exchange.status,
            "error.type": _error_type(exchange),
            "peregrine.request_id": exchange.request_id,
            "peregrine.outcome": exchange.outcome,
        }
    )


def _generation_attributes(exchange: Exchange, made: Generation) -> dict[str, Any]:
    params = made.params
    return _given(
        {
            "gen_ai.operation.name": made.operation,
            "gen_ai.provider.name": "peregrine",
            "gen_ai.output.type": None if made.operation == "embeddings" else "text",
            "gen_ai.request.model": made.model,
            "gen_ai.request.stream": made.is_stream,
            "gen_ai.request.choice.count": params.n if params and params.n != 1 else None,
            "gen_ai.request.max_tokens": params.max_tokens if params else None,
            "gen_ai.request.temperature": params.temperature if params else None,
            "gen_ai.request.top_p": params.top_p if params else None,
            "gen_ai.request.top_k": params.top_k if params and params.top_k else None,
            "gen_ai.request.seed": params.seed if params else None,
            "gen_ai.request.frequency_penalty": params.frequency_penalty if params else None,
            "gen_ai.request.presence_penalty": params.presence_penalty if params else None,
            "gen_ai.response.id": made.response_id or None,
            "gen_ai.response.model": made.model,
            "gen_ai.response.finish_reasons": tuple(made.finish_reasons) or None,
            "gen_ai.response.time_to_first_chunk": exchange.ttft_s if made.is_stream else None,
            "gen_ai.usage.input_tokens": made.num_prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": made.num_cached_tokens,
            "gen_ai.usage.output_tokens": made.num_output_tokens,
            "error.type": _error_type(exchange),
            "peregrine.tier": made.tier,
            "peregrine.ttft_limit_s": made.ttft_limit_s,
        }
    )


def _error_type(exchange: Exchange) -> str | None:
    if exchange.outcome == "finished":
        return None
    return exchange.error or exchange.outcome


def _given(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}
