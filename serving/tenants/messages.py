"""What replicas and the ledger say to each other, a message a line."""

from dataclasses import dataclass, field

from serving.lines import LineCodec
from serving.tenants.ledger import Account, Limits, Reason, Verdict
from serving.tenants.window import Window


@dataclass(frozen=True, slots=True)
class Hello:
    """A replica's first message; its accounts and its usage follow."""

    replica: str


@dataclass(frozen=True, slots=True)
class Opened:
    """An account as the replica has it. Entries are (seconds ago, amount): clocks need not agree."""

    tenant: str
    num_open: int
    expected_tokens: int
    requests: list[tuple[float, int]] = field(default_factory=list)
    tokens: list[tuple[float, int]] = field(default_factory=list)

    @classmethod
    def of(cls, tenant: str, account: Account, now: float) -> "Opened":
        requests, tokens = account.requests.entries(now), account.tokens.entries(now)
        return cls(tenant, account.num_open, account.expected_tokens, requests, tokens)

    def account(self, now: float) -> Account:
        requests, tokens = Window(self.requests, now), Window(self.tokens, now)
        return Account(requests, tokens, self.num_open, self.expected_tokens)


@dataclass(frozen=True, slots=True)
class Ask:
    """May this request come in? The limits come along: replicas read them, the ledger does not."""

    number: int
    tenant: str
    prompt_tokens: int
    expected_tokens: int
    requests: int | None
    tokens: int | None
    concurrency: int | None

    @property
    def limits(self) -> Limits:
        return Limits(self.requests, self.tokens, self.concurrency)


@dataclass(frozen=True, slots=True)
class Answer:
    """To the `Ask` of that number."""

    number: int
    num_replicas: int
    reason: Reason | None
    retry_after_s: float
    remaining_requests: int | None
    reset_requests_s: float
    remaining_tokens: int | None
    reset_tokens_s: float

    @property
    def verdict(self) -> Verdict:
        return Verdict(
            self.reason,
            self.retry_after_s,
            self.remaining_requests,
            self.reset_requests_s,
            self.remaining_tokens,
            self.reset_tokens_s,
        )


@dataclass(frozen=True, slots=True)
class Used:
    """`Ledger.use`, since the last one."""

    tenant: str
    output_tokens: int
    num_closed: int
    released_tokens: int


@dataclass(frozen=True, slots=True)
class Metered:
    """What a replica counted for one tenant and model within one hour, so far: said again, it is no more.

    hour: its beginning, seconds since 1970.
    """

    hour: int
    tenant: str
    model: str
    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    refusals: int = 0


FromReplica = Hello | Opened | Ask | Used | Metered
from_replica: LineCodec[FromReplica] = LineCodec(Hello, Opened, Ask, Used, Metered)
to_replica: LineCodec[Answer] = LineCodec(Answer)
