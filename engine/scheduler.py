"""Continuous batching: who computes how many tokens in the next step. Pure Python."""

import heapq
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from engine.kv_cache_manager import KVCacheManager
from engine.outputs import StepKind
from engine.pacing import StepPacer
from engine.request import Request, RequestStatus
from engine.speculation import Drafter, DraftPolicy
from engine.urgency import MAX_PRIORITY


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """One request's part of a step: compute `num_scheduled_tokens` tokens from `num_computed_tokens` on.

    The last of them may be drafts, which are no tokens of the request yet: `draft_token_ids` follow its
    last known token, and the step verifies them.
    """

    request: Request
    num_computed_tokens: int
    num_scheduled_tokens: int
    draft_token_ids: tuple[int, ...] = ()

    @property
    def is_sampled(self) -> bool:
        """The chunk reaches the request's last token, so the step yields a new one (and one for each draft).

        Holds until the step's results are taken in, also while the last token is pending (then the chunk ends
        behind the known ones). A prompt that is embedded yields none.
        """
        return self.request.pooling is None and self.is_last

    @property
    def is_last(self) -> bool:
        """The chunk reaches the request's last known token."""
        num_own = self.num_scheduled_tokens - len(self.draft_token_ids)
        return self.num_computed_tokens + num_own >= self.request.num_tokens

    @property
    def num_sampled(self) -> int:
        """Tokens that the step samples; fewer count where drafts are rejected."""
        return 1 + len(self.draft_token_ids) if self.is_sampled else 0


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step's work. Decodes come first, then prefill chunks in their turn (earliest deadline first)."""

    scheduled: tuple[ScheduledRequest, ...]
    preempted_ids: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(s.num_scheduled_tokens for s in self.scheduled)

    @property
    def num_decodes(self) -> int:
        """Parts that only decode: one token, and perhaps drafts."""
        return sum(s.num_scheduled_tokens == 1 + len(s.draft_token_ids) for s in self.scheduled)

    @property
    def num_prompt_tokens(self) -> int:
        own = (s.num_scheduled_tokens - len(s.draft_token_ids) for s in self.scheduled)
        return sum(n for n in own if n > 1)

    @property
    def kind(self) -> StepKind:
        if self.num_prompt_tokens == 0:
            return "decode"
        return "mixed" if self.num_decodes else "prefill"


class Scheduler:
    """One token budget a step, spent on decodes first, then on prompts: earliest deadline first.

    Requests without a deadline come after those with one, in order of arrival; so do equals. Running prefills
    and waiting requests take turns together, so that an urgent prompt does not wait behind the rest of a
    long one. A waiting request that finds no room holds up those behind it, but for more important ones (of
    a smaller priority number): the room that these may take from others is no room for it.

    A request that finds no room for its next tokens preempts the youngest running request of the largest
    priority number; it gives up its blocks and computes its tokens again later (most of them usually come
    back as a prefix hit). A waiting request preempts as well, but only those of a larger number than its
    own. Every request is promised that it fits into the cache alone: `max_model_len` may not exceed the
    cache's capacity.

    Drafts come last: they displace no decode, at most half of the prompt tokens, and nobody's blocks.

    A step may be planned while the one before it runs (`run_ahead`): a decode then goes on behind a pending
    token. One step at most may be in flight when `schedule` is called. A request that turns out to have
    ended, or is preempted, has its tokens in flight dropped; their slots are written before any later step
    uses them.
    """

    def __init__(
        self,
        kv_cache: KVCacheManager,
        *,
        max_num_seqs: int,
        token_budget: int,
        max_model_len: int,
        eos_token_ids: frozenset[int] = frozenset(),
        draft_policy: DraftPolicy | None = None,
        pacer: StepPacer | None = None,
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
        self.waiting: list[Request] = []  # in their turn
        self.running: list[Request] = []  # in order of first scheduling: the youngest is last
        self.total_preemptions = 0
        self.total_drafts = 0
        self.total_draft_tokens = 0
        self.total_accepted_tokens = 0
        self._in_flight: deque[SchedulerOutput] = deque()
        self._draft_policy = draft_policy if draft_policy and draft_policy.max_tokens > 0 else None
        self.pacer = pacer or StepPacer(None)
        self._clock = clock
        self._num_arrivals = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt (or preempted) tokens not yet computed."""
        waiting = sum(r.num_tokens for r in self.waiting)
        return waiting + sum(r.num_missing_tokens for r in self.running if not r.is_decoding)

    @property
    def num_preempted(self) -> int:
        """Waiting requests that ran before."""
        if not self.total_preemptions:  # asked after every step
            return 0
        return sum(r.status is RequestStatus.PREEMPTED for r in self.waiting)

    def add_request(self, request: Request) -> None:
        """Queue a request. Raises ValueError for an id that is in use."""
        if request.request_id in self.requests:
            raise ValueError(f"request id {request.request_id!r} is in use")
        self.requests[request.request_id] = request
        self._num_arrivals += 1
        request.arrival_number = self._num_arrivals
        self._wait(request)

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
        drafts = self._draft() if self._draft_policy else {}
        budget = self.token_budget - sum(map(len, drafts.values()))
        scheduled: list[ScheduledRequest] = []
        preempted: list[str] = []

        # A victim of preemption may have been scheduled already.
        decoding = [r for r in self.running if r.is_decoding]
        for request in decoding:
            if request.status is not RequestStatus.RUNNING or budget == 0:
                continue
            if request.num_pending_tokens and self._num_remaining(request) <= 0:
                continue  # the pending token is its last one
            num_tokens = min(request.num_missing_tokens, budget)
            if self._make_room(request, num_tokens, preempted):
                scheduled.append(ScheduledRequest(request, request.num_computed_tokens, num_tokens))
                budget -= num_tokens

        budget = self.pacer.max_prompt_tokens(len(scheduled), budget, self.num_waiting_tokens)
        # A prompt to be embedded whose last chunk is in flight has nothing left to compute.
        prefills = sorted((r for r in self.running if not r.is_decoding and r.num_missing_tokens), key=_turn)
        # Only requests of a smaller number start: who gave way a moment ago would take the room back, and who
        # found none waits for it.
        ceiling = self._least_priority(preempted)
        for request in list(heapq.merge(prefills, self.waiting, key=_turn)):
            if budget == 0:
                break
            if request.status is RequestStatus.RUNNING:
                num_tokens = min(request.num_missing_tokens, budget)
                if self._make_room(request, num_tokens, preempted):
                    scheduled.append(ScheduledRequest(request, request.num_computed_tokens, num_tokens))
                    budget -= num_tokens
                ceiling = min(ceiling, self._least_priority(preempted))
            elif request.urgency.priority < ceiling:
                part = self._try_to_start(request, budget, preempted)
                ceiling = min(ceiling, self._least_priority(preempted))
                if part is None:
                    ceiling = min(ceiling, request.urgency.priority)
                else:
                    scheduled.append(part)
                    budget -= part.num_scheduled_tokens
        if preempted:
            kept = [s for s in scheduled if s.request.status is RequestStatus.RUNNING]
            return SchedulerOutput(tuple(kept), tuple(preempted))
        if drafts:
            scheduled = [self._with_drafts(s, drafts.get(s.request.request_id, ())) for s in scheduled]
        return SchedulerOutput(tuple(scheduled))

    def observe(self, output: SchedulerOutput, seconds: float) -> None:
        """A step took so long: the next prompt chunks are sized by it."""
        self.pacer.observe(output.num_decodes, output.num_prompt_tokens, seconds)

    def run_ahead(self, output: SchedulerOutput) -> None:
        """The step was launched: go on planning before `update` takes its results in."""
        self._in_flight.append(output)
        self._advance(output)

    def wants_drafts(self) -> bool:
        """Whether the next step should wait for the one in flight, because drafts then pay.

        What followed the known tokens before tells what the pending token is, and what comes after it. Also
        true for drafts in flight: how many of them count is not known.
        """
        if self._draft_policy is None:
            return False
        if any(p.draft_token_ids for output in self._in_flight for p in output.scheduled):
            return True
        return bool(self._draft(is_pending=True))

    @property
    def has_late_masks(self) -> bool:
        """Whether a running request's next mask depends on a token in flight."""
        return any(r.grammar is not None and r.num_pending_tokens > 0 for r in self.running)

    @property
    def num_decodes_ahead(self) -> int | None:
        """The most rows of the next step if it is one of decodes alone, else None."""
        if self.waiting or not all(r.is_decoding for r in self.running):
            return None
        return len(self.running)

    def update(
        self, output: SchedulerOutput, sampled: Mapping[str, Sequence[int]]
    ) -> list[tuple[Request, Sequence[int]]]:
        """Take in the step's results: `sampled` maps request ids to their new tokens, in order.

        One token a request, or up to one more than its drafts. Requests that ended while the step ran are
        skipped. Returns the requests with the new tokens that count (none after one that ends its
        request), and without tokens those whose prompts were to be embedded and are computed; finished ones
        have left the scheduler and carry their final status.
        """
        if self._in_flight and self._in_flight[0] is output:
            self._in_flight.popleft()
        else:
            self._advance(output)
        news: list[tuple[Request, Sequence[int]]] = []
        for part in output.scheduled:
            request = part.request
            if request.status is not RequestStatus.RUNNING:
                continue
            token_ids = sampled.get(request.request_id, ())
            request.num_pending_tokens -= part.num_sampled
            token_ids, status = self._append(request, token_ids)
            if num_drafts := len(part.draft_token_ids):
                # Accepted drafts are tokens now, and computed. The slots of the others are written again.
                num_accepted = len(token_ids) - 1
                request.num_computed_tokens -= num_drafts - num_accepted
                self.total_drafts += 1
                self.total_draft_tokens += num_drafts
                self.total_accepted_tokens += num_accepted
            if request.drafter is not None:
                request.drafter.observe(token_ids)
            self.kv_cache.cache_computed_blocks(request)
            if request.pooling is not None and part.is_last:
                status = RequestStatus.FINISHED_STOPPED
            if status is not None:
                self.finish_request(request.request_id, status)
            if token_ids or status is not None:
                news.append((request, token_ids))
        return news

    def _advance(self, output: SchedulerOutput) -> None:
        for part in output.scheduled:
            request = part.request
            if request.status is RequestStatus.RUNNING:
                request.num_computed_tokens += part.num_scheduled_tokens
                request.num_pending_tokens += part.num_sampled

    def _append(
        self, request: Request, token_ids: Sequence[int]
    ) -> tuple[Sequence[int], RequestStatus | None]:
        """Append tokens up to one that ends the request; those appended, and the final status."""
        grammar = request.grammar
        for i, token_id in enumerate(token_ids):
            request.all_token_ids.append(token_id)
            if grammar is not None and not grammar.accept(token_id):
                request.stop_reason = grammar.error
                return token_ids[: i + 1], RequestStatus.FINISHED_ABORTED
            if status := self._finished_status(request, token_id):
                return token_ids[: i + 1], status
        return token_ids, None

    def _finished_status(self, request: Request, token_id: int) -> RequestStatus | None:
        params = request.params
        if token_id in params.stop_token_ids:
            request.stop_reason = token_id
            return RequestStatus.FINISHED_STOPPED
        if token_id in self.eos_token_ids and not params.ignore_eos:
            return RequestStatus.FINISHED_STOPPED
        num_remaining = self._num_remaining(request) + request.num_pending_tokens
        return RequestStatus.FINISHED_LENGTH if num_remaining <= 0 else None

    def _num_remaining(self, request: Request) -> int:
        """Output tokens that the request may still get behind its pending one."""
        max_tokens, num_pending = request.params.max_tokens, request.num_pending_tokens
        room = self.max_model_len - request.num_tokens - num_pending
        return room if max_tokens is None else min(room, max_tokens - request.num_output_tokens - num_pending)

    def _draft(self, is_pending: bool = False) -> dict[str, tuple[int, ...]]:
        """Drafts of the decoding requests, by age, within what the token budget leaves to them.

        Of those whose tokens are all known; with `is_pending` of the others, for their pending token and on.
        """
        assert self._draft_policy is not None
        decoding = [r for r in self.running if r.is_decoding]
        budget = self.token_budget - len(decoding)
        if self.waiting or len(decoding) < len(self.running):
            budget //= 2  # prompts go on at half their pace at least
        drafts: dict[str, tuple[int, ...]] = {}
        for request in decoding:
            if (request.num_pending_tokens > 0) != is_pending:
                continue
            if request.drafter is None:
                request.drafter = Drafter(self._draft_policy, request.all_token_ids)
            # The last token that a request may get needs no draft: it is sampled behind the others.
            limit = min(budget, self._num_remaining(request) - 1)
            tokens = request.drafter.draft(limit, len(decoding))
            if request.grammar is not None and not is_pending:
                tokens = tokens[: request.grammar.num_accepted(tokens)]
            if tokens:
                drafts[request.request_id] = tokens
                budget -= len(tokens)
        return drafts

    def _with_drafts(self, part: ScheduledRequest, drafts: tuple[int, ...]) -> ScheduledRequest:
        """The decode with as many of its drafts as find room without a preemption, now or later."""
        request, pool, block_size = part.request, self.kv_cache.pool, self.kv_cache.block_size
        num_fitting = len(request.block_ids) * block_size - request.num_tokens
        num_new_blocks = -(-(len(drafts) - num_fitting) // block_size)
        # A new block is for drafts only while every running request could still get one.
        if num_new_blocks > 0 and not pool.can_allocate(num_new_blocks + len(self.running)):
            drafts = drafts[:num_fitting]
        if not drafts:
            return part
        num_tokens = 1 + len(drafts)
        self.kv_cache.allocate_slots(request, num_tokens)
        return replace(part, num_scheduled_tokens=num_tokens, draft_token_ids=drafts)

    def _try_to_start(self, request: Request, budget: int, preempted: list[str]) -> ScheduledRequest | None:
        """Start a waiting request's first chunk, at the cost of less important ones if need be."""
        most = self.pacer.max_sequences(self.max_num_seqs)
        while True:
            hit = self.kv_cache.get_computed_blocks(request)
            num_hit_tokens = len(hit) * self.kv_cache.block_size
            num_tokens = min(request.num_tokens - num_hit_tokens, budget)
            if len(self.running) < most and self.kv_cache.allocate_slots(request, num_tokens, hit):
                break
            victims = [r for r in self.running if r.urgency.priority > request.urgency.priority]
            held = sum(len(r.block_ids) for r in victims)
            wanted = -(-num_tokens // self.kv_cache.block_size)
            if not victims or wanted > self.kv_cache.pool.num_free_blocks + held:
                return None  # nobody gives way in vain
            self._preempt_next(preempted)
        self.waiting.remove(request)
        self._start(request, num_hit_tokens)
        return ScheduledRequest(request, num_hit_tokens, num_tokens)

    def _make_room(self, request: Request, num_tokens: int, preempted: list[str]) -> bool:
        while not self.kv_cache.allocate_slots(request, num_tokens):
            if self._preempt_next(preempted) is request:
                return False
        return True

    def _preempt_next(self, preempted: list[str]) -> Request:
        """The youngest of the largest priority number gives way."""
        victim = max(reversed(self.running), key=lambda r: r.urgency.priority)
        self._preempt(victim)
        preempted.append(victim.request_id)
        return victim

    def _least_priority(self, request_ids: Sequence[str]) -> int:
        return min((self.requests[i].urgency.priority for i in request_ids), default=MAX_PRIORITY + 1)

    def _wait(self, request: Request) -> None:
        insort(self.waiting, request, key=_turn)

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self.kv_cache.free(request)
        request.num_computed_tokens = request.num_pending_tokens = 0
        request.num_preemptions += 1
        request.status = RequestStatus.PREEMPTED
        self._wait(request)
        self.total_preemptions += 1

    def _start(self, request: Request, num_hit_tokens: int) -> None:
        request.num_computed_tokens = num_hit_tokens
        if request.first_scheduled_time is None:
            request.first_scheduled_time = self._clock()
            request.num_cached_tokens = num_hit_tokens
        request.status = RequestStatus.RUNNING
        self.running.append(request)


def _turn(request: Request) -> tuple[float, int]:
    return request.turn
