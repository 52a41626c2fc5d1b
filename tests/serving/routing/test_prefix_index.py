"""The index against a plain model of it."""

from hypothesis import given, settings
from hypothesis import strategies as st

from serving.routing import chain_hashes
from serving.routing.prefix_index import PrefixIndex

SLOTS = 5


def test_hashes_cover_what_stands_before():
    first = chain_hashes(list(range(40)))
    assert len(first) == 2
    assert chain_hashes([*range(32), 7])[:2] == first
    other = chain_hashes([99, *range(1, 40)])
    assert not set(first) & set(other)


def chain(words: list[int]) -> list[int]:
    """Four blocks a word, which is one entry of the index."""
    return chain_hashes([w for word in words for w in [word] * 64])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, SLOTS - 1), st.lists(st.integers(0, 1), max_size=6), st.booleans()),
        max_size=25,
    ),
    st.lists(st.integers(0, 1), max_size=8),
)
def test_matches_are_the_longest_common_prefixes(steps, asked):
    index = PrefixIndex(SLOTS, max_blocks=4096)
    held: list[list[list[int]]] = [[] for _ in range(SLOTS)]
    for slot, words, is_cleared in steps:
        if is_cleared:
            index.clear(slot)
            held[slot].clear()
        else:
            index.add(slot, chain(words))
            held[slot].append(words)

    def common(words: list[int]) -> int:
        same = 0
        while same < min(len(words), len(asked)) and words[same] == asked[same]:
            same += 1
        return 64 * same

    expected = [max((common(words) for words in slot), default=0) for slot in held]
    assert index.match(chain(asked), SLOTS).tolist() == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=30))
def test_the_bound_holds_and_ends_of_chains_go_first(prompts):
    index = PrefixIndex(1, max_blocks=8 * 4)
    for words in prompts:
        index.add(0, chain(words))
        assert index.num_prefixes(0) <= 8
        assert len(index) == index.num_prefixes(0)
        assert index.match(chain(words), 1)[0] == 64 * len(words)
    for prefix in chain([0, 1, 2])[3::4]:
        assert index._holders.get(prefix, 1)  # no empty sets stay
    index.clear(0)
    assert len(index) == 0


def test_what_was_never_computed_is_forgotten():
    index = PrefixIndex(2, max_blocks=64)
    index.add(0, chain([1, 2]))
    index.add(0, chain([1, 2, 3, 4]))
    index.forget(0, chain([1, 2, 3, 4]), kept_tokens=128)
    assert index.match(chain([1, 2, 3, 4]), 2).tolist() == [128, 0]
