"""One sequence on its way through the engine."""

import enum
import random
from collections.abc import Sequence

from engine.outputs import FinishReason
from engine.pooling_params import PoolingParams
from engine.sampling_params import SamplingParams
from engine.speculation import Drafter
from engine.structured import GrammarState
from engine.urgency import NOT_URGENT, Urgency


class RequestStatus(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()
    FINISHED_STOPPED = enum.auto()
    FINISHED_LENGTH = enum.auto()
    FINISHED_ABORTED = enum.auto()

    @property
    def is_finished(self) -> bool:
        return self in _FINISH_REASONS

    @property
    def finish_reason(self) -> FinishReason | None:
        return _FINISH_REASONS.get(self)


_FINISH_REASONS: dict[RequestStatus, FinishReason] = {
    RequestStatus.FINISHED_STOPPED: "stop",
    RequestStatus.FINISHED_LENGTH: "length",
    RequestStatus.FINISHED_ABORTED: "abort",
}


class Request:
    """State of one sequence, owned by the Scheduler.

    `num_computed_tokens` counts the tokens whose keys and values lie in the KV cache; a request is in
    prefill while more than one token is missing there. With a step in flight it counts that step's tokens
    too, and `num_pending_tokens` those that the step samples, drafts included: their ids are still on the
    device. `block_ids` and `block_hashes` belong to the KVCacheManager. With `pooling` the request ends with
    its prompt: nothing is sampled. `drafter` is there from the first
    decode step on where drafts are allowed. `grammar` stands behind the output's last token where there is a
    constraint; without its mask no token may be sampled.
    """

    __slots__ = (
        "all_token_ids",
        "arrival_number",
        "arrival_time",
        "block_hashes",
        "block_ids",
        "drafter",
        "first_scheduled_time",
        "grammar",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_pending_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_remembered_blocks",
        "params",
        "pooling",
        "request_id",
        "seed",
        "status",
        "stop_reason",
        "urgency",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        max_model_len: int,
        arrival_time: float = 0.0,
        urgency: Urgency = NOT_URGENT,
        pooling: PoolingParams | None = None,
    ) -> None:
        self.request_id = request_id
        self.params = params
        self.pooling = pooling
        self.seed = params.seed if params.seed is not None else random.getrandbits(64)
        self.arrival_time = arrival_time
        self.arrival_number = 0  # the scheduler's
        self.urgency = urgency
        self.all_token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(self.all_token_ids)
        self.num_computed_tokens = 0
        self.num_pending_tokens = 0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.first_scheduled_time: float | None = None
        self.status = RequestStatus.WAITING
        self.stop_reason: int | str | None = None
        self.block_ids: list[int] = []
        self.block_hashes: list[bytes] = []
        self.num_remembered_blocks = 0
        self.drafter: Drafter | None = None
        self.grammar: GrammarState | None = None
        limit = max_model_len if pooling is not None else max_model_len - 1
        if not 0 < self.num_prompt_tokens <= limit:
            raise ValueError(f"{request_id}: {self.num_prompt_tokens} prompt tokens, limit {limit}")

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.all_token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.all_token_ids[self.num_prompt_tokens :]

    @property
    def num_missing_tokens(self) -> int:
        """Tokens known or pending, but not yet in the KV cache: 1 while decoding."""
        return len(self.all_token_ids) + self.num_pending_tokens - self.num_computed_tokens

    @property
    def turn(self) -> tuple[float, int]:
        """Whose turn it is: earliest deadline first, in order of arrival among equals."""
        return self.urgency.deadline, self.arrival_number

    @property
    def is_decoding(self) -> bool:
        return self.num_missing_tokens == 1 and self.num_output_tokens + self.num_pending_tokens > 0

    @property
    def can_use_prefix_cache(self) -> bool:
        # Prompt logprobs and a mean need something of every prompt position, so every position is computed.
        if self.pooling is not None and self.pooling.needs_every_token:
            return False
        return self.params.prompt_logprobs is None

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id}, {self.status.name}, computed {self.num_computed_tokens} of "
            f"{self.num_tokens})"
        )
