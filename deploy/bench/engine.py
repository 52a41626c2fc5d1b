"""Decoding on a GPU in a real model's shape, on random weights: first token, between tokens, end to end.

Every figure stands beside the floor: the bytes that a step must read (the layers' matrices and the head) over
the read-only rate measured in the same run.
"""

import math
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from rich.console import Console

from deploy.bench.idle import WAKE_S
from engine import EngineConfig, SamplingParams
from engine.config import KVCacheDType
from engine.core import EngineCore
from engine.cuda.random_model import RandomModel
from engine.messages import AbortRequests, AddRequest, TokenOutput
from engine.models.shapes import SHAPES
from kernels.cuda.bandwidth import read_rate_gb_s

_MAX_MODEL_LEN = 4096
_PROMPT, _STEPS = 128, 128  # tokens of a prompt, and steps timed, of a batch
# Tokens that a stream may come to: the first ones decode while prompts of others are computed. With so many,
# weights, cache and workspace of 128 streams take 74 GB at 123B and 3.5 bits, 70 GB at 180B and 2.1 bits.
_STREAM = _PROMPT + _STEPS + 128
_OPS_PER_LAYER = 11  # one kernel an op: 2 norms, 2 qkv/rope, append, attention, o, gate/up, act, down, add


def run(
    shape: str,
    bits: float,
    batches: Sequence[int],
    prompts: Sequence[int],
    rounds: int,
    long_tokens: int,
    kv_cache_dtype: KVCacheDType = "auto",
) -> list[dict[str, Any]]:
    """Rows of engine.json. long_tokens: output tokens of the end-to-end run (0: none).

    Raises ParameterError for another kv_cache_dtype.
    """
    console = Console(stderr=True)
    rate = read_rate_gb_s()
    torch.cuda.empty_cache()
    config = SHAPES[shape]
    model = RandomModel(config, bits)
    core = EngineCore(
        EngineConfig(
            model=f"random-{shape}",
            max_model_len=_MAX_MODEL_LEN,
            max_num_seqs=max(16, *batches),
            kv_cache_bytes=config.num_kv_bytes_per_token(2) * max(_MAX_MODEL_LEN, _STREAM * max(batches)),
            kv_cache_dtype=kv_cache_dtype,
            step_target_s=math.inf,  # streams wait for their batch to be complete: as briefly as can be
            enable_prefix_caching=False,
            speculative_tokens=0,
        ),
        model,
    )
    core.warm_up()
    timer = Timer(core, config.vocab_size)
    weights = core.runner.weights  # type: ignore[attr-defined]
    read_bytes = sum(m.nbytes for m in weights.matrices) - weights.embedding.nbytes
    floor_ms = read_bytes / rate / 1e6
    launches = timer.launches_per_token()
    rows: list[dict[str, Any]] = []
    base = {
        "shape": shape,
        "bits": bits,
        "read_gb_s": round(rate),
        "weight_gb": round(read_bytes / 1e9, 2),
        "largest_batch": max(batches),  # that the engine was made for
    }
    if kv_cache_dtype != "auto":
        base["kv_cache_dtype"] = kv_cache_dtype
    timer.wake()
    for num_prompt in prompts:
        ttft = median(timer.seconds(1, num_prompt, 1) for _ in range(max(rounds, 3)))
        rows.append({**base, "batch": 1, "prompt_tokens": num_prompt, "ttft_ms": round(ttft * 1e3, 2)})
        console.print(rows[-1])
    for batch in batches:
        itl = median(timer.itl_s(batch) for _ in range(rounds)) * 1e3
        row = {
            **base,
            "batch": batch,
            "prompt_tokens": _PROMPT,
            "itl_ms": round(itl, 3),
            "tok_s": round(batch / itl * 1e3, 1),
            "floor_ms": round(floor_ms, 3),
            "share_of_floor": round(floor_ms / itl, 3),
            "launches_per_token": launches,
            "launches_one_per_op": _OPS_PER_LAYER * config.num_layers + 4,
        }
        if batch == 1 and long_tokens:
            row[f"e2e_{long_tokens}_s"] = round(timer.seconds(1, _PROMPT, long_tokens), 3)
        row["memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
        rows.append(row)
        console.print(row)
    return rows


class Timer:
    """Drives an EngineCore with random prompts."""

    def __init__(self, core: EngineCore, vocab_size: int) -> None:
        self.core, self.vocab_size = core, vocab_size
        self._count = 0

    def wake(self) -> None:
        """Requests that do not count, until the device runs as under load (`deploy.bench.idle`)."""
        end = time.perf_counter() + WAKE_S
        while time.perf_counter() < end:
            self.seconds(1, _PROMPT, 8)

    def seconds(self, batch: int, num_prompt: int, num_output: int) -> float:
        """From handing in `batch` requests to their last token."""
        prompts = self._prompts(batch, num_prompt)
        start = time.perf_counter()
        self._add(prompts, num_output)
        while self.core.has_work:
            self.core.step()
        return time.perf_counter() - start

    def _prompts(self, batch: int, num_prompt: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self._count)
        tokens = torch.randint(1, self.vocab_size, (batch, num_prompt), generator=generator)
        return tokens.tolist()

    def _add(self, prompts: list[list[int]], num_output: int) -> list[str]:
        """Hand in requests; their ids."""
        params = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)
        ids = []
        for prompt in prompts:
            self._count += 1
            ids.append(f"r{self._count}")
            self.core.add_request(AddRequest(ids[-1], tuple(prompt), params, time.monotonic()))
        return ids

    def itl_s(self, batch: int, num_steps: int = _STEPS) -> float:
        """Seconds between a stream's tokens, over steps in which every stream decodes and nothing else runs.

        How long the batch takes to fill up, and how it ends, does not count.
        """
        ids = self._add(self._prompts(batch, _PROMPT), self.core.model.max_model_len - _PROMPT)
        started: set[str] = set()
        while len(started) < batch:
            started |= {o.request_id for o in self._step()}
        begin = time.perf_counter()
        for _ in range(num_steps):
            if len(self._step()) != batch:
                raise RuntimeError(f"{batch} streams do not fit into the KV cache")
        seconds = time.perf_counter() - begin
        self.core.abort(AbortRequests(tuple(ids)))
        while self.core.has_work:
            self.core.step()
        return seconds / num_steps

    def _step(self) -> Sequence[TokenOutput]:
        return self.core.step().outputs

    def launches_per_token(self) -> float:
        """Kernels on the device for each decoded token of one stream, by the profiler."""

        def kernels_of(num_output: int) -> int:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                self.seconds(1, _PROMPT, num_output)
                torch.cuda.synchronize()
            return sum(
                e.count for e in profile.key_averages() if e.self_device_time_total > 0 and "Mem" not in e.key
            )

        self.seconds(1, _PROMPT, 40)
        return round((kernels_of(40) - kernels_of(8)) / 32, 2)
