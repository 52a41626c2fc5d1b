"""What a step may take on beside running streams: as much as their next tokens can wait for."""

from dataclasses import dataclass, field

_WEIGHT = 0.2  # of a new measurement
_MIN_TOKENS = 16  # prompts go on, however slow a step is


@dataclass(slots=True)
class StepPacer:
    """Learns from the steps' durations: t = t_decode + tokens / rate, as moving averages.

    target_s: what a step with running streams should take; None sets no limits.
    """

    target_s: float | None
    _decode_s: float | None = field(default=None)
    _num_decodes: float = field(default=0.0)  # that it is of
    _rate: float | None = field(default=None)  # prompt tokens a second

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

    @property
    def prompt_tokens_per_s(self) -> float:
        """0 while it is unknown."""
        return self._rate or 0.0

    def max_prompt_tokens(self, num_decodes: int, budget: int) -> int:
        """Of a step's token budget, how many may be prompt tokens."""
        if self.target_s is None or num_decodes == 0 or self._rate is None:
            return budget
        room = self.target_s - (self._decode_s or 0.0)
        return min(budget, max(_MIN_TOKENS, int(room * self._rate)))

    def max_sequences(self, limit: int) -> int:
        """How many sequences may run: as many as decode within the target, each taken to cost the same."""
        if self.target_s is None or not self._decode_s or self._num_decodes < 1:
            return limit
        return min(limit, max(1, int(self.target_s / self._decode_s * self._num_decodes)))


def _average(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT * (new - old)
