"""EngineCore: the synchronous loop of schedule, run, update."""

import concurrent.futures
import math
import time
from dataclasses import replace
from typing import Any

from engine.checkpoint import Checkpoint, open_checkpoint
from engine.config import EngineConfig
from engine.kv_cache_manager import KVCacheManager
from engine.messages import AbortRequests, AddRequest, RawLogprobs, StepOutputs, TokenOutput
from engine.model_runner import Runner, StepResult, create_runner
from engine.outputs import EngineStats, ModelInfo
from engine.pacing import StepPacer
from engine.pooling import PooledPrompts
from engine.request import Request, RequestStatus
from engine.sampler import SampledToken
from engine.sampling_params import SamplingParams
from engine.scheduler import ScheduledRequest, Scheduler, SchedulerOutput
from engine.speculation import DraftPolicy
from engine.step_cost import StepCostMeter
from engine.structured import ConstrainedArrivals, GrammarCompiler

_PROFILE_TOKENS = (16, 256)  # of prompts, where no other sizes matter
_PROFILE_DECODES = 8
_PROFILE_RUNS = 3  # of a chunk's size; the first one may load kernels
_GRAMMAR_WAIT_S = 0.01  # for a grammar where there is nothing else to do, before messages are looked at again
_PROFILE_S = 0.05  # a longer one is not repeated: what disturbs it counts for little


class EngineCore:
    """One model on one device. Not thread-safe: whoever drives `step` also adds and aborts.

    Where the runner can, one step stays in flight between calls: the next one is planned and launched
    before its results are waited for, so that the device never waits for the host.
    """

    def __init__(self, config: EngineConfig, checkpoint: Checkpoint | None = None) -> None:
        """`checkpoint` stands in for the one at `config.model` (benchmarks on random weights)."""
        checkpoint = checkpoint or open_checkpoint(config.model)
        self.runner: Runner = create_runner(config, checkpoint)
        self.kv_cache = KVCacheManager(
            self.runner.num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching
        )
        self.scheduler = Scheduler(
            self.kv_cache,
            max_num_seqs=config.max_num_seqs,
            token_budget=self.runner.token_budget,
            max_model_len=self.runner.max_model_len,
            eos_token_ids=checkpoint.eos_token_ids,
            draft_policy=DraftPolicy.for_device(self.runner.device.type, config.speculative_tokens),
            pacer=StepPacer.for_device(self.runner.device.type, config.step_target_s, self.runner.is_joint),
        )
        self._step_costs = StepCostMeter()
        self.grammars = GrammarCompiler(
            lambda: checkpoint.load_tokenizer().backend_tokenizer,
            checkpoint.config.vocab_size,
            checkpoint.eos_token_ids,
        )
        self._constrained = ConstrainedArrivals(self.grammars)
        self._in_flight: tuple[SchedulerOutput, Any] | None = None  # a plan and the runner's ticket for it
        self._prompt_logprobs: dict[str, list[RawLogprobs]] = {}
        self._pooled = PooledPrompts()
        self._total_steps = 0
        self._total_prompt_tokens = 0
        self._total_cached_tokens = 0
        self._total_output_tokens = 0
        self._last_step_s = 0.0
        self._last_plan: SchedulerOutput | None = None  # of the step that was taken in last

    @property
    def model(self) -> ModelInfo:
        return self.runner.info

    @property
    def has_work(self) -> bool:
        return self._can_step or len(self._constrained) > 0

    @property
    def _can_step(self) -> bool:
        return self.scheduler.has_work or self._in_flight is not None

    def warm_up(self) -> None:
        """Do all first-call work, and measure what steps take: routers predict by it from the first request
        on, and prompt chunks are sized by it, where they are.
        """
        vocabulary = self.grammars.prepare()
        self.runner.warm_up()
        concurrent.futures.wait([vocabulary])  # one that fails is a model without grammars
        is_paced = self.scheduler.pacer.target_s not in (None, math.inf)
        capacity = self.kv_cache.pool.num_blocks * self.kv_cache.block_size
        most = min(self.runner.token_budget, self.runner.max_model_len - 1, capacity - 1)
        sizes = self.runner.chunk_sizes if is_paced else sorted({min(n, most) for n in _PROFILE_TOKENS})
        chunks = {n: self._chunk_s(n) for n in sizes}
        if is_paced:
            self.scheduler.pacer.profile = {n: chunks[n] for n in self.runner.chunk_sizes}
        for num_tokens, seconds in chunks.items():
            self._step_costs.observe(0, num_tokens, seconds)
        for num_decodes in sorted({1, min(_PROFILE_DECODES, self.scheduler.max_num_seqs, most // 2)}):
            self._step_costs.observe(num_decodes, 0, self._decodes_s(num_decodes))

    def add_request(self, message: AddRequest) -> None:
        """Queue a sequence. Raises ValueError for an id in use or a prompt that does not fit."""
        request = Request(
            message.request_id,
            message.prompt_token_ids,
            message.params,
            max_model_len=self.runner.max_model_len,
            arrival_time=message.arrival_time,
            urgency=message.urgency,
            pooling=message.pooling,
        )
        if message.params.constraint is None:
            self.scheduler.add_request(request)
        elif message.request_id in self._constrained:
            raise ValueError(f"request id {message.request_id!r} is in use")
        else:
            self._constrained.add(request)

    def abort(self, message: AbortRequests) -> list[TokenOutput]:
        """End sequences in any state; unknown ids are ignored. One final output for each that was alive."""
        ended = []
        for request_id in message.request_ids:
            request = self.scheduler.finish_request(request_id, RequestStatus.FINISHED_ABORTED)
            if request is not None:
                self._forget(request_id)
                ended.append(_output_of(request, None, None))
            elif (request := self._constrained.remove(request_id)) is not None:
                ended.append(_aborted(request))
        return ended

    def step(self) -> StepOutputs:
        """Advance every scheduled sequence by one step; the outputs are those of one step."""
        ended = self._admit_constrained() if len(self._constrained) else []
        start = time.monotonic()
        if not self._can_step:
            return StepOutputs(start, tuple(ended), self.stats())
        if self.runner.runs_ahead:
            outputs = ended + self._step_ahead()
        else:
            plan = self._schedule()
            outputs = ended + self._update(plan, self.runner.execute(plan))
        end = time.monotonic()
        self._total_steps += 1
        self._last_step_s = end - start
        if self._last_plan is not None:
            # With a step in flight, a call takes as long as the step whose results it waits for.
            plan = self._last_plan
            self.scheduler.observe(plan, self._last_step_s)
            self._step_costs.observe(plan.num_decodes, plan.num_prompt_tokens, self._last_step_s)
        kind = self._last_plan.kind if self._last_plan is not None else None
        return StepOutputs(end, tuple(outputs), self.stats(), kind)

    def _chunk_s(self, num_tokens: int) -> float:
        """Seconds of a step of so many tokens of a prompt; writes into the KV cache's first blocks."""
        request = Request(
            "warm-up", [0] * (num_tokens + 1), SamplingParams(), max_model_len=self.runner.max_model_len + 1
        )
        request.block_ids = list(range(-(-(num_tokens + 1) // self.kv_cache.block_size)))
        return self._measured_s(SchedulerOutput((ScheduledRequest(request, 0, num_tokens),)))

    def _decodes_s(self, num_decodes: int) -> float:
        """Seconds of a step of so many decodes over short contexts, all in the first block."""
        parts = []
        for i in range(num_decodes):
            params = SamplingParams(temperature=0.0)
            request = Request(f"warm-up-{i}", [0, 0], params, max_model_len=self.runner.max_model_len + 1)
            request.block_ids = [0]
            parts.append(ScheduledRequest(request, 1, 1))
        return self._measured_s(SchedulerOutput(tuple(parts)))

    def _measured_s(self, plan: SchedulerOutput) -> float:
        times: list[float] = []
        while len(times) < _PROFILE_RUNS and sum(times) < _PROFILE_S:
            start = time.monotonic()
            self.runner.execute(plan)
            times.append(time.monotonic() - start)
        for part in plan.scheduled:
            self.runner.forget(part.request.request_id)
        return min(times)

    def _step_ahead(self) -> list[TokenOutput]:
        """Launch the next step, take in the one before; the other way round where that needs its tokens.

        Drafts do, and masks of constrained requests: with a step of decodes alone these are uploaded behind
        the launch, before its logits are there.
        """
        previous = self._in_flight or self._launch()
        self._in_flight = None
        if previous is None:
            return []
        has_late_masks = self.scheduler.has_late_masks
        if self.scheduler.wants_drafts() or (has_late_masks and not self._can_mask_late()):
            outputs = self._take_in(previous)
            self._in_flight = self._launch()
            return outputs
        self._in_flight = self._launch()
        outputs = self._take_in(previous)
        if has_late_masks and self._in_flight is not None:
            plan, ticket = self._in_flight
            self._in_flight = plan, self.runner.sample_late(ticket)
        return outputs

    def _can_mask_late(self) -> bool:
        num_decodes = self.scheduler.num_decodes_ahead
        return num_decodes is not None and self.runner.can_sample_late(num_decodes)

    def _admit_constrained(self) -> list[TokenOutput]:
        """Requests whose grammar is there join the others; the ends of those that can have none."""
        ready, refused = self._constrained.take(0.0 if self._can_step else _GRAMMAR_WAIT_S)
        for request in ready:
            self.scheduler.add_request(request)
        return [_aborted(request) for request in refused]

    def _launch(self) -> tuple[SchedulerOutput, Any] | None:
        plan = self._schedule()
        if not plan.scheduled:
            for request_id in plan.preempted_ids:
                self.runner.forget(request_id)
            return None
        ticket = self.runner.launch(plan)
        self.scheduler.run_ahead(plan)
        return plan, ticket

    def _take_in(self, step: tuple[SchedulerOutput, Any]) -> list[TokenOutput]:
        plan, ticket = step
        return self._update(plan, self.runner.collect(ticket))

    def _schedule(self) -> SchedulerOutput:
        plan = self.scheduler.schedule()
        for request_id in plan.preempted_ids:
            self._prompt_logprobs.pop(request_id, None)  # computed again from the start
            self._pooled.forget(request_id)
        return plan

    def _update(self, plan: SchedulerOutput, result: StepResult) -> list[TokenOutput]:
        self._last_plan = plan
        self._collect_prompt_logprobs(plan, result)
        self._collect_pooled(plan, result)
        sampled = {k: [t.token_id for t in tokens] for k, tokens in result.sampled.items()}
        outputs: list[TokenOutput] = []
        for request, token_ids in self.scheduler.update(plan, sampled):
            if request.pooling is None:
                outputs += self._emit(request, result.sampled[request.request_id][: len(token_ids)])
            else:
                outputs.append(self._emit_embedding(request))
        return outputs

    def stats(self) -> EngineStats:
        scheduler, pool = self.scheduler, self.kv_cache.pool
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + len(self._constrained),
            num_blocks=pool.num_blocks,
            num_free_blocks=pool.num_free_blocks,
            num_cached_blocks=pool.num_cached_blocks,
            num_waiting_tokens=scheduler.num_waiting_tokens,
            total_steps=self._total_steps,
            total_prompt_tokens=self._total_prompt_tokens,
            total_cached_tokens=self._total_cached_tokens,
            total_output_tokens=self._total_output_tokens,
            total_preemptions=scheduler.total_preemptions,
            last_step_s=self._last_step_s,
            total_drafts=scheduler.total_drafts,
            total_draft_tokens=scheduler.total_draft_tokens,
            total_accepted_tokens=scheduler.total_accepted_tokens,
            num_preempted=scheduler.num_preempted,
            step_cost=self._step_costs.cost,
            token_budget=scheduler.token_budget,
        )

    def _emit(self, request: Request, tokens: list[SampledToken]) -> list[TokenOutput]:
        """One output for each new token; the last one says whether, and why, the request ended."""
        self._total_output_tokens += len(tokens)
        prompt_logprobs = None
        if request.num_output_tokens == 1:  # a first token comes alone: drafts are for decoding requests
            self._count_prompt(request)
            if request.params.prompt_logprobs is not None:
                prompt_logprobs = tuple(self._prompt_logprobs.pop(request.request_id, ()))
        if request.status.is_finished:
            self._forget(request.request_id)
        *accepted, last = tokens
        outputs = [_output_of(request, token, None, is_last=False) for token in accepted]
        return [*outputs, _output_of(request, last, prompt_logprobs)]

    def _emit_embedding(self, request: Request) -> TokenOutput:
        self._count_prompt(request)
        embedding = self._pooled.take(request)
        self._forget(request.request_id)
        return replace(_output_of(request, None, None), embedding=embedding)

    def _count_prompt(self, request: Request) -> None:
        self._total_prompt_tokens += request.num_prompt_tokens
        self._total_cached_tokens += request.num_cached_tokens

    def _collect_prompt_logprobs(self, plan: SchedulerOutput, result: StepResult) -> None:
        for part in plan.scheduled if result.prompt_logprobs else ():
            request_id = part.request.request_id
            entries = result.prompt_logprobs.get(request_id)
            # Whoever was preempted while the step ran computes them again.
            is_running = part.request.status is RequestStatus.RUNNING
            if entries and is_running and part.request.num_output_tokens == 0:
                self._prompt_logprobs.setdefault(request_id, []).extend(entries)

    def _collect_pooled(self, plan: SchedulerOutput, result: StepResult) -> None:
        for part in plan.scheduled if result.pooled else ():
            chunk = result.pooled.get(part.request.request_id)
            if chunk is not None and part.request.status is RequestStatus.RUNNING:
                self._pooled.add(part.request, chunk)

    def _forget(self, request_id: str) -> None:
        self.runner.forget(request_id)
        self._prompt_logprobs.pop(request_id, None)
        self._pooled.forget(request_id)


def _aborted(request: Request) -> TokenOutput:
    """The end of a request that the scheduler has never seen."""
    request.status = RequestStatus.FINISHED_ABORTED
    return _output_of(request, None, None)


def _output_of(
    request: Request,
    token: SampledToken | None,
    prompt_logprobs: tuple[RawLogprobs, ...] | None,
    *,
    is_last: bool = True,
) -> TokenOutput:
    return TokenOutput(
        request_id=request.request_id,
        token_id=token.token_id if token else None,
        num_cached_tokens=request.num_cached_tokens,
        first_scheduled_time=request.first_scheduled_time,
        logprobs=token.logprobs if token else None,
        prompt_logprobs=prompt_logprobs,
        finish_reason=request.status.finish_reason if is_last else None,
        stop_reason=request.stop_reason if is_last else None,
    )
