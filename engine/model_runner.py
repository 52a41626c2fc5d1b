"""Runs scheduled steps on the device: weights, KV cache, forward pass, sampling."""

import contextlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import kernels
from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.errors import OutOfMemoryError, ParameterError
from engine.input_batch import InputBatch
from engine.messages import RawLogprobs
from engine.models.build import build_model
from engine.models.llama import KVCache, LlamaModel
from engine.models.rope import rope_limit
from engine.outputs import ModelInfo
from engine.pooling import pool_chunk
from engine.request import Request
from engine.sampler import SampledToken, Sampler, position_logprobs
from engine.sampling_params import SamplingParams
from engine.scheduler import ScheduledRequest, SchedulerOutput
from engine.speculation import num_kept

logger = logging.getLogger(__name__)

_DEFAULT_CPU_KV_BYTES = 1 << 30
GPU_MEMORY_SHARE = 0.9
DEFAULT_TOKEN_BUDGET = {"cpu": 128, "cuda": 2048}
# One cap on what prompt logprobs materialise at a time: rows x vocabulary x 4 bytes.
_LOGPROB_ROWS = 64


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step yields, by request id: the new tokens in order, accepted drafts before the last one.

    Prompt logprobs come chunk by chunk, and so does what `pool_chunk` makes of prompts to be embedded:
    float32 [hidden], on the CPU.
    """

    sampled: dict[str, list[SampledToken]]
    prompt_logprobs: dict[str, list[RawLogprobs]]
    pooled: dict[str, Tensor] = field(default_factory=dict)


class Runner(Protocol):
    """What the core asks of a device.

    Where `runs_ahead`, a second step may be launched before the first one's results are collected. Steps
    run in the order of their launches.
    """

    info: ModelInfo
    device: torch.device
    num_blocks: int
    max_model_len: int
    token_budget: int
    chunk_sizes: Sequence[int]
    """Numbers of prompt tokens that are computed without padding, ascending; empty where all are."""
    runs_ahead: bool

    def launch(self, output: SchedulerOutput) -> Any:
        """Begin a step; a ticket for `collect`. The runner reads what it needs of the requests at once."""
        ...

    def collect(self, ticket: Any) -> StepResult:
        """Wait for a launched step."""
        ...

    def can_sample_late(self, num_decodes: int) -> bool:
        """Whether a step of so many decodes can be launched while the masks of its tokens are not known.

        Asked only where the runner `runs_ahead`.
        """
        ...

    def sample_late(self, ticket: Any) -> Any:
        """Sample a launched step whose requests' grammars have meanwhile come to where it stands.

        Only then can its results be collected. A ticket of any other step comes back as it is.
        """
        ...

    def is_joint(self, num_decodes: int, num_prompt_tokens: int) -> bool:
        """Whether such a step takes as long as a chunk of all its tokens; else decodes and chunks add up."""
        ...

    def execute(self, output: SchedulerOutput) -> StepResult:
        """Compute one step; the KV cache holds its tokens afterwards."""
        ...

    def forget(self, request_id: str) -> None:
        """Drop what is kept for a request that left the batch; unknown ids are ignored."""
        ...

    def warm_up(self) -> None:
        """Do all first-call work before the first request."""
        ...


def create_runner(config: EngineConfig, checkpoint: Checkpoint) -> Runner:
    """The fused CUDA kernels where GPU and checkpoint allow it, else torch on the configured device."""
    if resolve_device(config).type == "cuda":
        from engine.cuda import CudaModelRunner, UnsupportedError

        try:
            return CudaModelRunner(config, checkpoint)
        except UnsupportedError as error:
            logger.warning("the fused CUDA kernels cannot run this model, slower torch ops do: %s", error)
    return ModelRunner(config, checkpoint)


class ModelRunner:
    """Runs steps with torch and the CPU's kernels; owns the device's memory: weights and paged KV cache."""

    runs_ahead = False
    chunk_sizes: Sequence[int] = ()

    def __init__(self, config: EngineConfig, checkpoint: Checkpoint) -> None:
        self.config = config
        self.device = resolve_device(config)
        if config.kv_cache_dtype != "auto":
            raise ParameterError(
                "kv_cache_dtype",
                f"{config.kv_cache_dtype} needs a Hopper GPU and packed weights (allowed here: auto)",
            )
        if self.device.type == "cpu" and config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
            kernels.set_num_threads(config.num_threads)
        self.token_budget = config.token_budget or max(
            DEFAULT_TOKEN_BUDGET[self.device.type], config.max_num_seqs
        )
        keep_packed = config.dtype == "auto"
        dtype = self._resolve_dtype()
        shape = checkpoint.config
        self.max_model_len = min(config.max_model_len or rope_limit(shape), rope_limit(shape))
        self.model: LlamaModel = build_model(
            checkpoint,
            max_model_len=self.max_model_len,
            dtype=dtype,
            device=self.device,
            keep_packed=keep_packed,
        )
        if self.device.type == "cpu" and _runs_natively(self.model):
            # torch has only small ops left, and its idle OpenMP threads spin on the kernel threads' cores.
            torch.set_num_threads(1)
        kv_dtype = torch.float32 if self.device.type == "cpu" else dtype
        bytes_per_token = shape.num_kv_bytes_per_token(kv_dtype.itemsize)
        self.num_blocks = size_kv_cache(config, self.max_model_len, bytes_per_token, self.device)
        self.kv_cache = KVCache.allocate(shape, self.num_blocks, config.block_size, kv_dtype, self.device)
        self.max_model_len = min(self.max_model_len, self.num_blocks * config.block_size)
        self.batch = InputBatch(config.max_num_seqs, self.max_model_len, config.block_size, self.device)
        self.sampler = Sampler(shape.vocab_size, self.device)
        self.info = self._describe(checkpoint, keep_packed, dtype)

    def launch(self, output: SchedulerOutput) -> StepResult:
        """The step is computed at once; its ticket is its result."""
        return self.execute(output)

    def collect(self, ticket: StepResult) -> StepResult:
        return ticket

    def can_sample_late(self, num_decodes: int) -> bool:
        return False

    def sample_late(self, ticket: StepResult) -> StepResult:
        return ticket

    def is_joint(self, num_decodes: int, num_prompt_tokens: int) -> bool:
        return False

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> StepResult:
        """Compute one step; the KV cache holds its tokens afterwards."""
        for request_id in output.preempted_ids:
            self.forget(request_id)
        if not output.scheduled:
            return StepResult({}, {})
        step = self.batch.prepare(output)
        hidden = self.model.forward(step.token_ids, self.kv_cache, step.metadata)
        prompt_logprobs = self._prompt_logprobs(hidden, output)
        pooled = self._pool(hidden, output)
        if not step.sampled:
            return StepResult({}, prompt_logprobs, pooled)
        rows = hidden if len(step.rows) == len(hidden) else hidden[step.sampled_indices]
        tokens = self.sampler.sample(self.model.logits(rows), step.rows)
        return StepResult(accept(step.sampled, tokens), prompt_logprobs, pooled)

    def forget(self, request_id: str) -> None:
        """Drop what is kept for a request that left the batch."""
        self.batch.forget(request_id)
        self.sampler.forget(request_id)

    def warm_up(self) -> None:
        """Run the largest prefill and a decode once, so that no request pays for first-call work.

        Writes into the KV cache's first blocks, which hold nothing yet.
        """
        capacity = self.num_blocks * self.config.block_size
        num_tokens = max(1, min(self.token_budget, self.max_model_len - 1, capacity - 1))
        request = Request(
            "warm-up", [0] * num_tokens, SamplingParams(top_p=0.9), max_model_len=self.max_model_len + 1
        )
        request.block_ids = list(range(-(-(num_tokens + 1) // self.config.block_size)))
        request.block_ids = request.block_ids[: self.num_blocks]
        self.execute(SchedulerOutput((ScheduledRequest(request, 0, num_tokens),)))
        self.execute(SchedulerOutput((ScheduledRequest(request, num_tokens - 1, 1),)))
        self.forget(request.request_id)

    def _prompt_logprobs(self, hidden: Tensor, output: SchedulerOutput) -> dict[str, list[RawLogprobs]]:
        result: dict[str, list[RawLogprobs]] = {}
        first = 0
        for part in output.scheduled:
            request, last = part.request, first + part.num_scheduled_tokens
            num_top = request.params.prompt_logprobs
            if num_top is not None and part.num_computed_tokens < request.num_prompt_tokens - 1:
                begin = part.num_computed_tokens + 1
                end = min(begin + part.num_scheduled_tokens, request.num_prompt_tokens)
                result[request.request_id] = self._logprobs_of(
                    hidden[first : first + end - begin], request.all_token_ids[begin:end], num_top
                )
            first = last
        return result

    def _pool(self, hidden: Tensor, output: SchedulerOutput) -> dict[str, Tensor]:
        pooled: dict[str, Tensor] = {}
        norm, eps, first = self.model.weights.final_norm, self.model.config.rms_norm_eps, 0
        for part in output.scheduled:
            last = first + part.num_scheduled_tokens
            if (params := part.request.pooling) is not None:
                chunk = pool_chunk(hidden[first:last], norm, eps, params)
                pooled[part.request.request_id] = chunk.cpu()
            first = last
        return pooled

    def _logprobs_of(self, hidden: Tensor, token_ids: list[int], num_top: int) -> list[RawLogprobs]:
        entries: list[RawLogprobs] = []
        for i in range(0, len(token_ids), _LOGPROB_ROWS):
            logits = self.model.logits(hidden[i : i + _LOGPROB_ROWS].contiguous())
            entries += position_logprobs(logits, token_ids[i : i + _LOGPROB_ROWS], num_top)
        return entries

    def _resolve_dtype(self) -> torch.dtype:
        if self.config.dtype != "auto":
            return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[
                self.config.dtype
            ]
        # CPUs without bf16 arithmetic run float32 matmuls five times as fast.
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    def _describe(self, checkpoint: Checkpoint, keep_packed: bool, dtype: torch.dtype) -> ModelInfo:
        tensors = list(self.model.weights.tensors())
        packed = keep_packed and not all(isinstance(t, Tensor) for t in tensors)
        return ModelInfo(
            name=self.config.served_model_name or Path(self.config.model).name.removesuffix(".gguf"),
            architecture=checkpoint.config.architecture,
            num_parameters=sum(t.numel() if isinstance(t, Tensor) else t.n * t.k for t in tensors),
            max_model_len=self.max_model_len,
            vocab_size=checkpoint.config.vocab_size,
            weight_bytes=sum(t.nbytes for t in tensors),
            weight_format=checkpoint.weight_format if packed else str(dtype).removeprefix("torch."),
            hidden_size=checkpoint.config.hidden_size,
        )


def size_kv_cache(
    config: EngineConfig,
    max_model_len: int,
    bytes_per_token: int,
    device: torch.device,
    reserved_bytes: int = 0,
) -> int:
    """Blocks of the KV cache, which the log states. `reserved_bytes` of what is free are left to others.

    Raises:
        OutOfMemoryError: not even one block fits, or less than was asked for.
    """
    if config.num_blocks is not None:
        return config.num_blocks
    bytes_per_block = bytes_per_token * config.block_size
    available = max(_available_bytes(device) - reserved_bytes, 0)
    if config.kv_cache_bytes is not None:
        wanted = config.kv_cache_bytes
    elif device.type == "cpu":
        wanted = max(_DEFAULT_CPU_KV_BYTES, -(-max_model_len // config.block_size) * bytes_per_block)
    else:
        wanted = int(available * GPU_MEMORY_SHARE)
    if wanted > available:
        fitting = int(available * GPU_MEMORY_SHARE) // bytes_per_token
        raise OutOfMemoryError(
            f"the KV cache wants {wanted / 2**30:.2f} GiB, {available / 2**30:.2f} GiB are free "
            f"(max_model_len {max(fitting, 0)} would fit)"
        )
    if wanted < bytes_per_block:
        raise OutOfMemoryError(f"the KV cache gets {wanted} bytes, one block takes {bytes_per_block}")
    num_blocks = wanted // bytes_per_block
    num_tokens = num_blocks * config.block_size
    logger.info(
        "KV cache: %d tokens in %.2f of %.2f GiB free (%d bytes a token, kv_cache_dtype %s): "
        "%.1f requests of %d tokens",
        num_tokens,
        wanted / 2**30,
        available / 2**30,
        bytes_per_token,
        config.kv_cache_dtype,
        num_tokens / max_model_len,
        max_model_len,
    )
    return num_blocks


def accept(
    sampled: Sequence[ScheduledRequest], tokens: Sequence[SampledToken]
) -> dict[str, list[SampledToken]]:
    """Of each request's k + 1 tokens, which stand in a row in `tokens`, those that count."""
    kept: dict[str, list[SampledToken]] = {}
    first = 0
    for part in sampled:
        drafts = part.draft_token_ids
        own = list(tokens[first : first + 1 + len(drafts)])
        first += len(own)
        if drafts:
            own = own[: num_kept(drafts, [t.token_id for t in own])]
        kept[part.request.request_id] = own
    return kept


def _runs_natively(model: LlamaModel) -> bool:
    weights = model.weights
    matrices = [w for a, ffn in weights.layers for w in (a.qkv, *weights.ffn_matrices(ffn))]
    return kernels.backend_name() == "native" and not any(isinstance(w, Tensor) for w in matrices)


def resolve_device(config: EngineConfig) -> torch.device:
    """Raises ParameterError where a GPU is asked for and there is none."""
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise ParameterError("device", "cuda was asked for, but no CUDA GPU is visible (allowed: auto, cpu)")
    return torch.device("cuda" if has_gpu and config.device != "cpu" else "cpu")


def _available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    # Free pages alone would leave out the page cache, which gives way.
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/meminfo") as meminfo:
        for line in meminfo:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
