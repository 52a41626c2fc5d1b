"""Tables beside speed: claims, memory, launches, speculation, the edge, the score, what failed, where."""

import math

from deploy.bench.article import score
from deploy.bench.article.claims import Claim, claims
from deploy.bench.article.floors import Card
from deploy.bench.article.plan import BRIEF, FULL, QUICK, Plan
from deploy.bench.article.results import Results, Row
from deploy.bench.article.subjects import SUBJECTS
from deploy.bench.article.table import NONE, Table, has_gpu, number, shapes


def claims_table(results: Results, card: Card) -> Table:
    def row(claim: Claim) -> list[str]:
        value = f"{claim.value:,g} {claim.unit}" if claim.value is not None else "not kept"
        floor = f"{claim.floor:,g} {claim.unit}" if claim.floor is not None else NONE
        return [
            claim.system,
            claim.what,
            value,
            floor,
            _verdict(claim),
            claim.ours(results) or NONE,
            claim.why,
        ]

    note = (
        "Published figures are claims: none of them was measured by us. The floor is the best that one "
        f"{card.name} allows; a claim beyond it cannot be met by any program on that card."
    )
    floor = f"floor, one {card.name}"
    columns = ["system", "claim", "as published", floor, "can it be met", "ours, measured", "why"]
    return Table("The article's rows", note, columns, [row(c) for c in claims(card)], 2, ends_in_text=True)


def _verdict(claim: Claim) -> str:
    if claim.can_be_met is None or claim.factor is None:
        return NONE
    if claim.can_be_met:
        return f"yes: the floor is {1 / claim.factor:.2f} times as good"
    return f"no: {claim.factor:.1f} times beyond the floor"


def memory(results: Results) -> Table:
    rows = []
    for shape in shapes(results):
        held = next(results.of("memory", shape), None)
        if held is None:
            continue
        served = next(results.of("server", shape, "http"), {})
        figures = [number(held.get(k), ",.2f") for k in ("weights_gb", "kv_gb", "workspace_gb")]
        figures += [f"{held['kv_tokens']:,}", number(held.get("allocated_gb")), number(served.get("used_gb"))]
        rows.append([shape, *figures])
    columns = ["model", "weights GB", "KV cache GB", "workspace GB", "tokens in the cache"]
    columns += ["torch, at most, GB", "GPU in use while served, GB"]
    note = "The cache takes 90% of what the weights and the workspace leave (on a CPU: 1 GiB)."
    return Table("Memory by part", note, columns, rows)


def launches(results: Results) -> Table:
    kinds = ("unfused", "one an operation", "fused", "captured")
    rows = []
    for shape in shapes(results):
        counts = {r["kind"]: r["per_token"] for r in results.of("launches", shape)}
        if counts:
            rows.append([shape, *(number(counts.get(kind), ",g") for kind in kinds)])
    note = (
        "Of one stream, by the profiler. Unfused: plain torch operations on a small model, by its depth. "
        "One an operation: counted, not run. Fused: kernels on the device. Captured: launches by the host, "
        "a graph counting once."
    )
    return Table("Kernel launches a token", note, ["model", *kinds], rows)


def speculation(results: Results) -> Table:
    rows = []
    for shape in shapes(results):
        pairs: dict[str, dict[bool, Row]] = {}
        for r in results.of("speculation", shape):
            pairs.setdefault(r["kind"], {})[r["speculative_tokens"] > 0] = r
        for kind, pair in pairs.items():
            off, on = (pair.get(drafts, {}).get("decode_tok_s") for drafts in (False, True))
            ratio = on / off if on and off else None
            accepted = pair.get(True, {}).get("accepted")
            row = [number(off), number(on), number(ratio, ".2f"), number(accepted, ".0%")]
            rows.append([SUBJECTS[shape].title, kind, *row])
    columns = ["model", "kind", "tokens/s without", "with drafts", "ratio", "drafted tokens accepted"]
    note = "Real weights and real text, one stream, greedy; the model verifies every drafted token."
    return Table("Speculation on copy-heavy work", note, columns, rows, num_names=2)


def edge(results: Results) -> Table:
    rows = [
        [
            r["runtime"],
            r["model"],
            str(r["threads"]),
            number(r["ttft_ms"]),
            number(r["tok_s"]),
            number(r["weights_mb"]),
            number(r["rss_mb"], ",.0f"),
        ]
        for r in results.of("edge")
    ]
    columns = ["runtime", "model", "cores", "TTFT ms, 128 tokens", "tokens/s", "weights MB", "RSS MB"]
    note = "One stream on the CPU; the runtimes take turns in one run, each in a process of its own; medians."
    return Table("CPU and edge", note, columns, rows, num_names=2)


def scores(results: Results, dollars_an_hour: float) -> Table:
    rows = []
    for shape in shapes(results):
        if not has_gpu(results, shape):  # whose price it is
            continue
        if (s := score.of_shape(results, shape, dollars_an_hour)) is None:
            continue
        parts = [number(v, ".2f") for v in (s.latency, s.cost, s.ease, s.dollars)]
        rows.append([SUBJECTS[shape].title, *parts, number(s.total, ".0f")])
    note = (
        f"100 (0.4 L + 0.4 C + 0.2 E). L = min(1, {score.LATENCY_MS:g} ms / TTFT of 512 tokens). "
        f"C = min(1, {score.DOLLARS_A_MILLION:g} $ / cost of a million output tokens at saturation), "
        f"at {dollars_an_hour:g} $ an hour, which is an assumption. E = share of the probes of the APIs that "
        "the live server passed."
    )
    columns = ["model", "L latency", "C cost", "E ease", "$ a million tokens", "score"]
    return Table("Deployability score", note, columns, rows)


def machines(results: Results) -> Table:
    found: dict[tuple[str, ...], list[str]] = {}
    for shape in shapes(results):
        run = results.runs[shape]
        machine, versions = run["machine"], run["versions"]
        host = f"{machine['cpu']}, {machine['cores']} cores"
        packages = [versions.get(package, NONE) for package in ("torch", "ray")]
        cells = (machine.get("gpu", "no GPU"), host, *packages, run["date"], run["command"])
        found.setdefault(cells, []).append(shape)
    rows = [[", ".join(names), *cells] for cells, names in found.items()]
    columns = ["models", "GPU", "host", "torch", "ray", "date", "command"]
    plans = (("--brief", BRIEF), ("--quick", QUICK), ("neither", FULL))
    note = "; ".join(f"{name}: {_repeats(plan)}" for name, plan in plans) + "."
    return Table("Where it was measured, and how often", note, columns, rows, num_names=7)


def _repeats(plan: Plan) -> str:
    rounds = "one round" if plan.rounds == 1 else f"up to {plan.rounds} rounds"
    limit = "" if plan.rounds_s == math.inf else f", none begun after {plan.rounds_s:g} s of a case"
    rates = f"up to {plan.rates} rates of {plan.rate_s:g} s a tier"
    return f"{rounds}{limit}, {plan.workload_share:.0%} of each kind's answer, goodput by {rates}"
