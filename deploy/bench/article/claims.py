"""The article's rows as published, each beside the floor of one card.

A claim is what somebody wrote, not what we measured. Where the project keeps no figure of a row, `value` is
None and the row says so: nothing is filled in from memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from deploy.bench.article import floors, ours
from deploy.bench.article.floors import Card
from deploy.bench.article.results import Results
from engine.models.shapes import SHAPES

Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Claim:
    """floor: the best that one card allows, in the claim's unit; None where the model's size is not public
    or nothing physical bounds it. why: the floor's arithmetic. ours: the measured figure of a run, or "".
    """

    system: str
    what: str
    value: float | None
    unit: str
    better: Better
    floor: float | None
    why: str
    ours: Callable[[Results], str] = ours.nothing

    @property
    def can_be_met(self) -> bool | None:
        """By that card; None where it cannot be told."""
        if self.value is None or self.floor is None:
            return None
        return self.floor <= self.value if self.better == "lower" else self.floor >= self.value

    @property
    def factor(self) -> float | None:
        """How many times as good as the floor the claim is: above 1, no such card can meet it."""
        if self.value is None or self.floor is None:
            return None
        return self.floor / self.value if self.better == "lower" else self.value / self.floor


LONG_TOKENS, LONG_S = 2000, 1.2
_STREAMS = 128  # of the aggregate rates; more would need more memory than an H100 has beside 180B
_ARTICLE = "Peregrine (article)"


def claims(card: Card) -> list[Claim]:
    """In the order of the article's table, with the card's floors."""
    best = floors.largest_shape(floors.readable_bytes(LONG_TOKENS, LONG_S, card))
    long = [("180b", 2.125), ("70b", 4.0), ("8b", 4.25)]
    if best is not None:
        long += [(best.shape, best.bits), (best.shape, min(floors.WIDTHS))]
    return [
        _first_token(card),
        *(stream_claim(shape, bits, card) for shape, bits in long),
        *_large_model(card),
        Claim(
            _ARTICLE,
            "kernel launches cut by",
            60.0,
            "%",
            "higher",
            100.0,
            "one launch a token is possible",
            ours.launches_cut,
        ),
        *_others(card),
    ]


def stream_claim(shape: str, bits: float, card: Card) -> Claim:
    """2,000 tokens in 1.2 s by one stream of a shape, without speculation."""
    read = floors.step_bytes(SHAPES[shape], bits)
    allowed = floors.readable_bytes(LONG_TOKENS, LONG_S, card)
    needed = floors.tokens_a_read(SHAPES[shape], bits, allowed)
    why = (
        f"it reads {read / 1e9:.2f} GB a token; {LONG_TOKENS / LONG_S:,.0f} tokens/s at "
        f"{card.read_bytes_s / 1e12:.2f} TB/s allow {allowed / 1e9:.2f} GB"
    )
    if needed > 1:
        why += f": each reading would have to bring {needed:.1f} tokens (accepted drafts)"
    return Claim(
        _ARTICLE,
        f"{LONG_TOKENS:,} tokens of one stream, {shape.upper()} at {bits:g} bits",
        LONG_S,
        "s",
        "lower",
        round(LONG_TOKENS * floors.decode_s(read, card), 3),
        why,
        ours.long_answer(shape, bits, LONG_TOKENS),
    )


def _first_token(card: Card) -> Claim:
    llama = SHAPES["70b"]
    narrow, wide = (1e3 * floors.prompt_s(llama, 512, r) for r in (card.fp8_flop_s, card.bf16_flop_s))
    why = (
        f"2 x {floors.layer_parameters(llama) / 1e9:.1f}e9 x 512 operations at the e4m3 rate; at the bf16 "
        f"rate {wide:.0f} ms, so that products in bf16 alone exceed the claim"
    )
    measured = ours.first_token("70b", 512)
    return Claim(_ARTICLE, "first token of 512, 70B", 87.0, "ms", "lower", round(narrow, 1), why, measured)


def _large_model(card: Card) -> list[Claim]:
    large = SHAPES["180b"]
    rate = round(floors.batch_tok_s(large, 2.125, _STREAMS, card))
    why = (
        f"a step reads {floors.step_bytes(large, 2.125) / 1e9:.1f} GB or multiplies 2 x "
        f"{floors.step_parameters(large) / 1e9:.0f}e9 x {_STREAMS} at the bf16 rate, whichever takes longer"
    )
    what = f"aggregate, 180B at 2.125 bits, {_STREAMS} streams"
    two_bits = floors.parameters(large) * 2 / 8e9
    bare = (
        f"{floors.parameters(large) / 1e9:.1f}e9 parameters at exactly 2 bits without scales; the narrowest "
        "packed format has 2.125"
    )
    best, published = ours.aggregate("180b"), "180B on a larger card"
    return [
        Claim(_ARTICLE, what, 1200.0, "tokens/s", "higher", rate, why, best),
        Claim(published, what, 800.0, "tokens/s", "higher", rate, why, best),
        Claim(
            _ARTICLE, "weights of 180B", 45.0, "GB", "lower", round(two_bits, 1), bare, ours.weights("180b")
        ),
    ]


def _others(card: Card) -> list[Claim]:
    llama, mistral, phi = (SHAPES[name] for name in ("70b", "123b", "14b"))
    fp16_bytes = 2 * floors.parameters(llama)
    too_large = f", which no {card.name} holds" if fp16_bytes > card.memory_bytes else ""
    mistral_gb = floors.step_bytes(mistral, 8.0) / 1e9
    stream, unit = "one stream", "tokens/s"
    unknown = "no figure of it is kept here, and its size is not public: nothing to compute"
    return [
        Claim(
            "Mistral Large 2 on two H100",
            "aggregate",
            600.0,
            unit,
            "higher",
            round(2 * floors.batch_tok_s(mistral, 8.0, _STREAMS, card)),
            f"8 bits: {mistral_gb:.0f} GB on two cards, {_STREAMS} streams; ours is one card, 3.5 bits",
            ours.aggregate("123b"),
        ),
        Claim(
            "Llama 3 70B FP16",
            stream,
            None,
            unit,
            "higher",
            round(card.read_bytes_s / fp16_bytes, 1),
            f"{fp16_bytes / 1e9:.0f} GB of weights{too_large}; one card's rate over them",
            ours.one_stream("70b"),
        ),
        Claim(
            "Phi-3-medium",
            stream,
            None,
            unit,
            "higher",
            round(1 / floors.decode_s(floors.step_bytes(phi, 4.25), card)),
            "at 4.25 bits",
            ours.one_stream("14b"),
        ),
        Claim(
            "Groq LPU", stream, None, unit, "higher", None, f"on-chip memory: no {card.name}'s limit applies"
        ),
        *(
            Claim(system, stream, None, unit, "higher", None, unknown)
            for system in ("DeepSeek V4", "GPT-4o", "Claude 3.5 Sonnet")
        ),
    ]
