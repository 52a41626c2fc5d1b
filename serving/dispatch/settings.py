"""The `routing` section of the configuration, and the policy that it asks for."""

import random
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from serving.routing import (
    CostModel,
    LatencyPolicy,
    LeastRequests,
    Policy,
    PowerOfTwo,
    PrefixAffinity,
    RoundRobin,
)

PolicyName = Literal[
    "auto", "latency", "round_robin", "least_requests", "power_of_two", "prefix_affinity", "none"
]

# Until a replica says what it measured, a moment after its start: an 8B model on one H100, roughly.
INITIAL_COST = CostModel(
    step_base_s=0.002,
    step_per_active_s=0.0001,
    step_per_kv_token_s=0.0,
    prefill_step_s=0.0,
    prefill_token_s=0.00004,
    chunk_tokens=512,
    max_num_seqs=64,
    kv_capacity_tokens=200_000,
    overhead_s=0.002,
)


class RoutingSettings(BaseModel):
    """How requests find their replica. Needs HAProxy; without it Ray Serve's own proxy chooses."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: PolicyName = "auto"
    """`none`: HAProxy's least connections, without a router. `auto`: `latency`, but none before a single
    replica whose number stays: a question that has one answer would only delay first tokens (by 1.1 ms, after
    a pause by 1.5 to 1.9, on 2 vCPU AMD EPYC)."""
    max_request_bytes: int = Field(default=2**17, ge=16_384, le=16 * 2**20)
    """Of a request's body, what the router sees; it is also what is kept to send a request again to another
    replica, so that longer ones are not retried once a replica has read them. All of HAProxy's buffers are of
    this size, and large ones are costly: with 1 MiB each first token came 2 ms later than with 128 KiB (on 2
    vCPU AMD EPYC), which hold about 32,000 tokens of English."""
    routers_per_node: int = Field(default=2, ge=1, le=8)
    """On each node with a proxy; one that is replaced or has failed leaves the others to be asked."""
    new_replica_delay_s: float = Field(default=3.0, ge=0, le=60)
    """A new replica gets requests only that long after the router heard of it: the proxy must know it."""


def create_policy(name: PolicyName, rng: random.Random) -> Policy:
    match name:
        case "auto" | "latency":
            return LatencyPolicy(INITIAL_COST, rng)
        case "round_robin":
            return RoundRobin()
        case "least_requests":
            return LeastRequests(rng)
        case "power_of_two":
            return PowerOfTwo(rng)
        case "prefix_affinity":
            return PrefixAffinity(rng)
    raise ValueError(f"policy {name!r} needs no router")
