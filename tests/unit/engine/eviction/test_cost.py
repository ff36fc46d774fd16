"""What the cost policy learns, and its hazards and Gittins index against arithmetic done by hand."""

import gc
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.engine.eviction import BlockFacts, Cost
from keepwarm.engine.eviction.hazard import EDGES_S, N_AGES, Hazards, age_index, age_index_of, gittins


@given(st.floats(0.0, 1e7))
def test_an_age_alone_and_in_an_array_are_the_same(age_s):
    assert age_index_of(age_s) == age_index(np.array([age_s]))[0]
    i = age_index_of(age_s)
    assert EDGES_S[i] <= age_s * (1 + 1e-9)
    assert i == N_AGES - 1 or age_s <= EDGES_S[i + 1] * (1 + 1e-9)


def test_a_constant_hazard_is_worth_itself_at_every_age():
    assert gittins(np.full((2, N_AGES), 0.01)) == pytest.approx(np.full((2, N_AGES), 0.01))


def test_a_rhythm_is_worth_waiting_for_and_nothing_after_it():
    hazards = np.full((1, N_AGES), 1e-6)
    hazards[0, 10] = 1.0
    worth = gittins(hazards)[0]
    assert (np.diff(worth[:11]) > 0).all()
    assert worth[11:] == pytest.approx(1e-6)


def test_reads_over_watched_time_is_the_hazard():
    hazards = Hazards(n_classes=2, n_groups=1)
    many = 200_000
    hazards.read(np.zeros(many, np.int64), np.full(many, 0.1), np.full(many, 0.1))
    hazards.watch(np.ones(many, np.int64), np.full(many, 0.25), np.full(many, 0.25))
    worth = hazards.worth(weight=1.0)
    assert worth[0, 0] == pytest.approx(10.0, rel=0.01)
    assert worth[1, 0] < 0.1


def cycle(policy, n_rounds):
    """Two kinds of prompts: block 0 is read every 10 s, the others never."""
    policy.stored(0, BlockFacts(b"kept", None, 0, 64, 0), 0.0)
    for n in range(1, n_rounds):
        policy.stored(1 + n, BlockFacts(b"%d" % n, None, 0, 64, 0), 10.0 * n)
        policy.hit([0], 10.0 * n)


def test_what_is_read_again_and_again_outlives_what_is_newer():
    policy = Cost(100)
    cycle(policy, 60)
    assert policy.victim({0, 60}, 595.0) == 60


def test_an_evicted_block_that_comes_back_has_its_uses():
    policy = Cost(100)
    cycle(policy, 60)
    policy.forget(0)
    policy.stored(0, BlockFacts(b"kept", None, 0, 64, 0), 600.0)
    policy.stored(70, BlockFacts(b"new", None, 0, 64, 0), 600.0)
    assert policy.victim({0, 70}, 605.0) == 70


def test_four_bytes_of_time_are_enough_after_a_year_of_uptime():
    policy = Cost(100)
    year_s = 365 * 86_400.0
    for n in range(40):
        policy.stored(n, BlockFacts(b"%d" % n, None, 0, 64, 0), year_s + 0.25 * n)
    used_s = policy._used_s[:40].tolist()
    assert used_s == [0.25 * n for n in range(40)]


def test_it_learns_after_a_share_of_the_store_was_used_whatever_the_number_of_turns():
    policy = Cost(16_000)
    for block in range(3000):  # one long prompt
        policy.stored(block, BlockFacts(b"%d" % block, block - 1 if block else None, 64 * block, 64, 0), 0.0)
    before = policy._worth
    policy.hit(list(range(3000)), 10.0)
    policy.hit(list(range(3000)), 20.0)
    assert (policy._worth[:, 0] != before[:, 0]).any()


def test_both_tiers_policies_take_a_hundred_bytes_a_block_at_most():
    keys = [b"%d" % block for block in range(20_000)]
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        policies = [Cost(20_000), Cost(20_000)]
        for policy in policies:
            for block, key in enumerate(keys):
                policy.stored(block, BlockFacts(key, block - 1 if block % 80 else None, 64 * (block % 80), 64, 0), 0.0)
            policy.victim(set(range(79, 20_000, 80)), 9.0)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(policies) == 2
    assert (after - before) / 20_000 <= 100
