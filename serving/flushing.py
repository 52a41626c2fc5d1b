"""Streamed text held back to the end of a word or a sentence, for clients that speak it."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Literal

import regex
import sentencex

from engine import RequestOutput

Flush = Literal["token", "word", "sentence"]

# sentencex knows the ends of sentences in all scripts; the language is that of the abbreviations ("Dr.") that
# end none.
_LANGUAGE = "en"
# Behind blanks; between words as Unicode's text segmentation (UAX #29) finds them where a script has none.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}"
_WORD_END = regex.compile(
    rf"(?w)(?<=\S\s+)(?!\s)|(?<=[{_UNSPACED}\p{{Po}}\p{{Pe}}\p{{Pf}}])\b(?=[{_UNSPACED}])"
)

# A quotation's beginning, which sentencex leaves with the sentence before while the quotation is open.
_OPENED = regex.compile(r"(?<=\s)[\p{Ps}\p{Pi}\"']+\Z")


@dataclass(frozen=True, slots=True)
class HoldLimit:
    """What is held is given out, up to the last end of a word in it, once either is reached."""

    chars: int
    seconds: float


LIMITS = {"word": HoldLimit(64, 0.25), "sentence": HoldLimit(400, 2.0)}


def word_end(text: str) -> int:
    """Length of the longest beginning of `text` that ends with a word and the blanks behind it; 0 if none
    does.
    """
    return max((found.end() for found in _WORD_END.finditer(text)), default=0)


def sentence_end(text: str) -> int:
    """Length of the longest beginning of `text` that ends with a sentence or a line; 0 if none does.

    The last sentence is whole only when something follows it: "3." may go on with "14".
    """
    last = sentencex.segment(_LANGUAGE, text)[-1:]
    whole = text[: len(text) - len(last[0])] if last else ""
    if (opened := _OPENED.search(whole)) is not None:
        whole = whole[: opened.start()]
    end = max(len(whole), text.rfind("\n") + 1)
    return end if text[:end].strip() else 0


_ENDS: dict[str, Callable[[str], int]] = {"word": word_end, "sentence": sentence_end}


@dataclass(slots=True)
class HeldText:
    """Of one choice: outputs whose text has not been given out, with the times at which they came.

    A token's logprobs go with the first character of its text.
    """

    flush: Flush
    _outputs: list[tuple[RequestOutput, float]] = field(default_factory=list)
    _text: str = ""

    def add(self, output: RequestOutput, now_s: float) -> RequestOutput | None:
        """What may be given out: all of a choice that has ended, else up to the last end."""
        self._outputs.append((output, now_s))
        self._text += output.text
        if output.finish_reason is not None:
            return self.take(len(self._text))
        if output.text and (end := _ENDS[self.flush](self._text)):
            return self.take(end)
        return self.take_late(now_s) if len(self._text) >= LIMITS[self.flush].chars else None

    @property
    def due_s(self) -> float:
        """When `take_late` is to be called; infinite while nothing is held."""
        return self._outputs[0][1] + LIMITS[self.flush].seconds if self._outputs else float("inf")

    def take_late(self, now_s: float) -> RequestOutput | None:
        """What a limit makes go, though no end has come."""
        is_late = now_s >= self.due_s or len(self._text) >= LIMITS[self.flush].chars
        return self.take(word_end(self._text) or len(self._text)) if is_late else None

    def take_all(self) -> RequestOutput | None:
        """None where nothing is held."""
        return self.take(len(self._text)) if self._outputs else None

    def take(self, num_chars: int) -> RequestOutput:
        """The outputs of the first `num_chars` characters, as one; there must be outputs."""
        taken: list[RequestOutput] = []
        left = num_chars
        while self._outputs and (left > 0 or not self._outputs[0][0].text):
            output, came_s = self._outputs.pop(0)
            if len(output.text) > left:
                rest = replace(
                    output,
                    text=output.text[left:],
                    token_ids=(),
                    logprobs=None if output.logprobs is None else (),
                    prompt_logprobs=None,
                )
                self._outputs.insert(0, (rest, came_s))
                output = replace(output, text=output.text[:left])
            left -= len(output.text)
            taken.append(output)
        self._text = self._text[num_chars:]
        return _merged(taken)


def _merged(outputs: Sequence[RequestOutput]) -> RequestOutput:
    first, last = outputs[0], outputs[-1]
    return replace(
        last,
        text="".join(output.text for output in outputs),
        token_ids=tuple(chain.from_iterable(output.token_ids for output in outputs)),
        logprobs=None
        if last.logprobs is None
        else tuple(chain.from_iterable(output.logprobs or () for output in outputs)),
        prompt_logprobs=first.prompt_logprobs,
        first_scheduled_s=first.first_scheduled_s,
    )


async def flushed(
    outputs: AsyncGenerator[tuple[int, RequestOutput], None],
    flush: Flush,
    began: Callable[[RequestOutput], None],
    clock: Callable[[], float] = time.monotonic,
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """The outputs of all prompts and choices, each with as many as belong to one piece of text merged.

    began: told of every output when it comes.
    Before an exception of `outputs` goes on, what is held goes out. Closing it closes `outputs`.
    """
    held: dict[tuple[int, int], HeldText] = {}
    coming: asyncio.Future[tuple[int, RequestOutput]] | None = None
    try:
        while True:
            due_s = min((h.due_s for h in held.values()), default=float("inf"))
            if coming is None:
                coming = asyncio.ensure_future(anext(outputs))
            timeout = None if due_s == float("inf") else max(0.0, due_s - clock())
            done, _ = await asyncio.wait({coming}, timeout=timeout)
            if not done:
                for (number, _), choice in held.items():
                    if (late := choice.take_late(clock())) is not None:
                        yield number, late
                continue
            try:
                number, output = coming.result()
            except StopAsyncIteration:
                break
            except Exception:
                for (number, _), choice in held.items():
                    if (rest := choice.take_all()) is not None:
                        yield number, rest
                raise
            finally:
                coming = None
            began(output)
            choice = held.setdefault((number, output.index), HeldText(flush))
            if (piece := choice.add(output, clock())) is not None:
                yield number, piece
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        await outputs.aclose()
