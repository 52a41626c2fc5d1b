"""Many decode steps on a GPU: none hangs, and the same prompt and seed give the same tokens every time.

    python -m deploy.bench.soak [--shape 8b] [--layers 2] [--bits 4.25] [--batch 1] [--steps 100000]

A race, a lost block or a NaN anywhere in a step changes tokens from there on, which decoding feeds back. They
are sampled: the model has random weights in the shape of a real one, with fewer layers, and would soon repeat
its best ones. A step that hangs ends with the kernel's own deadline and an error.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from tqdm import tqdm

from deploy.bench import report
from engine import EngineConfig, SamplingParams
from engine.core import EngineCore
from engine.cuda.random_model import RandomModel
from engine.messages import AddRequest
from engine.models.shapes import SHAPES

_TOKENS, _PROMPT = 4000, 64


def run(shape: str, layers: int, bits: float, batch: int, steps: int) -> dict[str, object]:
    """One row. Raises AssertionError where a round's tokens are not the first one's."""
    config = replace(SHAPES[shape], num_layers=layers)
    core = EngineCore(
        EngineConfig(
            model=f"random-{shape}",
            max_model_len=_PROMPT + _TOKENS + 32,
            max_num_seqs=max(16, batch),
            enable_prefix_caching=False,
            speculative_tokens=0,
            kv_cache_bytes=config.num_kv_bytes_per_token(2) * (_PROMPT + _TOKENS + 64) * batch,
        ),
        RandomModel(config, bits),
    )
    core.warm_up()
    start = time.perf_counter()
    expected: list[list[int]] | None = None
    rounds = -(-steps // _TOKENS)
    for number in tqdm(range(rounds), unit="round"):
        texts = _round(core, batch, number)
        assert all(len(text) == _TOKENS for text in texts)
        expected = expected or texts
        assert texts == expected, f"round {number} has other tokens"
    assert expected is not None
    return {
        "shape": shape,
        "layers": layers,
        "bits": bits,
        "batch": batch,
        "steps": rounds * _TOKENS,
        "seconds": round(time.perf_counter() - start, 1),
        "different_tokens": len(set(expected[0])),
    }


def _round(core: EngineCore, batch: int, number: int) -> list[list[int]]:
    texts: dict[str, list[int]] = {}
    for i in range(batch):
        texts[f"{number}-{i}"] = []
        prompt = tuple(range(1 + i, 1 + i + _PROMPT))
        params = SamplingParams(temperature=1.0, seed=i, max_tokens=_TOKENS, ignore_eos=True)
        core.add_request(AddRequest(f"{number}-{i}", prompt, params, time.perf_counter()))
    while core.has_work:
        for output in core.step().outputs:
            if output.token_id is not None:
                texts[output.request_id].append(output.token_id)
    return list(texts.values())


def main(
    shape: str = "8b",
    layers: int = 2,
    bits: float = 4.25,
    batch: int = 1,
    steps: int = 100_000,
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    row = run(shape, layers, bits, batch, steps)
    Console(stderr=True).print(row)
    report.publish([row], "Soak", json_path)


if __name__ == "__main__":
    typer.run(main)
