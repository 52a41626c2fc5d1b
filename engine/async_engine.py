"""AsyncEngine: the engine as the event loop sees it."""

import asyncio
import contextlib
import dataclasses
import itertools
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from functools import partial
from typing import Any

from engine.checkpoint import open_checkpoint
from engine.config import EngineConfig
from engine.constraint import Constraint
from engine.core_loop import CoreCarrier, start_core
from engine.errors import EngineDeadError, ParameterError, PromptTooLongError
from engine.messages import (
    AbortRequests,
    AddRequest,
    CoreFailed,
    CoreReady,
    FromCore,
    Ping,
    Pong,
    StepOutputs,
)
from engine.output_processor import OutputProcessor
from engine.output_stream import OutputStream
from engine.outputs import EngineStats, ModelInfo, RequestOutput, RequestTimings, StepKind, StepTimes
from engine.pooling_params import PoolingParams
from engine.sampling_params import SamplingParams
from engine.structured import GrammarCompiler, GrammarsUnavailableError
from engine.tokenizer import Tokenizer
from engine.urgency import NOT_URGENT, Urgency

# Below this, encoding takes less time (about 1 ms) than the trip to a thread under load is worth.
_INLINE_TOKENIZE_CHARS = 4_000
_START_TIMEOUT_S = 1_800.0  # a 180B checkpoint from a network disk
_STOP_TIMEOUT_S = 10.0
_HEALTH_TIMEOUT_S = 30.0


class AsyncEngine:
    """Streams tokens of many requests from one EngineCore. Implements `engine.api.InferenceEngine`.

    All methods belong to the event loop that ran `start`.
    """

    def __init__(self, config: EngineConfig, tokenizer: Tokenizer, grammars: GrammarCompiler) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self._grammars = grammars
        self._loop = asyncio.get_running_loop()
        self._processor = OutputProcessor(tokenizer)
        self._streams: dict[str, OutputStream] = {}
        self._sequences: dict[str, set[str]] = {}
        self._failure: Exception | None = None
        self._ready: asyncio.Future[CoreReady] = self._loop.create_future()
        self._pongs: dict[int, asyncio.Future[None]] = {}
        self._ping_numbers = itertools.count()
        self._stats: EngineStats | None = None
        self._steps: list[tuple[StepKind, float]] = []
        self._carrier: CoreCarrier = start_core(config, self._deliver_from_thread)

    @classmethod
    async def start(cls, config: EngineConfig) -> "AsyncEngine":
        """Load the model and warm it up.

        Raises:
            ModelLoadError, OutOfMemoryError, ParameterError: what the configuration asks for cannot be had.
        """
        checkpoint = await asyncio.to_thread(open_checkpoint, config.model)
        tokenizer = Tokenizer(await asyncio.to_thread(checkpoint.load_tokenizer))
        grammars = GrammarCompiler(
            lambda: tokenizer.backend, checkpoint.config.vocab_size, checkpoint.eos_token_ids
        )
        grammars.prepare()
        engine = cls(config, tokenizer, grammars)
        try:
            await asyncio.wait_for(asyncio.shield(engine._ready), _START_TIMEOUT_S)
        except BaseException:
            await engine.shutdown()
            raise
        return engine

    @property
    def model(self) -> ModelInfo:
        return self._ready.result().model

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if len(text) <= _INLINE_TOKENIZE_CHARS:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)

    def chat_template(self, *, has_tools: bool) -> str | None:
        return self.tokenizer.chat_template(has_tools=has_tools)

    async def tokenize_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        apply = partial(
            self.tokenizer.apply_chat_template,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
        )
        if tools is None and sum(len(str(m.get("content"))) for m in messages) <= _INLINE_TOKENIZE_CHARS:
            return apply()
        return await asyncio.to_thread(apply)

    def token_id(self, token: str) -> int | None:
        return self.tokenizer.token_id(token)

    def token(self, token_id: int) -> str:
        return self.tokenizer.token(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokenizer.token_bytes(token_id)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=False)

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        arrival_time: float | None = None,
        urgency: Urgency = NOT_URGENT,
    ) -> AsyncGenerator[RequestOutput, None]:
        """See `InferenceEngine.generate`.

        The choices after the first are queued when the first one has its first token: its prompt then lies
        in the prefix cache, so that it is computed once for all of them.
        """
        arrival = time.monotonic() if arrival_time is None else arrival_time
        if params.constraint is not None:
            await self._check_constraint(params.constraint)
        prompt = self._check_prompt(prompt_token_ids, params, request_id)
        stream = OutputStream()
        self._streams[request_id] = stream
        self._sequences[request_id] = set()
        num_open = params.n
        try:
            self._submit(request_id, 0, prompt, params, arrival, urgency, stream)
            has_siblings = params.n == 1
            while num_open:
                output = await stream.get()
                if not has_siblings:
                    if output.finish_reason == "abort":
                        num_open = 1  # the others never began
                    has_siblings = True
                    for index in range(1, num_open):
                        self._submit(request_id, index, prompt, params, arrival, urgency, stream)
                num_open -= output.finish_reason is not None
                yield output
        finally:
            self._drop(request_id)

    async def embed(
        self,
        prompt_token_ids: Sequence[int],
        params: PoolingParams,
        *,
        request_id: str,
        arrival_time: float | None = None,
        urgency: Urgency = NOT_URGENT,
    ) -> AsyncGenerator[RequestOutput, None]:
        """See `InferenceEngine.embed`."""
        arrival = time.monotonic() if arrival_time is None else arrival_time
        prompt = self._check_tokens(prompt_token_ids, request_id, self.model.max_model_len)
        stream = OutputStream()
        self._streams[request_id] = stream
        self._sequences[request_id] = set()
        try:
            self._submit(request_id, 0, prompt, SamplingParams(), arrival, urgency, stream, params)
            yield await stream.get()
        finally:
            self._drop(request_id)

    async def abort(self, request_id: str) -> None:
        """See `InferenceEngine.abort`. The request's stream ends with finish_reason `abort`."""
        open_sequences = self._sequences.get(request_id)
        if open_sequences:
            self._abort_sequences(open_sequences)

    def stats(self) -> EngineStats:
        return self._stats or self._ready.result().stats

    def drain_timings(self) -> list[RequestTimings]:
        return self._processor.drain_timings()

    def drain_step_times(self) -> StepTimes:
        steps, self._steps = self._steps, []
        return StepTimes(self._processor.drain_gaps(), tuple(steps))

    async def check_health(self) -> None:
        """Raises EngineDeadError when the core stopped or does not answer within 30 s."""
        if self._failure is not None:
            raise EngineDeadError(str(self._failure))
        number = next(self._ping_numbers)
        pong = self._pongs[number] = self._loop.create_future()
        try:
            self._carrier.send(Ping(number))
            await asyncio.wait_for(pong, _HEALTH_TIMEOUT_S)
        except TimeoutError:
            raise EngineDeadError(f"the engine core has not answered for {_HEALTH_TIMEOUT_S:.0f} s") from None
        finally:
            self._pongs.pop(number, None)

    async def shutdown(self) -> None:
        """Stop the core; requests in flight fail with EngineDeadError. Idempotent."""
        self._fail(EngineDeadError("the engine was shut down"))
        await asyncio.to_thread(self._carrier.stop, _STOP_TIMEOUT_S)

    def _check_prompt(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, request_id: str
    ) -> tuple[int, ...]:
        model = self.model
        prompt = self._check_tokens(prompt_token_ids, request_id, model.max_model_len - 1)
        for name, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
            if any(token_id >= model.vocab_size for token_id in ids):
                raise ParameterError(name, f"token ids must be in [0, {model.vocab_size - 1}]")
        if params.top_k > model.vocab_size:
            raise ParameterError("top_k", f"must be at most the vocabulary size, {model.vocab_size}")
        return prompt

    def _check_tokens(
        self, prompt_token_ids: Sequence[int], request_id: str, max_tokens: int
    ) -> tuple[int, ...]:
        if self._failure is not None:
            raise EngineDeadError(str(self._failure))
        vocab_size = self.model.vocab_size
        if not prompt_token_ids:
            raise ParameterError("prompt", "must have at least one token")
        if len(prompt_token_ids) > max_tokens:
            raise PromptTooLongError(len(prompt_token_ids), self.model.max_model_len)
        if not 0 <= min(prompt_token_ids) <= max(prompt_token_ids) < vocab_size:
            raise ParameterError("prompt", f"token ids must be in [0, {vocab_size - 1}]")
        if request_id in self._streams:
            raise ParameterError("request_id", f"{request_id!r} is in use")
        return tuple(prompt_token_ids)

    async def _check_constraint(self, constraint: Constraint) -> None:
        """Compile it in a thread, to refuse here what cannot be held; the core does the same for itself."""
        compiled = asyncio.wrap_future(self._grammars.compile(constraint))
        try:
            await asyncio.shield(compiled)  # others may wait for it as well
        except GrammarsUnavailableError as error:
            raise ParameterError(constraint.name, str(error)) from None

    def _submit(
        self,
        request_id: str,
        index: int,
        prompt: tuple[int, ...],
        params: SamplingParams,
        arrival: float,
        urgency: Urgency,
        stream: OutputStream,
        pooling: PoolingParams | None = None,
    ) -> None:
        sequence_id = f"{request_id}#{index}"
        own = params
        if index > 0:
            seed = None if params.seed is None else params.seed + index
            own = dataclasses.replace(params, seed=seed, prompt_logprobs=None)
        sequences = self._sequences[request_id]
        sequences.add(sequence_id)

        def deliver(output: RequestOutput) -> None:
            if output.finish_reason is not None:
                sequences.discard(sequence_id)
            stream.put(output)

        self._processor.add(sequence_id, request_id, index, prompt, own, arrival, deliver, urgency)
        self._carrier.send(AddRequest(sequence_id, prompt, own, arrival, urgency, pooling))

    def _drop(self, request_id: str) -> None:
        self._streams.pop(request_id, None)
        sequences = self._sequences.pop(request_id, set())
        for sequence_id in sequences:
            self._processor.discard(sequence_id)
        if sequences:
            self._abort_sequences(sequences)

    def _abort_sequences(self, sequence_ids: set[str]) -> None:
        with contextlib.suppress(EngineDeadError):  # a dead core holds nothing
            self._carrier.send(AbortRequests(tuple(sequence_ids)))

    def _deliver_from_thread(self, message: FromCore) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._receive, message)

    def _receive(self, message: FromCore) -> None:
        match message:
            case StepOutputs():
                self._stats = message.stats
                if message.kind is not None:
                    self._steps.append((message.kind, message.stats.last_step_s))
                stopped = self._processor.process(message.outputs, message.time or time.monotonic())
                if stopped:
                    self._abort_sequences(set(stopped))
            case Pong(number):
                if (pong := self._pongs.get(number)) and not pong.done():
                    pong.set_result(None)
            case CoreReady():
                if not self._ready.done():
                    self._ready.set_result(message)
            case CoreFailed(error):
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        if self._failure is not None:
            return
        self._failure = error
        if not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()  # retrieved: `start` may be gone already
        for pong in self._pongs.values():
            if not pong.done():
                pong.set_exception(EngineDeadError(str(error)))
        for stream in self._streams.values():
            stream.put(EngineDeadError(str(error)))
