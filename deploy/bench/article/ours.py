"""Measured figures of a run as text beside a claim, each made by a function; "" where a row is missing."""

from collections.abc import Callable

from deploy.bench.article import floors
from deploy.bench.article.results import Results
from deploy.bench.article.subjects import SUBJECTS
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
        return next((f"{r['e2e_s']:.2f} s" for r in rows if r["shape"] in names and r["bits"] == bits), "")

    return find


def aggregate(shape: str) -> Measured:
    def find(results: Results) -> str:
        best = max(results.of("decode", shape, "http"), key=lambda r: r["tok_s"], default=None)
        return "" if best is None else f"{best['tok_s']:,.0f} tokens/s with {best['streams']}"

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
    """By the largest shape that has both counts."""
    counts = {(r["shape"], r["kind"]): r["per_token"] for r in results.of("launches")}
    for shape in sorted(SHAPES, key=lambda name: -floors.parameters(SHAPES[name])):
        unfused, fused = counts.get((shape, "unfused")), counts.get((shape, "fused"))
        if unfused and fused:
            return f"{100 * (1 - fused / unfused):.1f}% ({shape.upper()}: {unfused:,.0f} to {fused:g})"
    return ""
