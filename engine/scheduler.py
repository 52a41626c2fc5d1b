"""Continuous batching: who computes how many tokens in the next step. Pure Python."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from engine.kv_cache_manager import KVCacheManager
from engine.request import Request, RequestStatus


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """One request's part of a step: compute `num_scheduled_tokens` tokens from `num_computed_tokens` on."""

    request: Request
    num_computed_tokens: int
    num_scheduled_tokens: int

    @property
    def is_sampled(self) -> bool:
        """The chunk reaches the last known token, so the step yields a new one."""
        return self.num_computed_tokens + self.num_scheduled_tokens == self.request.num_tokens


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step's work. Decodes come first, then prefill chunks in order of arrival."""

    scheduled: tuple[ScheduledRequest, ...]
    preempted_ids: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(s.num_scheduled_tokens for s in self.scheduled)


class Scheduler:
    """One token budget a step, spent on RUNNING requests first (decodes, then chunks), then on WAITING ones.

    A request that finds no room for its next tokens preempts the youngest running request, which gives
    up its blocks and computes its tokens again later (most of them usually come back as a prefix hit).
    Waiting requests are taken in order of arrival, preempted ones before all others; nothing overtakes,
    so none starves. Every request is promised that it fits into the cache alone: `max_model_len` may
    not exceed the cache's capacity.
    """

    def __init__(
        self,
        kv_cache: KVCacheManager,
        *,
        max_num_seqs: int,
        token_budget: int,
        max_model_len: int,
        eos_token_ids: frozenset[int] = frozenset(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_model_len > kv_cache.capacity_tokens:
            raise ValueError(
                f"max_model_len {max_model_len} exceeds the KV cache's {kv_cache.capacity_tokens} tokens"
            )
        if token_budget < max_num_seqs:
            raise ValueError(f"token_budget {token_budget} is below max_num_seqs {max_num_seqs}")
        self.kv_cache = kv_cache
        self.max_num_seqs = max_num_seqs
        self.token_budget = token_budget
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self.requests: dict[str, Request] = {}
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of first scheduling: the youngest is last
        self.total_preemptions = 0
        self._clock = clock

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt (or preempted) tokens not yet computed."""
        waiting = sum(r.num_tokens for r in self.waiting)
        return waiting + sum(r.num_missing_tokens for r in self.running if not r.is_decoding)

    def add_request(self, request: Request) -> None:
        """Queue a request. Raises ValueError for an id that is in use."""
        if request.request_id in self.requests:
            raise ValueError(f"request id {request.request_id!r} is in use")
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def finish_request(self, request_id: str, status: RequestStatus) -> Request | None:
        """End a request in any state and free all it holds; None when the id is unknown (idempotent)."""
        request = self.requests.pop(request_id, None)
        if request is None:
            return None
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self.kv_cache.free(request)
        request.status = status
        return request

    def schedule(self) -> SchedulerOutput:
        """Decide the next step and reserve its blocks."""
        budget = self.token_budget
        scheduled: list[ScheduledRequest] = []
        preempted: list[str] = []

        # Decodes before chunks, each group in order of age. A victim of preemption is always younger
        # than the one that needs room, but it may have been scheduled already if it decodes.
        for request in sorted(self.running, key=lambda r: not r.is_decoding):
            if request.status is not RequestStatus.RUNNING or budget == 0:
                continue
            num_tokens = min(request.num_missing_tokens, budget)
            if self._make_room(request, num_tokens, preempted):
                scheduled.append(ScheduledRequest(request, request.num_computed_tokens, num_tokens))
                budget -= num_tokens
        if preempted:
            kept = [s for s in scheduled if s.request.status is RequestStatus.RUNNING]
            return SchedulerOutput(tuple(kept), tuple(preempted))

        while self.waiting and budget and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            hit = self.kv_cache.get_computed_blocks(request)
            num_hit_tokens = len(hit) * self.kv_cache.block_size
            num_tokens = min(request.num_tokens - num_hit_tokens, budget)
            if not self.kv_cache.allocate_slots(request, num_tokens, hit):
                break
            self.waiting.popleft()
            self._start(request, num_hit_tokens)
            scheduled.append(ScheduledRequest(request, num_hit_tokens, num_tokens))
            budget -= num_tokens
        return SchedulerOutput(tuple(scheduled))

    def update(self, output: SchedulerOutput, sampled: Mapping[str, int]) -> list[tuple[Request, int]]:
        """Take in the step's results: `sampled` maps request ids to their new tokens.

        Requests that ended while the step ran are skipped. Returns the (request, new token) pairs that
        count; finished ones have left the scheduler and carry their final status.
        """
        news: list[tuple[Request, int]] = []
        for part in output.scheduled:
            request = part.request
            if request.status is not RequestStatus.RUNNING:
                continue
            request.num_computed_tokens += part.num_scheduled_tokens
            token_id = sampled.get(request.request_id)
            if token_id is not None:
                request.all_token_ids.append(token_id)
            self.kv_cache.cache_computed_blocks(request)
            if token_id is None:
                continue
            if status := self._finished_status(request, token_id):
                self.finish_request(request.request_id, status)
            news.append((request, token_id))
        return news

    def _finished_status(self, request: Request, token_id: int) -> RequestStatus | None:
        params = request.params
        if token_id in params.stop_token_ids:
            request.stop_reason = token_id
            return RequestStatus.FINISHED_STOPPED
        if token_id in self.eos_token_ids and not params.ignore_eos:
            return RequestStatus.FINISHED_STOPPED
        limit = self.max_model_len - request.num_prompt_tokens
        if params.max_tokens is not None:
            limit = min(limit, params.max_tokens)
        return RequestStatus.FINISHED_LENGTH if request.num_output_tokens >= limit else None

    def _make_room(self, request: Request, num_tokens: int, preempted: list[str]) -> bool:
        while not self.kv_cache.allocate_slots(request, num_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            preempted.append(victim.request_id)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self.kv_cache.free(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        request.status = RequestStatus.PREEMPTED
        self.waiting.appendleft(request)
        self.total_preemptions += 1

    def _start(self, request: Request, num_hit_tokens: int) -> None:
        request.num_computed_tokens = num_hit_tokens
        if request.first_scheduled_time is None:
            request.first_scheduled_time = self._clock()
            request.num_cached_tokens = num_hit_tokens
        request.status = RequestStatus.RUNNING
        self.running.append(request)
