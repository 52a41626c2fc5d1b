"""What a report has no figures of, and why: a row for each shape, path and reason."""

from collections.abc import Iterable, Iterator, Mapping

from deploy.bench.article.plan import Plan
from deploy.bench.article.results import Results
from deploy.bench.article.subjects import DEFAULT_SUBJECTS, SUBJECTS
from deploy.bench.article.table import NONE, Table, by, has_gpu, is_cut_off
from deploy.bench.article.workloads import DEADLINES

_ALONE, _HTTP = "engine alone", "over HTTP"
_ENDED = "the run ended before it"
_SINGLE = {
    "long": "2,000 tokens",
    "integration": "probes of the APIs",
    "workload": "kinds of prompts",
}
_GROUPS = {"engine", "server", "ttft", "decode", "goodput", "launches", *_SINGLE}
Missing = tuple[str, str, str]
"""Path, what, and why."""


def left_out(results: Results) -> Table:
    """Parts that failed, were stopped or not begun, or of which there are no rows at all."""
    rows = []
    for name, subject in SUBJECTS.items():
        if name in results.runs:
            missing = [*_engine(results, name), *_http(results, name), *_others(results, name)]
            grouped: dict[tuple[str, str], list[str]] = {}
            for path, what, why in missing:
                grouped.setdefault((path, why), []).append(what)
            rows += [[subject.title, path, "; ".join(what), why] for (path, why), what in grouped.items()]
        elif name in DEFAULT_SUBJECTS:
            rows.append([subject.title, NONE, "everything", "given no machine time by any run"])
    rows += [["all", NONE, what, why] for what, why in _of_the_machine(results)]
    rows += [
        [SUBJECTS[r["shape"]].title, _HTTP, f"failed: the probe {r['probe']}", r["answer"]]
        for r in results.of("integration")
        if not r["passed"]
    ]
    note = (
        "Each shape has a budget of the machine's time, in the run's command behind its name. What did not "
        "fit into it was not begun, or was stopped after the seconds that were left for it."
    )
    return Table("What was not measured, or failed", note, ["model", "path", "what", "why"], rows, 4)


def _engine(results: Results, name: str) -> Iterator[Missing]:
    """Its parts fail together: the process is one."""
    why = _reasons(results, name).get("engine")
    lengths = _absent(Plan.prompts, by(results.of("ttft", name, "engine"), "prompt_tokens"))
    batches = [n for n in Plan.engine_batches if n <= SUBJECTS[name].max_num_seqs]
    streams = _absent(batches, by(results.of("decode", name, "engine"), "streams"))
    if why is None and not (lengths or streams):
        return
    if lengths:
        yield _ALONE, f"first token of {lengths}", why or _ENDED
    if streams:
        yield _ALONE, f"streams: {streams}", why or _ENDED
    if has_gpu(results, name) and not any(r["kind"] == "fused" for r in results.of("launches", name)):
        yield _ALONE, "launches", why or _ENDED


def _http(results: Results, name: str) -> Iterator[Missing]:
    reasons = _reasons(results, name)
    if "server" in reasons:
        yield _HTTP, "everything", reasons["server"]
        return
    if lengths := _absent(Plan.prompts, by(results.of("ttft", name, "http"), "prompt_tokens")):
        yield _HTTP, f"first token of {lengths}", reasons.get("ttft", _ENDED)
    most = max((r["streams"] for r in results.of("decode", name, "http")), default=0)
    if not most:
        yield _HTTP, "streams, of any number", reasons.get("decode", _ENDED)
    elif is_cut_off(results, name):
        yield _HTTP, f"streams, more than {most}", reasons["decode"]
    for part, what in _SINGLE.items():
        if part in reasons or not any(results.of(part, name, "http")):
            yield _HTTP, what, reasons.get(part, _ENDED)
    tiers = {r["tier"] for r in results.of("goodput", name, "http")}
    absent = [d.tier for d in DEADLINES if d.tier not in tiers]
    if absent or "goodput" in reasons:
        which = ", ".join(absent) or "of a rate"
        what = "goodput" if len(absent) == len(DEADLINES) else f"goodput, {which}"
        yield _HTTP, what, reasons.get("goodput", _ENDED)


def _others(results: Results, name: str) -> Iterator[Missing]:
    """Of parts that only some shapes have: the model, speculation, the edge."""
    for row in results.failures():
        if row["shape"] == name and row["part"] not in _GROUPS:
            yield _HTTP if row.get("path") == "http" else NONE, row["part"], row["failed"]


def _of_the_machine(results: Results) -> Iterator[tuple[str, str]]:
    """What and why, of parts that belong to no shape."""
    reasons = _reasons(results, "any")
    counted = any(r["kind"] == "unfused" for r in results.of("launches"))
    if not counted and any(has_gpu(results, name) for name in results.runs):
        yield "launches of plain torch operations", reasons.pop("launches", _ENDED)
    yield from reasons.items()


def _reasons(results: Results, name: str) -> dict[str, str]:
    """By part, the first one's."""
    found: dict[str, str] = {}
    for row in results.failures():
        if row["shape"] == name:
            found.setdefault(row["part"], row["failed"])
    return found


def _absent(wanted: Iterable[int], found: Mapping[int, object]) -> str:
    return ", ".join(f"{n:,}" for n in wanted if n not in found)
