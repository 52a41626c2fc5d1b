"""A TEST DOUBLE of the engine whose steps are planned by the engine's own scheduler.

Seats, deadlines, preemption, KV blocks and prefix hits are the real ones; the model is a wait, as in
tests.timed_engine.
"""

import asyncio
import dataclasses
import time
from collections.abc import Sequence

from engine import EngineConfig, EngineStats, SamplingParams, Urgency
from engine.kv_cache_manager import KVCacheManager
from engine.request import Request, RequestStatus
from engine.scheduler import Scheduler, SchedulerOutput
from tests.timed_engine import CHUNK_TOKENS, MAX_MODEL_LEN, NUM_BLOCKS, Speed, TimedEngine, TimedSequence

_ANY_TOKEN = 1
# About an eighth of an H100's: slow enough for two cores to play four of it, fast enough for the tiers.
_SPEED = Speed(base_s=0.015, per_active_s=0.0005, prefill_token_s=0.0001)


class ScheduledEngine(TimedEngine):
    def __init__(self, name: str, speed: Speed, max_num_seqs: int) -> None:
        self._scheduler = Scheduler(
            KVCacheManager(NUM_BLOCKS, 16),
            max_num_seqs=max_num_seqs,
            token_budget=CHUNK_TOKENS,
            max_model_len=MAX_MODEL_LEN,
        )
        super().__init__(name, speed)

    def stats(self) -> EngineStats:
        scheduler, pool = self._scheduler, self._scheduler.kv_cache.pool
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_blocks=NUM_BLOCKS,
            num_free_blocks=pool.num_free_blocks,
            num_cached_blocks=0,
            num_waiting_tokens=scheduler.num_waiting_tokens,
            total_steps=self._steps,
            total_prompt_tokens=self._prompt_tokens,
            total_cached_tokens=0,
            total_output_tokens=self._output_tokens,
            total_preemptions=scheduler.total_preemptions,
            last_step_s=self._last_step_s,
            step_cost=self.speed.cost,
            token_budget=CHUNK_TOKENS,
        )

    def _enter(
        self, sequence: TimedSequence, token_ids: Sequence[int], params: SamplingParams, urgency: Urgency
    ) -> None:
        super()._enter(sequence, token_ids, params, urgency)
        self._scheduler.add_request(
            Request(
                sequence.request_id,
                token_ids,
                params,
                max_model_len=MAX_MODEL_LEN,
                arrival_time=sequence.arrival,
                urgency=urgency,
            )
        )

    def _leave(self, sequence: TimedSequence) -> None:
        super()._leave(sequence)
        self._scheduler.finish_request(sequence.request_id, RequestStatus.FINISHED_ABORTED)

    async def _run(self) -> None:
        due = time.monotonic()
        while True:
            if not self._scheduler.has_work:
                self._wake.clear()
                await self._wake.wait()
                due = time.monotonic()
            if self._is_hung:
                await asyncio.Event().wait()
            plan = self._scheduler.schedule()
            if not plan.scheduled:  # all that was planned gave way
                await asyncio.sleep(0)
                continue
            step_s = self.speed.step_s(plan.num_decodes, plan.num_prompt_tokens)
            due = max(due, time.monotonic() - step_s) + step_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            self._steps += 1
            self._last_step_s = step_s
            self._prompt_tokens += plan.num_prompt_tokens
            self._scheduler.observe(plan, step_s)
            self._update(plan)

    def _update(self, plan: SchedulerOutput) -> None:
        sampled = {p.request.request_id: (_ANY_TOKEN,) for p in plan.scheduled if p.is_sampled}
        sequences = {s.request_id: s for s in self._sequences}
        for request, _ in self._scheduler.update(plan, sampled):
            if (sequence := sequences.get(request.request_id)) is not None:
                self._emit(sequence)


async def start_slow_first(config: EngineConfig) -> ScheduledEngine:
    """The factory for replicas of which the first is half as fast as the others."""
    from ray import serve

    rank = serve.get_replica_context().rank
    factor = 2 if rank is not None and rank.rank == 0 else 1
    speed = Speed(*(factor * seconds for seconds in dataclasses.astuple(_SPEED)))
    return ScheduledEngine(config.served_model_name or "double", speed, config.max_num_seqs)


async def start_scheduled_engine(config: EngineConfig) -> ScheduledEngine:
    """The factory for replicas."""
    return ScheduledEngine(config.served_model_name or "double", _SPEED, config.max_num_seqs)
