"""Where a sequence stands in its grammar, and which tokens may come next."""

import os
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

# Waking the threads costs 30 us, as much as this many masks (most take 5 to 10 us).
_MIN_PARALLEL = 4
_MAX_THREADS = 8


class GrammarState:
    """One sequence's place in its grammar. It follows the sequence's output tokens and is never moved back.

    Not thread-safe: it belongs to whoever owns the sequence.
    """

    __slots__ = ("_eos_token_ids", "matcher")

    def __init__(self, matcher: "LLMatcher", eos_token_ids: frozenset[int]) -> None:
        self.matcher = matcher
        self._eos_token_ids = eos_token_ids

    def accept(self, token_id: int) -> bool:
        """Take in the next token. False where the grammar does not go on with it, or has failed (`error`)."""
        return self.matcher.consume_token(token_id)

    def num_accepted(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens, one after the other, could come next; the output's end is not one."""
        end = next((i for i, t in enumerate(token_ids) if t in self._eos_token_ids), len(token_ids))
        return self.matcher.validate_tokens(list(token_ids[:end]))

    @property
    def error(self) -> str | None:
        """Why the grammar cannot go on, mostly that a token would take more work than the library allows."""
        return self.matcher.get_error().partition("\n")[0] or None


def fill_masks(wanted: Sequence[tuple[GrammarState, Sequence[int]]], out: NDArray[np.int32]) -> None:
    """Which tokens may come next: one bit a token, in rows of `out`, int32 [R, ceil(vocab / 32)], contiguous.

    A state has one row, and behind it one for each of its drafts, which `num_accepted` has let through. The
    states stay where they are. Rows of a failed state allow everything: its next `accept` says no.
    """
    placed, first = [], 0
    for state, drafts in wanted:
        placed.append((state.matcher, drafts, first))
        first += 1 + len(drafts)
    assert first == len(out)
    assert out.flags.c_contiguous
    alone = [(matcher, row) for matcher, drafts, row in placed if not drafts]
    if len(alone) >= _MIN_PARALLEL:
        num_bytes = out.shape[1] * out.itemsize
        _executor().unsafe_compute_mask_ptr(alone, out.ctypes.data, num_bytes, len(out))
    for matcher, drafts, row in placed:
        if drafts or len(alone) < _MIN_PARALLEL:
            _fill_in_turn(matcher, drafts, out[row:])
        if matcher.is_error():
            out[row : row + 1 + len(drafts)] = -1


def _fill_in_turn(matcher: "LLMatcher", drafts: Sequence[int], out: NDArray[np.int32]) -> None:
    num_bytes = out.shape[1] * out.itemsize
    matcher.unsafe_compute_mask_ptr(out[0].ctypes.data, num_bytes)
    for i, token_id in enumerate(drafts, 1):
        matcher.consume_token(token_id)
        matcher.unsafe_compute_mask_ptr(out[i].ctypes.data, num_bytes)
    if drafts:
        matcher.rollback(len(drafts))


@cache
def _executor() -> "LLExecutor":
    from llguidance import LLExecutor

    return LLExecutor(min(_MAX_THREADS, os.cpu_count() or 1))
