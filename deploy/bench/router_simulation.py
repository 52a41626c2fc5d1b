"""A discrete-event simulation of replicas with continuous batching behind the router that serves.

The router is `serving.routing.Router` itself, on the simulation's clock.
"""

import heapq
import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from deploy.bench.router_clock import Clock
from deploy.bench.router_engine import Engine
from deploy.bench.router_group import Routing
from deploy.bench.router_traces import Arrival
from serving.routing import Overloaded, ReplicaStats, RoutedRequest
from serving.routing.prefix_index import BLOCK_TOKENS


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on a replica."""

    request_id: str
    prompt_tokens: int
    output_tokens: int
    block_hashes: tuple[int, ...]
    on_first_token: Callable[[], None]
    on_finish: Callable[[], None]
    left: int = 0  # prompt tokens still to compute, once it has begun
    is_gone: bool = False
    joined_step: int = 0  # the step after which it decodes

    @property
    def kv_tokens(self) -> int:
        """Reserved from the start to the end, so that nothing is preempted."""
        return self.prompt_tokens + self.output_tokens


class Replica:
    """Chunked prefill in order of arrival beside the decodes of every step; a prefix cache in the free KV
    blocks.
    """

    def __init__(self, clock: Clock, engine: Engine, slowness: float = 1.0, is_failing: bool = False) -> None:
        self.engine, self.slowness, self.is_failing = engine, slowness, is_failing
        self.waiting: deque[Sequence] = deque()
        self.current: Sequence | None = None  # its prompt is partly computed
        self.num_active = 0
        self.finish_steps: list[tuple[int, int, Sequence]] = []  # heap
        self.kv_reserved = 0
        self.kv_decoding = 0  # context of the active decodes
        self.step_end_s = 0.0
        self._clock, self._order = clock, itertools.count()
        self._steps = 0
        self._is_running = False
        self._run = 0  # number of the running stretch; a replaced stretch's end is void
        self._stretch = (0.0, 0.0, 0)  # start, seconds a step, steps
        self._computed: list[Sequence] = []  # prompts that this step completes
        self._cache: dict[int, None] = {}  # blocks, oldest first

    @property
    def num_running(self) -> int:
        return self.num_active + (self.current is not None)

    def pending_prefill(self) -> int:
        """Prompt tokens to compute, a cached prefix counted as if it were not."""
        waiting = sum(s.prompt_tokens for s in self.waiting if not s.is_gone)
        return waiting + (self.current.left if self.current else 0)

    def step_left_s(self) -> float:
        """Seconds until the running step ends."""
        if not self._is_running:
            return 0.0
        start_s, step_s, _ = self._stretch
        return step_s - (self._clock.now_s - start_s) % step_s

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)
        self._wake()

    def abort(self, sequence: Sequence) -> None:
        if sequence.is_gone:
            return
        if sequence.joined_step:
            self._wake()
            self.num_active -= 1
            self._release(sequence)
        elif sequence is self.current:
            self.current = None
            self.kv_reserved -= sequence.kv_tokens
        elif sequence in self._computed:
            self._computed.remove(sequence)
            self.kv_reserved -= sequence.kv_tokens
        sequence.is_gone = True

    def _wake(self) -> None:
        """Start, or end a stretch of decode steps at the step that is running now."""
        if not self._is_running:
            self._step()
            return
        start_s, step_s, steps = self._stretch
        if steps > 1:
            done = min(steps, int((self._clock.now_s - start_s) / step_s) + 1)
            self._schedule(start_s, step_s, done)

    def _schedule(self, start_s: float, step_s: float, steps: int) -> None:
        self._stretch = (start_s, step_s, steps)
        self._run += 1
        run, self.step_end_s = self._run, start_s + steps * step_s
        self._clock.after(self.step_end_s - self._clock.now_s, lambda: self._end_step(run))

    def _step(self) -> None:
        budget = self.engine.chunk_tokens
        while budget and (sequence := self.current or self._admit()):
            computed = min(budget, sequence.left)
            sequence.left -= computed
            budget -= computed
            self.current = sequence if sequence.left else None
            if not sequence.left:
                self._computed.append(sequence)
        prompt_tokens = self.engine.chunk_tokens - budget
        self._is_running = bool(prompt_tokens or self.num_active)
        if not self._is_running:
            return
        step_s = self.engine.decode_s(self.num_active, self.kv_decoding) + self.engine.prefill_s(
            prompt_tokens
        )
        steps = 1
        if not prompt_tokens:  # nothing changes until a sequence ends, or `_wake` says so
            steps = max(1, min(64, self.finish_steps[0][0] - self._steps))
        self._schedule(self._clock.now_s, step_s * self.slowness, steps)

    def _admit(self) -> Sequence | None:
        while self.waiting and self.waiting[0].is_gone:
            self.waiting.popleft()
        if not self.waiting or self.num_running + len(self._computed) >= self.engine.max_num_seqs:
            return None
        sequence = self.waiting[0]
        if self.kv_reserved and self.kv_reserved + sequence.kv_tokens > self.engine.kv_capacity_tokens:
            return None
        self.kv_reserved += sequence.kv_tokens
        cached = itertools.takewhile(self._cache.__contains__, sequence.block_hashes)
        hit = sum(1 for _ in cached) * BLOCK_TOKENS
        sequence.left = max(1, sequence.prompt_tokens - hit)
        return self.waiting.popleft()

    def _end_step(self, run: int) -> None:
        if run != self._run:
            return
        steps = self._stretch[2]
        self._steps += steps
        self.kv_decoding += steps * self.num_active
        for sequence in self._computed:
            self._remember(sequence.block_hashes)
            sequence.joined_step = self._steps
            self.num_active += 1
            self.kv_decoding += sequence.prompt_tokens
            end = self._steps + sequence.output_tokens - 1
            heapq.heappush(self.finish_steps, (end, next(self._order), sequence))
            sequence.on_first_token()
        self._computed.clear()
        while self.finish_steps and (
            self.finish_steps[0][2].is_gone or self.finish_steps[0][0] <= self._steps
        ):
            _, _, sequence = heapq.heappop(self.finish_steps)
            if not sequence.is_gone:
                sequence.is_gone = True
                self.num_active -= 1
                self._release(sequence)
                sequence.on_finish()
        self._step()

    def _release(self, sequence: Sequence) -> None:
        self.kv_reserved -= sequence.kv_tokens
        self.kv_decoding -= sequence.prompt_tokens + self._steps - sequence.joined_step

    def _remember(self, hashes: tuple[int, ...]) -> None:
        for block in reversed(hashes):
            self._cache.pop(block, None)
            self._cache[block] = None
        room = (self.engine.kv_capacity_tokens - self.kv_reserved) // BLOCK_TOKENS
        while len(self._cache) > max(0, room):
            del self._cache[next(iter(self._cache))]


@dataclass
class Client:
    """A request as its sender sees it: retries count, and so does the time until they succeed."""

    arrival: Arrival
    number: int
    attempts: int = 0
    failed_on: frozenset[str] = frozenset()
    ttft_s: float | None = None
    has_failed: bool = False
    is_over: bool = False


@dataclass
class Result:
    clients: list[Client]
    decisions_us: list[tuple[float, float]]
    """Of each: passed time, and this thread's processor time."""


class Simulation:
    """Clients, network, router, replicas. All times in seconds.

    network_s: one way, for requests, tokens and the events that the router hears of.
    retry_s: what a client waits before it sends again after an error, doubled the next time, `max_retries`
    times. A refusal (Overloaded) is tried again after the predicted wait, as often as
        that takes, within `patience_s`.
    """

    network_s = 0.001
    failure_s = 0.005
    max_retries = 2
    patience_s = 10.0

    def __init__(
        self, replicas: dict[str, Replica], router: Routing, clock: Clock, rng: random.Random, retry_s: float
    ) -> None:
        self.replicas, self.router, self.clock, self.retry_s = replicas, router, clock, retry_s
        self._rng = rng
        self._decisions_us: list[tuple[float, float]] = []
        self._num_over = 0

    def run(self, arrivals: Iterable[Arrival], on_over: Callable[[], None] = lambda: None) -> Result:
        clients = [Client(arrival, i) for i, arrival in enumerate(arrivals)]
        self._on_over = on_over
        for name, replica in self.replicas.items():
            self.router.add_replica(name)
            self.router.measured(name, replica.engine.cost_model(self.network_s, replica.slowness))
            self.clock.after(self._rng.uniform(0, 1), partial(self._publish, name))
        pending = iter(clients)
        self._next_arrival(pending)
        self.clock.run(lambda: self._num_over == len(clients))
        return Result(clients, self._decisions_us)

    def _next_arrival(self, pending: Iterable[Client]) -> None:
        client = next(iter(pending), None)
        if client is None:
            return

        def arrive() -> None:
            self._next_arrival(pending)
            self._send(client)

        self.clock.after(client.arrival.at_s - self.clock.now_s, arrive)

    def _publish(self, name: str) -> None:
        replica = self.replicas[name]
        stats = ReplicaStats(
            self.clock.now_s, replica.pending_prefill(), replica.num_active, replica.kv_reserved
        )
        self.clock.after(self.network_s, lambda: self.router.report(name, stats))
        self.clock.after(self._rng.uniform(0.2, 1), lambda: self._publish(name))

    def _send(self, client: Client) -> None:
        arrival = client.arrival
        client.attempts += 1
        request_id = f"{client.number}.{client.attempts}"
        request = RoutedRequest(
            request_id, arrival.prompt_tokens, 1024, arrival.block_hashes, failed_on=client.failed_on
        )
        start, cpu = time.perf_counter_ns(), time.thread_time_ns()
        decision = self.router.route(request)
        self._decisions_us.append(
            ((time.perf_counter_ns() - start) / 1e3, (time.thread_time_ns() - cpu) / 1e3)
        )
        if isinstance(decision, Overloaded):
            if self.clock.now_s - arrival.at_s + decision.predicted_wait_s > self.patience_s:
                self._give_up(client)
            else:
                self.clock.after(max(0.01, decision.predicted_wait_s), lambda: self._send(client))
            return
        replica = self.replicas[decision.replica_id]
        if replica.is_failing:
            if not self.retry_s:  # a proxy knows where it has tried, a client does not
                client.failed_on |= {decision.replica_id}
            self.clock.after(2 * self.network_s + self.failure_s, lambda: self._fail(client, request_id))
            return
        sequence = Sequence(
            request_id,
            arrival.prompt_tokens,
            arrival.output_tokens,
            arrival.block_hashes,
            lambda: self.clock.after(self.network_s, lambda: self._first_token(client, request_id)),
            lambda: self.clock.after(self.network_s, lambda: self._finish(client, request_id)),
        )
        self.clock.after(self.network_s, lambda: replica.add(sequence))
        if arrival.abort_after_s is not None:
            self.clock.after(
                arrival.abort_after_s, lambda: self._abort(client, request_id, replica, sequence)
            )

    def _first_token(self, client: Client, request_id: str) -> None:
        if not client.is_over:
            client.ttft_s = self.clock.now_s - client.arrival.at_s
            self.router.first_token(request_id)

    def _finish(self, client: Client, request_id: str) -> None:
        if not client.is_over:
            self.router.finished(request_id, client.arrival.output_tokens)
            self._end(client)

    def _abort(self, client: Client, request_id: str, replica: Replica, sequence: Sequence) -> None:
        if not client.is_over:
            self.router.aborted(request_id)
            self.clock.after(self.network_s, lambda: replica.abort(sequence))
            self._end(client)

    def _fail(self, client: Client, request_id: str) -> None:
        self.router.failed(request_id)
        if client.attempts > self.max_retries:
            self._give_up(client)
        else:
            self.clock.after(self.retry_s * 2 ** (client.attempts - 1), lambda: self._send(client))

    def _give_up(self, client: Client) -> None:
        client.has_failed = True
        self._end(client)

    def _end(self, client: Client) -> None:
        client.is_over = True
        self._num_over += 1
        self._on_over()
