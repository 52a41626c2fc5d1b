"""Logprobs of completions in OpenAI's older format: parallel lists over the tokens of the text."""

import codecs
from collections.abc import Sequence

from engine import PositionLogprobs
from serving.schemas import CompletionLogprobs


class LogprobsWriter:
    """Of one choice, from its first token on; follows where in the text it is.

    A token that is no whole text by itself is named "bytes:" and its bytes, as OpenAI does, so that no two
    tokens share a name.
    """

    def __init__(self, first_token: bytes = b"") -> None:
        """first_token: of the prompt where it is echoed; nothing precedes it, so that it has no logprob."""
        self._first_token = first_token
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def write(self, positions: Sequence[PositionLogprobs | None]) -> CompletionLogprobs:
        """The next tokens; None is the prompt's first one."""
        shown = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for position in positions:
            raw = self._first_token if position is None else position.token.raw
            shown.tokens.append(_name(raw))
            shown.token_logprobs.append(None if position is None else position.token.logprob)
            shown.top_logprobs.append(None if position is None else _top(position))
            shown.text_offset.append(self._offset)
            self._offset += len(self._decoder.decode(raw))
        return shown


def _top(position: PositionLogprobs) -> dict[str, float]:
    """The most likely tokens, and the token itself where it is none of them."""
    return {_name(t.raw): t.logprob for t in (*position.top, position.token)}


def _name(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
