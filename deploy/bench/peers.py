"""One protocol for any server of the OpenAI API: the same shapes, prompts and definitions, side by side.

    python -m deploy.bench.peers folder DIR --shape 8b --weights w4
    python -m deploy.bench.peers measure http://127.0.0.1:8000 --server vllm-0.24.0 --json vllm.json
    python -m deploy.bench.peers compare ours.json vllm.json --json both.json

docs/benchmarks/peers.md has the definitions and the servers' command lines.
"""

import argparse
import asyncio
import json
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp

from deploy.bench import report
from deploy.bench.client import Streams, Timeline
from deploy.bench.peer_folder import WEIGHTS, write_folder
from engine.models.shapes import SHAPES

_TIMEOUT_S = 900.0
_TOKEN_IDS = range(1000, 30_000)  # in every vocabulary, no special tokens among them
_FIGURES = (
    "ttft_ms",
    "itl_ms",
    "itl_ms_p99",
    "tok_s",
    "e2e",
)  # compared, in this order; e2e_2000_s and the like
_DECODE_PROMPT = 128  # tokens before decoding is timed


@dataclass(frozen=True)
class Cases:
    """batches: streams at a time; prompts: lengths in tokens, each alone; output: tokens of a timed stream.

    long_output: of the request whose whole answer is timed; 0 for none. rounds: medians are over so many.
    """

    batches: Sequence[int] = (1, 4, 16, 64)
    prompts: Sequence[int] = (128, 512, 2048)
    output: int = 256
    long_output: int = 2000
    rounds: int = 3


class Client:
    """Sends prompts of random token ids, none of them twice."""

    def __init__(self, streams: Streams, url: str, model: str) -> None:
        self._streams, self._url, self._model = streams, url.rstrip("/").removesuffix("/v1"), model
        self._random = random.Random(time.time_ns())  # a server that runs on may have cached an earlier run's

    async def batch(self, size: int, num_prompt: int, num_output: int) -> list[Timeline]:
        """So many requests at once, until the last one has ended.

        Raises RuntimeError where the server counts other tokens than were asked for.
        """
        prompts = [self._random.choices(_TOKEN_IDS, k=num_prompt) for _ in range(size)]
        timelines = [Timeline(time.perf_counter()) for _ in prompts]
        jobs = (
            self._streams.complete(self._url, self._model, p, num_output, t)
            for p, t in zip(prompts, timelines, strict=True)
        )
        await asyncio.gather(*jobs)
        for t in timelines:
            if (t.num_prompt_tokens, t.num_tokens) != (num_prompt, num_output):
                raise RuntimeError(
                    f"asked for {num_prompt} prompt and {num_output} output tokens, the server counts "
                    f"{t.num_prompt_tokens} and {t.num_tokens}"
                )
        return timelines


def together(timelines: Sequence[Timeline]) -> dict[str, float]:
    """Of the time in which every stream decodes: tokens a second of all, ms between a stream's tokens.

    That is from the last stream's first token to the first stream's last one: neither how long the batch
    takes to fill up nor how it ends counts. A chunk of several tokens counts as so many.
    """
    begin, end = max(t.arrivals[0] for t in timelines), min(t.arrivals[-1] for t in timelines)
    if begin >= end:
        raise RuntimeError("the streams never ran together: ask for more output tokens (--output)")
    num_tokens = 0.0
    gaps: list[float] = []
    for t in timelines:
        inside = [a for a in t.arrivals if begin <= a <= end]
        num_tokens += sum(a > begin for a in inside) * t.num_tokens / len(t.arrivals)
        gaps += [1e3 * (b - a) for a, b in pairwise(inside)]
    tok_s = num_tokens / (end - begin)
    return {
        "itl_ms": 1e3 * len(timelines) / tok_s,
        "itl_ms_p50": report.percentile(gaps, 0.5) if gaps else 0.0,
        "itl_ms_p99": report.percentile(gaps, 0.99) if gaps else 0.0,
        "tok_s": tok_s,
    }


async def measure(url: str, model: str | None, server: str, cases: Cases) -> list[dict[str, Any]]:
    """Rows like those of engine.json, of one server; each case once to warm up, then the rounds."""
    async with Streams(_TIMEOUT_S) as streams:
        client = Client(streams, url, model or await _first_model(url))
        rows: list[dict[str, Any]] = []

        def add(batch: int, num_prompt: int, figures: Mapping[str, float]) -> None:
            rounded = {k: round(v, 1 if k == "tok_s" else 3) for k, v in figures.items()}
            rows.append({"server": server, "batch": batch, "prompt_tokens": num_prompt, **rounded})
            print(rows[-1], flush=True)

        for num_prompt in cases.prompts:
            runs = [await client.batch(1, num_prompt, 1) for _ in range(1 + max(cases.rounds, 3))]
            add(1, num_prompt, {"ttft_ms": 1e3 * median(run[0].ttft for run in runs[1:])})
        for size in cases.batches:
            runs = [await client.batch(size, _DECODE_PROMPT, cases.output) for _ in range(1 + cases.rounds)]
            figures = [together(run) for run in runs[1:]]
            add(size, _DECODE_PROMPT, {k: median(f[k] for f in figures) for k in figures[0]})
        if cases.long_output:
            (long,) = await client.batch(1, _DECODE_PROMPT, cases.long_output)
            seconds = long.arrivals[-1] - long.due
            add(1, _DECODE_PROMPT, {f"e2e_{cases.long_output}_s": seconds})
    return rows


async def _first_model(url: str) -> str:
    models = f"{url.rstrip('/').removesuffix('/v1')}/v1/models"
    async with aiohttp.ClientSession() as session, session.get(models) as response:
        response.raise_for_status()
        return str((await response.json())["data"][0]["id"])


Case = tuple[int, int, str]


def best_figures(rows: Iterable[Mapping[str, Any]], shape: str | None = None) -> dict[Case, float]:
    """By batch, prompt length and figure, of rows of the shape or of none; the best of several kernels."""
    found: dict[Case, float] = {}
    for row in rows:
        if shape is not None and row.get("shape", shape) != shape:
            continue
        for name, value in row.items():
            if name in _FIGURES or name.startswith("e2e_"):
                case = (row["batch"], row.get("prompt_tokens", _DECODE_PROMPT), name)
                found[case] = _better(name)(value, found.get(case, value))
    return found


def compare(
    first: Sequence[Mapping[str, Any]],
    second: Sequence[Mapping[str, Any]],
    names: tuple[str, str],
    shape: str | None = None,
) -> list[dict[str, Any]]:
    """A row for each figure that both have; ratio: how many times as good the first one's is."""
    ours, theirs = best_figures(first, shape), best_figures(second, shape)
    rows = []
    for case in sorted(ours.keys() & theirs.keys(), key=lambda c: (_place(c[2]), c[0], c[1])):
        (batch, num_prompt, figure), a, b = case, ours[case], theirs[case]
        ratio = a / b if _better(figure) is max else b / a
        row = {"figure": figure, "batch": batch, "prompt_tokens": num_prompt}
        rows.append({**row, names[0]: a, names[1]: b, "ratio": round(ratio, 2)})
    return rows


def _better(figure: str) -> Callable[[float, float], float]:
    return max if figure == "tok_s" else min


def _place(figure: str) -> int:
    return _FIGURES.index("e2e" if figure.startswith("e2e_") else figure)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    folder = commands.add_parser("folder", help="write a model folder of a shape, without weights")
    folder.add_argument("directory", type=Path)
    folder.add_argument("--shape", choices=list(SHAPES), default="8b")
    folder.add_argument("--weights", choices=list(WEIGHTS), default="w4")
    folder.add_argument("--bits", type=float, default=4.25, help="of Peregrine's random weights")
    one = commands.add_parser("measure", help="measure a running server")
    one.add_argument("url")
    one.add_argument("--server", required=True, help="its name in the result, with version and weights")
    one.add_argument("--model", help="the first one it names by default")
    one.add_argument("--batches", type=_numbers, default=Cases.batches)
    one.add_argument("--prompts", type=_numbers, default=Cases.prompts)
    one.add_argument("--output", type=int, default=Cases.output, help="tokens of a stream that is timed")
    one.add_argument("--long-output", type=int, default=Cases.long_output, help="end to end; 0 for none")
    one.add_argument("--rounds", type=int, default=Cases.rounds)
    one.add_argument("--json", type=Path)
    two = commands.add_parser("compare", help="one table of two results, also of engine.json and peer.json")
    two.add_argument("first", type=Path)
    two.add_argument("second", type=Path)
    two.add_argument("--shape", choices=list(SHAPES), help="where the results hold several")
    two.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.command == "folder":
        write_folder(options.directory, SHAPES[options.shape], options.weights, options.bits)
        print(f"{options.directory}: {options.shape}, {options.weights}")
    elif options.command == "measure":
        cases = Cases(options.batches, options.prompts, options.output, options.long_output, options.rounds)
        rows = asyncio.run(measure(options.url, options.model, options.server, cases))
        report.publish(rows, options.server, options.json)
    else:
        results = [json.loads(path.read_text())["rows"] for path in (options.first, options.second)]
        names = (options.first.stem, options.second.stem)
        rows = compare(results[0], results[1], names, options.shape)
        report.publish(rows, " and ".join(names), options.json)


if __name__ == "__main__":
    main()
