"""The engines that the router's simulation plays: what their steps take."""

from dataclasses import dataclass

import numpy as np

from serving.routing import CostModel
from serving.routing.prefix_index import BLOCK_TOKENS

# Peregrine, 8B shape at 4.25 bits on one H100: docs/benchmarks/engine.json (itl_ms by batch, ttft_ms by
# prompt).
_STEP_MS = {1: 1.94, 4: 2.32, 8: 2.72, 16: 3.98}
_PREFILL_MS = {128: 9.4, 512: 12.5, 2048: 45.2}


@dataclass(frozen=True, slots=True)
class Engine:
    """
    decode_ms: of a step, and of each sequence in it.
    prefill_ms: of a step's prompt part by its tokens; lines between them.
    kv_token_ms: of a step, for each token in its context.
    chunk_tokens: of prompts, at most in a step, beside all decodes.
    """

    decode_ms: tuple[float, float]
    prefill_ms: tuple[tuple[int, float], ...]
    kv_token_ms: float
    chunk_tokens: int
    max_num_seqs: int
    kv_capacity_tokens: int

    def decode_s(self, active: int, kv_tokens: float) -> float:
        """A step of `active` decodes over `kv_tokens` of context."""
        start, slope = self.decode_ms
        return (start + slope * active + self.kv_token_ms * kv_tokens) / 1e3 if active else 0.0

    def prefill_s(self, tokens: int) -> float:
        """The prompt part of a step."""
        sizes, times = zip(*self.prefill_ms, strict=True)
        return float(np.interp(tokens, sizes, times)) / 1e3 if tokens else 0.0

    def request_s(self, prompt_tokens: float, output_tokens: float) -> float:
        """A request's share of a full replica's time: load 1 is one request in each such time."""
        context = self.max_num_seqs * (prompt_tokens + output_tokens / 2)
        decode = self.decode_s(self.max_num_seqs, min(context, self.kv_capacity_tokens)) / self.max_num_seqs
        return prompt_tokens * self.prefill_s(self.chunk_tokens) / self.chunk_tokens + output_tokens * decode

    def cost_model(self, network_s: float, slowness: float = 1.0) -> CostModel:
        """What a replica publishes of itself: a line through the last two measurements up to the chunk."""
        (few, few_ms), (many, many_ms) = [p for p in self.prefill_ms if p[0] <= self.chunk_tokens][-2:]
        token_ms = (many_ms - few_ms) / (many - few)
        start, slope = self.decode_ms
        return CostModel(
            step_base_s=slowness * start / 1e3,
            step_per_active_s=slowness * slope / 1e3,
            step_per_kv_token_s=slowness * self.kv_token_ms / 1e3,
            prefill_step_s=slowness * max(0.0, few_ms - few * token_ms) / 1e3,
            prefill_token_s=slowness * token_ms / 1e3,
            chunk_tokens=self.chunk_tokens,
            max_num_seqs=self.max_num_seqs,
            kv_capacity_tokens=self.kv_capacity_tokens,
            overhead_s=2 * network_s,
        )


def _h100() -> Engine:
    slope, start = np.polyfit(list(_STEP_MS), list(_STEP_MS.values()), 1)
    return Engine(
        decode_ms=(float(start), float(slope)),  # beyond a batch of 16 the line goes on
        # Up to 16 tokens it is a decode step.
        prefill_ms=((16, _STEP_MS[16]), *_PREFILL_MS.items()),
        # Not measured but derived: 8 KV heads x 128 x 32 layers x 2 (K, V) x 2 bytes a token over 3,060 GB/s.
        kv_token_ms=131_072 / 3_060e9 * 1e3,
        chunk_tokens=512,
        max_num_seqs=64,  # the engine's default
        kv_capacity_tokens=13_000 * BLOCK_TOKENS,  # what 28 GB hold of its keys and values
    )


H100 = _h100()
# The double that live runs on two cores are made with (tests/scheduled_engine.py), with few places.
DOUBLE = Engine(
    decode_ms=(15.0, 0.5),
    prefill_ms=((1, 0.1), (512, 51.2)),
    kv_token_ms=0.0,
    chunk_tokens=512,
    max_num_seqs=8,
    kv_capacity_tokens=13_000 * BLOCK_TOKENS,
)
