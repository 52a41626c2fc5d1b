"""A TEST DOUBLE of the engine: no model, steps that take a set time, text that means nothing.

It batches continuously as the real one does: a step decodes every running request and computes some prompt
tokens in order of arrival. A prompt that contains HANG stops its steps for good, as a stuck kernel would.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine import (
    EngineConfig,
    EngineDeadError,
    EngineStats,
    ModelInfo,
    PoolingParams,
    RequestOutput,
    RequestTimings,
    SamplingParams,
    StepCost,
    StepTimes,
    Urgency,
)
from engine.urgency import NOT_URGENT

HANG = "<hang>"
BYTES_PER_TOKEN = 4
CHUNK_TOKENS = 512
NUM_BLOCKS = 13_000
MAX_MODEL_LEN = 100_000


@dataclass(frozen=True)
class Speed:
    """Of a step, in seconds: about a tenth of an H100's, so that two cores can play four of it."""

    base_s: float = 0.02
    per_active_s: float = 0.0005
    prefill_token_s: float = 0.0002

    @property
    def cost(self) -> StepCost:
        """What the real engine would have measured."""
        return StepCost(self.base_s, self.per_active_s, 0.0, self.prefill_token_s)

    def step_s(self, num_decodes: int, num_prompt_tokens: int) -> float:
        return self.base_s + self.per_active_s * num_decodes + self.prefill_token_s * num_prompt_tokens


class Outputs:
    """One sequence's, none merged. In asyncio.Queue's place: that took a tenth of a replica's event loop."""

    def __init__(self) -> None:
        self._items: deque[RequestOutput | Exception] = deque()
        self._loop = asyncio.get_running_loop()
        self._filled: asyncio.Future[None] | None = None

    def put_nowait(self, item: RequestOutput | Exception) -> None:
        self._items.append(item)
        if self._filled is not None and not self._filled.done():
            self._filled.set_result(None)

    async def get(self) -> RequestOutput | Exception:
        while not self._items:
            self._filled = self._loop.create_future()
            await self._filled
        return self._items.popleft()


@dataclass(eq=False)
class TimedSequence:
    prompt_tokens: int
    max_tokens: int
    arrival: float
    queue: Outputs
    request_id: str
    remaining_prefill: int
    produced: int = 0


@dataclass
class TimedEngine:
    """Implements `engine.api.InferenceEngine`."""

    name: str
    speed: Speed
    _sequences: list[TimedSequence] = field(default_factory=list)
    _timings: list[RequestTimings] = field(default_factory=list)
    _is_hung: bool = False
    _steps: int = 0
    _output_tokens: int = 0
    _prompt_tokens: int = 0
    _last_step_s: float = 0.0

    def __post_init__(self) -> None:
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    @property
    def model(self) -> ModelInfo:
        return ModelInfo(self.name, "double", 0, MAX_MODEL_LEN, 256, 0, "none")

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if HANG in text:
            self._is_hung = True
        return [ord(c) % 256 for c in text[::BYTES_PER_TOKEN]] or [0]

    def chat_template(self, *, has_tools: bool) -> str | None:
        return None

    async def tokenize_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        return await self.tokenize("\n".join(str(m.get("content") or "") for m in messages))

    def token_id(self, token: str) -> int | None:
        return None

    def token(self, token_id: int) -> str:
        return "word"

    def token_bytes(self, token_id: int) -> bytes:
        return b" word"

    def detokenize(self, token_ids: Sequence[int]) -> str:
        return " word" * len(token_ids)

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        arrival_time: float | None = None,
        urgency: Urgency = NOT_URGENT,
    ) -> AsyncGenerator[RequestOutput, None]:
        num_prompt = len(prompt_token_ids)
        arrival = time.monotonic() if arrival_time is None else arrival_time
        sequence = TimedSequence(
            num_prompt, params.max_tokens or 16, arrival, Outputs(), request_id, num_prompt
        )
        self._enter(sequence, prompt_token_ids, params, urgency)
        try:
            while True:
                output = await sequence.queue.get()
                if isinstance(output, Exception):
                    raise output
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            self._leave(sequence)

    def embed(
        self,
        prompt_token_ids: Sequence[int],
        params: PoolingParams,
        *,
        request_id: str,
        arrival_time: float | None = None,
        urgency: Urgency = NOT_URGENT,
    ) -> AsyncGenerator[RequestOutput, None]:
        raise NotImplementedError("the double has no vectors")

    async def abort(self, request_id: str) -> None:
        for sequence in [s for s in self._sequences if s.request_id == request_id]:
            self._leave(sequence)

    def stats(self) -> EngineStats:
        running = [s for s in self._sequences if s.remaining_prefill == 0]
        held = sum(s.prompt_tokens + s.produced for s in self._sequences) // 16
        return EngineStats(
            num_running=len(running),
            num_waiting=len(self._sequences) - len(running),
            num_blocks=NUM_BLOCKS,
            num_free_blocks=max(0, NUM_BLOCKS - held),
            num_cached_blocks=0,
            num_waiting_tokens=sum(s.remaining_prefill for s in self._sequences),
            total_steps=self._steps,
            total_prompt_tokens=self._prompt_tokens,
            total_cached_tokens=0,
            total_output_tokens=self._output_tokens,
            total_preemptions=0,
            last_step_s=self._last_step_s,
            step_cost=self.speed.cost,
            token_budget=CHUNK_TOKENS,
        )

    def drain_timings(self) -> list[RequestTimings]:
        timings, self._timings = self._timings, []
        return timings

    def drain_step_times(self) -> StepTimes:
        return StepTimes()

    async def check_health(self) -> None:
        if self._is_hung:
            await asyncio.Event().wait()  # as a core that never comes back from its step

    async def shutdown(self) -> None:
        self._task.cancel()
        for sequence in self._sequences:
            sequence.queue.put_nowait(EngineDeadError("shut down"))

    def _enter(
        self, sequence: TimedSequence, token_ids: Sequence[int], params: SamplingParams, urgency: Urgency
    ) -> None:
        self._sequences.append(sequence)
        self._wake.set()

    def _leave(self, sequence: TimedSequence) -> None:
        """Whatever its end; more than once is no harm."""
        with contextlib.suppress(ValueError):
            self._sequences.remove(sequence)

    async def _run(self) -> None:
        due = time.monotonic()
        while True:
            if not self._sequences:
                self._wake.clear()
                await self._wake.wait()
                due = time.monotonic()
            if self._is_hung:
                await asyncio.Event().wait()
            decoding = [s for s in self._sequences if s.remaining_prefill == 0]
            budget, prefilled = CHUNK_TOKENS, []
            for sequence in self._sequences:
                if sequence.remaining_prefill and budget:
                    chunk = min(budget, sequence.remaining_prefill)
                    budget -= chunk
                    prefilled.append((sequence, chunk))
            step_s = self.speed.step_s(len(decoding), CHUNK_TOKENS - budget)
            # The next step is due when this one was, not when this machine's scheduler got to it.
            due = max(due, time.monotonic() - step_s) + step_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            self._steps += 1
            self._last_step_s = step_s
            for sequence, chunk in prefilled:
                sequence.remaining_prefill -= chunk
                self._prompt_tokens += chunk
                if sequence.remaining_prefill == 0:
                    self._emit(sequence)
            for sequence in decoding:
                self._emit(sequence)

    def _emit(self, sequence: TimedSequence) -> None:
        if sequence not in self._sequences:
            return
        sequence.produced += 1
        self._output_tokens += 1
        is_last = sequence.produced >= sequence.max_tokens
        if is_last:
            self._sequences.remove(sequence)
        sequence.queue.put_nowait(
            RequestOutput(
                sequence.request_id,
                0,
                " word",
                (0,),
                sequence.prompt_tokens,
                0,
                sequence.produced,
                finish_reason="length" if is_last else None,
            )
        )


async def start_fast(config: EngineConfig) -> TimedEngine:
    """The factory for replicas that never wait: what is measured then is the path."""
    return TimedEngine(config.served_model_name or "double", Speed(0.0, 0.0, 1e-9))


async def start_timed_engine(config: EngineConfig) -> TimedEngine:
    """The factory for replicas."""
    return TimedEngine(config.served_model_name or "double", Speed())
