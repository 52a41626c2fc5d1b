"""The router's own books: what it sent to each replica and has not seen the end of."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engine import MAX_PRIORITY
from serving.routing.requests import RoutedRequest

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(slots=True)
class Flight:
    """One request on one replica. Closing it takes from the counters exactly what opening it put in.

    `saved_tokens` is the part of the prompt that the router expects in the replica's prefix cache.
    `predicted_*` are before the residual's correction, seconds; None where the policy predicts nothing.
    """

    request: RoutedRequest
    slot: int
    saved_tokens: int
    expected_output_tokens: int
    dispatched_at_s: float
    predicted_ttft_s: float | None = None
    predicted_tpot_s: float | None = None
    first_token_at_s: float | None = None

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens that the replica must compute; at least the last one, which gives the first
        logits.
        """
        return max(1, self.request.prompt_tokens - self.saved_tokens)

    @property
    def kv_tokens(self) -> int:
        """Mean size in the KV cache over the request's life: the prompt and half of the answer.

        The shared part of the prompt is there already, and counted with the request that computed it.
        """
        return self.prefill_tokens + self.expected_output_tokens // 2


@dataclass
class Ledger:
    """Counters per replica slot, as arrays, and the flights they are made of.

    Every counter is the sum over open flights. A flight is opened once, moved by its first token once and
    closed once; repeated, late and unknown events return None and change nothing, so that no order of events
    can make a counter negative or leave something in it. Nothing else writes to them: neither health checks
    nor the replicas' own statistics.
    """

    max_replicas: int
    in_flight_from: IntArray = field(init=False)  # [priorities, slots], requests at least so important
    pending_from: IntArray = field(init=False)  # [priorities, slots], their prompt tokens still to compute
    in_flight: IntArray = field(init=False)  # [slots], requests; the last row of `in_flight_from`
    active_decodes: IntArray = field(init=False)  # [slots], requests past their first token
    pending_prefill: IntArray = field(init=False)  # [slots], prompt tokens still to compute; as well
    expected_output: IntArray = field(init=False)  # [slots], tokens
    saved_tokens: IntArray = field(init=False)  # [slots], prompt tokens expected in the prefix cache
    kv_tokens: IntArray = field(init=False)  # [slots]
    _head_tokens: IntArray = field(init=False)
    _head_since_s: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        def zeros() -> IntArray:
            return np.zeros(self.max_replicas, np.int64)

        self.in_flight_from, self.pending_from = (
            np.zeros((MAX_PRIORITY + 1, self.max_replicas), np.int64) for _ in range(2)
        )
        self.in_flight, self.pending_prefill = self.in_flight_from[-1], self.pending_from[-1]
        self.active_decodes = zeros()
        self.expected_output, self.saved_tokens, self.kv_tokens = zeros(), zeros(), zeros()
        self._head_tokens, self._head_since_s = zeros(), np.zeros(self.max_replicas)
        self._flights: dict[str, Flight] = {}
        # Flights without a first token, in order of dispatch: the engine prefills in that order.
        self._prefilling: list[dict[str, Flight]] = [{} for _ in range(self.max_replicas)]

    def __len__(self) -> int:
        return len(self._flights)

    def find(self, request_id: str) -> Flight | None:
        return self._flights.get(request_id)

    def open(self, flight: Flight) -> bool:
        """Enter a dispatched request; False, and no change, if its id is open already."""
        request_id = flight.request.request_id
        if request_id in self._flights:
            return False
        self._flights[request_id] = flight
        self._count(flight, 1)
        self.pending_from[flight.request.priority :, flight.slot] += flight.prefill_tokens
        queue = self._prefilling[flight.slot]
        queue[request_id] = flight
        if len(queue) == 1:
            self._start_head(flight.slot, flight.dispatched_at_s)
        return True

    def first_token(self, request_id: str, now_s: float) -> Flight | None:
        """Move a request from prefill to decode; None if it is unknown, closed or moved already."""
        flight = self._flights.get(request_id)
        if flight is None or flight.first_token_at_s is not None:
            return None
        self._leave_prefill(flight, now_s)
        flight.first_token_at_s = now_s
        self.active_decodes[flight.slot] += 1
        return flight

    def close(self, request_id: str, now_s: float) -> Flight | None:
        """Take a request out, whatever its end was; None if it is unknown or closed already."""
        flight = self._flights.pop(request_id, None)
        if flight is None:
            return None
        self._count(flight, -1)
        if flight.first_token_at_s is None:
            self._leave_prefill(flight, now_s)
        else:
            self.active_decodes[flight.slot] -= 1
        return flight

    def close_slot(self, slot: int, now_s: float) -> list[Flight]:
        """Take out every request of a replica that is gone."""
        ids = [request_id for request_id, flight in self._flights.items() if flight.slot == slot]
        return [flight for request_id in ids if (flight := self.close(request_id, now_s)) is not None]

    def remaining_prefill(
        self, num_slots: int, now_s: float, tokens_per_s: FloatArray, priority: int = MAX_PRIORITY
    ) -> FloatArray:
        """Pending prompt tokens of requests that are at least so important, less what the oldest prompt's
        progress must be by now. [num_slots]

        Between its start and its first token a prompt's progress is not seen, so it is taken from the rate.
        A quarter of the oldest prompt stays however long it takes: a hung replica must not look idle.
        """
        pending = self.pending_from[priority, :num_slots]
        # The oldest may be a less important one, which counts for nothing here.
        head = np.minimum(self._head_tokens[:num_slots], pending)
        progress = (now_s - self._head_since_s[:num_slots]) * tokens_per_s
        return np.subtract(pending, np.minimum(progress, 0.75 * head), dtype=np.float64)

    def _count(self, flight: Flight, sign: int) -> None:
        slot = flight.slot
        self.in_flight_from[flight.request.priority :, slot] += sign
        self.expected_output[slot] += sign * flight.expected_output_tokens
        self.saved_tokens[slot] += sign * flight.saved_tokens
        self.kv_tokens[slot] += sign * flight.kv_tokens

    def _leave_prefill(self, flight: Flight, now_s: float) -> None:
        self.pending_from[flight.request.priority :, flight.slot] -= flight.prefill_tokens
        queue = self._prefilling[flight.slot]
        was_head = next(iter(queue.values())) is flight
        del queue[flight.request.request_id]
        if was_head:
            self._start_head(flight.slot, now_s)

    def _start_head(self, slot: int, now_s: float) -> None:
        head = next(iter(self._prefilling[slot].values()), None)
        self._head_tokens[slot] = head.prefill_tokens if head else 0
        self._head_since_s[slot] = now_s
