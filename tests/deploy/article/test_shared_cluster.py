"""The child that deploys for all shapes, with a small program in its place."""

import contextlib
import sys

import pytest

from deploy.bench.article import processes, shared_cluster
from deploy.bench.article.shared_cluster import SharedCluster

ANSWERS = """
import json, sys
for line in sys.stdin:
    command = json.loads(line)
    with open(sys.argv[1], "a") as file:
        file.write(json.dumps(json.loads(sys.argv[2]) if "deploy" in command else {"ended": True}) + "\\n")
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Of a child that gives `answer` to each deployment."""

    def make(answer: str, program: str = ANSWERS) -> SharedCluster:
        start = processes.started

        def started(command, log, *, asks):
            return start([sys.executable, "-c", program, command[-2], answer], log, asks=asks)

        monkeypatch.setattr(shared_cluster.processes, "started", started)
        return stack.enter_context(contextlib.closing(SharedCluster(tmp_path, num_gpus=0)))

    with contextlib.ExitStack() as stack:
        yield make


def test_a_server_is_begun_and_taken_and_the_next_one_finds_the_same_child(cluster, tmp_path):
    shared = cluster('{"ready": true}')
    shared.begin({"model": "m"}, {}, tmp_path / "a", 30)
    assert shared.is_begun
    with shared.server({"model": "m"}, {}, tmp_path / "a", 30) as first:
        assert (tmp_path / "a" / "gate").exists()
        assert not shared.is_begun
    with shared.server({"model": "n"}, {}, tmp_path / "b", 30) as second:
        assert first == second
    assert len(processes.lines(tmp_path / "answers.jsonl")) == 4


def test_one_that_fails_has_a_reason_and_the_next_may_start(cluster, tmp_path):
    shared = cluster('{"failed": "no memory"}')
    for _ in range(2):
        with (
            pytest.raises(processes.ChildError, match="did not start: no memory"),
            shared.server({"model": "m"}, {}, tmp_path / "a", 30),
        ):
            pass


def test_a_child_that_ended_is_started_again(cluster, tmp_path):
    shared = cluster("", program="raise SystemExit('peregrine: broken')")
    for _ in range(2):
        with (
            pytest.raises(processes.ChildError, match="the cluster ended: peregrine: broken"),
            shared.server({"model": "m"}, {}, tmp_path / "a", 30),
        ):
            pass


def test_what_was_begun_can_be_given_up(cluster, tmp_path):
    shared = cluster('{"ready": true}')
    shared.begin({"model": "m"}, {}, tmp_path / "a", 30)
    shared.abandon()
    assert not shared.is_begun
    with shared.server({"model": "m"}, {}, tmp_path / "a", 30):
        pass
