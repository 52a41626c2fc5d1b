"""What load tests send: arrivals, tiers, lengths, aborts. Rates are multiples of the measured capacity."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

_WORDS = ("river", "stone", "light", "winter", "garden", "letter", "market", "engine", "silver", "bridge")


@dataclass(frozen=True)
class Kind:
    """One sort of request: its tier, its share of the arrivals, how long it is."""

    tier: str
    share: float
    prompt_words: int
    output_tokens: int
    deadline_s: float  # of the first token, from the moment the request was due
    total_s: float | None = None  # of the whole answer


MIX = (
    Kind("voice", 0.2, 20, 24, deadline_s=0.2),
    Kind("copilot", 0.2, 40, 12, deadline_s=0.25, total_s=0.5),
    Kind("agent", 0.1, 60, 16, deadline_s=0.5, total_s=1.0),
    Kind("default", 0.2, 40, 48, deadline_s=5.0),
    Kind("batch", 0.3, 100, 64, deadline_s=120.0),
)
LONG = (Kind("default", 0.9, 30, 32, 5.0), Kind("default", 0.1, 1200, 32, 5.0))


@dataclass(frozen=True)
class Scenario:
    """`phases`: (seconds, load as a multiple of the capacity) in turn."""

    phases: tuple[tuple[float, float], ...]
    kinds: tuple[Kind, ...] = MIX
    abort_share: float = 0.0
    shared_prefix_words: int = 0


SCENARIOS = {
    "steady": Scenario(((20, 0.3), (20, 0.5), (20, 0.7))),
    "burst": Scenario(((15, 0.3), (5, 2.0), (20, 0.3))),
    "long-prompts": Scenario(((40, 0.5),), kinds=LONG),
    "shared-prefix": Scenario(((40, 0.6),), shared_prefix_words=300),
    "aborts": Scenario(((40, 0.6),), abort_share=0.1),
    "overload": Scenario(((120, 2.0),)),
}


@dataclass(frozen=True)
class Arrival:
    due_s: float
    kind: Kind
    prompt: str
    aborts: bool


def arrivals(scenario: Scenario, capacity: float, seed: int) -> Iterator[Arrival]:
    """Poisson arrivals, whatever becomes of earlier requests. capacity: requests a second."""
    random_ = random.Random(seed)
    prefix = " ".join(random_.choices(_WORDS, k=scenario.shared_prefix_words))
    begin = 0.0
    for seconds, load in scenario.phases:
        due = begin
        while (due := due + random_.expovariate(load * capacity)) < begin + seconds:
            (kind,) = random_.choices(scenario.kinds, [k.share for k in scenario.kinds])
            own = " ".join(random_.choices(_WORDS, k=kind.prompt_words))
            yield Arrival(due, kind, f"{prefix} {own}".strip(), random_.random() < scenario.abort_share)
        begin += seconds
