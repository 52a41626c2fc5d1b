"""One HTTP request and what became of it: filled on its way, read once at its end by whoever observes."""

import time
from dataclasses import dataclass, field
from typing import Literal

from engine import RequestOutput, SamplingParams

Outcome = Literal["finished", "aborted", "refused", "invalid", "failed"]
Operation = Literal["chat", "text_completion", "embeddings"]
"""As OpenTelemetry's conventions for generative AI name them."""
CLIENT_GONE = 499
UNKNOWN_ROUTE = "unknown"


@dataclass(slots=True)
class Generation:
    """What a request asked the engine for, and got. Times are time.monotonic(), None where it did not come
    so far.
    """

    operation: Operation
    model: str
    tier: str
    ttft_limit_s: float
    is_stream: bool
    response_id: str = ""
    params: SamplingParams | None = None
    prompt: object = None
    """For the log, where it asks for prompts."""
    queued_s: float | None = None
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    """So far, while outputs come."""
    finish_reasons: list[str] = field(default_factory=list)
    """One for each choice that has ended."""
    is_complete: bool = False
    """The answer was sent to its end."""

    def began(self, output: RequestOutput) -> None:
        """The engine has given its first output; later calls do nothing."""
        if self.first_token_s is None:
            self.first_token_s = time.monotonic()
            self.first_scheduled_s = output.first_scheduled_s

    def note(self, output: RequestOutput) -> None:
        """Take in an output; on the hot path, hence no clock after the first."""
        self.began(output)
        self.num_output_tokens += len(output.token_ids)
        if output.finish_reason is not None:
            self.finish_reasons.append(output.finish_reason)

    def stopped(self, prompt_tokens: int, cached_tokens: int, output_tokens: int) -> None:
        """No more outputs come, for whatever reason."""
        self.last_token_s = time.monotonic()
        self.num_prompt_tokens = prompt_tokens
        self.num_cached_tokens = cached_tokens
        self.num_output_tokens = output_tokens


@dataclass(slots=True)
class Exchange:
    """`arrival_s` is time.monotonic(), `arrival_ns` the same moment since 1970."""

    request_id: str
    method: str
    arrival_s: float
    arrival_ns: int = field(default_factory=time.time_ns)
    replica: str = ""
    trace_headers: dict[str, str] = field(default_factory=dict)
    """W3C trace context as the client sent it."""
    routing: dict[str, str] = field(default_factory=dict)
    """The router's headers, where one sent the request."""
    route: str = UNKNOWN_ROUTE
    """The route's template, never the path: that may hold anything."""
    status: int = 0
    error: str | None = None
    """Its code, also of an error inside a stream."""
    ended_s: float = 0.0
    trace_id: str | None = None
    generation: Generation | None = None

    @property
    def outcome(self) -> Outcome:
        if self.status == 429:
            return "refused"
        if self.status >= 500 or (self.status < 400 and self.error is not None):
            return "failed"
        if self.status == CLIENT_GONE:
            return "aborted"
        if self.status >= 400:
            return "invalid"
        if self.generation is not None and not self.generation.is_complete:
            return "aborted"
        return "finished"

    @property
    def total_s(self) -> float:
        return self.ended_s - self.arrival_s

    @property
    def ttft_s(self) -> float | None:
        """From arrival to the first token's leaving the engine."""
        made = self.generation
        return None if made is None or made.first_token_s is None else made.first_token_s - self.arrival_s

    @property
    def queue_s(self) -> float | None:
        """From arrival to the first scheduling, tokenization included."""
        made = self.generation
        if made is None or made.first_scheduled_s is None:
            return None
        return max(0.0, made.first_scheduled_s - self.arrival_s)

    @property
    def tpot_s(self) -> float | None:
        """Mean time of an output token after the first."""
        made = self.generation
        if made is None or made.first_token_s is None or made.last_token_s is None:
            return None
        if made.num_output_tokens < 2:
            return None
        return (made.last_token_s - made.first_token_s) / (made.num_output_tokens - 1)

    def ns_at(self, monotonic_s: float) -> int:
        """A moment of this process's monotonic clock, since 1970."""
        return self.arrival_ns + round((monotonic_s - self.arrival_s) * 1e9)
