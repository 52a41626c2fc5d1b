"""One line for each request: when, how long, how many tokens. No text of it, unless asked."""

import logging
from typing import Any

from serving.telemetry.exchange import UNKNOWN_ROUTE, Exchange
from serving.telemetry.logs import ACCESS_LOGGER
from serving.telemetry.settings import LogSettings

logger = logging.getLogger(ACCESS_LOGGER)


class AccessLog:
    """Requests of the API, and what was refused before it had a route, at level info; probes and pages at
    debug.
    """

    def __init__(self, settings: LogSettings) -> None:
        self._shows_prompts = settings.prompts

    def write(self, exchange: Exchange) -> None:
        is_routine = exchange.status < 500 and not exchange.route.startswith(("/v1", UNKNOWN_ROUTE))
        level = logging.DEBUG if is_routine else logging.INFO
        if not logger.isEnabledFor(level):
            return
        fields: dict[str, Any] = {
            "request_id": exchange.request_id,
            "method": exchange.method,
            "route": exchange.route,
            "status": exchange.status,
            "outcome": exchange.outcome,
            "error": exchange.error,
            "total_ms": _ms(exchange.total_s),
            "replica": exchange.replica or None,
            "trace_id": exchange.trace_id,
        }
        if (made := exchange.generation) is not None:
            fields |= {
                "response_id": made.response_id or None,
                "model": made.model,
                "tier": made.tier,
                "stream": made.is_stream,
                "prompt_tokens": made.num_prompt_tokens,
                "cached_tokens": made.num_cached_tokens,
                "output_tokens": made.num_output_tokens,
                "finish_reasons": made.finish_reasons,
                "queue_ms": _ms(exchange.queue_s),
                "ttft_ms": _ms(exchange.ttft_s),
                "tpot_ms": _ms(exchange.tpot_s),
            }
            if self._shows_prompts:
                fields["prompt"] = made.prompt
        given = {key: value for key, value in fields.items() if value is not None}
        logger.log(level, "%s %s %d", exchange.method, exchange.route, exchange.status, extra=given)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 2)
