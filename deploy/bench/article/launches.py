"""Kernel launches a decoded token, by the profiler: of one stream, after its prompt.

    python -m deploy.bench.article.launches rows.jsonl

counts those of the plain torch operations (unfused) on small random models of two depths: launches grow by
the same number with every layer, so that two depths give the count of any.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from deploy.bench.article.subjects import MAX_MODEL_LEN, write_random_llama
from deploy.bench.engine import Timer
from engine import EngineConfig
from engine.core import EngineCore
from engine.models.config import ModelConfig

_PROMPT, _SHORT, _LONG = 128, 8, 40  # tokens: two lengths of output, whose difference has decoding alone
_DEPTHS = (2, 4)
_BLOCK_TOKENS = EngineConfig(model="").block_size
_LAUNCH_CALLS = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cuGraphLaunch")
_OPS_A_LAYER, _OPS_BESIDE = 11, 4
"""One kernel an operation: 2 norms, qkv, rope, append, attention, o, gate/up, activation, down, add."""


def count_launches(timer: Timer) -> tuple[float, float]:
    """Kernels that ran on the device for each token, and calls by which the host launched them or graphs."""

    def counts(num_output: int) -> tuple[int, int]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            timer.seconds(1, _PROMPT, num_output)
            torch.cuda.synchronize()
        events = profile.key_averages()
        on_device = sum(e.count for e in events if e.self_device_time_total > 0 and "Mem" not in e.key)
        return on_device, sum(e.count for e in events if e.key.startswith(_LAUNCH_CALLS))

    timer.seconds(1, _PROMPT, _LONG)
    long, short = counts(_LONG), counts(_SHORT)
    kernels, calls = ((a - b) / (_LONG - _SHORT) for a, b in zip(long, short, strict=True))
    return round(kernels, 2), round(calls, 2)


def one_an_operation(shape: ModelConfig) -> int:
    """What a token would launch with each operation a kernel of its own and nothing else."""
    return _OPS_A_LAYER * shape.num_layers + _OPS_BESIDE


def of_depth(counts: dict[int, float], num_layers: int) -> float:
    """The count at a depth, from the counts at two others. Raises ValueError for other than two."""
    if len(counts) != 2:
        raise ValueError(f"two depths are needed, got {sorted(counts)}")
    (low, a), (high, b) = sorted(counts.items())
    return a + (b - a) / (high - low) * (num_layers - low)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", type=Path)
    options = parser.parse_args()
    for depth in _DEPTHS:
        with tempfile.TemporaryDirectory() as directory:
            write_random_llama(Path(directory), depth)
            core = EngineCore(
                EngineConfig(
                    directory,
                    device="cuda",
                    dtype="bfloat16",
                    max_model_len=MAX_MODEL_LEN,
                    num_blocks=MAX_MODEL_LEN // _BLOCK_TOKENS,
                    max_num_seqs=1,
                )
            )
            core.warm_up()
            kernels, _ = count_launches(Timer(core, core.model.vocab_size))
        with open(options.rows, "a") as file:
            row = {"part": "launches", "kind": "unfused", "layers": depth, "per_token": kernels}
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
