"""AsyncEngine on the real model, with its core in a thread and in a process of its own."""

import asyncio
import dataclasses
import re
import sys
import textwrap
import time

import psutil
import pytest
import pytest_asyncio

from engine import (
    Constraint,
    EngineConfig,
    EngineDeadError,
    ModelLoadError,
    ParameterError,
    PromptTooLongError,
    SamplingParams,
)
from engine.async_engine import AsyncEngine
from engine.tokenizer import IncrementalDetokenizer

pytestmark = pytest.mark.model

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = SamplingParams(temperature=0.0, max_tokens=32)


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=["thread", "process"])
async def engine(request, smollm2):
    engine = await AsyncEngine.start(
        EngineConfig(model=str(smollm2), device="cpu", num_blocks=520, core=request.param)
    )
    yield engine
    await engine.shutdown()


async def collect(engine, prompt, params, request_id="r"):
    texts: dict[int, str] = {}
    ends: dict[int, tuple] = {}
    async for output in engine.generate(prompt, params, request_id=request_id):
        texts[output.index] = texts.get(output.index, "") + output.text
        if output.finish_reason is not None:
            assert output.index not in ends
            ends[output.index] = (output.finish_reason, output.stop_reason, output.num_output_tokens)
    return texts, ends


async def settled(engine):
    """Statistics once nothing runs any more."""
    for _ in range(100):
        stats = engine.stats()
        if stats.num_running == stats.num_waiting == 0 and stats.num_free_blocks == stats.num_blocks:
            return stats
        await asyncio.sleep(0.05)
    raise AssertionError(engine.stats())


async def test_text_and_timings(engine):
    prompt = await engine.tokenize_chat(FRANCE)
    engine.drain_timings()
    texts, ends = await collect(engine, prompt, GREEDY)
    assert texts == {0: "The capital of France is Paris."}
    assert ends == {0: ("stop", None, 8)}
    (timings,) = engine.drain_timings()
    assert timings.num_output_tokens == 8
    assert len(timings.itl_s) == 7
    assert 0 <= timings.queue_wait_s <= timings.ttft_s <= timings.e2e_s
    await settled(engine)


async def test_choices_share_the_prompt(engine):
    prompt = await engine.tokenize_chat(FRANCE)
    params = SamplingParams(temperature=1.0, seed=3, n=4, max_tokens=8, ignore_eos=True)
    texts, ends = await collect(engine, prompt, params)
    assert set(texts) == set(ends) == {0, 1, 2, 3}
    assert len(set(texts.values())) > 1
    assert await collect(engine, prompt, params) == (texts, ends)


async def test_a_stop_string_ends_the_sequence_in_the_core_too(engine):
    prompt = await engine.tokenize_chat(FRANCE)
    params = dataclasses.replace(GREEDY, stop=("of France",), max_tokens=2000)
    texts, ends = await collect(engine, prompt, params)
    assert texts == {0: "The capital "}
    assert ends[0][:2] == ("stop", "of France")
    await settled(engine)


async def test_leaving_and_aborting_free_everything(engine):
    params = SamplingParams(temperature=0.0, max_tokens=4000, ignore_eos=True, n=2)

    async def leave():
        stream = engine.generate([1, 2, 3], params, request_id="leaver")
        async for _ in stream:
            break
        await stream.aclose()

    async def cancelled():
        task = asyncio.create_task(collect(engine, [4, 5, 6], params, "cancelled"))
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def aborted():
        task = asyncio.create_task(collect(engine, [7, 8, 9], params, "aborted"))
        await asyncio.sleep(0.2)
        await engine.abort("aborted")
        await engine.abort("aborted")
        _, ends = await asyncio.wait_for(task, 30)
        assert {reason for reason, *_ in ends.values()} == {"abort"}

    await asyncio.gather(leave(), cancelled(), aborted(), engine.abort("unknown"))
    await settled(engine)


async def test_what_does_not_fit_the_model_is_named(engine):
    for prompt, params, field in (
        ([], GREEDY, "prompt"),
        ([49152], GREEDY, "prompt"),
        ([1], SamplingParams(stop_token_ids=(49152,)), "stop_token_ids"),
        ([1], SamplingParams(logit_bias={49152: 1.0}), "logit_bias"),
        ([1], SamplingParams(top_k=49153), "top_k"),
    ):
        with pytest.raises(ParameterError) as error:
            await collect(engine, prompt, params)
        assert error.value.field == field
    with pytest.raises(PromptTooLongError):
        await collect(engine, [1] * 8192, GREEDY)


async def test_answers_of_a_form(engine):
    """Compiled here and in the core, which may be another process; each choice has a grammar of its own."""
    prompt = await engine.tokenize_chat(FRANCE)
    form = Constraint("regex", "[A-Z][a-z]{2,9}")
    params = SamplingParams(temperature=1.0, seed=4, n=3, max_tokens=20, constraint=form)
    texts, ends = await collect(engine, prompt, params)
    assert all(re.fullmatch(form.value, text) for text in texts.values()), texts
    assert {reason for reason, _, _ in ends.values()} == {"stop"}
    for refused in (Constraint("regex", "a(", "guided_regex"), Constraint("json_schema", '{"not": {}}')):
        with pytest.raises(ParameterError) as error:
            await collect(engine, prompt, dataclasses.replace(params, constraint=refused))
        assert error.value.field == refused.name
    await settled(engine)


async def test_a_killed_core_process_fails_its_requests(smollm2):
    engine = await AsyncEngine.start(
        EngineConfig(model=str(smollm2), device="cpu", num_blocks=520, core="process")
    )
    await engine.check_health()
    endless = SamplingParams(temperature=0.0, max_tokens=8000, ignore_eos=True)
    task = asyncio.create_task(collect(engine, [1, 2, 3], endless))
    await asyncio.sleep(0.3)
    engine._carrier._process.kill()
    with pytest.raises(EngineDeadError, match="process ended"):
        await asyncio.wait_for(task, 30)
    with pytest.raises(EngineDeadError):
        await engine.check_health()
    with pytest.raises(EngineDeadError):
        await collect(engine, [1, 2, 3], endless)
    await engine.shutdown()


def _ends(process_id: int, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        # Where nobody collects orphans, an ended one stays as a zombie.
        if not psutil.pid_exists(process_id) or psutil.Process(process_id).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


async def test_a_core_process_ends_with_the_process_that_asked_for_it(smollm2):
    """Also where it hangs, so that the next one finds the device's memory free."""
    program = textwrap.dedent(f"""
        import asyncio, os, signal
        from engine import EngineConfig
        from engine.async_engine import AsyncEngine

        async def main():
            config = EngineConfig(model={str(smollm2)!r}, device="cpu", num_blocks=520, core="process")
            engine = await AsyncEngine.start(config)
            core = engine._carrier._process.pid
            os.kill(core, signal.SIGSTOP)
            print(core, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

        if __name__ == "__main__":
            asyncio.run(main())
    """)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await asyncio.wait_for(process.communicate(), 120)
    assert await asyncio.to_thread(_ends, int(output), 20.0)


@pytest.mark.parametrize("core", ["thread", "process"])
async def test_a_model_that_cannot_be_loaded_fails_the_start(tmp_path, core):
    with pytest.raises(ModelLoadError):
        await AsyncEngine.start(EngineConfig(model=str(tmp_path), core=core))


async def test_detokenization_never_cuts_a_character(engine):
    text = "naïve café, 世界, 🎉🚀 fin\n\tdef f(): pass"
    token_ids = engine.tokenizer.encode(text, add_special_tokens=False)
    for end in range(len(token_ids) + 1):
        detokenizer = IncrementalDetokenizer(engine.tokenizer)
        pieces = [detokenizer.step(token_id) for token_id in token_ids[:end]]
        assert "�" not in "".join(pieces)
        assert "".join(pieces) + detokenizer.flush() == engine.tokenizer.decode(token_ids[:end])
    assert b"".join(engine.tokenizer.token_bytes(t) for t in token_ids).decode() == text
