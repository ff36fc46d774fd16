"""All policies against what the store relies on, and LRU and S3-FIFO against naive twins."""

from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.engine.eviction import POLICIES, BlockFacts, policy

N_BLOCKS_MAX = 20
every = pytest.mark.parametrize("name", POLICIES)


def facts(key, parent=None, depth=0):
    return BlockFacts(key=b"key %d" % key, parent=parent, depth=depth, n_tokens=64, n_read=0)


def store(tested, block, key=None, now_s=0.0):
    tested.stored(block, facts(block if key is None else key), now_s)
    tested.offer(block)


@every
def test_a_policy_says_its_name_and_starts_empty(name):
    tested = policy(name, N_BLOCKS_MAX)
    assert tested.name == name
    assert len(tested) == 0
    assert tested.victim(set(), 0.0) is None


def test_unknown_names_and_sizes_are_refused():
    with pytest.raises(ValueError, match="'fifo'; there are lru, s3fifo, cost"):
        policy("fifo", N_BLOCKS_MAX)
    with pytest.raises(ValueError, match="0 blocks"):
        policy("lru", 0)


steps = st.lists(
    st.tuples(st.sampled_from(["store", "hit", "bar", "offer", "evict", "damage"]), st.integers(0, 11)), max_size=150
)


@every
@given(steps=steps)
def test_victims_are_evictable_and_all_go_in_the_end(name, steps):
    tested, stored, evictable = policy(name, 8), set(), set()
    for now, (step, n) in enumerate(steps):
        if step == "store" and n not in stored:  # ids are used again, with the same key or another
            store(tested, n, key=n + now % 3, now_s=float(now))
            stored.add(n)
            evictable.add(n)
        elif step == "hit" and stored:
            tested.hit(sorted(stored)[: n + 1], float(now))
        elif step == "bar":
            evictable.discard(n)
        elif step == "offer" and n in stored:
            evictable.add(n)
            tested.offer(n)
        elif step == "damage" and n in stored:
            tested.forget(n)
            stored.discard(n)
            evictable.discard(n)
        elif step == "evict":
            victim = tested.victim(evictable, float(now))
            assert (victim is None) == (not evictable)
            if victim is not None:
                assert victim in evictable
                tested.forget(victim)
                stored.discard(victim)
                evictable.discard(victim)
        assert len(tested) == len(stored)
    for n in sorted(stored - evictable):
        tested.offer(n)
    while stored:
        victim = tested.victim(stored, 1e6)
        assert victim in stored
        tested.forget(victim)
        stored.discard(victim)
    assert len(tested) == 0


@every
def test_a_chain_goes_from_its_tail_when_only_leaves_may(name):
    tested = policy(name, N_BLOCKS_MAX)
    for block in range(10):
        tested.stored(block, facts(block, parent=block - 1 if block else None, depth=64 * block), 0.0)
    gone = []
    for leaf in range(9, -1, -1):
        tested.offer(leaf)
        gone.append(tested.victim({leaf}, 1.0))
        tested.forget(leaf)
    assert gone == list(range(9, -1, -1))


@given(steps)
def test_lru_is_an_ordered_dict(steps):
    tested, twin, evictable = policy("lru", 8), OrderedDict(), set()
    for step, n in steps:
        if step == "store" and n not in twin:
            store(tested, n)
            twin[n] = None
            evictable.add(n)
        elif step == "hit" and n in twin:
            tested.hit([n], 0.0)
            twin.move_to_end(n)
        elif step == "bar":
            evictable.discard(n)
        elif step == "offer" and n in twin:
            evictable.add(n)
            tested.offer(n)
        elif step == "evict":
            expected = next((block for block in twin if block in evictable), None)
            assert tested.victim(evictable, 0.0) == expected
            if expected is not None:
                tested.forget(expected)
                evictable.discard(expected)
                del twin[expected]


class NaiveS3Fifo:
    """The paper's two queues as lists, and its ghosts as a list of keys; every block may go."""

    def __init__(self, n_max):
        self.n_small_max = max(1, n_max // 10)
        self.n_ghosts_max = n_max - self.n_small_max
        self.small, self.main, self.ghosts, self.reads, self.keys = [], [], [], {}, {}

    def stored(self, block, key):
        self.keys[block], self.reads[block] = key, 0
        if key in self.ghosts:
            self.ghosts.remove(key)
            self.main.append(block)
        else:
            self.small.append(block)

    def evict(self):
        while len(self.small) > self.n_small_max:
            block = self.small.pop(0)
            if self.reads[block] < 2:
                self.ghosts = [*(key for key in self.ghosts if key != self.keys[block]), self.keys[block]]
                self.ghosts = self.ghosts[-self.n_ghosts_max :]
                return block
            self.reads[block] = 0
            self.main.append(block)
        while self.main:
            block = self.main.pop(0)
            if self.reads[block] == 0:
                return block
            self.reads[block] -= 1
            self.main.append(block)
        return None


@given(st.lists(st.tuples(st.sampled_from(["turn", "hit", "hit"]), st.integers(0, 19)), max_size=300))
def test_s3fifo_is_two_queues(steps):
    n_max = 10  # so that all its ghosts are in one row, where the oldest goes first
    tested, twin, stored = policy("s3fifo", n_max), NaiveS3Fifo(n_max), {}
    free = list(range(n_max))
    for step, key in steps:
        if step == "hit" and key in stored:
            tested.hit([stored[key]], 0.0)
            twin.reads[stored[key]] = min(3, twin.reads[stored[key]] + 1)
        elif step == "turn" and key not in stored:
            if not free:
                victim = tested.victim(set(stored.values()), 0.0)
                assert victim == twin.evict()
                tested.forget(victim)
                free.append(victim)
                stored = {known: block for known, block in stored.items() if block != victim}
            stored[key] = free.pop()
            store(tested, stored[key], key)
            twin.stored(stored[key], key)


@every
def test_offers_do_not_pile_up(name):
    tested = policy(name, N_BLOCKS_MAX)
    for block in range(4):
        store(tested, block)
    for _ in range(1000):
        tested.offer(1)
    queues = [tested._leaves] if name == "lru" else list(tested._leaves) if name == "s3fifo" else [tested._batch]
    assert sum(map(len, queues)) <= 8
