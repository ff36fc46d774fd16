"""Greedy-dual values: examples, and any history against a naive twin."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.engine.eviction import DEPTH_COST, GreedyDual


def touched(*blocks):
    policy = GreedyDual()
    for block, depth in blocks:
        policy.touch(block, depth)
    return policy


def test_nothing_to_evict():
    assert GreedyDual().victim(set()) is None
    assert touched((1, 0)).victim(set()) is None


def test_what_is_shallow_goes_before_what_is_deep():
    assert touched((1, 4096), (2, 0), (3, 64)).victim({1, 2, 3}) == 2


def test_what_was_hit_more_often_stays():
    assert touched((1, 0), (2, 64), (1, 0)).victim({1, 2}) == 2


def test_only_what_may_go_is_taken_and_the_cheapest_of_it():
    policy = touched((1, 0), (2, 64), (3, 128))
    assert policy.victim({2, 3}) == 2


def test_what_could_not_go_can_when_it_is_offered():
    policy = touched((1, 0), (2, 64))
    assert policy.victim({2}) == 2
    policy.forget(2)
    assert policy.victim({1}) is None  # its offer was used up while it could not go
    policy.offer(1)
    assert policy.victim({1}) == 1


def test_what_is_not_used_ages():
    policy = touched(*[(1, 0)] * 5)  # worth 5, once
    for block in range(2, 100):
        policy.touch(block, 0)
        victim = policy.victim({1, block})
        policy.forget(victim)
        if victim == 1:
            break
    assert block == 6  # five newer blocks later: worth 5 as well, and older


@pytest.mark.parametrize("n_touches", [1, 3])
def test_a_forgotten_block_begins_anew(n_touches):
    policy = touched(*[(1, 0)] * n_touches, (2, 0))
    policy.forget(1)
    assert len(policy) == 1
    assert policy.victim({1, 2}) == 2
    policy.forget(2)
    policy.touch(1, 0)
    policy.touch(3, 1)
    assert policy.victim({1, 3}) == 1


def test_offers_do_not_pile_up():
    policy = touched((1, 0), (2, 0))
    for _ in range(10_000):
        policy.offer(1)
    assert len(policy._heap) <= 4 * 2 + 64
    assert policy.victim({2}) == 2  # not lost when the heap was made anew


steps = st.lists(st.tuples(st.sampled_from(["touch", "bar", "offer", "evict"]), st.integers(0, 7)), max_size=120)


@given(steps)
def test_any_history_evicts_what_the_naive_twin_evicts(steps):
    policy, age, evictable = GreedyDual(), 0.0, set()
    value, hits = {}, {}
    for step, block in steps:
        if step == "touch":
            hits[block] = hits.get(block, 0) + 1
            value[block] = age + hits[block] * (1.0 + 64 * block * DEPTH_COST)
            policy.touch(block, 64 * block)
            evictable.add(block)
        elif step == "bar":
            evictable.discard(block)
        elif step == "offer" and block in value and block not in evictable:
            evictable.add(block)
            policy.offer(block)
        elif step == "evict":
            expected = min(evictable, key=lambda b: (value[b], b), default=None)
            assert policy.victim(evictable) == expected
            if expected is not None:
                age = max(age, value[expected])
                policy.forget(expected)
                evictable.discard(expected)
                del value[expected], hits[expected]
        assert len(policy) == len(value)
