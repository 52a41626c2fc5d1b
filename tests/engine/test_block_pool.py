"""BlockPool and KVCacheManager, with tiny pools and exact assertions."""

import pytest

from engine.block_pool import BlockPool
from engine.kv_cache_manager import KVCacheManager
from engine.request import Request
from engine.sampling_params import SamplingParams

BLOCK_SIZE = 4


def make_request(prompt: list[int], request_id: str = "r", **params: object) -> Request:
    return Request(request_id, prompt, SamplingParams(**params), max_model_len=1000)  # type: ignore[arg-type]


def compute(manager: KVCacheManager, request: Request, num_tokens: int) -> None:
    """What a step does to the cache: room, computation, remembering."""
    hit = manager.get_computed_blocks(request) if not request.block_ids else []
    assert manager.allocate_slots(request, num_tokens, hit)
    request.num_computed_tokens = max(request.num_computed_tokens, len(hit) * BLOCK_SIZE) + num_tokens
    manager.cache_computed_blocks(request)


def test_blocks_are_handed_out_in_order_and_come_back():
    pool = BlockPool(4)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.num_free_blocks == 1
    assert not pool.can_allocate(2)
    pool.release([0, 1, 2])
    assert pool.num_free_blocks == 4


def test_allocating_more_than_is_free_takes_nothing():
    pool = BlockPool(2)
    with pytest.raises(ValueError, match="3 blocks wanted, 2 free"):
        pool.allocate(3)
    assert pool.num_free_blocks == 2


def test_releasing_twice_is_an_error():
    pool = BlockPool(1)
    pool.release(pool.allocate(1))
    with pytest.raises(ValueError, match="released more often"):
        pool.release([0])


def test_remembered_blocks_are_found_until_they_are_handed_out_again():
    pool = BlockPool(3)
    pool.allocate(2)
    pool.remember(0, b"a")
    pool.remember(1, b"b")
    pool.release([0, 1])
    assert pool.num_cached_blocks == 2
    assert pool.find([b"a", b"b", b"c"]) == [0, 1]
    assert pool.allocate(2) == [2, 1]  # the empty block first, then the end of the remembered sequence
    assert pool.find([b"a", b"b"]) == [0]
    assert pool.num_cached_blocks == 1


def test_a_hit_takes_the_block_off_the_free_list():
    pool = BlockPool(2)
    pool.allocate(1)
    pool.remember(0, b"a")
    pool.release([0])
    pool.acquire(pool.find([b"a"]))
    assert (pool.num_free_blocks, pool.num_cached_blocks) == (1, 0)
    pool.acquire([0])
    pool.release([0])
    assert pool.num_free_blocks == 1
    pool.release([0])
    assert pool.num_free_blocks == 2


def test_equal_contents_are_remembered_once():
    pool = BlockPool(2)
    pool.allocate(2)
    pool.remember(0, b"a")
    pool.remember(1, b"a")
    assert pool.find([b"a"]) == [0]
    pool.release([0, 1])
    assert pool.num_cached_blocks == 1


def test_slots_are_allocated_by_whole_blocks():
    manager = KVCacheManager(4, BLOCK_SIZE)
    request = make_request([1] * 6)
    assert manager.allocate_slots(request, 6)
    assert request.block_ids == [0, 1]
    request.num_computed_tokens = 6
    assert manager.allocate_slots(request, 2)
    assert request.block_ids == [0, 1]
    request.num_computed_tokens = 8
    assert manager.allocate_slots(request, 1)
    assert request.block_ids == [0, 1, 2]


def test_no_room_takes_nothing():
    manager = KVCacheManager(2, BLOCK_SIZE)
    request = make_request([1] * 9)
    assert not manager.allocate_slots(request, 9)
    assert request.block_ids == []
    assert manager.pool.num_free_blocks == 2


def test_prefix_hit_covers_full_blocks_and_leaves_the_last_token():
    manager = KVCacheManager(8, BLOCK_SIZE)
    first = make_request(list(range(8)))
    compute(manager, first, 8)
    same = make_request(list(range(8)))
    assert manager.get_computed_blocks(same) == [0]  # block 1 holds the last token
    longer = make_request([*range(8), 99])
    assert manager.get_computed_blocks(longer) == [0, 1]
    different_start = make_request([7, *range(1, 8), 99])
    assert manager.get_computed_blocks(different_start) == []


def test_a_block_is_not_found_before_it_is_computed():
    manager = KVCacheManager(8, BLOCK_SIZE)
    first = make_request(list(range(9)))
    assert manager.get_computed_blocks(first) == []
    assert manager.allocate_slots(first, 9)
    assert manager.get_computed_blocks(make_request(list(range(9)))) == []


def test_shared_blocks_outlive_their_first_owner():
    manager = KVCacheManager(4, BLOCK_SIZE)
    first = make_request(list(range(9)), "a")
    compute(manager, first, 9)
    second = make_request(list(range(9)), "b")
    compute(manager, second, 1)
    assert second.block_ids == [0, 1, 3]
    manager.free(first)
    assert [b.ref_count for b in manager.pool.blocks] == [1, 1, 0, 1]
    manager.free(second)
    assert manager.pool.num_free_blocks == 4


def test_a_hit_counts_against_the_free_blocks():
    manager = KVCacheManager(3, BLOCK_SIZE)
    first = make_request(list(range(9)))
    compute(manager, first, 9)
    manager.free(first)
    second = make_request([*range(8), *range(50, 58)])
    hit = manager.get_computed_blocks(second)
    assert hit == [0, 1]
    assert not manager.allocate_slots(second, 8, hit)  # needs 2 new blocks, only 1 beside the hit
    assert manager.pool.num_free_blocks == 3
    assert manager.allocate_slots(second, 4, hit)
    assert second.block_ids == [0, 1, 2]


def test_prompt_logprobs_and_the_switch_turn_hits_off():
    manager = KVCacheManager(8, BLOCK_SIZE)
    compute(manager, make_request(list(range(9))), 9)
    assert manager.get_computed_blocks(make_request(list(range(9)), prompt_logprobs=1)) == []
    off = KVCacheManager(8, BLOCK_SIZE, enable_prefix_caching=False)
    compute(off, make_request(list(range(9))), 9)
    assert off.get_computed_blocks(make_request(list(range(9)))) == []


def test_generated_blocks_serve_the_next_turn():
    manager = KVCacheManager(8, BLOCK_SIZE)
    request = make_request([1, 2, 3])
    compute(manager, request, 3)
    for token_id in (4, 5, 6):
        request.all_token_ids.append(token_id)
        compute(manager, request, 1)
    manager.free(request)
    assert manager.get_computed_blocks(make_request([1, 2, 3, 4, 5])) == [0]
