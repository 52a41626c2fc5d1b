"""A router on a clock that tests turn, with round numbers for costs."""

import random

from serving.routing import CostModel, LatencyPolicy, LatencyPolicySettings, RoutedRequest, Router

# Seconds: a step of 10 ms + 1 ms a decode; a chunk of 100 prompt tokens adds 5 ms + 100 x 0.1 ms.
COST = CostModel(
    step_base_s=0.010,
    step_per_active_s=0.001,
    step_per_kv_token_s=0.000001,
    prefill_step_s=0.005,
    prefill_token_s=0.0001,
    chunk_tokens=100,
    max_num_seqs=8,
    kv_capacity_tokens=10_000,
    overhead_s=0.002,
)


class ManualClock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def make_router(
    num_replicas: int, seed: int = 0, settings: LatencyPolicySettings | None = None, cost: CostModel = COST
) -> tuple[Router, LatencyPolicy, ManualClock]:
    clock = ManualClock()
    policy = LatencyPolicy(cost, random.Random(seed), max_replicas=64, settings=settings)
    router = Router(policy, clock, max_replicas=64)
    for i in range(num_replicas):
        router.add_replica(f"r{i}")
    return router, policy, clock


def request(request_id: str, prompt_tokens: int = 100, **rest) -> RoutedRequest:
    return RoutedRequest(request_id, prompt_tokens, **rest)


def counters(router: Router) -> dict[str, list[int]]:
    ledger = router.fleet.ledger
    names = ("in_flight", "active_decodes", "pending_prefill", "expected_output", "saved_tokens", "kv_tokens")
    return {name: getattr(ledger, name).tolist() for name in names}


def assert_empty(router: Router) -> None:
    assert len(router.fleet.ledger) == 0
    for name, values in counters(router).items():
        assert not any(values), name
