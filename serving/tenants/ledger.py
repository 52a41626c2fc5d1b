"""The books of all tenants over all replicas: who asks gets a yes or a no that holds for the cluster.

Plain: no sockets, no tasks; the clock is given.
"""

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from serving.tenants.window import MINUTE_S, Window

Reason = Literal["concurrency", "requests", "tokens", "too_large"]
"""Which limit a request was refused for; too_large: its prompt alone has more tokens than the limit."""

_RETRY_S = 1.0  # where nobody can tell when an answer ends


@dataclass(frozen=True, slots=True)
class Limits:
    """A tenant's. None: no limit."""

    requests: int | None = None
    tokens: int | None = None
    concurrency: int | None = None

    def expected(self, prompt_tokens: int, output_tokens: int) -> int:
        """How much of the output of one request is held back: never more than there is."""
        if self.tokens is None:
            return output_tokens
        return max(0, min(output_tokens, self.tokens - prompt_tokens))

    def share(self, num_replicas: int) -> "Limits":
        """What one of so many replicas may give alone; at least 1."""
        parts = (
            None if limit is None else max(1, limit // num_replicas)
            for limit in (self.requests, self.tokens, self.concurrency)
        )
        return Limits(*parts)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was decided, and what is left. None: no limit."""

    reason: Reason | None
    """None: the request may come in."""
    retry_after_s: float = 0.0
    remaining_requests: int | None = None
    reset_requests_s: float = 0.0
    """Until all of the limit is free again, if nobody asks."""
    remaining_tokens: int | None = None
    reset_tokens_s: float = 0.0

    @property
    def is_granted(self) -> bool:
        return self.reason is None


@dataclass(slots=True)
class Account:
    """What one replica let one tenant have.

    tokens: prompts' from their admission on, output as it is generated.
    num_open: requests in flight.
    expected_tokens: output that those in flight are expected to add.
    """

    requests: Window = field(default_factory=Window)
    tokens: Window = field(default_factory=Window)
    num_open: int = 0
    expected_tokens: int = 0

    def is_empty(self, now: float) -> bool:
        return not (self.num_open or self.requests.total(now) or self.tokens.total(now))


class Ledger:
    """One account for each replica and tenant. A limit is held against the sum over all replicas.

    Output is counted when it is there, which may be long after the decision. So that a burst of requests does
    not leave with many times the limit, the output that those in flight are expected to add is held back
    meanwhile (`Limits.expected`).
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._accounts: defaultdict[str, dict[str, Account]] = defaultdict(dict)
        """By tenant, then by replica."""

    def ask(
        self, replica: str, tenant: str, limits: Limits, prompt_tokens: int, expected_tokens: int
    ) -> Verdict:
        """Decide about one request; what is granted is in the books at once."""
        now = self._clock()
        accounts = self._accounts[tenant].values()
        num_open = sum(a.num_open for a in accounts)
        num_requests = sum(a.requests.total(now) for a in accounts)
        num_tokens = sum(a.tokens.total(now) + a.expected_tokens for a in accounts)
        wanted = prompt_tokens + expected_tokens

        reason: Reason | None = None
        waits_s = [0.0]
        if limits.tokens is not None and num_tokens + wanted > limits.tokens:
            reason = "tokens" if prompt_tokens <= limits.tokens else "too_large"
            waits_s.append(_wait_s((a.tokens for a in accounts), num_tokens + wanted - limits.tokens, now))
        if limits.requests is not None and num_requests >= limits.requests:
            reason = reason or "requests"
            waits_s.append(_wait_s((a.requests for a in accounts), num_requests + 1 - limits.requests, now))
        if limits.concurrency is not None and num_open >= limits.concurrency:
            reason = reason or "concurrency"
            waits_s.append(_RETRY_S)
        if reason is None:
            self.enter(replica, tenant, prompt_tokens, expected_tokens)
            num_requests, num_tokens = num_requests + 1, num_tokens + wanted
        accounts = self._accounts[tenant].values()
        return Verdict(
            reason,
            max(waits_s),
            _left(limits.requests, num_requests),
            _reset_s((a.requests for a in accounts), now),
            _left(limits.tokens, num_tokens),
            _reset_s((a.tokens for a in accounts), now),
        )

    def enter(self, replica: str, tenant: str, prompt_tokens: int, expected_tokens: int) -> None:
        """Take a request into the books, whatever the limits."""
        now = self._clock()
        account = self._accounts[tenant].setdefault(replica, Account())
        account.requests.add(now, 1)
        account.tokens.add(now, prompt_tokens)
        account.num_open += 1
        account.expected_tokens += expected_tokens

    def use(
        self, replica: str, tenant: str, output_tokens: int, num_closed: int, released_tokens: int
    ) -> None:
        """Output that was generated, requests that ended, and how much of the expected tokens these were."""
        account = self._accounts[tenant].setdefault(replica, Account())
        account.tokens.add(self._clock(), output_tokens)
        account.num_open = max(0, account.num_open - num_closed)
        account.expected_tokens = max(0, account.expected_tokens - released_tokens)

    def accounts_of(self, replica: str) -> Iterator[tuple[str, Account]]:
        """By tenant."""
        now = self._clock()
        for tenant, accounts in self._accounts.items():
            if replica in accounts and not accounts[replica].is_empty(now):
                yield tenant, accounts[replica]

    def put(self, replica: str, tenant: str, account: Account) -> None:
        """As the replica knows it."""
        self._accounts[tenant][replica] = account

    def close_all(self, replica: str) -> None:
        """Nothing is in flight there (any more). What it let in counts on for its minute."""
        for accounts in self._accounts.values():
            if (account := accounts.get(replica)) is not None:
                account.num_open = account.expected_tokens = 0

    def sweep(self) -> None:
        """Forget accounts that say nothing."""
        now = self._clock()
        for tenant, accounts in list(self._accounts.items()):
            for replica in [r for r, account in accounts.items() if account.is_empty(now)]:
                del accounts[replica]
            if not accounts:
                del self._accounts[tenant]


def _left(limit: int | None, used: int) -> int | None:
    return None if limit is None else max(0, limit - used)


def _wait_s(windows: Iterable[Window], excess: int, now: float) -> float:
    """Until so much is given back; what is in flight may end sooner or later than that."""
    for wait_s, amount in heapq.merge(*(window.releases(now) for window in windows)):
        excess -= amount
        if excess <= 0:
            return wait_s
    return _RETRY_S


def _reset_s(windows: Iterable[Window], now: float) -> float:
    return min(MINUTE_S, max((window.reset_s(now) for window in windows), default=0.0))
