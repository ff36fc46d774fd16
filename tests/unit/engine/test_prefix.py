"""The prefix index by example; any history against a naive twin is in tests/property/test_prefix_machine.py."""

import numpy as np
import pytest

from keepwarm.core.prompt import common_prefix
from keepwarm.engine.chunks import pieces
from keepwarm.engine.eviction import policy
from keepwarm.engine.layout import BLOCK_TOKENS
from keepwarm.engine.prefix import DoubleInsert, Gone, Missing, PrefixIndex, block_key, extents, root_key
from tests.unit.engine.conftest import tokens

ROOT = root_key("model", "a")


def store(index, prompt, n=None, *, marks=(), g=1, root=ROOT):
    """Add the first `n` tokens of a prompt; all nodes on their path."""
    parts = pieces(len(prompt), marks, g)
    have, wanted = index.missing(root, prompt, parts, len(prompt) if n is None else n)
    path = list(have.nodes)
    for extent in wanted:
        node, _ = index.add(root, path[-1] if path else None, prompt, extent, slot=len(index))
        path.append(node)
    index.check_integrity()
    return path


def found(index, prompt, *, marks=(), g=1, root=ROOT):
    return index.match(root, prompt, pieces(len(prompt), marks, g)).n_tokens


def evicted(index, n):
    """Keys of the next n blocks that the host tier gives up."""
    return [gone.key if (gone := index.evict_host()) else None for _ in range(n)]


def keys(nodes):
    return [node.key for node in nodes]


def forked(prompt, at, seed=9):
    """The same tokens up to `at`, others from there on."""
    other = prompt.copy()
    other[at:] = prompt[at:] + 1 + seed
    return other


def test_extents_are_blocks_from_each_pieces_start():
    parts = pieces(300, [70], 8)
    assert list(extents(parts, 200)) == [
        Missing(0, 64, closed=False),
        Missing(64, 70, closed=True),
        Missing(70, 134, closed=False),
        Missing(134, 198, closed=False),
        Missing(198, 200, closed=False),
    ]


def test_nothing_is_found_in_an_empty_index():
    assert found(PrefixIndex(), tokens(10)) == 0


@pytest.mark.parametrize("at", [0, 1, 63, 64, 65, 100, 199, 200])
def test_a_match_ends_at_the_first_different_token(at):
    index = PrefixIndex()
    store(index, tokens(200))
    assert found(index, forked(tokens(200), at)) == at


def test_the_longest_of_several_branches_is_found():
    index, prompt = PrefixIndex(), tokens(64)
    for at in (10, 50, 30):
        store(index, forked(prompt, at))
    assert found(index, prompt) == 50


def test_roots_share_nothing():
    index = PrefixIndex()
    store(index, tokens(100))
    assert found(index, tokens(100), root=root_key("model", "b")) == 0
    assert root_key("ab", "c") != root_key("a", "bc")


def test_a_key_names_parent_tokens_and_closedness():
    prompt = tokens(64)
    keys = {
        block_key(ROOT, prompt, closed=False),
        block_key(ROOT, prompt, closed=True),
        block_key(root_key("other"), prompt, closed=False),
        block_key(ROOT, prompt + np.int32(1), closed=False),
    }
    assert len(keys) == 4


def test_a_closed_block_is_read_to_its_end_only_at_the_same_mark():
    index, prompt = PrefixIndex(), tokens(70)
    store(index, prompt, marks=[70], g=8)
    longer = np.concatenate([prompt, tokens(30, seed=1)])
    assert found(index, longer, marks=[70], g=8) == 70
    assert found(index, longer, g=8) == 70  # chunks.usable cuts this at 64
    store(index, longer, n=96, g=8)
    assert found(index, prompt, marks=[70], g=8) == 70
    assert found(index, longer, g=8) == 96


def test_an_open_block_does_not_serve_the_last_token_of_a_closed_one():
    index, prompt = PrefixIndex(), tokens(70)
    store(index, prompt, n=64, g=8)
    store(index, np.concatenate([prompt, tokens(30, seed=1)]), n=96, g=8)
    assert found(index, prompt, marks=[70], g=8) == 69


def test_a_longer_block_makes_the_shorter_one_superfluous():
    index, prompt = PrefixIndex(), tokens(100)
    short = store(index, prompt, 80)[-1]
    key = short.key
    parts = pieces(100, (), 1)
    have, wanted = index.missing(ROOT, prompt, parts, 100)
    assert (have.n_tokens, wanted) == (64, [Missing(64, 100, closed=False)])
    _, gone = index.add(ROOT, have.nodes[-1], prompt, wanted[0], slot=9)
    assert gone == [Gone(key, n_tokens=16, slot=1, disk_bytes=0)]
    assert len(index) == 2
    index.check_integrity()


def test_a_shorter_block_in_use_stays():
    index, prompt = PrefixIndex(), tokens(100)
    path = store(index, prompt, 80)
    index.lock(path)
    store(index, prompt, 100)
    assert len(index) == 3
    index.unlock(path)
    assert found(index, prompt) == 100


def test_a_shorter_block_is_not_missing_where_a_longer_one_stands():
    index, prompt = PrefixIndex(), tokens(100)
    path = store(index, prompt)
    have, wanted = index.missing(ROOT, prompt, pieces(100, (), 1), 80)
    assert (have.nodes, have.n_tokens, wanted) == (tuple(path), 80, [])


@pytest.mark.parametrize("marks", [[], [70]])
def test_adding_a_block_twice_is_our_bug(marks):
    index, prompt = PrefixIndex(), tokens(70)
    store(index, prompt, marks=marks, g=8)
    first = Missing(0, BLOCK_TOKENS, closed=False)
    with pytest.raises(DoubleInsert):
        index.add(ROOT, None, prompt, first, slot=5)
    if marks:
        (parent,) = index.match(ROOT, prompt[:64], pieces(64, (), 8)).nodes
        with pytest.raises(DoubleInsert):
            index.add(ROOT, parent, prompt, Missing(64, 70, closed=True), slot=5)


def test_leaves_go_first_and_an_empty_index_has_nothing_to_give():
    index = PrefixIndex()
    path = keys(store(index, tokens(200)))
    assert evicted(index, 5) == [*reversed(path), None]
    assert len(index) == 0
    index.check_integrity()


def test_locks_and_pins_are_counted_and_keep_all_above_them():
    index = PrefixIndex()
    path = store(index, tokens(192))
    first, second, third = keys(path)
    index.lock(path[1:2])
    index.lock(path[1:2])
    index.pin(path[1:2])
    assert (index.n_reclaimable(), index.n_pinned) == (1, 1)
    assert evicted(index, 1) == [third]
    for give_back in (index.unlock, index.unlock, index.unpin):
        assert evicted(index, 1) == [None]
        assert index.n_reclaimable() == 0
        give_back(path[1:2])
    assert (index.n_reclaimable(), index.n_pinned) == (2, 0)
    assert evicted(index, 2) == [second, first]


def test_what_was_used_again_stays_longer():
    index = PrefixIndex()
    (old,) = store(index, tokens(64))
    new = keys(store(index, tokens(64, seed=1)))
    index.touch([old])
    assert evicted(index, 1) == new


def test_the_policies_given_are_the_ones_that_are_asked():
    host, disk = policy("s3fifo", 8), policy("cost", 8)
    index = PrefixIndex(host, disk)
    (node,) = store(index, tokens(64))
    index.stored(node, 100)
    assert (len(host), len(disk)) == (1, 1)


def test_ids_of_blocks_that_went_are_used_again():
    index = PrefixIndex()
    before = {node.id for node in store(index, tokens(200))}
    evicted(index, 4)
    assert {node.id for node in store(index, tokens(200, seed=1))} <= before | {0}  # the root's, which went with them


def test_a_handle_of_a_block_that_went_does_nothing_to_its_successor():
    index = PrefixIndex()
    (old,) = store(index, tokens(64))
    index.evict_host()
    (new,) = store(index, tokens(64))
    for act in (index.lock, index.pin, index.touch, index.keep):
        with pytest.raises(AssertionError, match="gone"):
            act([old])
    assert (new.locks, new.pins) == (0, 0)
    assert new != old


def test_what_left_is_told_with_what_the_caller_must_free():
    index = PrefixIndex()
    (node,) = store(index, tokens(64))
    key = node.key
    index.stored(node, 500)
    assert index.evict_host() == Gone(key, 64, slot=0, disk_bytes=500)
    assert (node.slot, node.disk_bytes) == (-1, 500)  # it is there still
    assert index.evict_disk() == (Gone(key, 64, slot=-1, disk_bytes=500), [])
    assert len(index) == 0


def test_the_disk_keeps_whole_chains_also_where_the_host_tier_has_all_of_them():
    index = PrefixIndex()
    path = store(index, tokens(192))
    first, second, third = keys(path)
    for node in path:
        index.stored(node, 500)
    assert [index.evict_disk()[0].key for _ in range(3)] == [third, second, first]
    assert (index.evict_disk(), index.n_on_disk, len(index)) == (None, 0, 3)


def test_a_leased_block_that_is_lost_on_disk_counts_as_held_in_the_host_tier_again():
    index = PrefixIndex()
    (node,) = store(index, tokens(64))
    index.pin([node])
    index.stored(node, 500)
    assert (index.n_pinned, index.disk_bytes_leased) == (0, 500)
    index.leave_disk(node)
    assert (index.n_pinned, index.disk_bytes_leased) == (1, 0)
    index.check_integrity()


def test_where_nothing_else_may_go_from_disk_a_block_goes_with_what_hangs_on_it_in_the_host_tier():
    index = PrefixIndex()
    path = store(index, tokens(192))
    first = path[0].key
    index.stored(path[0], 500)
    assert index.evict_host().key == first  # a copy of what is on disk goes before the leaves: it was used before them
    gone, slots = index.evict_disk()
    assert (gone.key, slots, len(index)) == (first, [2, 1], 0)
    index.check_integrity()


def test_a_damaged_block_that_something_hangs_on_is_filled_again():
    index, prompt = PrefixIndex(), tokens(128)
    path = store(index, prompt)
    index.stored(path[0], 500)
    index.evict_host()
    index.leave_disk(path[0])
    assert (path[0].is_hollow, found(index, prompt), len(index)) == (True, 0, 2)
    have, wanted = index.missing(ROOT, prompt, pieces(128, (), 1), 128)
    assert (have.n_tokens, len(wanted)) == (0, 2)
    assert index.child(ROOT, None, prompt, wanted[0]) == path[0]
    index.fill(path[0], 7)
    assert found(index, prompt) == 128
    index.check_integrity()


def test_a_root_that_lost_everything_can_be_used_again():
    index = PrefixIndex()
    store(index, tokens(64))
    index.evict_host()
    store(index, tokens(64))
    assert found(index, tokens(64)) == 64


def test_common_prefix():
    a = np.array([1, 2, 3], np.int32)
    assert [common_prefix(a, a), common_prefix(a, a[:2]), common_prefix(a[:0], a)] == [3, 2, 0]
    assert common_prefix(a, np.array([1, 5, 3], np.int32)) == 1
