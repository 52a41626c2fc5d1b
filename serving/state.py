"""What a replica's routes share: the engine, once there is one, and admission."""

import asyncio
import functools
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from importlib.metadata import PackageNotFoundError, version

from engine import InferenceEngine, PoolingParams, RequestOutput, SamplingParams, Urgency
from monitoring import Recorder
from serving.admission import Admission
from serving.api.responses.store import ResponseStore
from serving.dispatch.reporter import RouterLinks
from serving.errors import ApiError, not_ready
from serving.settings import ServingSettings
from serving.status.activity import Activity
from serving.stream_guard import StreamGuard
from serving.telemetry.exchange import Exchange
from serving.tenants.gate import Gate
from serving.tiers import Service

_STATS_PERIOD_S = 0.5


@functools.cache  # every answer names it, and it stands in a file that takes a millisecond to parse
def package_version() -> str:
    try:
        return version("peregrine-llm")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0.0.0+checkout"


class ReplicaState:
    """Holds the engine. Requests are admitted only between `ready` and `start_draining`.

    links: to the routers; None where there is none.
    guard: of the streams, where this process may be killed alone.
    """

    def __init__(
        self,
        settings: ServingSettings,
        recorder: Recorder,
        replica: str,
        links: RouterLinks | None = None,
        guard: StreamGuard | None = None,
    ) -> None:
        self.settings = settings
        self.recorder = recorder
        self.replica = replica
        self.links = links
        self.guard = guard
        self.created = int(time.time())
        self.admission = Admission(settings, recorder)
        self.activity = Activity()
        self.responses = ResponseStore(settings.responses)
        self.observers: list[Callable[[Exchange], None]] = [self.activity.record]
        """Called in order with every exchange that has ended."""
        self.gate: Gate | None = None
        """Where there are tenants; set before the app is made."""
        self.kv_block_tokens = 16
        self.kv_dtype = "auto"
        """As configured."""
        self.keeps_prompts = False
        """Exchanges carry their prompts, for a log that was asked to show them."""
        self.leaving = asyncio.Event()
        """Set when this replica is to go: no new connection comes, and what is open is to end soon."""
        self._engine: InferenceEngine | None = None
        self._is_draining = False

    def ready(self, engine: InferenceEngine) -> None:
        """The engine is loaded and warm: requests may come."""
        self._engine = engine
        self.recorder.record_ready(True)

    def start_draining(self) -> None:
        self._is_draining = True
        self.recorder.record_ready(False)

    @property
    def engine(self) -> InferenceEngine:
        """Raises ApiError 503 while there is none, or no more."""
        if self._engine is None:
            raise not_ready("The model is still loading.")
        if self._is_draining:
            raise not_ready("This replica is shutting down.")
        return self._engine

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    @property
    def loaded_engine(self) -> InferenceEngine | None:
        """The engine as long as it is there, also while draining."""
        return self._engine

    def observe(self, exchange: Exchange) -> None:
        for observer in self.observers:
            observer(exchange)

    @contextmanager
    def admit(self, service: Service) -> Iterator[InferenceEngine]:
        """A place among the requests in flight.

        Raises ApiError 429 when those of the tier are taken, 503 when not ready.
        """
        engine = self.engine
        self.admission.prompts_s = engine.stats().prompts_s
        with self.admission.place(service):
            yield engine

    def check_model(self, name: str) -> None:
        """Raises ApiError 404 when `name` is not the served model."""
        served = self.engine.model.name
        if name != served:
            raise ApiError(
                404,
                f"The model '{name}' does not exist. This server has: '{served}'.",
                param="model",
                code="model_not_found",
            )

    async def publish_stats(self) -> None:
        """Feed the recorder from the engine until cancelled."""
        while True:
            self.collect()
            await asyncio.sleep(_STATS_PERIOD_S)

    def collect(self) -> None:
        if self._engine is not None:
            self.recorder.record_stats(self._engine.stats(), self.admission.num_inflight)
            steps = self._engine.drain_step_times()
            self.recorder.record_steps(steps)
            self.activity.record_gaps((gap_s, count) for (_, gap_s), count in steps.gaps.items())
            for timings in self._engine.drain_timings():
                self.recorder.record_timings(timings)
            self.activity.sample(self._engine.stats().total_output_tokens)


async def generate_all(
    engine: InferenceEngine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | PoolingParams,
    request_id: str,
    arrival_time: float,
    urgency: Urgency,
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Outputs of several prompts as they come, each with its prompt's number. Closing it aborts all."""

    def start(prompt: Sequence[int], own_id: str) -> AsyncGenerator[RequestOutput, None]:
        if isinstance(params, PoolingParams):
            return engine.embed(prompt, params, request_id=own_id, arrival_time=arrival_time, urgency=urgency)
        return engine.generate(prompt, params, request_id=own_id, arrival_time=arrival_time, urgency=urgency)

    if len(prompts) == 1:
        stream = start(prompts[0], request_id)
        async with aclosing(stream) as outputs:
            async for output in outputs:
                yield 0, output
        return

    queue: asyncio.Queue[tuple[int, RequestOutput | BaseException | None]] = asyncio.Queue()

    async def pump(number: int, prompt: Sequence[int]) -> None:
        try:
            stream = start(prompt, f"{request_id}-{number}")
            async with aclosing(stream) as outputs:
                async for output in outputs:
                    queue.put_nowait((number, output))
            queue.put_nowait((number, None))
        except Exception as error:
            queue.put_nowait((number, error))

    tasks = [asyncio.create_task(pump(i, prompt)) for i, prompt in enumerate(prompts)]
    try:
        num_open = len(tasks)
        while num_open:
            number, item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield number, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
