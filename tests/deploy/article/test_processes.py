"""Children of a run: what their failures are called, and that none outlives its deadline."""

import sys

import psutil
import pytest

from deploy.bench.article import processes


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_a_child_that_fails_says_why_itself(tmp_path):
    with pytest.raises(processes.ChildError, match=r"No module named .*nowhere"):
        processes.run("deploy.bench.article.nowhere", [], tmp_path / "log", timeout_s=60)


def test_a_child_that_takes_too_long_is_ended(tmp_path):
    before = children()
    with pytest.raises(processes.ChildError, match="was stopped after 1 s"):
        processes.run("http.server", ["0", "--bind", "127.0.0.1"], tmp_path / "log", timeout_s=1)
    assert children() <= before


def test_a_child_hears_lines_and_its_whole_lines_are_read(tmp_path):
    program = "import sys; print(sys.stdin.readline(), end=''); print('half', end='')"
    with processes.started([sys.executable, "-c", program], tmp_path / "log", asks=True) as child:
        processes.tell(child, "a line")
        processes.wait(child, "it", tmp_path / "log", timeout_s=60)
        processes.tell(child, "nobody hears this")
    assert processes.lines(tmp_path / "log") == ["a line"]
    assert processes.lines(tmp_path / "nothing") == []


def test_a_server_that_does_not_start_has_a_reason(tmp_path):
    before = children()
    engine = {"model": "./nothing-here"}
    with (
        pytest.raises(processes.ChildError, match="nothing-here: no such file"),
        processes.server(engine, {}, tmp_path, timeout_s=120),
    ):
        pass
    assert children() <= before
