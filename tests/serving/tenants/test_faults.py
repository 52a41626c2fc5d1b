"""The ledger goes, is silent, or comes back; replicas die; clients leave at the wrong moment."""

import asyncio
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.tenants.ledger import Account, Ledger, Limits
from serving.tenants.link import LedgerGoneError, LedgerLink
from serving.tenants.messages import Ask, Hello, Metered, Opened, Used, from_replica, to_replica
from serving.tenants.meter import Meter
from serving.tenants.usage import HOUR_S, UsageStore
from serving.tenants.window import Window
from tests.serving.tenants.conftest import TIMEOUT_S, until


async def codes(replica, key: str, count: int, **fields: object) -> list[int]:
    return [(await replica.post(key, **fields)).status_code for _ in range(count)]


async def test_without_a_ledger_each_replica_gives_its_share(make_cluster):
    cluster = await make_cluster(acme={"requests_per_minute": 4}, beta={"max_concurrent_requests": 2})
    a, b = cluster.replicas
    await cluster.stop_ledger()
    for replica in (a, b):
        assert await codes(replica, cluster.keys["acme"], 3) == [200, 200, 429]
        answers = await asyncio.gather(*(replica.post(cluster.keys["beta"], max_tokens=50) for _ in range(2)))
        assert sorted(r.status_code for r in answers) == [200, 429]


async def test_what_the_ledger_refused_stays_refused_without_it(make_cluster):
    cluster = await make_cluster(acme={"requests_per_minute": 4})
    a, b = cluster.replicas
    assert await codes(a, cluster.keys["acme"], 4) == [200] * 4
    assert await codes(b, cluster.keys["acme"], 1) == [429]
    await cluster.stop_ledger()
    refused = await b.post(cluster.keys["acme"])
    assert refused.status_code == 429
    assert 50 <= int(refused.headers["retry-after"]) <= 61  # a minute and a slice of it, rounded up


async def test_a_ledger_that_starts_anew_is_told_what_was_had(make_cluster):
    cluster = await make_cluster(acme={"requests_per_minute": 5}, beta={})
    a, b = cluster.replicas
    assert await codes(a, cluster.keys["acme"], 2) == [200, 200]
    await cluster.stop_ledger()
    assert await codes(b, cluster.keys["acme"], 1) == [200]
    await codes(b, cluster.keys["beta"], 3)
    await cluster.start_ledger()
    answer = await a.post(cluster.keys["acme"])
    assert (answer.status_code, answer.headers["x-ratelimit-remaining-requests"]) == (200, "1")
    assert await codes(b, cluster.keys["acme"], 2) == [200, 429]
    await until(lambda: not (a.gate.meter._changed or b.gate.meter._changed))
    deadline, counts = time.monotonic() + TIMEOUT_S, {}
    while counts != {"acme": (5, 1), "beta": (3, 0)}:
        assert time.monotonic() < deadline, counts
        counts = {row.tenant: (row.requests, row.refusals) for row in await cluster.usage()}


async def test_who_is_to_refuse_without_a_ledger_does(make_cluster):
    cluster = await make_cluster(alone="refuse", acme={"requests_per_minute": 5}, beta={})
    replica = cluster.replicas[0]
    await cluster.stop_ledger()
    refused = await replica.post(cluster.keys["acme"])
    assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
    assert await codes(replica, cluster.keys["beta"], 1) == [200]  # has no limits to check
    await cluster.start_ledger()
    assert await codes(replica, cluster.keys["acme"], 1) == [200]


async def test_the_places_of_a_dead_replica_come_back(make_cluster):
    cluster = await make_cluster(acme={"max_concurrent_requests": 1})
    a, b = cluster.replicas
    held = asyncio.create_task(a.post(cluster.keys["acme"], max_tokens=5000))
    await until(lambda: bool(a.gate._visits))
    assert await codes(b, cluster.keys["acme"], 1) == [429]
    await a.stop()
    deadline = time.monotonic() + TIMEOUT_S
    while (await codes(b, cluster.keys["acme"], 1)) != [200]:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    held.cancel()
    await asyncio.gather(held, return_exceptions=True)


@pytest.fixture
async def silent_ledger():
    """Reads all, answers when it is told to. Yields (address, messages, writers)."""
    messages, writers = [], []

    async def serve(reader, writer):
        writers.append(writer)
        while line := await reader.readline():
            messages.append(from_replica.decode(line))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", messages, writers
    server.close()


@pytest.fixture
async def link(silent_ledger):
    async def find() -> str:
        return silent_ledger[0]

    link = LedgerLink("r0", find, list, timeout_s=0.2)
    running = asyncio.create_task(link.run())
    await link.connected.wait()
    yield link
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_silent_ledger_is_not_waited_for_and_told_all_anew(link, silent_ledger):
    _, messages, _ = silent_ledger
    limits = Limits(requests=10)
    with pytest.raises(LedgerGoneError):
        await link.ask("acme", limits, 7, 0)
    assert link.decide_alone("acme", limits, 7, 0).is_granted
    async with asyncio.timeout(10):
        await link.connected.wait()
    await until(lambda: isinstance(messages[-1], Opened))
    first, asked, again, opened = messages
    assert (first, again) == (Hello("r0"), Hello("r0"))
    assert isinstance(asked, Ask)
    assert (opened.tenant, opened.num_open) == ("acme", 1)
    assert [amount for _, amount in opened.tokens] == [7]


async def test_who_leaves_while_asking_takes_no_place(link, silent_ledger):
    _, messages, writers = silent_ledger
    asking = asyncio.create_task(link.ask("acme", Limits(concurrency=1), 7, 20))
    await until(lambda: isinstance(messages[-1], Ask))
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    writers[0].write(b'["Answer",0,1,null,0,null,0,null,0]\n')
    await until(lambda: isinstance(messages[-1], Used))
    assert messages[-1] == Used("acme", 0, 1, 20)


def test_a_share_of_a_token_limit_is_no_limit_of_a_prompt():
    link = LedgerLink("r0", None, list, timeout_s=1, num_replicas=4)
    assert link.decide_alone("acme", Limits(tokens=100), 30, 0).reason == "tokens"
    assert link.decide_alone("acme", Limits(tokens=100), 101, 0).reason == "too_large"
    assert link.decide_alone("acme", Limits(tokens=100), 20, 50).is_granted


def test_an_account_arrives_as_it_was_on_another_clock():
    account = Account(num_open=2, expected_tokens=30)
    account.requests.add(100.0, 2)
    account.tokens.add(130.0, 40)
    opened = from_replica.decode(from_replica.encode(Opened.of("acme", account, 140.0)))
    there = opened.account(9000.0)
    assert (there.num_open, there.expected_tokens) == (2, 30)
    assert (there.requests.total(9019.0), there.requests.total(9021.0)) == (2, 0)
    assert (there.tokens.total(9049.0), there.tokens.total(9051.0)) == (40, 0)


@pytest.mark.parametrize("line", [b"", b"[]", b'["Nothing"]', b'["Hello"]', b"{}", b'["Hello",1,2]', b"3"])
def test_nonsense_is_no_message(line):
    for codec in (from_replica, to_replica):
        with pytest.raises(ValueError):  # noqa: PT011  # of either kind: no JSON, or no message
            codec.decode(line)


def test_counts_are_taken_as_they_stand_and_old_hours_go(tmp_path):
    now = 10 * 24 * HOUR_S
    for _ in range(2):  # the second one finds the file of the first
        store = UsageStore(tmp_path / "new" / "usage.sqlite", 2, lambda: now)
        store.write({"r0": [Metered(now, "acme", "m", 3, 30, 15, 1)]})
        store.write({"r0": [Metered(now, "acme", "m", 4, 40, 20, 1)], "r1": [Metered(now, "acme", "m", 1)]})
        store.write({"r1": [Metered(now - 3 * 24 * HOUR_S, "acme", "m", 9)]})
        (row,) = store.rows()
        assert (row.hour, row.requests, row.prompt_tokens) == ("1970-01-11T00:00:00Z", 5, 40)
        assert store.rows("beta") == []
        store.close()


def test_a_meter_keeps_two_days_and_says_what_has_changed():
    now = [100 * HOUR_S + 5.0]
    meter, sent = Meter(lambda: now[0]), []
    meter.count("acme", "m", requests=1, prompt_tokens=7)
    meter.send_changed(lambda m: False)
    meter.send_changed(lambda m: sent.append(m) or True)
    meter.send_changed(lambda m: sent.append(m) or True)
    assert sent == [Metered(100 * HOUR_S, "acme", "m", 1, 7)]
    now[0] += 60 * HOUR_S
    meter.count("acme", "m", output_tokens=3)
    assert list(meter.all()) == [Metered(160 * HOUR_S, "acme", "m", output_tokens=3)]


def test_an_empty_window_is_empty():
    assert (Window().total(5.0), Window().reset_s(5.0), Window().entries(5.0)) == (0, 0.0, [])


steps = st.lists(
    st.one_of(
        st.tuples(st.just("enter"), st.integers(1, 50), st.integers(0, 20)),
        st.tuples(st.just("use"), st.integers(0, 9), st.integers(0, 3)),
        st.tuples(st.just("wait"), st.integers(0, 40), st.just(0)),
        st.tuples(st.just("reconnect"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=100, deadline=None)
@given(steps)
def test_whatever_happens_a_reconnection_makes_both_books_equal(steps):
    """The ledger misses everything that happens while there is no connection, at random."""
    now = [1000.0]
    own, theirs = Ledger(lambda: now[0]), Ledger(lambda: now[0])
    for number, (what, amount, other) in enumerate(steps):
        told = [own, theirs] if number % 3 else [own]
        for ledger in told:
            if what == "enter":
                ledger.enter("r0", "acme", amount, other)
            elif what == "use":
                ledger.use("r0", "acme", amount, other, amount)
        if what == "wait":
            now[0] += amount
        if what == "reconnect":
            theirs.close_all("r0")
            for tenant, account in own.accounts_of("r0"):
                theirs.put("r0", tenant, Opened.of(tenant, account, now[0]).account(now[0]))
            if mine := dict(own.accounts_of("r0")):
                ours, its = mine["acme"], dict(theirs.accounts_of("r0"))["acme"]
                assert (ours.num_open, ours.expected_tokens) == (its.num_open, its.expected_tokens)
                assert ours.requests.total(now[0]) == its.requests.total(now[0])
                assert ours.tokens.total(now[0]) == its.tokens.total(now[0])
