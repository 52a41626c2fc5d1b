"""A replica's side of the tenants: knows them by their keys, asks for their requests, counts their use."""

import asyncio
import contextlib
import math
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Literal

from monitoring import Recorder
from serving.errors import ApiError, not_ready, overloaded
from serving.telemetry.exchange import Exchange
from serving.tenants.directory import Directory, Member
from serving.tenants.headers import anthropic_headers, duration, openai_headers
from serving.tenants.ledger import Limits, Reason, Verdict
from serving.tenants.link import LedgerGoneError, LedgerLink
from serving.tenants.messages import Used
from serving.tenants.meter import Meter
from serving.tenants.usage import UsageRow
from serving.tenants.visit import Visit, model_not_found

RefusalReason = Literal["requests", "tokens", "concurrency", "model", "tier", "ledger"]

_SETTLE_PERIOD_S = 0.1
_SLOW_PERIOD_S = 1.0
_WEIGHT = 0.1  # of a new answer's length
# Of an answer, before there was one.
_EXPECTED_TOKENS = 256


class Gate:
    """Of one replica.

    Nothing here is called for a token: the output of the requests in flight is looked up ten times a second.

    model: the served one's name, by which usage is counted.
    usage: of one tenant or of all, over all replicas. Raises ConnectionError.
    refuses_alone: refuse, where the ledger is gone, instead of deciding by this replica's share.
    """

    def __init__(
        self,
        directory: Directory,
        link: LedgerLink,
        meter: Meter,
        recorder: Recorder,
        *,
        model: str,
        usage: Callable[[str | None], Awaitable[list[UsageRow]]],
        refuses_alone: bool = False,
    ) -> None:
        self.directory = directory
        self.recorder = recorder
        self.meter = meter
        self.model = model
        self.usage = usage
        self._link, self._refuses_alone = link, refuses_alone
        self._mean_output: dict[str, float] = {}
        self._visits: set[TenantVisit] = set()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, wait_s: float) -> None:
        """wait_s: how long to wait for the ledger; without it the replica begins alone."""
        self._tasks = [
            asyncio.create_task(work) for work in (self._link.run(), self.directory.follow(), self._settle())
        ]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._link.connected.wait()

    async def close(self) -> None:
        self.settle()
        self.meter.send_changed(self._link.meter)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def visit(self, key: bytes, exchange: Exchange) -> "TenantVisit | None":
        """None where the key is no tenant's."""
        member = self.directory.identify(key)
        return None if member is None else TenantVisit(self, member, exchange)

    async def decide(self, tenant: str, limits: Limits, prompt_tokens: int, expected_tokens: int) -> Verdict:
        """Raises ApiError 503 where there is no ledger to ask, and no deciding without it."""
        try:
            return await self._link.ask(tenant, limits, prompt_tokens, expected_tokens)
        except LedgerGoneError:
            if self._refuses_alone:
                self.refused(tenant, "ledger")
                raise not_ready(
                    "The limits of your key cannot be checked at the moment; retry later."
                ) from None
            return self._link.decide_alone(tenant, limits, prompt_tokens, expected_tokens)

    def expected_output(self, tenant: str, max_tokens: int | None) -> int:
        """Tokens: as many as the tenant's answers had in the mean."""
        mean = math.ceil(self._mean_output.get(tenant, _EXPECTED_TOKENS))
        return mean if max_tokens is None else min(mean, max_tokens)

    def entered(self, visit: "TenantVisit", prompt_tokens: int) -> None:
        self._visits.add(visit)
        self.recorder.record_tenant_request(visit.tenant, prompt_tokens)
        self.meter.count(visit.tenant, self.model, requests=1, prompt_tokens=prompt_tokens)

    def left(self, visit: "TenantVisit", output_tokens: int) -> None:
        self._visits.discard(visit)
        if not output_tokens:
            return
        mean = self._mean_output.setdefault(visit.tenant, output_tokens)
        self._mean_output[visit.tenant] = mean + _WEIGHT * (output_tokens - mean)

    def used(self, used: Used) -> None:
        self._link.use(used)
        if used.output_tokens:
            self.recorder.record_tenant_output(used.tenant, used.output_tokens)
            self.meter.count(used.tenant, self.model, output_tokens=used.output_tokens)

    def refused(self, tenant: str, reason: RefusalReason) -> None:
        self.recorder.record_tenant_refusal(tenant, reason)
        self.meter.count(tenant, self.model, refusals=1)

    async def _settle(self) -> None:
        rounds = round(_SLOW_PERIOD_S / _SETTLE_PERIOD_S)
        while True:
            for _ in range(rounds):
                await asyncio.sleep(_SETTLE_PERIOD_S)
                self.settle()
            self._link.sweep()
            self.meter.send_changed(self._link.meter)
            self.recorder.record_ledger(self._link.connected.is_set())

    def settle(self) -> None:
        """Count the output of the requests in flight, so far."""
        sums: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
        for visit in self._visits:
            output_tokens, released = visit.take_output()
            sums[visit.tenant][0] += output_tokens
            sums[visit.tenant][1] += released
        for tenant, (output_tokens, released) in sums.items():
            if output_tokens:
                self.used(Used(tenant, output_tokens, 0, released))


class TenantVisit(Visit):
    """Of a tenant's request."""

    tenant: str

    def __init__(self, gate: Gate, member: Member, exchange: Exchange) -> None:
        self.tenant, self._rules = member.name, member.rules
        self._gate, self._exchange = gate, exchange
        self._limits = Limits(
            member.rules.requests_per_minute,
            member.rules.tokens_per_minute,
            member.rules.max_concurrent_requests,
        )
        self._verdict: Verdict | None = None
        self._is_inside = False
        self._expected_tokens = 0
        self._output_tokens = 0

    def may_use(self, model: str) -> bool:
        return self._rules.models is None or model in self._rules.models

    def check_model(self, model: str) -> None:
        if not self.may_use(model):
            self._gate.refused(self.tenant, "model")
            raise model_not_found(model)

    def tier(self, asked: str | None) -> str | None:
        is_open = asked in (None, "auto") and self._rules.tiers is not None
        return self._rules.tiers[0] if is_open else asked  # type: ignore[index]  # is_open says so

    def check_tier(self, tier: str) -> None:
        if self._rules.tiers is None or tier in self._rules.tiers:
            return
        self._gate.refused(self.tenant, "tier")
        allowed = ", ".join(f"'{name}'" for name in self._rules.tiers)
        raise ApiError(
            403,
            f"Your key may not use service_tier '{tier}'; it may use {allowed}.",
            param="service_tier",
            code="service_tier_not_allowed",
        )

    async def admit(self, prompt_tokens: int, max_output_tokens: int | None) -> None:
        if self._verdict is not None:
            return
        output_tokens = self._gate.expected_output(self.tenant, max_output_tokens)
        expected_tokens = self._limits.expected(prompt_tokens, output_tokens)
        if self._limits == Limits():
            self._verdict = Verdict(None)
        else:
            self._verdict = await self._gate.decide(self.tenant, self._limits, prompt_tokens, expected_tokens)
        if self._verdict.reason is not None:
            self._refuse(self._verdict.reason, self._verdict.retry_after_s, prompt_tokens)
        self._is_inside, self._expected_tokens = True, expected_tokens
        self._gate.entered(self, prompt_tokens)

    def headers(self, *, is_anthropic: bool) -> dict[str, str]:
        if self._verdict is None:
            return {}
        of_api = anthropic_headers if is_anthropic else openai_headers
        return of_api(self._limits, self._verdict)

    def leave(self) -> None:
        if not self._is_inside:
            return
        self._is_inside = False
        held_tokens = self._expected_tokens  # free again, whether they came or not
        output_tokens, _ = self.take_output()
        self._gate.used(Used(self.tenant, output_tokens, 1, held_tokens))
        self._gate.left(self, self._output_tokens)

    def take_output(self) -> tuple[int, int]:
        """Output tokens since the last time, and how many of them were expected."""
        made = self._exchange.generation
        new = max(0, made.num_output_tokens - self._output_tokens) if made is not None else 0
        self._output_tokens += new
        released = min(new, self._expected_tokens)
        self._expected_tokens -= released
        return new, released

    def _refuse(self, reason: Reason, retry_after_s: float, prompt_tokens: int) -> None:
        limits = self._limits
        match reason:
            case "too_large":
                self._gate.refused(self.tenant, "tokens")
                raise ApiError(
                    429,
                    f"Request too large for tenant '{self.tenant}': the limit is {limits.tokens} tokens per "
                    f"minute, the prompt alone has {prompt_tokens}. Shorten it, as waiting does not help.",
                    code="rate_limit_exceeded",
                    headers={"Retry-After": "60", "x-should-retry": "false"},
                )
            case "requests":
                limit = f"requests per minute: limit {limits.requests}"
            case "tokens":
                limit = f"tokens per minute: limit {limits.tokens}"
            case "concurrency":
                limit = f"concurrent requests: limit {limits.concurrency}"
        self._gate.refused(self.tenant, reason)
        raise overloaded(
            f"Rate limit reached for tenant '{self.tenant}' on {limit}. "
            f"Please try again in {duration(retry_after_s)}.",
            max(1, math.ceil(retry_after_s)),
        )
