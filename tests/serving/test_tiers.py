"""Service tiers: the choice, places by load, forecasts, and the answers of the API."""

import asyncio
import math

import pytest

from engine import EngineStats, ParameterError, StepCost, Urgency
from engine.step_cost import StepCostMeter
from monitoring import Recorder
from serving.admission import Admission
from serving.errors import ApiError
from serving.settings import ServingSettings
from serving.tiers import TIERS, Tier, choose_service

CHAT = {
    "model": "SmolLM2-135M-Instruct",
    "messages": [{"role": "user", "content": "Hi"}],
    "max_tokens": 2,
    "temperature": 0,
}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def a_thousand_tokens_a_second(num_tokens: int) -> float:
    return num_tokens / 1000


def make_admission(**settings) -> Admission:
    return Admission(ServingSettings(**settings), Recorder(), clock=Clock())


def service(tier: str = "default", arrival: float = 100.0, **headers: str):
    return choose_service(TIERS, tier, headers, arrival)


@pytest.mark.parametrize(
    ("name", "tier"), [(None, "default"), ("auto", "default"), ("flex", "batch"), ("priority", "voice")]
)
def test_names_of_openai_have_their_tier(name, tier):
    assert choose_service(TIERS, name, {}, 0.0).tier == tier


def test_the_header_sets_a_deadline_of_its_own():
    chosen = choose_service(TIERS, "batch", {"x-slo-ttft-ms": "250"}, 10.0)
    assert (chosen.tier, chosen.urgency.deadline, chosen.urgency.priority) == ("batch", 10.25, 4)
    assert chosen.refuses_late


@pytest.mark.parametrize("text", ["0", "-5", "nan", "inf", "soon", "600001", ""])
def test_a_header_that_is_no_time_is_refused(text):
    with pytest.raises(ApiError, match="x-slo-ttft-ms") as caught:
        choose_service(TIERS, None, {"x-slo-ttft-ms": text}, 0.0)
    assert caught.value.status_code == 400


def test_an_unknown_tier_is_refused_with_those_that_there_are():
    with pytest.raises(ParameterError, match=r"agent.*voice.*got 'gold'"):
        choose_service(TIERS, "gold", {}, 0.0)


def test_tiers_of_the_configuration_extend_the_built_in_ones():
    settings = ServingSettings(tiers={"gold": {"ttft_s": 0.1, "priority": 0}})
    assert settings.tiers["gold"] == Tier(ttft_s=0.1, priority=0)
    assert settings.tiers["voice"] == TIERS["voice"]


def test_the_lowest_tier_is_refused_first():
    admission = make_admission(max_inflight_requests=10)
    admission.num_inflight = 8
    with pytest.raises(ApiError, match="'batch' is 8") as caught, admission.place(service("batch")):
        pass
    assert caught.value.status_code == 429
    assert int(caught.value.headers["Retry-After"]) >= 1
    with admission.place(service("agent")), admission.place(service("voice")):
        assert admission.num_inflight == 10
    assert admission.num_inflight == 8


async def _outputs(gate: asyncio.Event):
    await gate.wait()
    yield 1
    yield 2


async def _start(admission: Admission, gate: asyncio.Event, tier: str, num_tokens: int):
    """A request that waits for its first output."""
    stream = admission.watch(_outputs(gate), service(tier), num_tokens)
    task = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    return stream, task


async def test_forecasts_count_what_is_due_no_later():
    admission, gate = make_admission(), asyncio.Event()
    assert admission.predicted_ttft_s(Urgency(math.inf, 9), 10**6) == 0  # nothing is known yet
    admission.prompts_s = a_thousand_tokens_a_second
    waiting = [await _start(admission, gate, t, n) for t, n in (("batch", 5000), ("voice", 100))]
    arrival = admission.clock.now
    assert admission.predicted_ttft_s(Urgency(arrival + 0.2, 0), 50) == pytest.approx(
        0.15
    )  # batch is due later
    assert admission.predicted_ttft_s(Urgency(arrival + 500, 4), 50) == pytest.approx(5.15)
    assert admission.predicted_ttft_s(Urgency(arrival + 500, 2), 50) == pytest.approx(
        0.15
    )  # and less important
    admission.check_deadline(service("voice", arrival), 50)
    with pytest.raises(ApiError, match="may take 1100 ms") as caught:
        admission.check_deadline(service("voice", arrival), 1000)
    assert caught.value.headers["Retry-After"] == "1"
    admission.check_deadline(service("default", arrival), 100_000)  # late, but wanted all the same
    for stream, task in waiting:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await stream.aclose()
    assert admission.predicted_ttft_s(Urgency(arrival + 500, 9), 0) == 0


def test_a_forecast_after_tiny_prompts_is_that_of_the_steps_of_a_long_one():
    admission, meter = make_admission(), StepCostMeter()
    true = StepCost(base_s=0.02, per_decode_s=0.001, prefill_step_s=0.0, prefill_token_s=0.0002)
    for num_tokens in (16, 256, *[2] * 1000):
        meter.observe(0, num_tokens, true.step_s(0, num_tokens))
    stats = EngineStats(*[0] * 11, last_step_s=0.02, step_cost=meter.cost, token_budget=512)
    admission.prompts_s = stats.prompts_s
    urgency = Urgency(admission.clock.now + 1, 0)
    assert admission.predicted_ttft_s(urgency, 4) == pytest.approx(0.0208, rel=0.01)
    assert admission.predicted_ttft_s(urgency, 1000) == pytest.approx(2 * 0.02 + 0.2, rel=0.01)
    assert stats.prompt_tokens_per_s == pytest.approx(512 / (0.02 + 0.1024), rel=0.01)


def test_nothing_is_forecast_before_steps_were_measured():
    stats = EngineStats(*[0] * 11, last_step_s=0.0)
    assert stats.prompts_s(1000) == stats.prompt_tokens_per_s == 0


async def test_forecasts_learn_from_their_errors():
    admission = make_admission()
    admission.prompts_s = a_thousand_tokens_a_second
    for _ in range(30):  # 10 ms are forecast, 110 pass
        gate = asyncio.Event()
        admission.clock.now = 100.0
        stream, task = await _start(admission, gate, "voice", 10)
        admission.clock.now += 0.11
        gate.set()
        await task
        await stream.aclose()
    admission.clock.now = 100.11
    admission.check_deadline(service("voice", 100.11), 40)  # 40 ms, 100 of error and little deviation
    with pytest.raises(ApiError, match="may take"):
        admission.check_deadline(service("voice", 100.11), 120)
    admission.clock.now += 10.0  # refused requests teach nothing: after a while one is tried again
    admission.check_deadline(service("voice", 110.11), 120)


async def test_errors_that_were_forgotten_do_not_come_back_with_the_next_request():
    """After a rush of late first tokens, one request a while that is in time must let the others in."""
    admission = make_admission()
    admission.prompts_s = a_thousand_tokens_a_second
    for wait_s, pause_s in [(0.4, 0.0)] * 10 + [(0.01, 8.0)]:
        gate = asyncio.Event()
        admission.clock.now += pause_s
        stream, task = await _start(admission, gate, "voice", 10)
        admission.clock.now += wait_s
        gate.set()
        await task
        await stream.aclose()
    admission.check_deadline(service("voice", admission.clock.now), 10)


async def test_the_errors_of_those_who_wait_for_a_place_are_not_those_of_who_takes_one():
    admission = make_admission()
    admission.prompts_s = a_thousand_tokens_a_second
    for _ in range(10):
        gate = asyncio.Event()
        admission.clock.now = 100.0
        stream, task = await _start(admission, gate, "agent", 10)
        admission.clock.now += 0.4
        gate.set()
        await task
        await stream.aclose()
    with pytest.raises(ApiError, match="may take"):
        admission.check_deadline(service("agent", 100.4), 120)
    admission.check_deadline(service("voice", 100.4), 120)


async def test_forecasts_count_places_that_only_the_less_important_give():
    admission = make_admission()
    admission.max_num_seqs, admission.prompts_s = 2, a_thousand_tokens_a_second
    arrival = admission.clock.now
    for tier in ("voice", "batch"):  # an answer takes 0.4 s
        gate = asyncio.Event()
        stream, task = await _start(admission, gate, tier, 10)
        gate.set()
        await task
        admission.clock.now += 0.4
        assert [output async for output in stream] == [2]
    admission.clock.now = arrival
    open_ = [
        await _start(admission, asyncio.Event(), tier, 1) for tier in ("voice", "batch", "batch", "voice")
    ]
    # Of two places voices have both: the next one waits for the first of two answers to end.
    assert admission.predicted_ttft_s(Urgency(arrival + 1, 0), 8) == pytest.approx(0.01 + 0.2)
    open_[0][1].cancel()
    await asyncio.gather(open_[0][1], return_exceptions=True)
    await open_[0][0].aclose()
    assert admission.predicted_ttft_s(Urgency(arrival + 1, 0), 8) == pytest.approx(0.009)
    assert admission.predicted_ttft_s(Urgency(arrival + 200, 4), 8) == pytest.approx(0.011 + 2 * 0.2)
    for stream, task in open_[1:]:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await stream.aclose()
    assert not admission._open


async def test_kept_and_missed_deadlines_are_counted():
    admission = make_admission()
    for late_s in (0.1, 0.3):
        gate = asyncio.Event()
        admission.clock.now = 100.0
        stream, task = await _start(admission, gate, "voice", 5)
        admission.clock.now += late_s
        gate.set()
        await task
        await stream.aclose()
    text = admission.recorder.exposition().decode()
    assert 'peregrine_ttft_deadlines_total{kept="yes",tier="voice"} 1.0' in text
    assert 'peregrine_ttft_deadlines_total{kept="no",tier="voice"} 1.0' in text


@pytest.mark.parametrize("tier", [None, "default", "agent", "flex", "batch"])
async def test_every_tier_answers(make_client, tier):
    async with make_client() as client:
        body = CHAT if tier is None else {**CHAT, "service_tier": tier}
        response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200


async def test_what_cannot_keep_its_deadline_gets_429_with_retry_after(make_client, make_state):
    state = make_state()
    async with make_client(state) as client:
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200  # gives a rate
        headers = {"x-slo-ttft-ms": "0.5"}
        response = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert response.status_code == 429
        assert int(response.headers["Retry-After"]) >= 1
        assert response.json()["error"]["code"] == "rate_limit_exceeded"
        response = await client.post("/v1/chat/completions", json={**CHAT, "service_tier": "gold"})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "service_tier")
    assert state.admission.num_inflight == 0
