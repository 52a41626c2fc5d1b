"""A replica's engine asked beside its HTTP door."""

import asyncio
import pickle
from functools import partial

from deploy.bench.bare_engine import ask, start_asked
from deploy.bench.client import Timeline
from deploy.ray_environment import free_port
from engine import EngineConfig
from tests.timed_engine import start_fast


async def test_the_engine_answers_with_the_times_of_its_tokens():
    port = free_port()
    engine = await start_asked(EngineConfig(model="double"), port=port, start=start_fast)
    try:
        timelines = [Timeline(due=0.0) for _ in range(3)]
        await asyncio.gather(*(ask(port, "Hello there", 5, timeline) for timeline in timelines))
        for timeline in timelines:
            assert timeline.num_tokens == 5
            assert len(timeline.arrivals) >= 1
            assert timeline.arrivals == sorted(timeline.arrivals)
            assert timeline.ttft > 0
    finally:
        await engine.shutdown()


def test_the_factory_goes_to_another_process():
    assert callable(pickle.loads(pickle.dumps(partial(start_asked, port=1))))
