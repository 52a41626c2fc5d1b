"""The latency policy: each request goes where its answer is predicted to start, and to end, soonest."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine import MAX_PRIORITY
from serving.routing.costs import CostModel, FleetCosts
from serving.routing.fleet import Fleet
from serving.routing.gates import BoolArray, ErrorGate, kv_admits
from serving.routing.ledger import Flight, FloatArray, IntArray
from serving.routing.predictor import OutputLengths, Residuals
from serving.routing.prefix_index import PrefixIndex
from serving.routing.requests import Outcome, Overloaded, RequestKind, RoutedRequest
from serving.routing.router import Choice


@dataclass(frozen=True, slots=True)
class LatencyPolicySettings:
    """
    answer_weight: seconds of TTFT that one second of a later end is worth, for interactive requests.
    lateness_weight: the same for a second beyond the request's own deadline.
    tie_share, tie_steps, tie_s: scores within that share, those steps and seconds of the best are ties: when
        a step begins on a replica is not known, and where all places are taken anyway, no score tells who
        holds them.
    max_kv_share: no request is sent where it would fill the KV cache beyond this.
    """

    answer_weight: float = 0.1
    lateness_weight: float = 10.0
    tie_share: float = 0.03
    tie_steps: float = 0.25
    tie_s: float = 0.0005
    max_kv_share: float = 0.97

    def __post_init__(self) -> None:
        if not 0 < self.max_kv_share <= 1:
            raise ValueError(f"max_kv_share must be in (0, 1], got {self.max_kv_share}")
        for name in ("answer_weight", "lateness_weight", "tie_share", "tie_steps", "tie_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


class LatencyPolicy:
    """Predicts TTFT and TPOT of the request on every replica that no gate closes, and takes the lowest score.

    Among near ties it draws two and takes the one with fewer requests in flight that are at least as
    important (power of two choices: Azar et al., "Balanced allocations", 1999; Mitzenmacher, IEEE TPDS
    12(10), 2001), so that several routers with the same statistics do not all pick the same replica.

    cost: of replicas that have not said what they measured, as long as none has.
    rng: seeded by the owner where decisions must repeat.
    """

    name = "latency"

    def __init__(
        self,
        cost: CostModel,
        rng: random.Random,
        max_replicas: int = 1024,
        max_prefix_blocks: int = 16_384,
        settings: LatencyPolicySettings | None = None,
    ) -> None:
        self.costs = FleetCosts(cost, max_replicas)
        # By priority: what the less important wait for the more important, who take their places, says
        # nothing about how soon a replica begins with these.
        self.residuals = [Residuals(max_replicas) for _ in range(MAX_PRIORITY + 1)]
        self.lengths = OutputLengths()
        self.errors = ErrorGate(max_replicas)
        self.prefixes = PrefixIndex(max_replicas, max_prefix_blocks)
        self._rng = rng
        self._settings = settings or LatencyPolicySettings()

    def choose(self, request: RoutedRequest, fleet: Fleet, now_s: float) -> Choice | Overloaded:
        n, costs, ledger = fleet.num_slots, self.costs, fleet.ledger
        output = self.lengths.expect(request.max_output_tokens)
        saved = self.prefixes.match(request.block_hashes, n)
        own = np.maximum(request.prompt_tokens - saved, 1).astype(np.float64)

        foreign_prefill, foreign_active, foreign_kv = fleet.foreign(now_s)
        # No more than there are places: those beyond wait, or gave way.
        active = np.minimum(ledger.active_decodes[:n] + foreign_active, costs.max_num_seqs[:n])
        kv = ledger.kv_tokens[:n] + foreign_kv
        residuals = self.residuals[request.priority]
        slowness = residuals.ttft_factors(n, now_s)
        step = costs.decode_step_s(active, kv)
        rate = costs.prefill_rate(step) / slowness
        ahead = ledger.remaining_prefill(n, now_s, rate, request.priority) + foreign_prefill

        in_flight, as_important = ledger.in_flight[:n], ledger.in_flight_from[request.priority, :n]
        beside = np.minimum(in_flight + foreign_active + 1, costs.max_num_seqs[:n])
        raw_tpot = costs.decode_step_s(beside, kv + request.prompt_tokens)
        tpot = raw_tpot * residuals.tpot_factors(n, now_s)
        raw_ttft = costs.ttft_s(ahead, own, step, active) + costs.admission_wait_s(
            as_important,
            kv,
            request.prompt_tokens,
            self.lengths.mean * raw_tpot,
        )
        ttft = raw_ttft * slowness

        may_go = fleet.eligible(request)
        admitted = may_go & self.errors.admits(n, now_s)
        admitted &= kv_admits(kv, own, costs.kv_capacity_tokens[:n], self._settings.max_kv_share)
        if not admitted.any():
            return self._overloaded(may_go, ttft, n, now_s)

        score = np.where(admitted, self._score(request, ttft, output * tpot), np.inf)
        slot, runner_up, reason = self._pick(score, step, as_important)
        if saved[slot] > 0:
            reason += f", {saved[slot]} prompt tokens cached"
        return Choice(
            slot,
            reason,
            runner_up,
            int(saved[slot]),
            output,
            float(ttft[slot]),
            float(tpot[slot]),
            float(raw_ttft[slot]),
            float(raw_tpot[slot]),
        )

    def dispatched(self, flight: Flight) -> None:
        self.errors.dispatched(flight.request.request_id, flight.slot)
        self.prefixes.add(flight.slot, flight.request.block_hashes)

    def measured(self, slot: int, cost: CostModel) -> None:
        self.costs.set(slot, cost)

    def holds(self, slot: int, block_hashes: Sequence[int]) -> None:
        self.prefixes.add(slot, block_hashes)

    def closed(self, flight: Flight, outcome: Outcome, output_tokens: int, now_s: float) -> None:
        request_id, slot = flight.request.request_id, flight.slot
        if outcome is Outcome.FINISHED:
            self.errors.finished(request_id, slot, now_s)
            self.residuals[flight.request.priority].observe(flight, output_tokens, now_s)
            self.lengths.observe(output_tokens)
        elif outcome is Outcome.FAILED:
            self.errors.failed(request_id, slot, now_s)
        else:
            self.errors.aborted(request_id)
        if flight.first_token_at_s is None and outcome is not Outcome.FINISHED:
            # What was not there before this request was never computed either.
            self.prefixes.forget(slot, flight.request.block_hashes, flight.saved_tokens)

    def replica_removed(self, slot: int) -> None:
        for residuals in self.residuals:
            residuals.reset(slot)
        self.costs.reset(slot)
        self.errors.reset(slot)
        self.prefixes.clear(slot)

    def _score(self, request: RoutedRequest, ttft: FloatArray, answer_s: FloatArray) -> FloatArray:
        """Seconds, lower is better."""
        settings = self._settings
        answer_weight = 1.0 if request.kind is RequestKind.BATCH else settings.answer_weight
        score: FloatArray = ttft + answer_weight * answer_s
        if request.ttft_budget_s is not None:
            score += settings.lateness_weight * np.maximum(0.0, ttft - request.ttft_budget_s)
        return score

    def _pick(
        self, score: FloatArray, step_s: FloatArray, in_flight: IntArray
    ) -> tuple[int, int | None, str]:
        """Slot, runner-up where there is one, and the reason."""
        best = int(score.argmin())
        lowest = float(score[best])
        settings = self._settings
        width_s = settings.tie_share * lowest + settings.tie_steps * float(step_s[best]) + settings.tie_s
        ties = (score <= lowest + width_s).nonzero()[0]
        if len(ties) > 1:
            # Two of them: random.sample takes ten times as long for it.
            drawn = self._rng.randrange(len(ties))
            other = (drawn + 1 + self._rng.randrange(len(ties) - 1)) % len(ties)
            first, second = int(ties[drawn]), int(ties[other])
            if in_flight[second] < in_flight[first]:
                first, second = second, first
            return first, second, f"least busy of two from {len(ties)} near ties"
        if len(score) == 1:
            return best, None, "the only replica"
        score[best] = np.inf
        second = int(score.argmin())
        return best, (second if np.isfinite(score[second]) else None), "lowest predicted latency"

    def _overloaded(self, may_go: BoolArray, ttft: FloatArray, num_slots: int, now_s: float) -> Overloaded:
        if not may_go.any():
            return Overloaded(1.0, "every replica is draining or unhealthy")
        waits = np.maximum(ttft, self.errors.waits_s(num_slots, now_s))[may_go]
        return Overloaded(float(waits.min()), "every replica is full or failing")
