"""What a run is to show beside what it measured: serving's cost, first tokens, rates, memory."""

from collections.abc import Iterator

from deploy.bench.article import floors
from deploy.bench.article.claims import LONG_S, LONG_TOKENS
from deploy.bench.article.results import Results
from deploy.bench.article.subjects import SUBJECTS
from deploy.bench.article.table import NONE, Table, by, is_cut_off, long_by_rate_s, shapes
from engine.models.shapes import SHAPES

ADDED_ITL, ADDED_TTFT_MS = 0.05, 5.0
_SERVED = "8b"  # whose cost of serving is asked for: the shortest steps that users have
_STREAMS = (1, 16, 64)
_FIRST_TOKEN = ("70b", 512, 90.0)  # shape, prompt tokens, ms
_LARGE, _LARGE_TOK_S, _LARGE_GB = "180b", 1200.0, 50.0

Cells = tuple[str, str, bool | None]


def asked_table(results: Results) -> Table:
    """A row for each thing asked; those without figures say so."""
    rows = [
        [asked, measured or "not measured", NONE if kept is None else "yes" if kept else "no"]
        for asked, measured, kept in _rows(results)
    ]
    note = "Over HTTP unless it says otherwise; medians of the rounds that the run had time for."
    return Table("What was asked", note, ["asked", "measured", "kept"], rows, num_names=2)


def _rows(results: Results) -> Iterator[Cells]:
    yield from _between_tokens(results)
    yield _first_token_added(results)
    yield _first_token(results)
    yield _aggregate(results)
    yield _weights(results)
    yield _long_answer(results)


def _between_tokens(results: Results) -> Iterator[Cells]:
    alone = by(results.of("decode", _SERVED, "engine"), "streams")
    served = by(results.of("decode", _SERVED, "http"), "streams")
    for n in _STREAMS:
        streams = "1 stream" if n == 1 else f"{n} streams"
        asked = f"8B, {streams}: time between tokens at most {ADDED_ITL:.0%} above the engine's alone"
        if n not in alone or n not in served:
            yield asked, "", None
            continue
        a, b = alone[n]["itl_ms"], served[n]["itl_ms"]
        yield asked, f"{b:.2f} ms, alone {a:.2f} ms: {b / a - 1:+.1%}", b / a - 1 <= ADDED_ITL


def _first_token_added(results: Results) -> Cells:
    asked = f"8B: first token at most {ADDED_TTFT_MS:g} ms later than the engine's alone"
    alone = by(results.of("ttft", _SERVED, "engine"), "prompt_tokens")
    served = by(results.of("ttft", _SERVED, "http"), "prompt_tokens")
    added = {n: served[n]["ttft_ms"] - alone[n]["ttft_ms"] for n in sorted(alone.keys() & served.keys())}
    if not added:
        return asked, "", None
    text = ", ".join(f"{ms:+.2f} ms of {n:,}" for n, ms in added.items())
    return asked, text, max(added.values()) <= ADDED_TTFT_MS


def _first_token(results: Results) -> Cells:
    shape, prompt, limit_ms = _FIRST_TOKEN
    asked = f"{shape.upper()}: first token of {prompt} in at most {limit_ms:g} ms"
    row = by(results.of("ttft", shape, "http"), "prompt_tokens").get(prompt)
    if row is None:
        return asked, "", None
    return asked, f"{row['ttft_ms']:.1f} ms", row["ttft_ms"] <= limit_ms


def _aggregate(results: Results) -> Cells:
    asked = f"{_LARGE.upper()}: at least {_LARGE_TOK_S:,.0f} tokens/s of all streams"
    best = max(results.of("decode", _LARGE, "http"), key=lambda r: r["tok_s"], default=None)
    if best is None:
        return asked, "", None
    text = f"{best['tok_s']:,.0f} tokens/s with {best['streams']} streams"
    if is_cut_off(results, _LARGE):
        text += "; no time was left for more"
    return asked, text, best["tok_s"] >= _LARGE_TOK_S


def _weights(results: Results) -> Cells:
    asked = f"{_LARGE.upper()}: weights of at most {_LARGE_GB:g} GB"
    row = next(results.of("memory", _LARGE), None)
    if row is None:
        return asked, "", None
    return asked, f"{row['weights_gb']:.1f} GB", row["weights_gb"] <= _LARGE_GB


def _long_answer(results: Results) -> Cells:
    asked = f"{LONG_TOKENS:,} tokens of one stream in {LONG_S} s: the largest shape that does it"
    took = {
        r["shape"]: r["e2e_s"] for r in results.of("long", path="http") if r["output_tokens"] == LONG_TOKENS
    }
    took = {name: seconds for name, seconds in took.items() if SUBJECTS[name].shape_name in SHAPES}
    if kept := [name for name, seconds in took.items() if seconds <= LONG_S]:
        name = max(kept, key=_size)
        return asked, f"{_named(name)}: {took[name]:.2f} s", True
    by_rate = {
        name: seconds
        for name in shapes(results)
        if name not in took and (seconds := long_by_rate_s(results, name, LONG_TOKENS)) is not None
    }
    parts = []
    if took:
        name = min(took, key=lambda n: took[n])
        parts.append(f"none; the fastest is {_named(name)}: {took[name]:.2f} s")
    if by_rate:
        name = min(by_rate, key=lambda n: by_rate[n])
        parts.append(f"{_named(name)}, not timed, takes at least {by_rate[name]:.2f} s by its rate")
    can_tell = parts and all(seconds > LONG_S for seconds in by_rate.values())
    return asked, "; ".join(parts), False if can_tell else None


def _size(name: str) -> tuple[int, float]:
    """Parameters, and of the same shape the wider format."""
    subject = SUBJECTS[name]
    return floors.parameters(SHAPES[subject.shape_name]), subject.bits or 0.0


def _named(name: str) -> str:
    subject = SUBJECTS[name]
    shape = subject.shape_name.upper()
    return shape if subject.bits is None else f"{shape} at {subject.bits:g} bits"
