"""Multi-hop reasoning: where is a thing, through a chain of 2, 3 or 4 containers, with distracting chains.

Every story holds four chains of the same length; the wrong answers are the ends of the other three, so that
only following the chain tells them apart.
"""

import itertools
import random
from dataclasses import dataclass

HOPS = (2, 3, 4)
_THINGS = "lamp ring drum coin flute map kettle scarf violin compass".split()
_LEVELS = (
    [f"{c} box" for c in "red blue green white black yellow brown grey pink silver".split()],
    [f"{c} room" for c in "north south east west upper lower middle inner outer back".split()],
    [f"house of {n}" for n in "Arlo Benna Corvin Delia Edric Fanny Goran Hilde Ivo Jora".split()],
    [f"town of {n}" for n in "Velmor Tarkin Osdale Quimby Lorenz Halvik Brenno Sutter Pelias Nordey".split()],
)
_CHAINS = 4


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and its possible continuations; `answer` is the index of the right one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int
    num_hops: int


def questions(count: int, num_hops: int, seed: int = 0) -> list[Question]:
    """`count` questions of one chain length, each behind two solved examples."""
    rng = random.Random(f"{seed}-{num_hops}")
    result = []
    for _ in range(count):
        examples = [_story(rng, num_hops) for _ in range(2)]
        shown = "".join(f"{text}{choices[answer]}.\n\n" for text, choices, answer in examples)
        text, choices, answer = _story(rng, num_hops)
        result.append(Question(shown + text, choices, answer, num_hops))
    return result


def _story(rng: random.Random, num_hops: int) -> tuple[str, tuple[str, ...], int]:
    levels = [rng.sample(_THINGS, _CHAINS)] + [rng.sample(names, _CHAINS) for names in _LEVELS[:num_hops]]
    facts = [
        f"The {inner} is in the {outer}."
        for inside, outside in itertools.pairwise(levels)
        for inner, outer in zip(inside, outside, strict=True)
    ]
    rng.shuffle(facts)
    asked = rng.randrange(_CHAINS)
    order = rng.sample(range(_CHAINS), _CHAINS)
    kind = levels[-1][0].split()[-1] if num_hops <= 2 else levels[-1][0].split()[0]
    text = f"{' '.join(facts)}\nQuestion: In which {kind} is the {levels[0][asked]}?\nAnswer: in the"
    return text, tuple(f" {levels[-1][i]}" for i in order), order.index(asked)
