"""Stop strings and the one per-request loop, without a model."""

import pytest

from engine.output_processor import StopStringMatcher


@pytest.mark.parametrize(
    ("stop", "pieces", "text", "found"),
    [
        (("END",), ["abc"], "abc", None),
        (("END",), ["abEN", "Dxx"], "ab", "END"),
        (("END",), ["abEN", "xD"], "abENxD", None),
        (("END",), ["E", "N", "D"], "", "END"),
        (("aab",), ["a", "a", "a", "b"], "a", "aab"),
        (("xy", "x"), ["axy"], "a", "x"),
        (("b", "abc"), ["abc"], "", "abc"),
        (("\n\n",), ["a\n", "\nb"], "a", "\n\n"),
        (("é!",), ["caf", "é", "?"], "café?", None),
    ],
)
def test_text_goes_out_up_to_the_first_stop_string(stop, pieces, text, found):
    matcher = StopStringMatcher(stop)
    out, stopped = "", None
    for piece in pieces:
        new, stopped = matcher.feed(piece)
        out += new
        if stopped:
            break
    if stopped is None:
        out += matcher.flush()
    assert (out, stopped) == (text, found)


def test_only_what_may_begin_a_stop_string_is_held_back():
    matcher = StopStringMatcher(("STOP",))
    assert matcher.feed("hello S") == ("hello ", None)
    assert matcher.feed("T") == ("", None)
    assert matcher.feed("x") == ("STx", None)
