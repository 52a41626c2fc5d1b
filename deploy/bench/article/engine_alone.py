"""The engine without HTTP, in a process of its own: the same configuration and definitions as over HTTP.

    python -m deploy.bench.article.engine_alone server.yaml rows.jsonl --prompts 128,512 --batches 1,16

Rows are appended as they come, so that a run that is stopped at its deadline keeps what it has. With --asks
it waits for a line on standard input before it touches the device, and for another before it measures.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

from deploy.bench.article.launches import count_launches
from deploy.bench.article.plan import FIRST_TOKENS, Rounds
from deploy.bench.engine import Timer
from engine import EngineConfig
from engine.checkpoint import open_checkpoint
from engine.core import EngineCore
from engine.model_runner import ModelRunner, resolve_device
from engine.models.config import ModelConfig

Row = dict[str, Any]
_STEPS = 128  # that a batch is timed for
_HOPPER = (9, 0)


def measure(
    config: EngineConfig,
    prompts: list[int],
    batches: list[int],
    rounds: Rounds,
    wait: Callable[[], None] = lambda: None,
) -> Iterator[Row]:
    """Rows of the parts memory, ttft, decode and launches, the path `engine`.

    wait: called before the device is touched, and when what follows is timed.
    """
    wait()
    checkpoint = open_checkpoint(config.model)
    rate = _read_rate(config)
    core = EngineCore(config, checkpoint)
    core.warm_up()
    timer = Timer(core, core.model.vocab_size)
    yield {"part": "memory", **_memory(core, checkpoint.config, config), **_floor(core, rate)}
    wait()
    timer.wake()
    for num_prompt in prompts:
        timer.seconds(1, num_prompt, 1)
        times = [timer.seconds(1, num_prompt, 1) for _ in FIRST_TOKENS]
        row: Row = {"part": "ttft", "prompt_tokens": num_prompt, "rounds": len(times)}
        yield {**row, "ttft_ms": round(1e3 * median(times), 3)}
    for streams in batches:
        runs = [timer.itl_s(streams, _STEPS) for _ in rounds]
        itl_s = median(runs)
        row = {"part": "decode", "streams": streams, "itl_ms": round(1e3 * itl_s, 3)}
        yield {**row, "tok_s": round(streams / itl_s, 1), "rounds": len(runs)}
    if core.runner.device.type == "cuda":
        kernels_a_token, calls_a_token = count_launches(timer)
        yield {"part": "launches", "kind": "fused", "per_token": kernels_a_token}
        yield {"part": "launches", "kind": "captured", "per_token": calls_a_token}


def _read_rate(config: EngineConfig) -> float | None:
    """GB/s; None without a Hopper GPU. Measured first: the KV cache leaves no room for what is read."""
    if resolve_device(config).type != "cuda" or torch.cuda.get_device_capability() != _HOPPER:
        return None
    from kernels.cuda.bandwidth import read_rate_gb_s

    rate = read_rate_gb_s()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return rate


def _floor(core: EngineCore, rate: float | None) -> Row:
    """What a step must read over the rate; empty where the weights are not the fused kernels'."""
    if rate is None or isinstance(core.runner, ModelRunner):
        return {}
    weights = core.runner.weights  # type: ignore[attr-defined]
    tables = 0 if weights.head is weights.embedding else weights.embedding.nbytes
    read_bytes = sum(m.nbytes for m in weights.matrices) - tables
    return {
        "read_gb_s": round(rate),
        "step_gb": round(read_bytes / 1e9, 3),
        "floor_ms": round(read_bytes / rate / 1e6, 3),
    }


def _memory(core: EngineCore, shape: ModelConfig, config: EngineConfig) -> Row:
    """In 10^9 bytes: weights, cache, workspace of the largest step, and the most that torch allocated."""
    runner = core.runner
    is_gpu = runner.device.type == "cuda"
    tokens = runner.num_blocks * config.block_size
    row: Row = {
        "weights_gb": round(core.model.weight_bytes / 1e9, 3),
        "kv_gb": round(tokens * shape.num_kv_bytes_per_token(2 if is_gpu else 4) / 1e9, 3),
        "kv_tokens": tokens,
    }
    if not isinstance(runner, ModelRunner):
        from engine.cuda.layers import workspace_bytes
        from engine.cuda.prefill import padded_tokens

        chunk = min(runner.token_budget, runner.max_model_len)
        size = workspace_bytes(
            shape,
            runner.weights,  # type: ignore[attr-defined]
            padded_tokens(chunk),
            config.max_num_seqs,
            config.prefill_precision,
        )
        row["workspace_gb"] = round(size / 1e9, 3)
    if is_gpu:
        row["allocated_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return row


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _wait_for_line() -> None:
    """Ends the process where whoever would say it is gone."""
    if not sys.stdin.readline():
        raise SystemExit("the run that asked for this has ended")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path, help="YAML; its section `engine` is read")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--prompts", type=_numbers, default=[128, 512, 2048])
    parser.add_argument("--batches", type=_numbers, default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rounds-s", type=float, default=math.inf, help="no round is begun after so long")
    parser.add_argument("--asks", action="store_true", help="wait for lines on standard input")
    options = parser.parse_args()
    config = EngineConfig(**yaml.safe_load(options.config.read_text())["engine"])
    rounds = Rounds(options.rounds, options.rounds_s)
    wait = _wait_for_line if options.asks else lambda: None
    with open(options.rows, "a") as file:
        for row in measure(config, options.prompts, options.batches, rounds, wait):
            file.write(json.dumps(row) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
