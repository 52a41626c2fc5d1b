"""A dispatcher on a clock that tests turn."""

import json

from engine import StepCost
from serving.dispatch.dispatcher import Answer, Dispatcher
from serving.dispatch.headers import FLIGHT, FlightNote
from serving.dispatch.messages import Hello, Report
from serving.tiers import TIERS
from tests.serving.routing.helpers import ManualClock, make_router

BODY = json.dumps({"prompt": "Hello there", "max_tokens": 5}).encode()


def make_dispatcher(num_replicas: int = 2, **rest) -> tuple[Dispatcher, ManualClock]:
    router, _, clock = make_router(0)
    dispatcher = Dispatcher(router, TIERS, clock, reply_to="h:1", **rest)
    dispatcher.list_replicas(f"r{i}" for i in range(num_replicas))
    return dispatcher, clock


def hello(replica_id: str) -> Hello:
    return Hello(replica_id, max_num_seqs=64, chunk_tokens=512, kv_capacity_tokens=100_000)


def report(total_steps: int, num_running: int = 1) -> Report:
    return Report(num_running, 0, 0, total_steps, StepCost(0.01, 0.001, 0.0, 0.001))


def send(dispatcher: Dispatcher, body: bytes = BODY) -> tuple[str, str]:
    """Flight and replica."""
    answer = dispatcher.route(body, len(body))
    assert isinstance(answer, Answer)
    return note_of(answer).flight_id, answer.replica_id


def note_of(answer: Answer) -> FlightNote:
    return FlightNote.read(answer.headers[FLIGHT])


def is_empty(dispatcher: Dispatcher) -> bool:
    return not any(dispatcher.counters().values())
