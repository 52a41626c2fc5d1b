"""The pool of KV blocks: reference counts, the free list in eviction order, the prefix cache index."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class KVBlock:
    """One block of the KV cache. `block_hash` is set while its contents can serve a prefix hit."""

    block_id: int
    ref_count: int = 0
    block_hash: bytes | None = None


class BlockPool:
    """Hands out blocks, counts their owners and remembers the contents of the unreferenced ones.

    A block is free when no request holds it. A free block with a hash stays usable for a prefix hit
    until it is handed out again: the free list is in least-recently-freed order, so old contents go
    first. All operations are O(1) per block.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a block pool needs at least 1 block, got {num_blocks}")
        self.blocks = [KVBlock(i) for i in range(num_blocks)]
        self._free: OrderedDict[int, KVBlock] = OrderedDict((b.block_id, b) for b in self.blocks)
        self._by_hash: dict[bytes, KVBlock] = {}
        self._num_cached = 0

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def num_cached_blocks(self) -> int:
        """Free blocks whose contents are still known."""
        return self._num_cached

    def can_allocate(self, num_blocks: int) -> bool:
        return num_blocks <= len(self._free)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take free blocks, forgetting their contents. Raises ValueError when too few are free."""
        if not self.can_allocate(num_blocks):
            raise ValueError(f"{num_blocks} blocks wanted, {len(self._free)} free")
        block_ids = []
        for _ in range(num_blocks):
            block_id, block = self._free.popitem(last=False)
            self._forget(block)
            block.ref_count = 1
            block_ids.append(block_id)
        return block_ids

    def find(self, block_hashes: Iterable[bytes]) -> list[int]:
        """Blocks holding the longest known prefix of `block_hashes`; takes no reference."""
        found = []
        for block_hash in block_hashes:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            found.append(block.block_id)
        return found

    def num_unreferenced(self, block_ids: Iterable[int]) -> int:
        return sum(1 for block_id in block_ids if self.blocks[block_id].ref_count == 0)

    def acquire(self, block_ids: Iterable[int]) -> None:
        """Add one reference to each block (a prefix hit)."""
        for block_id in block_ids:
            block = self.blocks[block_id]
            if block.ref_count == 0:
                del self._free[block_id]
                self._num_cached -= block.block_hash is not None
            block.ref_count += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Drop one reference from each block.

        The last block is freed first, so that eviction eats a sequence from its end and the shared
        beginning survives longest.
        """
        for block_id in reversed(block_ids):
            block = self.blocks[block_id]
            if block.ref_count < 1:
                raise ValueError(f"block {block_id} released more often than acquired")
            block.ref_count -= 1
            if block.ref_count == 0:
                self._free[block_id] = block
                if block.block_hash is not None:
                    self._num_cached += 1
                else:
                    # Nothing to remember: hand it out before any block that could still be hit.
                    self._free.move_to_end(block_id, last=False)

    def remember(self, block_id: int, block_hash: bytes) -> None:
        """Make a computed block findable. The first block with given contents stays the one found."""
        block = self.blocks[block_id]
        if block.block_hash is None and block_hash not in self._by_hash:
            block.block_hash = block_hash
            self._by_hash[block_hash] = block

    def reset_cache(self) -> None:
        """Forget all contents."""
        for block in list(self._by_hash.values()):
            self._forget(block)

    def _forget(self, block: KVBlock) -> None:
        if block.block_hash is not None:
            del self._by_hash[block.block_hash]
            block.block_hash = None
            self._num_cached -= block.ref_count == 0
