"""Tables of speed: all models, what serving adds, concurrency, deadlines, kinds of prompts."""

from collections.abc import Sequence

from deploy.bench.article.asked import ADDED_ITL, ADDED_TTFT_MS
from deploy.bench.article.goodput import GOOD_SHARE
from deploy.bench.article.results import Results, Row
from deploy.bench.article.subjects import SUBJECTS
from deploy.bench.article.table import NONE, Table, by, floor_ms, is_cut_off, number, shapes
from deploy.bench.article.workloads import DEADLINES, WORKLOADS


def summary(results: Results) -> Table:
    rows = []
    for shape in shapes(results):
        ttft = by(results.of("ttft", shape, "http"), "prompt_tokens")
        decode = by(results.of("decode", shape, "http"), "streams")
        best = max(decode.values(), key=lambda r: r["tok_s"], default={})
        long = next(results.of("long", shape, "http"), {})
        held = next(results.of("memory", shape), {})
        one, floor = decode.get(1, {}), floor_ms(results, shape)
        share = floor / one["itl_ms"] if floor and one else None
        rows.append(
            [
                SUBJECTS[shape].title,
                number(SUBJECTS[shape].bits, "g"),
                number(held.get("weights_gb")),
                *(number(ttft.get(n, {}).get("ttft_ms")) for n in (128, 512, 2048)),
                number(one.get("tok_s")),
                number(share, ".0%"),
                number(long.get("e2e_s"), ".2f"),
                number(best.get("tok_s"), ",.0f"),
                number(best.get("streams"), "d") + (", cut off" if is_cut_off(results, shape) else ""),
                number(best.get("itl_ms_p99")),
                number(best.get("joules_per_token"), ".3f"),
            ]
        )
    columns = ["model", "bits", "weights GB", "TTFT ms, 128", "512", "2,048", "tokens/s, 1 stream"]
    columns += ["share of floor", "2,000 tokens, s", "tokens/s, most", "streams", "its ITL p99 ms", "J/token"]
    note = (
        "Over HTTP through HAProxy, one replica. Bits are those of the layers' matrices. The floor is what a "
        "step must read over the read-only rate measured in the same run. Cut off: time was up before more "
        "streams had been tried."
    )
    return Table("All models, over HTTP", note, columns, rows)


def first_tokens(results: Results) -> Table:
    rows = []
    for shape in shapes(results):
        alone = by(results.of("ttft", shape, "engine"), "prompt_tokens")
        served = by(results.of("ttft", shape, "http"), "prompt_tokens")
        for prompt in sorted(alone.keys() | served.keys()):
            a, b = (d.get(prompt, {}).get("ttft_ms") for d in (alone, served))
            added = None if a is None or b is None else b - a
            kept = NONE if added is None else "yes" if added <= ADDED_TTFT_MS else "no"
            row = [shape, f"{prompt:,}", number(a, ",.2f"), number(b, ",.2f"), number(added, "+.2f"), kept]
            rows.append(row)
    columns = ["model", "prompt tokens", "engine alone, ms", "over HTTP, ms", "added, ms", "at most 5 ms"]
    note = "One request at a time, one output token; medians. The difference is what serving costs."
    return Table("First token: the engine alone and over HTTP", note, columns, rows)


def serving_cost(results: Results) -> Table:
    rows = []
    for shape in shapes(results):
        alone = by(results.of("decode", shape, "engine"), "streams")
        served = by(results.of("decode", shape, "http"), "streams")
        for streams in sorted(alone.keys() & served.keys()):
            a, b = alone[streams]["itl_ms"], served[streams]["itl_ms"]
            kept = "yes" if b / a - 1 <= ADDED_ITL else "no"
            row = [shape, str(streams), number(a, ".3f"), number(b, ".3f"), number(b / a - 1, "+.1%"), kept]
            rows.append(row)
    columns = ["model", "streams", "engine alone, ms", "over HTTP, ms", "added", "at most 5%"]
    note = "Streams over tokens a second, while all streams decode and nothing else runs; medians."
    return Table("Between tokens: the engine alone and over HTTP", note, columns, rows)


def concurrency(results: Results) -> Table:
    rows = []
    for shape in shapes(results):
        floor = floor_ms(results, shape)
        for r in results.of("decode", shape, "http"):
            share = floor / r["itl_ms"] if floor else None
            figures = [number(r["tok_s"]), number(r["itl_ms"], ".2f"), number(r["itl_ms_p50"], ".2f")]
            figures += [number(r["itl_ms_p99"], ".2f"), number(r["ttft_ms_p50"]), number(r["ttft_ms_p99"])]
            figures += [number(share, ".0%"), number(r.get("joules_per_token"), ".3f")]
            rows.append([shape, str(r["streams"]), *figures, number(r.get("watts"), ".0f")])
    columns = ["model", "streams", "tokens/s", "ITL ms", "p50", "p99", "TTFT p50 ms", "p99", "share of floor"]
    note = (
        "Prompts of 128 tokens, all streams at once; their number grows until more bring no more. p50 and "
        "p99 are of the gaps between chunks, TTFT of prompts that arrive together."
    )
    return Table("Growing concurrency", note, [*columns, "J/token", "W"], rows)


def goodput(results: Results) -> Table:
    rows = []
    for shape in shapes(results):
        for deadline in DEADLINES:
            tried = [r for r in results.of("goodput", shape) if r["tier"] == deadline.tier]
            if not tried:
                continue
            best = best_goodput(tried)
            figures = [number(best["rate_req_s"], ",.2f"), number(best["goodput_req_s"], ",.2f")]
            figures += [number(best["goodput_tok_s"], ",.0f"), number(best["share_good"], ".0%")]
            figures += [number(best.get("ttft_ms_p99")), number(best.get("e2e_ms_p99"), ",.0f")]
            promise = f"{best['ends']} in {best['deadline_ms']} ms"
            rows.append([shape, deadline.tier, promise, *figures, str(best["num_refused"])])
    columns = ["model", "tier", "promise", "sent/s", "good/s", "good tokens/s", "share good", "TTFT p99 ms"]
    note = (
        "Open loop, Poisson arrivals at rising rates; the row is the highest rate of which "
        f"{GOOD_SHARE:.0%} were good, or the lowest one where none was. Times count from when a request was "
        "due; refusals (429) are not good."
    )
    return Table("Goodput under each tier's deadline", note, [*columns, "e2e p99 ms", "refused"], rows, 3)


def best_goodput(rows: Sequence[Row]) -> Row:
    """Of one tier's rates: the highest that kept its promise, else the lowest."""
    good = [r for r in rows if r["share_good"] >= GOOD_SHARE]
    if good:
        return max(good, key=lambda r: r["goodput_req_s"])
    return min(rows, key=lambda r: r["rate_req_s"])


def workloads(results: Results) -> Table:
    found = {name: by(results.of("workload", name), "workload") for name in shapes(results)}
    found = {name: rows for name, rows in found.items() if rows}
    rows = []
    for kind in WORKLOADS if found else ():
        cells = [_workload_cell(of_shape.get(kind.name)) for of_shape in found.values()]
        rows.append([kind.name, kind.what, f"{kind.prompt_tokens:,}", f"{kind.output_tokens:,}", *cells])
    note = (
        "One request of each kind alone: first token in ms / whole answer in s (in brackets: output tokens, "
        "where a short run asked for fewer)."
    )
    columns = ["kind", "what", "prompt tokens", "output tokens", *found]
    return Table("Fifteen kinds of prompts", note, columns, rows, num_names=2)


def _workload_cell(row: Row | None) -> str:
    if row is None:
        return NONE
    full = {w.name: w.output_tokens for w in WORKLOADS}[row["workload"]]
    short = "" if row["output_tokens"] == full else f" ({row['output_tokens']})"
    return f"{row['ttft_ms']:,.1f} / {row['e2e_s']:.2f}{short}"
