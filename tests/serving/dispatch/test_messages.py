"""What a replica says survives the wire; nonsense is an error."""

import pytest

from serving.dispatch.messages import Arrived, Ended, FirstToken, Held, Report, decode, encode
from tests.serving.dispatch.helpers import hello, report


@pytest.mark.parametrize(
    "message",
    [
        hello("SERVE_REPLICA::a#b#c"),
        Arrived("f", 4, 5),
        Arrived("f", 4, 5, 3, [7, 2**64 - 1]),
        FirstToken("f"),
        Held([2**64 - 1, 7]),
        Report(0, 0, 0, 0, None),
        Ended("f", "failed", 3),
        report(9),
    ],
)
def test_a_message_is_one_line_and_comes_back(message):
    line = encode(message)
    assert line.count(b"\n") == 1
    assert decode(line) == message


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b"5",
        b'["Nothing"]',
        b'["Arrived"]',
        b'["Ended","f","eaten",1]',
        b'["Report",0,0,0,0,[1.0]]',
        b"GET / HTTP/1.1",
    ],
)
def test_anything_else_is_an_error(line):
    with pytest.raises(ValueError):  # noqa: PT011  # json's own is one, too
        decode(line)
