"""The router before live replicas: its header, its metric, and the same replica for the same beginning."""

import httpx
import pytest

from tests.e2e.conftest import MODEL
from tests.e2e.test_disconnects import replica_stats

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(180)]


def ask(url: str, prompt: str, **rest) -> dict[str, str]:
    """The parts of the answer's route header."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 2, "temperature": 0, **rest}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return dict(part.split("=", 1) for part in response.headers["x-peregrine-route"].split("; "))


def test_the_header_explains_the_choice_and_the_metric_counts_it(cluster):
    replica_stats(cluster, 2)  # both are there
    for is_stream in (False, True):
        route = ask(cluster, "The capital of France is", stream=is_stream)
        assert route["policy"] == "latency"
        assert float(route["predicted-ttft-ms"]) > 0
        assert float(route["actual-ttft-ms"]) > 0
    counts = []
    for _ in range(20):  # each replica has its own metrics; any may answer
        lines = httpx.get(f"{cluster}/metrics", timeout=10).text.splitlines()
        counts += [float(x.split()[1]) for x in lines if x.startswith("peregrine_route_ttft_ratio_count")]
    assert max(counts) > 0


def test_a_long_beginning_goes_back_to_where_it_is_cached(cluster):
    beginning = "A river runs through the old town, past the mill and under the bridge. " * 12
    first = ask(cluster, beginning + "Who lives there?")
    for question in ("How old is the bridge?", "Where is the mill?"):  # each of the two routers is asked
        again = ask(cluster, beginning + question)
        assert again["replica"] == first["replica"]
        assert int(again["saved-tokens"]) >= 128
