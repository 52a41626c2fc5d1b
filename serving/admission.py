"""Who may come in: places in flight, by tier, and deadlines that can still be kept."""

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from engine import MAX_PRIORITY, Urgency
from monitoring import Recorder
from serving.autoscaling import Attainment
from serving.errors import overloaded
from serving.settings import ServingSettings
from serving.tiers import Service

T = TypeVar("T")

_WEIGHT = 0.2  # of a new error
_DEVIATIONS = 3.0
_HALF_LIFE_S = 2.0  # of an error that nothing confirms
_LAST = Urgency(math.inf, MAX_PRIORITY)  # behind everything


@dataclass(slots=True, eq=False)
class _Pending:
    urgency: Urgency
    num_tokens: int
    since: float
    predicted_s: float


@dataclass(slots=True)
class _Error:
    """Of forecasts: moving mean and mean deviation, as they were when last confirmed."""

    mean_s: float = 0.0
    deviation_s: float = 0.0
    observed_at: float = 0.0

    def observe(self, error_s: float, now: float) -> None:
        # What was forgotten stays so: a request that came in after a rush would else bring its errors back.
        memory = self._memory(now)
        self.mean_s, self.deviation_s = memory * self.mean_s, memory * self.deviation_s
        self.deviation_s += _WEIGHT * (abs(error_s - self.mean_s) - self.deviation_s)
        self.mean_s += _WEIGHT * (error_s - self.mean_s)
        self.observed_at = now

    def allowance_s(self, now: float) -> float:
        return self._memory(now) * (self.mean_s + _DEVIATIONS * self.deviation_s)

    def _memory(self, now: float) -> float:
        share: float = 0.5 ** ((now - self.observed_at) / _HALF_LIFE_S)
        return share


@dataclass(slots=True)
class Admission:
    """Counts the requests of one replica, and foresees when a prompt would have its first token.

    The forecast: what the engine's steps take for the prompt tokens that are due no later and no less
    important, the own ones included. What it leaves out (the step that runs, the streams beside it)
    shows as its error, whose mean and mean deviation are followed; a deadline is expected to be kept when
    forecast, mean error and some deviations fit (as TCP sets its timeouts: Jacobson 1988). Each priority has
    its own errors: where places run out, the important take them from others, who wait; that these wait for
    those at least as important to leave is part of the forecast. Errors are forgotten with time: who refuses
    everything learns nothing. Nothing is refused before steps were measured.

    max_num_seqs: places in the engine's batch; None leaves them out of the forecast.
    """

    settings: ServingSettings
    recorder: Recorder
    clock: Callable[[], float] = time.monotonic
    max_num_seqs: int | None = None
    num_inflight: int = 0
    prompts_s: Callable[[int], float] = field(default=lambda num_tokens: 0.0)  # the latest `EngineStats`'
    attainment: Attainment = field(default_factory=Attainment)
    _pending: dict[int, _Pending] = field(default_factory=dict)
    _open: dict[int, int] = field(default_factory=dict)  # priorities of those in the engine
    _answer_s: dict[int, float] = field(default_factory=dict)  # by priority, from first to last output
    _errors: defaultdict[int, _Error] = field(default_factory=lambda: defaultdict(_Error))  # by priority

    @contextmanager
    def place(self, service: Service) -> Iterator[None]:
        """A place among the requests in flight. Raises ApiError 429 when the tier's share is taken."""
        limit = max(1, int(self.settings.max_inflight_requests * service.max_load))
        if self.num_inflight >= limit:
            self.recorder.record_refusal("inflight")
            wait_s = math.ceil(self.predicted_ttft_s(_LAST, 0))
            raise overloaded(
                f"{self.num_inflight} requests are in flight already, the limit of tier "
                f"'{service.tier}' is {limit}; retry later.",
                max(self.settings.retry_after_s, wait_s),
            )
        self.num_inflight += 1
        try:
            yield
        finally:
            self.num_inflight -= 1

    def predicted_ttft_s(self, urgency: Urgency, num_tokens: int) -> float:
        """Seconds from now to the first token of a prompt so urgent."""
        ahead = sum(
            p.num_tokens
            for p in self._pending.values()
            if p.urgency.deadline <= urgency.deadline and p.urgency.priority <= urgency.priority
        )
        return self.prompts_s(ahead + num_tokens) + self._wait_for_a_place_s(urgency.priority)

    def _wait_for_a_place_s(self, priority: int) -> float:
        """Those that give no place to this priority leave one by one over a mean answer's time."""
        if self.max_num_seqs is None:
            return 0.0
        num_missing = sum(p <= priority for p in self._open.values()) + 1 - self.max_num_seqs
        answer_s = max((s for p, s in self._answer_s.items() if p <= priority), default=0.0)
        return max(0, num_missing) / self.max_num_seqs * answer_s

    def check_deadline(self, service: Service, num_tokens: int) -> None:
        """Raises ApiError 429 for a request that asked not to be answered late, and would be."""
        if not service.refuses_late:
            return
        predicted = self.predicted_ttft_s(service.urgency, num_tokens)
        if predicted > 0:
            allowance_s = self._errors[service.urgency.priority].allowance_s(self.clock())
            predicted = max(0.0, predicted + allowance_s)
        late_s = self.clock() + predicted - service.urgency.deadline
        if late_s > 0:
            self.recorder.record_refusal("deadline")
            self.attainment.add(False, self.clock())
            raise overloaded(
                f"The first token may take {predicted * 1e3:.0f} ms, tier '{service.tier}' promises it "
                f"within {service.ttft_s * 1e3:.0f} ms of the request's arrival; retry later.",
                max(self.settings.retry_after_s, math.ceil(late_s)),
            )

    async def watch(
        self, outputs: AsyncGenerator[T, None], service: Service, num_tokens: int
    ) -> AsyncGenerator[T, None]:
        """The same outputs; what waits for its first one counts in the forecasts of others."""
        key, now, urgency = id(outputs), self.clock(), service.urgency
        predicted_s = self.predicted_ttft_s(urgency, num_tokens)
        self._pending[key] = _Pending(urgency, num_tokens, now, predicted_s)
        self._open[key] = urgency.priority
        first_at = now
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    if key in self._pending:
                        self._begin(key, service)
                        first_at = self.clock()
                    yield output
            answer_s = self.clock() - first_at
            known_s = self._answer_s.setdefault(urgency.priority, answer_s)
            self._answer_s[urgency.priority] = known_s + _WEIGHT * (answer_s - known_s)
        finally:
            self._pending.pop(key, None)
            self._open.pop(key, None)

    def _begin(self, key: int, service: Service) -> None:
        now, begun = self.clock(), self._pending.pop(key)
        if begun.predicted_s > 0 and service.refuses_late:
            # Of those alone that jump the queue: others wait for whoever comes after them, too.
            error_s = now - begun.since - begun.predicted_s
            self._errors[service.urgency.priority].observe(error_s, now)
        is_kept = now <= service.urgency.deadline
        self.attainment.add(is_kept, now)
        # When the first chunk is on its way.
        asyncio.get_running_loop().call_soon(self.recorder.record_deadline, service.tier, is_kept)
