"""The side-by-side harness: what it counts on made-up timelines and servers; the folder that peers load."""

import asyncio
import json
from dataclasses import replace

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from transformers import AutoConfig, AutoTokenizer

from deploy.bench.client import Timeline
from deploy.bench.peer_folder import WEIGHTS, write_folder
from deploy.bench.peers import Cases, best_figures, compare, measure, together
from engine.checkpoint import open_checkpoint
from engine.errors import ModelLoadError
from engine.models.shapes import SHAPES
from tests.engine.emulated_cuda import emulate
from tests.engine.helpers import greedy, make_core, run_all


def timeline(start: float, step: float, num_chunks: int, tokens_per_chunk: int = 1) -> Timeline:
    arrivals = [start + i * step for i in range(num_chunks)]
    return Timeline(0.0, arrivals, num_chunks * tokens_per_chunk)


def test_only_the_time_in_which_all_streams_decode_counts():
    # The second stream starts at 1.0, the first one ends at 4.0: three seconds, of 2 and 4 tokens a second.
    figures = together([timeline(0.0, 0.5, 9), timeline(1.0, 0.25, 41)])
    assert figures["tok_s"] == pytest.approx(6.0)
    assert figures["itl_ms"] == pytest.approx(2e3 / 6)
    assert figures["itl_ms_p99"] == pytest.approx(500)


def test_a_chunk_of_several_tokens_counts_as_so_many():
    assert together([timeline(0.0, 0.5, 9, tokens_per_chunk=3)])["tok_s"] == pytest.approx(6.0)


def test_streams_that_never_ran_together_are_no_measurement():
    with pytest.raises(RuntimeError, match="--output"):
        together([timeline(0.0, 0.1, 3), timeline(1.0, 0.1, 3)])


def test_two_results_side_by_side():
    ours = [
        {"shape": "8b", "batch": 1, "prompt_tokens": 128, "ttft_ms": 5.0},
        {"shape": "8b", "batch": 16, "prompt_tokens": 128, "itl_ms": 2.0, "tok_s": 8000.0, "floor_ms": 1.0},
        {"shape": "70b", "batch": 1, "prompt_tokens": 128, "ttft_ms": 50.0},
        {"shape": "8b", "batch": 1, "prompt_tokens": 128, "e2e_2000_s": 4.0},
    ]
    theirs = [
        {"kernel": "a", "batch": 1, "prompt_tokens": 128, "ttft_ms": 12.0},
        {"kernel": "b", "batch": 1, "prompt_tokens": 128, "ttft_ms": 10.0, "e2e_2000_s": 6.0},
        {"kernel": "a", "batch": 16, "tok_s": 4000.0},
        {"kernel": "a", "batch": 64, "tok_s": 9000.0},
    ]
    rows = compare(ours, theirs, ("peregrine", "vllm"), "8b")
    assert [tuple(r.values()) for r in rows] == [
        ("ttft_ms", 1, 128, 5.0, 10.0, 2.0),
        ("tok_s", 16, 128, 8000.0, 4000.0, 2.0),
        ("e2e_2000_s", 1, 128, 4.0, 6.0, 1.5),
    ]
    assert best_figures(ours, "70b") == {(1, 128, "ttft_ms"): 50.0}


async def _completions(request: web.Request) -> web.StreamResponse:
    """As SGLang does it: text, a last chunk with a reason alone, then the counts; here two tokens a chunk."""
    body = await request.json()
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    num_tokens = body["max_tokens"]

    async def send(chunk: dict) -> None:
        await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")

    for _ in range(-(-num_tokens // 2)):
        await asyncio.sleep(0.002)  # several streams shall run together
        await send({"choices": [{"index": 0, "text": " a b", "finish_reason": None}]})
    await send({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
    num_prompt = len(body["prompt"]) - (body["model"] == "miscounts")
    await send({"choices": [], "usage": {"completion_tokens": num_tokens, "prompt_tokens": num_prompt}})
    await response.write(b"data: [DONE]\n\n")
    return response


async def _models(request: web.Request) -> web.Response:
    return web.json_response({"data": [{"id": "double"}]})


@pytest.fixture
async def server():
    app = web.Application()
    app.router.add_post("/v1/completions", _completions)
    app.router.add_get("/v1/models", _models)
    async with TestServer(app) as server:
        yield server


async def test_a_server_is_measured(server):
    cases = Cases(batches=(1, 3), prompts=(16, 64), output=40, long_output=50, rounds=2)
    rows = await measure(str(server.make_url("/v1")), None, "double", cases)
    kinds = [(r["batch"], r["prompt_tokens"], *(k for k in r if k.endswith(("_ms", "_s")))) for r in rows]
    assert kinds == [
        (1, 16, "ttft_ms"),
        (1, 64, "ttft_ms"),
        (1, 128, "itl_ms", "tok_s"),
        (3, 128, "itl_ms", "tok_s"),
        (1, 128, "e2e_50_s"),
    ]
    assert {r["server"] for r in rows} == {"double"}


async def test_a_server_that_counts_other_tokens_is_refused(server):
    with pytest.raises(RuntimeError, match="asked for 16 prompt and 1 output"):
        await measure(str(server.make_url("")), "miscounts", "double", Cases(prompts=(16,)))


@pytest.mark.parametrize("weights", list(WEIGHTS))
def test_the_folder_is_the_shape_for_us_and_for_transformers(tmp_path, weights):
    write_folder(tmp_path, SHAPES["123b"], weights, 3.5)
    model = open_checkpoint(tmp_path)
    assert (model.config, model.bits) == (SHAPES["123b"], 3.5)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert (theirs.num_hidden_layers, theirs.num_key_value_heads, theirs.vocab_size) == (88, 8, 32768)
    assert hasattr(theirs, "quantization_config") == (WEIGHTS[weights] is not None)
    for tokenizer in (AutoTokenizer.from_pretrained(tmp_path), model.load_tokenizer()):
        assert len(tokenizer) == 32768
        assert tokenizer.decode([1000, 32767]) == " t742 t32509"
        assert tokenizer.decode(tokenizer("é t7 x")["input_ids"]) == "é t7 x"


def test_the_folder_is_served_with_random_weights(tmp_path, monkeypatch):
    emulate(monkeypatch)
    shape = replace(SHAPES["8b"], num_layers=2, hidden_size=256, intermediate_size=256, vocab_size=512)
    shape = replace(shape, num_heads=4, num_kv_heads=2, head_dim=64)
    write_folder(tmp_path, shape, "w4", 4.25)
    core = make_core(tmp_path, dtype="auto", num_blocks=16)
    assert core.model.weight_format == "random"
    assert len(run_all(core, {"a": (list(range(40)), greedy(5))})["a"]) == 5


def test_random_weights_are_not_made_on_a_cpu(tmp_path):
    write_folder(tmp_path, SHAPES["8b"], "w4", 4.25)
    with pytest.raises(ModelLoadError, match="Hopper GPU"):
        make_core(tmp_path, dtype="auto")
