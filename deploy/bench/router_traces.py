"""Seeded traces for the router's simulation: who asks for what, when, and which replicas are not like the
others.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from deploy.bench.router_engine import DOUBLE, H100, Engine
from serving.routing.prefix_index import BLOCK_TOKENS


@dataclass(slots=True)
class Arrival:
    """One client's request. `output_tokens` is what the model will say; no router knows it beforehand."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    block_hashes: tuple[int, ...] = ()
    abort_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """What happens at one replica's worth of load; the simulation scales the rate.

    lengths: draws prompt and output tokens.
    burst: requests that arrive together; the times between bursts are exponential, always.
    documents: shared prefixes for each replica; a request starts with one of them, by Zipf's law.
    document_tokens: length of a shared prefix; it comes in front of the drawn prompt.
    slow_share, failing_share: of the replicas, at least one where above 0.
    retry_s: what a client waits before it sends again after an error; the OpenAI client's 0.5 s. 0 is a proxy
    that
        tries again at once, on another replica.
    """

    name: str
    lengths: Callable[[random.Random], tuple[int, int]] = field(repr=False)
    burst: int = 1
    abort_share: float = 0.0
    documents: int = 0
    document_tokens: int = 0
    slow_share: float = 0.0
    failing_share: float = 0.0
    retry_s: float = 0.5
    engine: Engine = H100

    def arrivals(self, rng: random.Random, rate_per_s: float, count: int, replicas: int) -> Iterator[Arrival]:
        """`count` requests at a mean of `rate_per_s` a second."""
        documents = range(self.documents * replicas)
        popularity = list(itertools.accumulate(1 / (1 + i) ** 0.8 for i in documents))
        now_s, sent = 0.0, 0
        while sent < count:
            now_s += rng.expovariate(rate_per_s / self.burst)
            for _ in range(self.burst):
                prompt, output = self.lengths(rng)
                arrival = Arrival(now_s, prompt, output)
                if documents:
                    chosen = rng.choices(documents, cum_weights=popularity)[0]
                    arrival.prompt_tokens += self.document_tokens
                    arrival.block_hashes = _blocks(chosen, self.document_tokens, sent, prompt)
                if rng.random() < self.abort_share:
                    arrival.abort_after_s = rng.uniform(0, 1)
                yield arrival
                sent += 1


def _blocks(document: int, document_tokens: int, unique: int, own_tokens: int) -> tuple[int, ...]:
    shared = document_tokens // BLOCK_TOKENS
    own = own_tokens // BLOCK_TOKENS
    first_own = 1 << 48 | unique << 12
    return (*range(document << 12, (document << 12) + shared), *range(first_own, first_own + own))


def _lognormal(rng: random.Random, median: float, sigma: float, low: int, high: int) -> int:
    return max(low, min(high, round(median * rng.lognormvariate(0, sigma))))


def _chat(rng: random.Random) -> tuple[int, int]:
    return _lognormal(rng, 512, 0.6, 16, 4096), _lognormal(rng, 96, 0.8, 1, 1024)


def _with_documents(share: float) -> Callable[[random.Random], tuple[int, int]]:
    """Chat in which a `share` of the prompts carries a document of 8,192 to 16,384 tokens."""

    def draw(rng: random.Random) -> tuple[int, int]:
        prompt, output = _chat(rng)
        return (prompt + rng.randint(8192, 16_384) if rng.random() < share else prompt), output

    return draw


def _short(rng: random.Random) -> tuple[int, int]:
    return 50, 24


_CHAT = Trace("uniform", _chat)
_MIXED = Trace("long_prompts", _with_documents(0.005))

# Every trace but the first has the mixed prompts, and one trouble more.
MAIN_TRACES = (
    _CHAT,
    replace(_MIXED, name="heterogeneous", slow_share=0.25),
    _MIXED,
    replace(_MIXED, name="bursts", burst=8),
    replace(_MIXED, name="shared_prefixes", documents=48, document_tokens=2048),
    replace(_MIXED, name="aborts", abort_share=0.1),
    replace(_MIXED, name="failing_fast", failing_share=0.25),
)
# The same troubles without the long prompts, or with more of them.
OTHER_TRACES = (
    replace(_CHAT, name="heterogeneous_chat", slow_share=0.25),
    replace(_MIXED, name="long_prompts_3pct", lengths=_with_documents(0.03)),
    replace(_CHAT, name="bursts_chat", burst=8),
    replace(_CHAT, name="shared_prefixes_chat", documents=48, document_tokens=2048),
    replace(_CHAT, name="aborts_chat", abort_share=0.1),
    replace(_CHAT, name="failing_fast_chat_retried", failing_share=0.25, retry_s=0.0),
    # The live run of that name (tests/load/policies.py), where places in the batch run out.
    Trace("one_at_half_speed", _short, slow_share=0.25, engine=DOUBLE),
)
TRACES = {trace.name: trace for trace in (*MAIN_TRACES, *OTHER_TRACES)}
