"""What a step may take on beside running streams: as much as their next tokens can wait for."""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

_WEIGHT = 0.2  # of a new measurement
_OUTLIER = 2.0  # a measurement counts as so many times the average at most: a stall is no change of speed
_MIN_TOKENS = 16  # prompts go on, however slow a step is

# An H100 decodes 16 streams of an 8B model in 3.3 ms and takes 5.3 ms for 128 prompt tokens: a step of both
# stays below 10 ms, which is what p99 of the streams' token intervals should be.
_GPU_TARGET_S = 0.009
_MIN_DECODES = 2.0  # decode steps that a step may last by default: larger models have longer ones
_JOINT_EXTRA = 0.3  # of a chunk's time: what decodes are taken to add to it, before it is known
_DRAIN_S = 0.5  # within so long a backlog of prompts is computed, by default, whatever it costs the streams

JointTest = Callable[[int, int], bool]


@dataclass(slots=True)
class StepPacer:
    """Learns from the steps' durations: t = t_decode + t_chunk(tokens), as moving averages.

    t_chunk is `profile`, where there is one, times how much longer steps took than it says (their context,
    the host); else in proportion to the tokens. Joint steps, whose decodes are tokens of the chunk, take
    profile(decodes + tokens) and an average of what comes to it, whatever the tokens: the decodes' attention.

    Args:
        target_s: what a step with running streams should take; None sets no limits.
        is_soft: the target bounds no batch, and gives way to long decode steps and a long backlog of prompts.
        profile: seconds of a step of so many prompt tokens alone, by numbers that need no padding, ascending.
        is_joint: whether a step of so many decodes and prompt tokens is one.
    """

    target_s: float | None
    is_soft: bool = False
    profile: dict[int, float] = field(default_factory=dict)
    is_joint: JointTest = field(default=lambda num_decodes, num_prompt_tokens: False)
    _decode_s: float | None = field(default=None)
    _num_decodes: float = field(default=0.0)  # that it is of
    _rate: float | None = field(default=None)  # prompt tokens a second
    _stretch: float = field(default=1.0)  # of the profile
    _joint_extra_s: float | None = field(default=None)

    @classmethod
    def for_device(
        cls, device_type: str, target_s: float | None, is_joint: JointTest | None = None
    ) -> "StepPacer":
        """target_s: as configured; infinite is no limit, None the device's default."""
        is_soft = target_s is None and device_type == "cuda"
        pacer = cls(_GPU_TARGET_S if is_soft else None if target_s == math.inf else target_s, is_soft)
        if is_joint is not None:
            pacer.is_joint = is_joint
        return pacer

    def observe(self, num_decodes: int, num_prompt_tokens: int, seconds: float) -> None:
        """A step has taken so long."""
        if seconds <= 0:
            return
        if num_prompt_tokens == 0:
            self._num_decodes = _average(self._num_decodes or None, num_decodes)
            self._decode_s = _average(self._decode_s, seconds)
            return
        beside = (self._decode_s or 0.0) if num_decodes else 0.0
        # A step that took less than decoding alone says that prompts cost next to nothing.
        cost = max(seconds - beside, 0.1 * seconds)
        self._rate = _average(self._rate, num_prompt_tokens / cost)
        if not self.profile:
            return
        if self.is_joint(num_decodes, num_prompt_tokens):
            alone_s = self._profiled_s(num_decodes + num_prompt_tokens)
            self._joint_extra_s = _average(self._joint_extra_s, max(seconds - alone_s, 0.05 * alone_s))
        else:
            self._stretch = _average(self._stretch, cost / self._profiled_s(num_prompt_tokens))

    def max_prompt_tokens(self, num_decodes: int, budget: int, num_waiting_tokens: int = 0) -> int:
        """Of a step's token budget, how many may be prompt tokens, of `num_waiting_tokens` to be computed."""
        is_unknown = self._rate is None and not self.profile
        if self.target_s is None or num_decodes == 0 or budget < 1 or is_unknown:
            return budget
        decode_s = self._decode_s or 0.0
        target_s = max(self.target_s, _MIN_DECODES * decode_s) if self.is_soft else self.target_s
        sizes = {n: self._step_s(num_decodes, n) for n in self._sizes(num_decodes, budget)}
        size = max((n for n, seconds in sizes.items() if seconds <= target_s), default=min(sizes))
        if not self.is_soft:
            return size
        wanted = num_waiting_tokens / _DRAIN_S
        return next((n for n, seconds in sizes.items() if n >= size and n >= wanted * seconds), budget)

    def max_sequences(self, limit: int) -> int:
        """How many sequences may run: as many as decode within the target, each taken to cost the same."""
        if self.is_soft or self.target_s is None or not self._decode_s or self._num_decodes < 1:
            return limit
        return min(limit, max(1, int(self.target_s / self._decode_s * self._num_decodes)))

    def _sizes(self, num_decodes: int, budget: int) -> Sequence[int]:
        """Chunks to choose from, ascending; the last one is the whole budget."""
        sizes = set(self.profile or range(_MIN_TOKENS, budget, _MIN_TOKENS))
        sizes |= {n - num_decodes for n in self.profile if self.is_joint(num_decodes, n - num_decodes)}
        return [*sorted(n for n in sizes if n < budget), budget]

    def _step_s(self, num_decodes: int, num_tokens: int) -> float:
        if not self.profile:
            return (self._decode_s or 0.0) + (num_tokens / self._rate if self._rate else 0.0)
        if self.is_joint(num_decodes, num_tokens):
            alone_s = self._profiled_s(num_decodes + num_tokens)
            return alone_s + (_JOINT_EXTRA * alone_s if self._joint_extra_s is None else self._joint_extra_s)
        return (self._decode_s or 0.0) + self._stretch * self._profiled_s(num_tokens)

    def _profiled_s(self, num_tokens: int) -> float:
        """Of the next larger profiled number: they are padded to it. Beyond the last in proportion."""
        sizes = list(self.profile)
        at = bisect_left(sizes, num_tokens)
        if at < len(sizes):
            return self.profile[sizes[at]]
        return self.profile[sizes[-1]] * num_tokens / sizes[-1]


def _average(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT * (min(new, _OUTLIER * old) - old)
