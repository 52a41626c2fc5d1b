"""Measured figures of a run as text beside a claim, each made by a function; "" where a row is missing."""

from collections.abc import Callable

from deploy.bench.article import floors
from deploy.bench.article.results import Results
from deploy.bench.article.subjects import SUBJECTS
from deploy.bench.article.table import is_cut_off, long_by_rate_s
from engine.models.shapes import SHAPES

Measured = Callable[[Results], str]


def nothing(results: Results) -> str:
    """Of systems that we do not have."""
    return ""


def first_token(shape: str, prompt_tokens: int) -> Measured:
    def find(results: Results) -> str:
        rows = (r for r in results.of("ttft", shape, "http") if r["prompt_tokens"] == prompt_tokens)
        return next((f"{r['ttft_ms']:.1f} ms" for r in rows), "")

    return find


def long_answer(shape: str, bits: float, output_tokens: int) -> Measured:
    names = {s.name for s in SUBJECTS.values() if (s.shape_name, s.bits) == (shape, bits)}

    def find(results: Results) -> str:
        rows = (r for r in results.of("long", path="http") if r["output_tokens"] == output_tokens)
        for row in rows:
            if row["shape"] in names and row["bits"] == bits:
                return f"{row['e2e_s']:.2f} s"
        least = next(filter(None, (long_by_rate_s(results, name, output_tokens) for name in names)), None)
        return "" if least is None else f"at least {least:.1f} s, by its rate"

    return find


def aggregate(shape: str) -> Measured:
    def find(results: Results) -> str:
        best = max(results.of("decode", shape, "http"), key=lambda r: r["tok_s"], default=None)
        if best is None:
            return ""
        more = "; more not reached" if is_cut_off(results, shape) else ""
        return f"{best['tok_s']:,.0f} tokens/s with {best['streams']}{more}"

    return find


def one_stream(shape: str) -> Measured:
    def find(results: Results) -> str:
        rows = (r for r in results.of("decode", shape, "http") if r["streams"] == 1)
        return next((f"{r['tok_s']:,.0f} tokens/s at {r['bits']:g} bits" for r in rows), "")

    return find


def weights(shape: str) -> Measured:
    def find(results: Results) -> str:
        return next((f"{r['weights_gb']:.1f} GB" for r in results.of("memory", shape)), "")

    return find


def launches_cut(results: Results) -> str:
    """By the largest shape that has both counts; from one an operation where unfused ones were not run."""
    counts = {(r["shape"], r["kind"]): r["per_token"] for r in results.of("launches")}
    for before, note in (("unfused", ""), ("one an operation", ", one an operation,")):
        for shape in sorted(SHAPES, key=lambda name: -floors.parameters(SHAPES[name])):
            unfused, fused = counts.get((shape, before)), counts.get((shape, "fused"))
            if unfused and fused:
                cut = 1 - fused / unfused
                return f"{cut:.1%} ({shape.upper()}: {unfused:,.0f}{note} to {fused:g})"
    return ""
