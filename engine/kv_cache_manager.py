"""Who owns which KV blocks: allocation per request and prefix hits."""

import hashlib
from array import array

from engine.block_pool import BlockPool
from engine.request import Request


class KVCacheManager:
    """Gives requests their blocks; keeps `Request.block_ids` in step with the pool's reference counts."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching

    @property
    def capacity_tokens(self) -> int:
        return self.pool.num_blocks * self.block_size

    def get_computed_blocks(self, request: Request) -> list[int]:
        """Blocks of the longest cached prefix of the request; takes no reference.

        At least the last token is left to compute: its logits are what the next token comes from.
        """
        if not (self.enable_prefix_caching and request.can_use_prefix_cache):
            return []
        num_full = (request.num_tokens - 1) // self.block_size
        self._extend_hashes(request, num_full)
        return self.pool.find(request.block_hashes[:num_full])

    def allocate_slots(
        self, request: Request, num_new_tokens: int, computed_blocks: list[int] | None = None
    ) -> bool:
        """Make room for `num_new_tokens` more tokens. False, and nothing taken, if there is none.

        `computed_blocks` (from `get_computed_blocks`) become the request's first blocks; it must hold
        none yet.
        """
        hit = computed_blocks or []
        num_computed = request.num_computed_tokens or len(hit) * self.block_size
        num_needed = -(-(num_computed + num_new_tokens) // self.block_size)
        num_new_blocks = max(0, num_needed - len(request.block_ids) - len(hit))
        # Hit blocks that nobody holds leave the free list too.
        if not self.pool.can_allocate(num_new_blocks + self.pool.num_unreferenced(hit)):
            return False
        if hit:
            self.pool.acquire(hit)
            request.block_ids.extend(hit)
            request.num_remembered_blocks = len(hit)
        if num_new_blocks:
            request.block_ids.extend(self.pool.allocate(num_new_blocks))
        return True

    def cache_computed_blocks(self, request: Request) -> None:
        """Make the request's full blocks of known tokens findable, once their step was launched.

        Steps run in order: whoever finds a block reads it after it was written.
        """
        if not self.enable_prefix_caching:
            return
        num_full = min(request.num_computed_tokens, request.num_tokens) // self.block_size
        self._extend_hashes(request, num_full)
        for i in range(request.num_remembered_blocks, num_full):
            self.pool.remember(request.block_ids[i], request.block_hashes[i])
        request.num_remembered_blocks = num_full

    def free(self, request: Request) -> None:
        """Give up all blocks of the request; their contents stay findable until they are handed out."""
        self.pool.release(request.block_ids)
        request.block_ids = []
        request.num_remembered_blocks = 0

    def _extend_hashes(self, request: Request, num_blocks: int) -> None:
        # A block's hash covers everything before it, so that equal hashes mean equal prefixes. SHA-256:
        # a collision would show one user's context to another.
        hashes, size = request.block_hashes, self.block_size
        for i in range(len(hashes), num_blocks):
            parent = hashes[i - 1] if i else b""
            tokens = array("q", request.all_token_ids[i * size : (i + 1) * size])
            hashes.append(hashlib.sha256(parent + tokens.tobytes()).digest())
