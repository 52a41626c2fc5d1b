"""The deployability score: latency, hardware cost and ease of integration in one number of 0 to 100.

    score = 100 (0.4 L + 0.4 C + 0.2 E)
    L = min(1, 200 ms / TTFT)      first token of a prompt of 512, over HTTP, one at a time
    C = min(1, 1 $ / cost)         cost of a million output tokens at saturation, by the price of an hour
    E = probes passed / probes     requests of other APIs' forms to the live server (`integration`)

The weights and the two references are a choice, written down so that it can be argued with.
"""

from dataclasses import dataclass

from deploy.bench.article.results import Results

LATENCY_MS = 200.0
DOLLARS_A_MILLION = 1.0
WEIGHTS = (0.4, 0.4, 0.2)
PROMPT_TOKENS = 512


@dataclass(frozen=True)
class Score:
    """Parts in [0, 1], total in [0, 100]; dollars: of a million output tokens."""

    latency: float
    cost: float
    ease: float
    dollars: float

    @property
    def total(self) -> float:
        parts = (self.latency, self.cost, self.ease)
        return 100 * sum(w * p for w, p in zip(WEIGHTS, parts, strict=True))


def score(ttft_ms: float, tok_s: float, passed: int, asked: int, dollars_an_hour: float) -> Score:
    """Raises ValueError for figures that are not positive."""
    if min(ttft_ms, tok_s, asked, dollars_an_hour) <= 0:
        raise ValueError("a score needs a first token, tokens, probes and a price above 0")
    dollars = dollars_an_hour / (tok_s * 3600) * 1e6
    return Score(
        min(1.0, LATENCY_MS / ttft_ms), min(1.0, DOLLARS_A_MILLION / dollars), passed / asked, dollars
    )


def of_shape(results: Results, shape: str, dollars_an_hour: float) -> Score | None:
    """None where one of its figures was not measured."""
    rows = results.of("ttft", shape, "http")
    ttft = next((r["ttft_ms"] for r in rows if r["prompt_tokens"] == PROMPT_TOKENS), None)
    best = max((r["tok_s"] for r in results.of("decode", shape, "http")), default=None)
    probes = list(results.of("integration", shape))
    if ttft is None or best is None or not probes:
        return None
    return score(ttft, best, sum(r["passed"] for r in probes), len(probes), dollars_an_hour)
