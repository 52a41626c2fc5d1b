"""What one replica counted, by hour, tenant and model."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from serving.tenants.messages import Metered
from serving.tenants.usage import HOUR_S

_KEPT_HOURS = 48  # for a ledger that is away or starts anew
Key = tuple[int, str, str]


class Meter:
    """Counts only ever grow within their hour, so that the latest one said of an hour is the right one."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._counts: dict[Key, Metered] = {}
        self._changed: set[Key] = set()

    def count(
        self,
        tenant: str,
        model: str,
        *,
        requests: int = 0,
        prompt_tokens: int = 0,
        output_tokens: int = 0,
        refusals: int = 0,
    ) -> None:
        hour = int(self._clock()) // HOUR_S * HOUR_S
        key = (hour, tenant, model)
        if (known := self._counts.get(key)) is None:
            known = Metered(*key)
            oldest = hour - _KEPT_HOURS * HOUR_S
            self._counts = {k: m for k, m in self._counts.items() if k[0] > oldest}
        self._counts[key] = replace(
            known,
            requests=known.requests + requests,
            prompt_tokens=known.prompt_tokens + prompt_tokens,
            output_tokens=known.output_tokens + output_tokens,
            refusals=known.refusals + refusals,
        )
        self._changed.add(key)

    def all(self) -> Iterator[Metered]:
        return iter(list(self._counts.values()))

    def send_changed(self, send: Callable[[Metered], bool]) -> None:
        """What has changed since it was sent last; what cannot be sent stays changed."""
        self._changed = {key for key in self._changed if key in self._counts and not send(self._counts[key])}
