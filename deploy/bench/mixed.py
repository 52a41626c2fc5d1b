"""Streams that run on while long prompts arrive: what the prompts cost the streams, and how long they wait.

    python -m deploy.bench.mixed --shape 8b --bits 4.25 --targets default,inf --json mixed.json

Open loop: prompts arrive by a seeded Poisson schedule, whatever became of those before, and their first
tokens count from the moment they were due. A stream that reaches its last token gives its place to a new one,
whose short prompt is a chunk beside the others like any other. Needs a Hopper GPU; random weights, greedy.
"""

import argparse
import dataclasses
import math
import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.bench import report
from engine import EngineConfig, SamplingParams
from engine.core import EngineCore
from engine.messages import AbortRequests, AddRequest
from engine.models.shapes import SHAPES
from engine.pacing import StepPacer


@dataclass(frozen=True)
class Load:
    """streams: running at any time; rate: prompts a second; lengths in tokens; seconds: of the arrivals."""

    streams: int = 16
    stream_prompt: int = 128
    stream_output: int = 2048
    rate: float = 2.0
    prompt: int = 2048
    output: int = 32
    seconds: float = 20.0
    seed: int = 0

    def arrivals(self) -> Iterator[float]:
        """When prompts are due, in seconds from the start."""
        generator, due = random.Random(self.seed), 0.0
        while (due := due + generator.expovariate(self.rate)) < self.seconds:
            yield due


@dataclass
class Outcome:
    """In seconds: gaps between tokens of the streams, from due to first token of the prompts that arrived."""

    gaps: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    num_tokens: int = 0
    """Of outputs, the arrived prompts' included."""
    seconds: float = 0.0

    def row(self) -> dict[str, Any]:
        itl, ttft = ([1e3 * t for t in times] for times in (self.gaps, self.ttft))
        return {
            "itl_ms_p50": round(report.percentile(itl, 0.5), 3),
            "itl_ms_p99": round(report.percentile(itl, 0.99), 3),
            "itl_ms_p999": round(report.percentile(itl, 0.999), 3),
            "itl_ms_max": round(max(itl), 3),
            "ttft_ms_p50": round(report.percentile(ttft, 0.5), 1),
            "ttft_ms_max": round(max(ttft), 1),
            "num_prompts": len(ttft),
            "tok_s": round(self.num_tokens / self.seconds, 1),
        }


class Driver:
    """One core under one load. Times are those at which a step's tokens were known to the host."""

    def __init__(self, core: EngineCore, load: Load) -> None:
        self._core, self._load = core, load
        self._random = random.Random(load.seed)
        self._last: dict[str, float] = {}  # token of a stream
        self._due: dict[str, float] = {}  # of prompts without a first token
        self._count = 0
        self._outcome = Outcome()

    def run(self) -> Outcome:
        """Fill the streams, then let prompts arrive; ends with the last of their first tokens."""
        load, outcome = self._load, self._outcome
        for i in range(load.streams):  # they end one after the other, not all in one step
            self._add_stream(max(2, load.stream_output * (i + 1) // load.streams))
        while len(self._last) < load.streams:
            self._step()
        arrivals = deque((t, self._prompt(load.prompt)) for t in load.arrivals())
        start = time.monotonic()
        self._outcome = outcome = Outcome()
        while arrivals or self._due:
            while arrivals and start + arrivals[0][0] <= time.monotonic():
                at, prompt = arrivals.popleft()
                due = start + at
                self._due[self._add("prompt", prompt, load.output, due)] = due
            self._step()
        outcome.seconds = time.monotonic() - start
        self._core.abort(AbortRequests(tuple(self._core.scheduler.requests)))
        while self._core.has_work:
            self._core.step()
        return outcome

    def _step(self) -> None:
        outcome, step = self._outcome, self._core.step()
        for output in step.outputs:
            name, now = output.request_id, step.time
            outcome.num_tokens += 1
            if name in self._due:
                outcome.ttft.append(now - self._due.pop(name))
            elif name.startswith("stream"):
                if name in self._last:
                    outcome.gaps.append(now - self._last[name])
                self._last[name] = now
                if output.finish_reason is not None:
                    del self._last[name]
                    self._add_stream(self._load.stream_output)

    def _add_stream(self, num_output: int) -> None:
        self._add("stream", self._prompt(self._load.stream_prompt), num_output, time.monotonic())

    def _prompt(self, num_tokens: int) -> tuple[int, ...]:
        return tuple(self._random.choices(range(1, self._core.model.vocab_size), k=num_tokens))

    def _add(self, kind: str, prompt: tuple[int, ...], num_output: int, arrival: float) -> str:
        self._count += 1
        name = f"{kind}-{self._count}"
        params = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)
        self._core.add_request(AddRequest(name, prompt, params, arrival))
        return name


def measure(core: EngineCore, load: Load, targets: Sequence[float | None]) -> Iterator[dict[str, Any]]:
    """A row for each target of a step with running streams, in seconds (see `EngineConfig.step_target_s`)."""
    warm = core.scheduler.pacer
    for target_s in targets:
        pacer = StepPacer.for_device(core.runner.device.type, target_s, core.runner.is_joint)
        core.scheduler.pacer = dataclasses.replace(pacer, profile=warm.profile)
        Driver(core, dataclasses.replace(load, seconds=min(2.0, load.seconds), seed=load.seed + 1)).run()
        outcome = Driver(core, load).run()
        yield {
            "step_target_ms": _name(pacer),
            "streams": load.streams,
            "prompt_tokens": load.prompt,
            "prompts_per_s": load.rate,
            "seconds": load.seconds,
            **outcome.row(),
        }


def _name(pacer: StepPacer) -> str:
    target = "none" if pacer.target_s is None else f"{1e3 * pacer.target_s:g}"
    return f"{target} (default)" if pacer.is_soft else target


def run(shape: str, bits: float, load: Load, targets: Sequence[float | None]) -> list[dict[str, Any]]:
    """Rows of mixed.json, on a GPU."""
    from engine.cuda.random_model import RandomModel

    config = SHAPES[shape]
    length = max(load.stream_prompt + load.stream_output, load.prompt + load.output)
    num_prompts = math.ceil(4 * load.rate)  # that may be there at a time
    tokens = load.streams * (load.stream_prompt + load.stream_output)
    tokens += num_prompts * (load.prompt + load.output)
    core = EngineCore(
        EngineConfig(
            model=f"random-{shape}",
            max_model_len=length + 16,
            max_num_seqs=max(64, load.streams + num_prompts),
            kv_cache_bytes=config.num_kv_bytes_per_token(2) * tokens,
            enable_prefix_caching=False,
            speculative_tokens=0,
        ),
        RandomModel(config, bits),
    )
    core.warm_up()
    rows = []
    for row in measure(core, load, targets):
        rows.append({"shape": shape, "bits": bits, **row})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--bits", type=float, default=4.25, help="of the layers' weights")
    parser.add_argument("--targets", default="default,inf", help="of a step, in seconds; comma-separated")
    for item in dataclasses.fields(Load):
        option = "--" + item.name.replace("_", "-")
        parser.add_argument(option, type=type(item.default), default=item.default)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    load = Load(**{item.name: getattr(options, item.name) for item in dataclasses.fields(Load)})
    targets = [None if t == "default" else float(t) for t in options.targets.split(",")]
    rows = run(options.shape, options.bits, load, targets)
    report.publish(rows, f"Streams beside prompts, {options.shape}", options.json)


if __name__ == "__main__":
    main()
