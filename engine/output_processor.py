"""From tokens to what the client sees: text, stop strings, logprobs, timings. One state per choice."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from engine.messages import RawLogprobs, TokenOutput
from engine.outputs import FinishReason, PositionLogprobs, RequestOutput, RequestTimings
from engine.sampling_params import SamplingParams
from engine.token_times import Gaps, TokenTimes
from engine.tokenizer import IncrementalDetokenizer, Tokenizer
from engine.urgency import NOT_URGENT, Urgency


class StopStringMatcher:
    """Holds back text that may be the beginning of a stop string; cuts at the first one that is complete."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """Text that may go out, and the stop string if one was completed."""
        if not self._stop:
            return text, None
        held = self._held + text
        matches = [(held.index(s), s) for s in self._stop if s in held]
        if matches:
            position, stop = min(matches)
            self._held = ""
            return held[:position], stop
        keep = max(_overlap(held, s) for s in self._stop)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], None

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


@dataclass(slots=True)
class _Choice:
    request_id: str
    index: int
    params: SamplingParams
    prompt_token_ids: tuple[int, ...]
    arrival_time: float
    urgency: Urgency
    times: TokenTimes
    detokenizer: IncrementalDetokenizer
    matcher: StopStringMatcher
    deliver: Callable[[RequestOutput], None]
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    first_scheduled_time: float | None = None


class OutputProcessor:
    """The one per-request loop. Not thread-safe: lives on the event loop.

    A choice ends here, by a stop string, or in the core; either way exactly one output carries its
    finish reason, and what the core still sends for it is ignored.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._choices: dict[str, _Choice] = {}
        self._timings: list[RequestTimings] = []
        self._gaps = Gaps()

    @property
    def sequence_ids(self) -> Iterable[str]:
        return self._choices.keys()

    def add(
        self,
        sequence_id: str,
        request_id: str,
        index: int,
        prompt_token_ids: tuple[int, ...],
        params: SamplingParams,
        arrival_time: float,
        deliver: Callable[[RequestOutput], None],
        urgency: Urgency = NOT_URGENT,
    ) -> None:
        """Expect outputs of a sequence; `deliver` gets every RequestOutput of it."""
        self._choices[sequence_id] = _Choice(
            request_id=request_id,
            index=index,
            params=params,
            prompt_token_ids=prompt_token_ids,
            arrival_time=arrival_time,
            urgency=urgency,
            times=TokenTimes(urgency.tier),
            detokenizer=IncrementalDetokenizer(
                self._tokenizer,
                [i for t in params.visible_tokens if (i := self._tokenizer.token_id(t)) is not None],
            ),
            matcher=StopStringMatcher(params.stop),
            deliver=deliver,
        )

    def discard(self, sequence_id: str) -> None:
        """Stop expecting outputs (the client is gone); unknown ids are ignored."""
        self._choices.pop(sequence_id, None)

    def drain_timings(self) -> list[RequestTimings]:
        timings, self._timings = self._timings, []
        return timings

    def drain_gaps(self) -> Mapping[tuple[str, float], int]:
        """`StepTimes.gaps` since the last call."""
        gaps, self._gaps = self._gaps, Gaps()
        return gaps

    def process(self, outputs: Iterable[TokenOutput], time: float) -> list[str]:
        """Deliver a step's outputs. Returns the sequences that a stop string ended, for the core to abort."""
        stopped = []
        for output in outputs:
            choice = self._choices.get(output.request_id)
            if choice is None:
                continue
            if self._advance(choice, output, time):
                del self._choices[output.request_id]
                if output.finish_reason is None:
                    stopped.append(output.request_id)
        return stopped

    def _advance(self, choice: _Choice, output: TokenOutput, time: float) -> bool:
        choice.num_cached_tokens = output.num_cached_tokens
        choice.first_scheduled_time = output.first_scheduled_time
        finish_reason: FinishReason | None = output.finish_reason
        stop_reason: str | int | None = output.stop_reason
        text = ""
        token_ids: tuple[int, ...] = ()
        if output.embedding is not None:
            choice.times.note(time, self._gaps)
        if output.token_id is not None:
            choice.times.note(time, self._gaps)
            token_ids = (output.token_id,)
            choice.num_output_tokens += 1
            # A token that ended the sequence by its id is not part of the text.
            new_text = "" if finish_reason == "stop" else choice.detokenizer.step(output.token_id)
            text, stop = choice.matcher.feed(new_text)
            if stop is not None:
                finish_reason, stop_reason = "stop", stop
            elif finish_reason is not None:
                rest, stop = choice.matcher.feed(choice.detokenizer.flush())
                text += rest
                if stop is None:
                    text += choice.matcher.flush()
                else:
                    finish_reason, stop_reason = "stop", stop
        if finish_reason is not None:
            self._timings.append(_timings_of(choice, finish_reason, time))
        choice.deliver(
            RequestOutput(
                request_id=choice.request_id,
                index=choice.index,
                text=text,
                token_ids=token_ids,
                num_prompt_tokens=len(choice.prompt_token_ids),
                num_cached_tokens=choice.num_cached_tokens,
                num_output_tokens=choice.num_output_tokens,
                logprobs=None if output.logprobs is None else (self._position(output.logprobs),),
                prompt_logprobs=self._prompt_positions(output.prompt_logprobs),
                finish_reason=finish_reason,
                stop_reason=stop_reason,
                first_scheduled_s=choice.first_scheduled_time,
                embedding=output.embedding,
            )
        )
        return finish_reason is not None

    def _position(self, raw: RawLogprobs) -> PositionLogprobs:
        described = [self._tokenizer.describe(token_id, logprob) for token_id, logprob in raw]
        return PositionLogprobs(described[0], tuple(described[1:]))

    def _prompt_positions(
        self, raw: tuple[RawLogprobs, ...] | None
    ) -> tuple[PositionLogprobs | None, ...] | None:
        return None if raw is None else (None, *(self._position(entry) for entry in raw))


def _timings_of(choice: _Choice, finish_reason: FinishReason, time: float) -> RequestTimings:
    started, first = choice.first_scheduled_time, choice.times.first
    return RequestTimings(
        request_id=choice.request_id,
        finish_reason=finish_reason,
        num_prompt_tokens=len(choice.prompt_token_ids),
        num_cached_tokens=choice.num_cached_tokens,
        num_output_tokens=choice.num_output_tokens,
        queue_wait_s=(started if started is not None else time) - choice.arrival_time,
        ttft_s=None if first is None else first - choice.arrival_time,
        e2e_s=time - choice.arrival_time,
        itl_s=tuple(choice.times.itl_s),
        tier=choice.urgency.tier,
        is_in_time=first is not None and first <= choice.urgency.deadline,
    )
