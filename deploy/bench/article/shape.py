"""The parts of one shape in their order. One that fails becomes a row with its reason; the rest goes on."""

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import yaml

from deploy.bench.article import (
    edge,
    goodput,
    integration,
    launches,
    machine,
    over_http,
    processes,
    speculation,
)
from deploy.bench.article.gpu_meter import open_meter
from deploy.bench.article.plan import Options, Rounds
from deploy.bench.article.results import Results, Row
from deploy.bench.article.shared_cluster import SharedCluster
from deploy.bench.article.subjects import Subject, engine_settings, prepare
from deploy.bench.article.workloads import WORKLOADS, Deadline, Workload
from deploy.bench.client import Streams
from deploy.bench.peers import Client

_MAX_INFLIGHT = 2048  # of the server: every stream of a batch is admitted
_DRAFTS = 7  # of a step, where speculation is measured: 8 tokens read the weights once
_HTTP_PARTS = ("server", "ttft", "decode", "long", "workload", "goodput", "integration", "speculation")
_ENGINE_MODULE = "deploy.bench.article.engine_alone"
_ENGINE_SHARE = 0.45  # of a shape's budget, at most: the rest is for the server
_DRAFTS_S = 60.0  # of a shape's budget: a second server, and the CPU
_LEAST_S = 5.0  # a part that has less left is not begun
_GATE_S = 60.0
_POLL_S = 0.05
Make = Callable[[Streams], AsyncIterator[Row]]


class Shape:
    """The parts of one shape, within its budget.

    cluster: of all shapes, in which the servers run; None where each has its own.
    """

    cluster: SharedCluster | None = None

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
        self._budget_s = options.budgets.get(subject.name, options.plan.budget_s)
        self._deadline = time.monotonic() + self._budget_s
        self._model: Path | None = None
        self._alone = contextlib.ExitStack()
        self._child: subprocess.Popen[bytes] | None = None

    def get_ready(self) -> None:
        """Start the engine's process, up to where it would touch the device. What fails is tried in `run`."""
        with contextlib.suppress(Exception):
            self._start_engine(self._prepared())

    def begin_server(self) -> None:
        """Start its processes, up to where they would touch the device. What fails is tried in `run`."""
        if self.cluster is not None and not self.cluster.is_begun:
            with contextlib.suppress(Exception):
                limit_s = self._budget_s + self._plan.start_s
                self.cluster.begin(*self._server_settings(self._prepared(), 0), limit_s)

    def close(self) -> None:
        """End the engine's process, if it still runs."""
        self._alone.close()
        self._child = None

    def run(self, following: "Shape | None" = None) -> None:
        """following: gets ready while this one's server loads."""
        self._deadline = time.monotonic() + self._budget_s
        with self._part("model"):
            model = self._prepared()
            self._engine_alone(model)
            self._launches()
            for part in _HTTP_PARTS:
                self._results.replace(self._subject.name, part, "http")
            if following is not None and self._plan.is_shared:
                following.get_ready()
            with self._part("server", "http"):
                self._serve(model)
            if self._subject.kind == "real":
                with self._part("speculation", "http", keeps=True), self._server(model, _DRAFTS) as url:
                    self._speculation(url, _DRAFTS)
                with self._part("edge"):
                    rows = edge.measure(
                        self._logs,
                        model,
                        self._options.quantized,
                        self._plan.rounds,
                        self._left(self._plan.part_s),
                    )
                    self._add_all("edge", rows)
        if self.cluster is not None:
            self.cluster.abandon()  # what was begun for a server that had no time left

    def _prepared(self) -> Path:
        if self._model is None:
            self._model = prepare(self._subject, self._directory, self._options.quantized)
        return self._model

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
            raise TimeoutError(f"not begun: the shape's {self._budget_s:.0f} s were spent")
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
        with self._part("engine"):
            limit_s = min(self._plan.start_s + self._plan.part_s, _ENGINE_SHARE * self._budget_s)
            deadline = time.monotonic() + self._left(limit_s)
            try:
                child = self._start_engine(model)
                if self.cluster is not None:
                    machine.wait_for_free_memory()
                processes.tell(child, "load")
                self.begin_server()
                while (
                    not processes.lines(self._rows) and child.poll() is None and time.monotonic() < deadline
                ):
                    time.sleep(_POLL_S)
                if self.cluster is not None:  # nothing else is to run while the engine is timed
                    self.cluster.wait_at_gate(_GATE_S)
                    machine.wait_until_quiet()
                processes.tell(child, "measure")
                left_s = max(0.0, deadline - time.monotonic())
                processes.wait(child, _ENGINE_MODULE, self._logs / "engine.log", left_s)
            finally:  # also what came before it failed
                self.close()
                for line in processes.lines(self._rows):
                    row = json.loads(line)
                    self._add(row.pop("part"), row, "engine")

    @property
    def _rows(self) -> Path:
        return self._directory / "engine.jsonl"

    def _start_engine(self, model: Path) -> "subprocess.Popen[bytes]":
        if self._child is not None:
            return self._child
        config = self._logs / "engine.yaml"
        config.parent.mkdir(parents=True, exist_ok=True)
        self._rows.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(yaml.safe_dump({"engine": engine_settings(self._subject, model)}))
        batches = [b for b in self._plan.engine_batches if b <= self._subject.max_num_seqs]
        command = [sys.executable, "-m", _ENGINE_MODULE, str(config), str(self._rows), "--asks"]
        command += ["--rounds", str(self._plan.rounds), "--rounds-s", str(self._plan.rounds_s)]
        command += ["--prompts", ",".join(map(str, self._plan.prompts))]
        command += ["--batches", ",".join(map(str, batches))]
        log = self._logs / "engine.log"
        self._child = self._alone.enter_context(processes.started(command, log, asks=True))
        return self._child

    def _launches(self) -> None:
        if (shape := self._subject.shape) is None:
            return
        row = {"kind": "one an operation", "per_token": launches.one_an_operation(shape)}
        self._add("launches", row, "engine")
        machine.add_unfused(self._results, self._subject.name, self._unfused)

    def _server_settings(self, model: Path, drafts: int) -> tuple[Row, Row, Path]:
        settings = engine_settings(self._subject, model, drafts)
        return settings, {"max_inflight_requests": _MAX_INFLIGHT}, self._logs / f"drafts-{drafts}"

    @contextlib.contextmanager
    def _server(self, model: Path, drafts: int) -> Iterator[str]:
        start = processes.server if self.cluster is None else self.cluster.server
        with start(*self._server_settings(model, drafts), self._left(self._plan.start_s)) as url:
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

            def client(streams: Streams) -> Client:
                return Client(streams, url, name)

            rounds = Rounds(plan.rounds, plan.rounds_s)
            self._http("ttft", lambda s: over_http.first_tokens(client(s), plan.prompts))
            streams = [n for n in plan.streams if n <= self._subject.max_num_seqs]
            self._http(
                "decode",
                lambda s: over_http.concurrency(client(s), streams, plan.output, rounds, meter),
            )
            itl_ms = self._itl_ms()
            self._http(
                "long", lambda s: over_http.long_answer(client(s), plan.long_output, itl_ms, plan.long_s)
            )
            with self._part("integration", "http"):
                self._add_all("integration", integration.run(url, name, self._left(plan.part_s)), "http")
            self._http("workload", lambda s: over_http.workloads(client(s), WORKLOADS, plan.workload_share))
            if self._subject.kind == "real":
                self._speculation(url, 0)
            for deadline in plan.deadlines:
                first = self._rate(deadline.workload)
                rates = goodput.Rates(first, plan.rate_factor, plan.rates, plan.rate_s, plan.drain_s)
                with self._part("goodput", "http", keeps=True):
                    if self._subject.kind == "real" and self._deadline - time.monotonic() < _DRAFTS_S:
                        raise TimeoutError("left out: what time is left is for speculation")
                    self._check_alone(deadline)
                    self._http(
                        "goodput",
                        lambda s, d=deadline, r=rates: goodput.measure(s, url, name, d, r),  # type: ignore[misc]
                    )

    def _speculation(self, url: str, drafts: int) -> None:
        name, rounds = self._subject.name, self._plan.rounds
        self._http("speculation", lambda s: speculation.measure(s, url, name, drafts, rounds))

    def _itl_ms(self) -> float:
        """Of one stream over HTTP; 0 where it was not measured."""
        rows = self._results.of("decode", self._subject.name, "http")
        return next((r["itl_ms"] for r in rows if r["streams"] == 1), 0.0)

    def _rate(self, kind: Workload) -> float:
        """Of goodput's first step, requests a second: a quarter of what prompts alone and tokens at
        their best rate would allow. From there it mostly rises: a server in trouble may refuse for a while.
        """
        name = self._subject.name
        timed = sorted(self._results.of("ttft", name, "http"), key=lambda r: r["prompt_tokens"])
        best = max((r["tok_s"] for r in self._results.of("decode", name, "http")), default=None)
        if not timed or best is None:
            return 1.0
        like = next((r for r in timed if r["prompt_tokens"] >= kind.prompt_tokens), timed[-1])
        prompt_s = like["ttft_ms"] / 1e3 * max(1.0, kind.prompt_tokens / like["prompt_tokens"])
        return 0.25 / (prompt_s + kind.output_tokens / best)

    def _check_alone(self, deadline: Deadline) -> None:
        """Raises TimeoutError where a request that is alone misses the deadline: then every rate does."""
        for row in self._results.of("workload", self._subject.name, "http"):
            if row["workload"] == deadline.workload.name:
                rest = row["itl_ms"] * (deadline.workload.output_tokens - 1)
                alone_s = (row["ttft_ms"] + (rest if deadline.ends == "answer" else 0.0)) / 1e3
                if alone_s > deadline.seconds:
                    raise TimeoutError(
                        f"{deadline.tier}: no rate keeps {1e3 * deadline.seconds:.0f} ms to the "
                        f"{deadline.ends}: a request alone takes {1e3 * alone_s:.0f} ms"
                    )

    def _http(self, part: str, make: Make) -> None:
        async def collect(limit_s: float) -> None:
            async with Streams(over_http.REQUEST_TIMEOUT_S) as streams, asyncio.timeout(limit_s):
                async for row in make(streams):
                    self._add(part, row, "http")

        with self._part(part, "http", keeps=True):
            limit_s = self._left(self._plan.part_s)
            try:
                asyncio.run(collect(limit_s))
            except TimeoutError as error:
                if str(error):  # a part that was not begun says why
                    raise
                raise TimeoutError(f"stopped after {limit_s:.0f} s") from None
