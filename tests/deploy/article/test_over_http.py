"""What is made of a server's timelines, with a client that answers by itself."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from deploy.bench.article import over_http, speculation
from deploy.bench.article.gpu_meter import GpuMeter
from deploy.bench.article.plan import Rounds
from deploy.bench.article.workloads import WORKLOADS
from deploy.bench.client import Timeline


@dataclass
class Client:
    """Answers at once, as if `most` tokens a second were all that a server can do."""

    most: float
    asked: list[tuple[int, int, int]] = field(default_factory=list)

    async def batch(self, size: int, num_prompt: int, num_output: int) -> list[Timeline]:
        self.asked.append((size, num_prompt, num_output))
        gap = max(0.01, size / self.most)
        times = [0.5 + gap * i for i in range(num_output)]
        return [Timeline(0.0, times, num_output, num_prompt) for _ in range(size)]


class Nvml:
    """A card that has used ten joules more each time it is asked."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.millijoules = 0

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, device: int) -> int:
        self.millijoules += 10_000
        return self.millijoules

    def nvmlDeviceGetMemoryInfo(self, device: int) -> SimpleNamespace:
        raise self.NVMLError


async def collect(rows) -> list[dict]:
    return [row async for row in rows]


async def test_first_tokens_are_medians_after_one_that_does_not_count():
    client = Client(1000)
    rows = await collect(over_http.first_tokens(client, [128, 512], Rounds(3), wake_s=0))
    assert [(r["prompt_tokens"], r["ttft_ms"]) for r in rows] == [(128, 500.0), (512, 500.0)]
    assert len(client.asked) == 8
    assert {output for _, _, output in client.asked} == {1}


async def test_concurrency_grows_until_it_brings_no_more():
    client = Client(most=1600)
    rows = await collect(over_http.concurrency(client, [1, 4, 16, 64, 256], 32, Rounds(1), None))
    assert [r["streams"] for r in rows] == [1, 4, 16, 64]  # 64 bring what 16 do, 256 are not tried
    assert [r["tok_s"] for r in rows] == pytest.approx([100, 400, 1600, 1600])
    assert rows[2]["output_tokens"] == 48
    assert "joules_per_token" not in rows[0]


async def test_joules_are_over_all_output_tokens():
    rows = await collect(over_http.concurrency(Client(1e6), [4], 16, Rounds(2), GpuMeter(Nvml())))
    assert rows[0]["joules_per_token"] == pytest.approx(10 / (2 * 4 * 20), abs=1e-4)


async def test_a_long_answer_counts_from_its_sending():
    (row,) = await collect(over_http.long_answer(Client(1e6), 101))
    assert row["e2e_s"] == pytest.approx(1.5)
    assert row["tok_s"] == pytest.approx(101 / 1.5, abs=0.1)


async def test_a_long_answer_that_takes_too_long_is_left_out():
    with pytest.raises(TimeoutError, match=r"left out: at 10.00 ms a token it takes 20.0 s"):
        await collect(over_http.long_answer(Client(1e6), 2000, itl_ms=10.0, limit_s=12.0))


async def test_rounds_end_when_their_time_is_over():
    assert list(Rounds(3)) == [0, 1, 2]
    assert list(Rounds(3, seconds=-1.0)) == [0]  # one there always is


async def test_a_short_run_asks_for_a_share_of_each_answer():
    rows = await collect(over_http.workloads(Client(1e6), WORKLOADS, 0.25))
    assert [r["output_tokens"] for r in rows] == [max(2, round(w.output_tokens / 4)) for w in WORKLOADS]


def test_a_card_that_does_not_tell_has_no_figure():
    assert GpuMeter(Nvml()).used_bytes() is None
    assert GpuMeter(Nvml()).joules() == 10.0


def test_copied_prompts_have_what_is_to_be_copied():
    assert all("```python" in prompt for prompt in speculation.prompts("code edit"))
    assert [len(speculation.prompts(kind)) for kind in speculation.KINDS] == [4, 4, 4]
    with pytest.raises(ValueError, match="unknown kind"):
        speculation.prompts("poem")
