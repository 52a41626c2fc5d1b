"""The order of the parts. A part that fails becomes a row with its reason, and the rest goes on."""

import asyncio
import concurrent.futures
import contextlib
import json
import multiprocessing
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import aiohttp
import yaml
from rich.console import Console

from deploy.bench import report
from deploy.bench.article import edge, goodput, integration, launches, over_http, processes, speculation
from deploy.bench.article.gpu_meter import open_meter
from deploy.bench.article.plan import Options
from deploy.bench.article.results import Results, Row
from deploy.bench.article.subjects import SUBJECTS, Subject, engine_settings, prepare
from deploy.bench.article.workloads import WORKLOADS, Workload
from deploy.bench.peers import Client

_MAX_INFLIGHT = 2048  # of the server: every stream of a batch is admitted
_DRAFTS = 7  # of a step, where speculation is measured: 8 tokens read the weights once
_HTTP_PARTS = ("server", "ttft", "decode", "long", "workload", "goodput", "integration", "speculation")
_MACHINE_S = 120.0
_BUILD_S = 600.0
_ENGINE_SHARE = 0.45  # of a shape's budget, at most: the rest is for the server
_LEAST_S = 5.0  # a part that has less left is not begun
Make = Callable[[aiohttp.ClientSession], AsyncIterator[Row]]


def run(options: Options, console: Console) -> Results:
    """Measure every chosen shape; article.json in options.out has the rows as they come."""
    results = Results(
        options.out / "article.json", lambda row: console.print(_line(row), highlight=False, soft_wrap=True)
    )
    machine = _machine()
    with tempfile.TemporaryDirectory(prefix="article-") as directory:
        unfused: dict[int, float] = {}
        if "gpu" in machine:
            _compile(options, results)
            unfused = _unfused(options, results, Path(directory))
        for number, name in enumerate(options.shapes, 1):
            console.print(f"[bold]{name}[/] ({number} of {len(options.shapes)})")
            results.begin(name, machine)
            _Shape(SUBJECTS[name], options, results, Path(directory) / name, unfused).run()
    return results


def _line(row: Row) -> str:
    return "  ".join(f"{k} {v}" for k, v in row.items() if k not in ("why", "answer"))


def _machine() -> Row:
    """By a process of its own: naming the GPU makes a context there, whose memory the server is to have."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(report.machine).result(_MACHINE_S)


def _compile(options: Options, results: Results) -> None:
    """The CUDA kernels, where that has not been done: minutes that belong to no shape."""
    results.replace("any", "kernels")
    try:
        processes.run("kernels.cuda.build", [], options.out / "logs" / "build.log", _BUILD_S)
    except processes.ChildError as error:  # the shapes will say what it means for them
        results.add("any", "kernels", {"failed": str(error)})


def _unfused(options: Options, results: Results, directory: Path) -> dict[int, float]:
    """Launches a token of plain torch operations, by depth of the model; empty where that failed.

    An earlier run into the same directory has counted them already.
    """
    found = {row["layers"]: row["per_token"] for row in results.of("launches", "any")}
    if found:
        return found
    rows, log = directory / "launches.jsonl", options.out / "logs" / "launches.log"
    results.replace("any", "launches")
    try:
        processes.run("deploy.bench.article.launches", [str(rows)], log, options.plan.part_s)
    except processes.ChildError as error:
        results.add("any", "launches", {"kind": "unfused", "failed": str(error)})
        return {}
    for row in _read(rows):
        found[row["layers"]] = row["per_token"]
        results.add("any", row.pop("part"), row)
    return found


def _read(rows: Path) -> list[Row]:
    return [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []


class _Shape:
    """The parts of one shape, within its budget."""

    def __init__(
        self,
        subject: Subject,
        options: Options,
        results: Results,
        directory: Path,
        unfused: dict[int, float],
    ) -> None:
        self._subject, self._options, self._plan = subject, options, options.plan
        self._results, self._directory, self._unfused = results, directory, unfused
        self._logs = options.out / "logs" / subject.name
        self._deadline = time.monotonic() + options.plan.budget_s

    def run(self) -> None:
        with self._part("model"):
            model = prepare(self._subject, self._directory)
            self._engine_alone(model)
            self._launches()
            for part in _HTTP_PARTS:
                self._results.replace(self._subject.name, part, "http")
            with self._part("server", "http"):
                self._serve(model)
            if self._subject.kind == "real":
                with self._part("speculation", "http", keeps=True), self._server(model, _DRAFTS) as url:
                    self._speculation(url, _DRAFTS)
                with self._part("edge"):
                    rows = edge.measure(
                        self._logs, self._options.quantized, self._plan.rounds, self._left(self._plan.part_s)
                    )
                    self._add_all("edge", rows)

    def _add(self, part: str, row: Row, path: str | None = None) -> None:
        where = {} if path is None else {"path": path}
        bits = {} if self._subject.bits is None else {"bits": self._subject.bits}
        self._results.add(self._subject.name, part, {**where, **bits, **row})

    def _add_all(self, part: str, rows: Sequence[Row], path: str | None = None) -> None:
        for row in rows:
            self._add(part, row, path)

    def _left(self, limit_s: float) -> float:
        """Of the part's limit and the shape's budget, whichever ends first. Raises TimeoutError."""
        left = min(limit_s, self._deadline - time.monotonic())
        if left < _LEAST_S:
            raise TimeoutError(f"not begun: the shape's {self._plan.budget_s:.0f} s were spent")
        return left

    @contextlib.contextmanager
    def _part(self, part: str, path: str | None = None, *, keeps: bool = False) -> Iterator[None]:
        """keeps: rows of it that this run has made already."""
        if not keeps:
            self._results.replace(self._subject.name, part, path)
        try:
            yield
        except Exception as error:  # whatever it was: it is written down, and the next part has its turn
            self._add(part, {"failed": str(error) or type(error).__name__}, path)

    def _engine_alone(self, model: Path) -> None:
        for part in ("memory", "ttft", "decode"):
            self._results.replace(self._subject.name, part, "engine")
        self._results.replace(self._subject.name, "launches")
        config, rows = self._logs / "engine.yaml", self._directory / "engine.jsonl"
        with self._part("engine"):
            config.parent.mkdir(parents=True, exist_ok=True)
            rows.parent.mkdir(parents=True, exist_ok=True)
            config.write_text(yaml.safe_dump({"engine": engine_settings(self._subject, model)}))
            batches = [b for b in self._plan.engine_batches if b <= self._subject.max_num_seqs]
            arguments = [str(config), str(rows), "--rounds", str(self._plan.rounds)]
            arguments += ["--prompts", ",".join(map(str, self._plan.prompts))]
            arguments += ["--batches", ",".join(map(str, batches))]
            limit_s = min(self._plan.start_s + self._plan.part_s, _ENGINE_SHARE * self._plan.budget_s)
            module = "deploy.bench.article.engine_alone"
            try:
                processes.run(module, arguments, self._logs / "engine.log", self._left(limit_s))
            finally:  # also what came before it failed
                for row in _read(rows):
                    self._add(row.pop("part"), row, "engine")

    def _launches(self) -> None:
        if (shape := self._subject.shape) is None:
            return
        row = {"kind": "one an operation", "per_token": launches.one_an_operation(shape)}
        self._add("launches", row, "engine")
        if self._unfused:
            count = round(launches.of_depth(self._unfused, shape.num_layers), 1)
            self._add("launches", {"kind": "unfused", "per_token": count}, "engine")

    @contextlib.contextmanager
    def _server(self, model: Path, drafts: int) -> Iterator[str]:
        settings = engine_settings(self._subject, model, drafts)
        serving = {"max_inflight_requests": _MAX_INFLIGHT}
        directory = self._logs / f"drafts-{drafts}"
        with processes.server(settings, serving, directory, self._left(self._plan.start_s)) as url:
            yield url

    def _serve(self, model: Path) -> None:
        begin = time.monotonic()
        with self._server(model, 0) as url:
            meter = open_meter()
            row: Row = {"start_s": round(time.monotonic() - begin, 1)}
            if meter is not None and (used := meter.used_bytes()) is not None:
                row["used_gb"] = round(used / 1e9, 2)
            self._add("server", row, "http")
            plan, name = self._plan, self._subject.name

            def client(session: aiohttp.ClientSession) -> Client:
                return Client(session, url, name)

            self._http("ttft", lambda s: over_http.first_tokens(client(s), plan.prompts, max(3, plan.rounds)))
            streams = [n for n in plan.streams if n <= self._subject.max_num_seqs]
            self._http(
                "decode",
                lambda s: over_http.concurrency(client(s), streams, plan.output, plan.rounds, meter),
            )
            self._http("long", lambda s: over_http.long_answer(client(s), plan.long_output))
            self._http("workload", lambda s: over_http.workloads(client(s), WORKLOADS, plan.workload_share))
            for deadline in plan.deadlines:
                rates = goodput.Rates(
                    self._rate(deadline.workload), plan.rate_factor, plan.rates, plan.rate_s
                )
                self._http(
                    "goodput",
                    lambda s, d=deadline, r=rates: goodput.measure(s, url, name, d, r),  # type: ignore[misc]
                )
            with self._part("integration", "http"):
                self._add_all("integration", integration.run(url, name, self._left(plan.part_s)), "http")
            if self._subject.kind == "real":
                self._speculation(url, 0)

    def _speculation(self, url: str, drafts: int) -> None:
        name, rounds = self._subject.name, self._plan.rounds
        self._http("speculation", lambda s: speculation.measure(s, url, name, drafts, rounds))

    def _rate(self, kind: Workload) -> float:
        """Of goodput's first step, requests a second: half of what one stream at a time would serve."""
        for row in self._results.of("workload", self._subject.name, "http"):
            if row["workload"] == kind.name:
                return 500 / (row["ttft_ms"] + row["itl_ms"] * (kind.output_tokens - 1))
        return 1.0

    def _http(self, part: str, make: Make) -> None:
        async def collect(limit_s: float) -> None:
            async with over_http.session() as session, asyncio.timeout(limit_s):
                async for row in make(session):
                    self._add(part, row, "http")

        with self._part(part, "http", keeps=True):
            limit_s = self._left(self._plan.part_s)
            try:
                asyncio.run(collect(limit_s))
            except TimeoutError:
                raise TimeoutError(f"stopped after {limit_s:.0f} s") from None
