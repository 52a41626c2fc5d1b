"""What goes into a routing decision and what comes out of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class RequestKind(Enum):
    """Whose time counts: the first token's, or that of the whole answer."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


class Outcome(Enum):
    """How a request left its replica."""

    FINISHED = "finished"
    ABORTED = "aborted"  # by the client: says nothing about the replica
    FAILED = "failed"
    REPLICA_LOST = "replica_lost"


@dataclass(frozen=True, slots=True)
class RoutedRequest:
    """What a router knows of a request before it has run.

    prompt_tokens: length of the prompt, tokens.
    max_output_tokens: the client's limit, tokens; None where it gave none.
    block_hashes: chain hashes of the prompt's full blocks (`prefix_index.chain_hashes`).
    priority: 0 is the most important; engines serve those of smaller numbers first where places run out.
    ttft_budget_s: seconds from now in which the first token is due; None where nothing was promised.
    failed_on: replicas that failed this request before; it goes elsewhere if there is an elsewhere.
    """

    request_id: str
    prompt_tokens: int
    max_output_tokens: int | None = None
    block_hashes: Sequence[int] = ()
    kind: RequestKind = RequestKind.INTERACTIVE
    priority: int = 0
    ttft_budget_s: float | None = None
    failed_on: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class ReplicaStats:
    """A replica's own account of itself. `published_at_s` is on the router's clock."""

    published_at_s: float
    pending_prefill_tokens: int
    active_decodes: int
    kv_tokens: int


@dataclass(frozen=True, slots=True)
class Decision:
    """The chosen replica and why. The predictions are None where the policy makes none."""

    replica_id: str
    reason: str
    runner_up_id: str | None = None
    predicted_ttft_s: float | None = None
    predicted_tpot_s: float | None = None
    saved_tokens: int = 0
    expected_output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Overloaded:
    """No replica may take the request now.

    predicted_wait_s: when it is worth another try, seconds from now (Retry-After).
    """

    predicted_wait_s: float
    reason: str
