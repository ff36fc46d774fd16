"""What the cost policy learns, and its hazards and Gittins index against arithmetic done by hand."""

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


def test_memory_is_small():
    policy = Cost(1000)
    for block in range(1000):
        policy.stored(block, BlockFacts(b"%d" % block, None, 0, 64, 0), 0.0)
    arrays = (policy._used_s, policy._class, policy._uses)
    n_bytes = sum(one.nbytes for one in arrays) + policy._prints.itemsize * len(policy._prints)
    assert n_bytes <= 25 * 1000  # growing by an eighth; ghosts take 19 bytes more each
