"""A locust user that sends streaming chat requests at given times, and times tokens from when they were due.

Open loop: a request that is late because the server or this machine is busy counts as late (no coordinated
omission). TTFT, ITL, TPOT and end to end become locust's own entries, by tier.
"""

import json
import re
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import gevent
from locust import FastHttpUser, task
from locust.contrib.fasthttp import ResponseContextManager
from locust.env import Environment

from serving.dispatch.headers import PEREGRINE_ROUTE
from tests.load.scenarios import Arrival, Kind

REQUEST_TIMEOUT_S = 300.0
_ACTUAL_TTFT = re.compile(r"actual-ttft-ms=([0-9.]+)")


@dataclass
class Outcome:
    """What became of one request; times in seconds since it was due."""

    kind: Kind
    status: int = 0
    retry_after: str | None = None
    ttft_at_replica_s: float | None = None
    """As `x-peregrine-route` says."""
    token_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    is_complete: bool = False
    is_aborted: bool = False
    error: str | None = None

    @property
    def is_in_time(self) -> bool:
        """Its first token, where it was admitted."""
        return bool(self.token_s) and self.token_s[0] <= self.kind.deadline_s

    @property
    def kept(self) -> bool:
        """All of its deadlines, where it was admitted."""
        return self.is_in_time and (self.kind.total_s is None or self.end_s <= self.kind.total_s)


class StreamingUser(FastHttpUser):
    """One user is all requests: each runs in a greenlet of its own.

    locust's fast client: with the usual one this process is late before two cores of servers are.
    """

    abstract = True
    concurrency = 10_000  # connections; no request ever waits for another one's
    network_timeout = connection_timeout = REQUEST_TIMEOUT_S
    model = ""
    arrivals: ClassVar[list[Arrival]] = []
    outcomes: ClassVar[list[Outcome]] = []

    @task
    def send_all(self) -> None:
        begin, jobs = time.monotonic(), []
        for arrival in self.arrivals:
            gevent.sleep(max(0.0, begin + arrival.due_s - time.monotonic()))
            jobs.append(gevent.spawn(self._one, arrival, begin + arrival.due_s))
        gevent.joinall(jobs, timeout=REQUEST_TIMEOUT_S)
        type(self).outcomes = [
            job.value or Outcome(a.kind, error="hangs") for job, a in zip(jobs, self.arrivals, strict=True)
        ]
        self.environment.runner.quit()

    def _one(self, arrival: Arrival, due: float) -> Outcome:
        outcome = Outcome(arrival.kind)
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": arrival.prompt}],
            "max_tokens": arrival.kind.output_tokens,
            "ignore_eos": True,
            "stream": True,
            "service_tier": arrival.kind.tier,
        }
        try:
            with self.client.post(
                "/v1/chat/completions",
                json=body,
                stream=True,
                name=arrival.kind.tier,
                catch_response=True,
            ) as response:
                outcome.status = response.status_code
                if not outcome.status:
                    raise response.error
                outcome.retry_after = response.headers.get("Retry-After")
                if actual := _ACTUAL_TTFT.search(response.headers.get(PEREGRINE_ROUTE, "")):
                    outcome.ttft_at_replica_s = float(actual[1]) / 1e3
                if response.status_code == 200:
                    self._read(response, arrival, due, outcome)
                elif response.status_code != 429:
                    outcome.error = f"status {response.status_code}: {response.text[:200]}"
                # 429 is the wanted answer to overload, counted apart.
                response.failure(outcome.error) if outcome.error else response.success()
        except Exception as error:  # whatever breaks a request is a result of the test
            outcome.error = repr(error)
        outcome.end_s = time.monotonic() - due
        _report(self.environment, outcome)
        return outcome

    def _read(self, response: ResponseContextManager, arrival: Arrival, due: float, outcome: Outcome) -> None:
        while line := response.stream.readline(b"\n"):
            if not line.startswith(b"data: "):
                continue
            if line == b"data: [DONE]\n":
                outcome.is_complete = True
                response.stream.read()  # the last chunk, so that the connection can be used again
                return
            event = json.loads(line[6:])
            if "error" in event:
                outcome.error = event["error"]["message"]
                return
            choices = event["choices"]
            if choices and choices[0]["delta"].get("content"):
                outcome.token_s.append(time.monotonic() - due)
                if arrival.aborts and len(outcome.token_s) == 3:
                    outcome.is_aborted = True
                    response.stream.release()  # in the middle of a body: closes the connection
                    return


def _report(environment: Environment, outcome: Outcome) -> None:
    def fire(what: str, seconds: float) -> None:
        environment.events.request.fire(
            request_type=what,
            name=outcome.kind.tier,
            response_time=1e3 * seconds,
            response_length=0,
            exception=None,
            context={},
        )

    times = outcome.token_s
    if not times:
        return
    fire("TTFT", times[0])
    for earlier, later in pairwise(times):
        fire("ITL", later - earlier)
    if len(times) > 1:
        fire("TPOT", (times[-1] - times[0]) / (len(times) - 1))
    if outcome.is_complete:
        fire("E2E", outcome.end_s)
