"""Which replica is likely to hold which prompt prefix in its KV cache."""

import hashlib
from collections.abc import Sequence

import numpy as np

from serving.routing.ledger import IntArray

BLOCK_TOKENS = 16
BYTES_PER_TOKEN = 4  # of English text, in the vocabularies of today's models


def chain_hashes(token_ids: Sequence[int], block_tokens: int = BLOCK_TOKENS) -> list[int]:
    """One hash for each full block; it covers everything before the block as well.

    Equal hashes mean equal prefixes, so that no tree is needed (vLLM's automatic prefix caching). 64 bits are
    enough for a hint: the engine compares prefixes by its own hashes.
    """
    ids = np.asarray(token_ids, np.int64)
    return _chain(ids.tobytes(), block_tokens * ids.itemsize)


def text_chain_hashes(text: bytes) -> list[int]:
    """The same over a text that nobody has tokenized yet, in blocks of about as many tokens."""
    return _chain(text, BLOCK_TOKENS * BYTES_PER_TOKEN)


def _chain(data: bytes, block_bytes: int) -> list[int]:
    hashes: list[int] = []
    parent = b""
    for end in range(block_bytes, len(data) + 1, block_bytes):
        parent = hashlib.blake2b(parent + data[end - block_bytes : end], digest_size=8).digest()
        hashes.append(int.from_bytes(parent, "little"))
    return hashes


class PrefixIndex:
    """Prefix hash -> replicas, as a bit mask of slots; a bounded number of prefixes a replica, oldest first
    out.

    Of a prompt's blocks every fourth is entered, so that a prefix is known to 64 tokens: finer steps of a few
    tokens save less than a step's fixed cost, and cost the router four times the time.

    A chain is always touched from its end to its start, so that its last prefix is the oldest and goes first:
    who holds a prefix holds those before it. `match` relies on that to skip over runs of them; where `forget`
    made a hole below a longer chain it may say too much until that chain has aged out. It is a hint.

    max_blocks: blocks of 16 tokens a replica, the size of its KV cache.
    """

    STRIDE_BLOCKS = 4
    STRIDE_TOKENS = STRIDE_BLOCKS * BLOCK_TOKENS

    def __init__(self, max_replicas: int, max_blocks: int) -> None:
        if max_blocks < self.STRIDE_BLOCKS:
            raise ValueError(f"max_blocks must be at least {self.STRIDE_BLOCKS}, got {max_blocks}")
        self._max_prefixes = max_blocks // self.STRIDE_BLOCKS
        self._holders: dict[int, int] = {}
        self._held: list[dict[int, None]] = [{} for _ in range(max_replicas)]  # oldest first

    @classmethod
    def entries(cls, block_hashes: Sequence[int]) -> Sequence[int]:
        """Those of a prompt's hashes that the index looks at."""
        return block_hashes[cls.STRIDE_BLOCKS - 1 :: cls.STRIDE_BLOCKS]

    @classmethod
    def with_entries(cls, entries: Sequence[int]) -> list[int]:
        """Stands for the block hashes of a prompt of which only the entries are known."""
        return [entry for entry in entries for _ in range(cls.STRIDE_BLOCKS)]

    def __len__(self) -> int:
        """Distinct prefixes known."""
        return len(self._holders)

    def num_prefixes(self, slot: int) -> int:
        return len(self._held[slot])

    def held(self, slot: int) -> list[int]:
        """Entries of the prefixes that the replica holds, the newest first. As `with_entries`, another
        index takes them in in one `add`.
        """
        return list(reversed(self._held[slot]))

    def match(self, block_hashes: Sequence[int], num_slots: int) -> IntArray:
        """Leading tokens of the prompt that each replica holds. [num_slots]

        Holders become fewer along the chain. Where two places have the same holders, so have those in
        between: the search halves its ranges, and costs the logarithm of the length for each change.
        """
        tokens = np.zeros(num_slots, np.int64)
        prefixes = self.entries(block_hashes)
        if prefixes and (holders := self._holders.get(prefixes[0], 0)):
            self._split(prefixes, 0, holders, len(prefixes), 0, tokens)
        return tokens

    def add(self, slot: int, block_hashes: Sequence[int]) -> None:
        """The replica computes this prompt now, and its blocks will be found there."""
        held, bit = self._held[slot], 1 << slot
        for prefix in reversed(self.entries(block_hashes)[: self._max_prefixes]):
            if prefix in held:
                del held[prefix]  # to be the newest
            else:
                self._holders[prefix] = self._holders.get(prefix, 0) | bit
            held[prefix] = None
        while len(held) > self._max_prefixes:
            self._drop(slot, next(iter(held)))

    def forget(self, slot: int, block_hashes: Sequence[int], kept_tokens: int) -> None:
        """Of this prompt the replica holds only the first `kept_tokens` after all."""
        for prefix in self.entries(block_hashes)[kept_tokens // self.STRIDE_TOKENS :]:
            if prefix in self._held[slot]:
                self._drop(slot, prefix)

    def clear(self, slot: int) -> None:
        """The replica is gone. What the others hold stays."""
        for prefix in list(self._held[slot]):
            self._drop(slot, prefix)

    def _drop(self, slot: int, prefix: int) -> None:
        del self._held[slot][prefix]
        holders = self._holders[prefix] & ~(1 << slot)
        if holders:
            self._holders[prefix] = holders
        else:
            del self._holders[prefix]

    def _split(
        self, prefixes: Sequence[int], low: int, at_low: int, high: int, at_high: int, tokens: IntArray
    ) -> None:
        """`at_low` hold prefix `low`, `at_high` of them `high` too: find where the others stop."""
        if at_low == at_high:
            return
        if high - low == 1:
            leaving = at_low & ~at_high
            while leaving:
                slot = (leaving & -leaving).bit_length() - 1
                if slot < len(tokens):
                    tokens[slot] = high * self.STRIDE_TOKENS
                leaving &= leaving - 1
            return
        middle = (low + high) // 2
        at_middle = self._holders.get(prefixes[middle], 0) & at_low
        self._split(prefixes, low, at_low, middle, at_middle, tokens)
        self._split(prefixes, middle, at_middle, high, at_high & at_middle, tokens)
