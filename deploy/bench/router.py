"""The latency policy beside the usual ones, on simulated replicas: p99 TTFT, failures, decision time."""

import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from deploy.bench.report import percentile
from deploy.bench.router_clock import Clock
from deploy.bench.router_engine import Engine
from deploy.bench.router_group import RouterGroup
from deploy.bench.router_simulation import Replica, Simulation
from deploy.bench.router_traces import TRACES, Trace
from serving.routing import (
    CostModel,
    LatencyPolicy,
    LeastRequests,
    Overloaded,
    Policy,
    PowerOfTwo,
    PrefixAffinity,
    RoundRobin,
    RoutedRequest,
    Router,
)
from serving.routing.fleet import Fleet
from serving.routing.ledger import Flight
from serving.routing.prefix_index import BLOCK_TOKENS, PrefixIndex
from serving.routing.requests import Outcome
from serving.routing.router import Choice

POLICIES = ("latency", "round_robin", "least_requests", "power_of_two", "prefix_affinity", "oracle")
SIMPLE = ("round_robin", "least_requests", "power_of_two")  # what the goal is measured against


class Oracle:
    """Sees the replicas themselves: queues, running steps, speed, health, and the answer's length.

    It is greedy, as the latency policy is, with the same weight of the answer's end; it is what perfect
    knowledge adds to that, and no bound on what any policy could do.
    """

    name = "oracle"

    def __init__(self, replicas: dict[str, Replica], engine: Engine, output_of: Callable[[str], int]) -> None:
        self._replicas, self._engine, self._output_of = replicas, engine, output_of
        self._prefixes = PrefixIndex(len(replicas), engine.kv_capacity_tokens // BLOCK_TOKENS)
        self._on_the_way: deque[tuple[float, int, int]] = deque()  # arrival, slot, prompt tokens

    def choose(self, request: RoutedRequest, fleet: Fleet, now_s: float) -> Choice | Overloaded:
        saved = self._prefixes.match(request.block_hashes, fleet.num_slots)
        while self._on_the_way and self._on_the_way[0][0] < now_s:
            self._on_the_way.popleft()
        coming = [0] * fleet.num_slots
        for _, slot, tokens in self._on_the_way:
            coming[slot] += tokens
        output = self._output_of(request.request_id)
        best, lowest = 0, math.inf
        for slot in range(fleet.num_slots):
            replica = self._replicas[fleet.replica_id(slot)]
            own = max(1, request.prompt_tokens - int(saved[slot]))
            score = self._score(replica, own + coming[slot], output, fleet)
            if score < lowest:
                best, lowest = slot, score
        return Choice(best, "lowest true latency", saved_tokens=int(saved[best]))

    def dispatched(self, flight: Flight) -> None:
        self._prefixes.add(flight.slot, flight.request.block_hashes)
        arrives_s = flight.dispatched_at_s + Simulation.network_s
        self._on_the_way.append((arrives_s, flight.slot, flight.prefill_tokens))

    def measured(self, slot: int, cost: CostModel) -> None:
        pass

    def holds(self, slot: int, block_hashes: Sequence[int]) -> None:
        self._prefixes.add(slot, block_hashes)

    def closed(self, flight: Flight, outcome: Outcome, output_tokens: int, now_s: float) -> None:
        pass

    def replica_removed(self, slot: int) -> None:
        pass

    def _score(self, replica: Replica, new_tokens: int, output_tokens: int, fleet: Fleet) -> float:
        if replica.is_failing:
            return math.inf
        tokens = new_tokens + (replica.current.left if replica.current else 0)
        for sequence in replica.waiting:
            flight = fleet.ledger.find(sequence.request_id)
            if flight is not None:
                tokens += flight.prefill_tokens
        engine = self._engine
        steps, rest = divmod(tokens, engine.chunk_tokens)
        decode_s = engine.decode_s(replica.num_active, replica.kv_decoding)
        own_s = steps * (decode_s + engine.prefill_s(engine.chunk_tokens))
        own_s += (decode_s + engine.prefill_s(rest)) if rest else 0.0
        queued = replica.num_running + len(replica.waiting)
        answer_s = output_tokens * engine.decode_s(queued + 1, replica.kv_decoding)
        excess = max(0, queued + 1 - engine.max_num_seqs) / engine.max_num_seqs
        return replica.step_left_s() + replica.slowness * (own_s + (0.1 + excess) * answer_s)


def run(
    replicas: Sequence[int],
    load: float,
    traces: Sequence[str],
    policies: Sequence[str],
    seeds: int,
    requests: int,
    routers: int = 1,
    lag_s: float = 0.0,
) -> list[dict[str, Any]]:
    """One row for each trace, number of replicas and policy; percentiles over all seeds together.

    load: arriving work over what the replicas can do at full batches, prompts counted as if nothing were
    cached.
    requests: a run's length; at least 100 a replica are sent.
    routers, lag_s: how many are asked in turn, and how late they hear of events (`RouterGroup`).
    """
    rows = []
    combinations = [(n, t, p) for n in replicas for t in traces for p in policies]
    with tqdm(total=len(combinations) * seeds, unit="run", disable=None) as progress:
        for number, trace, policy in combinations:
            progress.set_description(f"{trace}, {number} replicas, {policy}")
            results = []
            for seed in range(seeds):
                results.append(_simulate(TRACES[trace], policy, number, load, seed, requests, routers, lag_s))
                progress.update()
            setup = {"replicas": number, "load": load, "routers": routers, "event_lag_ms": 1e3 * lag_s}
            rows.append(_row(trace, policy, setup, results))
    _compare(rows)
    return rows


def _policy(
    name: str, rng: random.Random, fleet: dict[str, Replica], engine: Engine, outputs: list[int]
) -> Policy:
    blocks = engine.kv_capacity_tokens // BLOCK_TOKENS
    match name:
        case "latency":
            return LatencyPolicy(engine.cost_model(Simulation.network_s), rng, len(fleet), blocks)
        case "round_robin":
            return RoundRobin()
        case "least_requests":
            return LeastRequests(rng)
        case "power_of_two":
            return PowerOfTwo(rng)
        case "prefix_affinity":
            return PrefixAffinity(rng, len(fleet), blocks)
        case "oracle":
            return Oracle(fleet, engine, lambda request_id: outputs[int(request_id.partition(".")[0])])
    raise ValueError(f"unknown policy {name!r} (known: {', '.join(POLICIES)})")


def _simulate(
    trace: Trace,
    policy: str,
    number: int,
    load: float,
    seed: int,
    requests: int,
    routers: int,
    lag_s: float,
) -> tuple[list[float], int, int, list[tuple[float, float]]]:
    """TTFTs (s), failures, aborts before a first token, decision times (us, passed and the processor's), the
    first tenth left out.
    """
    rng = random.Random(f"trace {seed}")  # the same arrivals for every policy
    num_slow, num_failing = (
        max(1, round(share * number)) if share else 0 for share in (trace.slow_share, trace.failing_share)
    )
    capacity = number - num_failing - 0.5 * num_slow
    sample = [trace.lengths(rng) for _ in range(20_000)]
    mean_prompt = sum(p for p, _ in sample) / len(sample) + trace.document_tokens
    mean_output = sum(o for _, o in sample) / len(sample)
    rate = load * capacity / trace.engine.request_s(mean_prompt, mean_output)
    count = max(requests, 100 * number)
    arrivals = list(trace.arrivals(rng, rate, count, number))
    clock = Clock()
    fleet = {
        f"replica-{i}": Replica(
            clock,
            trace.engine,
            slowness=2.0 if i < num_slow else 1.0,
            is_failing=i < num_failing,
        )
        for i in range(number)
    }
    outputs = [a.output_tokens for a in arrivals]
    choosers = [
        _policy(policy, random.Random(f"policy {seed}.{i}"), fleet, trace.engine, outputs)
        for i in range(routers)
    ]
    router = (
        Router(choosers[0], clock, number)
        if routers == 1
        else RouterGroup(choosers, clock, number, lag_s, random.Random(f"lag {seed}"))
    )
    result = Simulation(fleet, router, clock, random.Random(f"network {seed}"), trace.retry_s).run(arrivals)
    measured = result.clients[count // 10 :]
    ttfts = [Simulation.patience_s if c.has_failed else c.ttft_s for c in measured]
    return (
        [t for t in ttfts if t is not None],
        sum(c.has_failed for c in measured),
        sum(t is None for t in ttfts),
        result.decisions_us[count // 10 :],
    )


def _row(trace: str, policy: str, setup: dict[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    ttfts = [t for r in results for t in r[0]]
    decisions, processor = ([t[i] for r in results for t in r[3]] for i in range(2))
    return {
        "trace": trace,
        "policy": policy,
        **setup,
        "requests": len(ttfts),
        "ttft_ms_p50": round(percentile(ttfts, 0.5) * 1e3, 1),
        "ttft_ms_p99": round(percentile(ttfts, 0.99) * 1e3, 1),
        "failures": sum(r[1] for r in results),
        "decision_us_p50": round(percentile(decisions, 0.5), 1),
        "decision_us_p95": round(percentile(decisions, 0.95), 1),
        "decision_us_p99": round(percentile(decisions, 0.99), 1),
        "decision_cpu_us_p50": round(percentile(processor, 0.5), 1),
        "decision_cpu_us_p95": round(percentile(processor, 0.95), 1),
        "decision_cpu_us_p99": round(percentile(processor, 0.99), 1),
    }


def _compare(rows: Sequence[dict[str, Any]]) -> None:
    """Adds `p99_of_best_simple`: p99 TTFT over that of the best simple policy in the same case."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["trace"], row["replicas"]), []).append(row)
    for group in groups.values():
        simple = [row["ttft_ms_p99"] for row in group if row["policy"] in SIMPLE]
        if simple:
            for row in group:
                row["p99_of_best_simple"] = round(row["ttft_ms_p99"] / min(simple), 3)
