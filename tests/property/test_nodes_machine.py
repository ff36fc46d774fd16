"""The rows of the prefix index against a tree of plain objects: same children, same nearest, no handle that lies."""

import hashlib

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from keepwarm.engine.nodes import NONE, NodeTable, pack

RUNS = st.lists(st.sampled_from([1, 255, 70_000]), min_size=1, max_size=3).map(tuple)  # few, so that they meet


def packed(run):
    return pack(np.array(run, np.int32))


def shared(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Twin:
    """A block as an object. Equal by identity."""

    def __init__(self, parent, key, run, closed):
        self.parent, self.key, self.run, self.closed = parent, key, run, closed
        self.start = parent.start + len(parent.run) if parent else 0
        self.below = []
        self.hollow = True


class NodesMachine(RuleBasedStateMachine):
    @initialize()
    def start(self):
        self.table = NodeTable()
        self.twins = {}  # by id
        self.handles = {}  # by id
        self.stale = []
        self.n_made = 0

    def key(self):
        self.n_made += 1
        return hashlib.sha256(str(self.n_made).encode()).digest()

    def enter(self, id_, twin):
        assert id_ not in self.twins
        self.twins[id_] = twin
        self.handles[id_] = self.table.node(id_)

    def pick(self, data, wanted=lambda twin: True):
        ids = [id_ for id_, twin in sorted(self.twins.items()) if wanted(twin)]
        return data.draw(st.sampled_from(ids)) if ids else None

    @precondition(lambda self: sum(not twin.parent for twin in self.twins.values()) < 2)  # more would thin the trees
    @rule()
    def add_root(self):
        key = self.key()
        self.enter(self.table.add_root(key), Twin(None, key, (), closed=False))

    @precondition(lambda self: self.twins)
    @rule(data=st.data(), run=RUNS, closed=st.booleans(), hollow=st.booleans())
    def add(self, data, run, closed, hollow):
        above = self.pick(data)
        twin = Twin(self.twins[above], self.key(), run, closed)
        if any((other.run, other.closed) == (run, closed) for other in twin.parent.below):
            return
        id_ = self.table.add(above, twin.key, packed(run), closed=closed)
        twin.parent.below.append(twin)
        twin.hollow = hollow
        if not hollow:
            self.table.slots[id_] = id_
        self.enter(id_, twin)

    @rule(data=st.data())
    def remove(self, data):
        id_ = self.pick(data, lambda twin: not twin.below)
        if id_ is None:
            return
        self.table.remove(id_)
        twin = self.twins.pop(id_)
        self.stale.append(self.handles.pop(id_))
        if twin.parent:
            twin.parent.below.remove(twin)

    @precondition(lambda self: self.twins)
    @rule(data=st.data(), run=RUNS, closed=st.booleans())
    def look(self, data, run, closed):
        above = self.pick(data)
        below = self.twins[above].below
        child = self.table.child(above, packed(run), closed=closed)
        exact = [twin for twin in below if (twin.run, twin.closed) == (run, closed)]
        assert ([self.twins[child]] if child != NONE else []) == exact
        nearest, n = self.table.nearest(above, packed(run))
        assert n == max((shared(twin.run, run) for twin in below if not twin.hollow), default=0)
        if nearest == NONE:
            assert n == 0
        else:
            assert self.twins[nearest] in below and not self.twins[nearest].hollow
            assert shared(self.twins[nearest].run, run) == n

    @precondition(lambda self: self.twins)
    @rule(data=st.data(), runs=st.lists(st.tuples(RUNS, st.booleans()), max_size=4), follow=st.booleans())
    def walk(self, data, runs, follow):
        above = self.pick(data)
        twin, expected, wanted = self.twins[above], [], []
        for drawn in runs:  # which seldom meet what is there
            block = (twin.below[0].run, twin.below[0].closed) if follow and twin and twin.below else drawn
            wanted.append((packed(block[0]), block[1]))
            exact = [t for t in twin.below if (t.run, t.closed) == block and not t.hollow] if twin else []
            twin = exact[0] if exact else None
            expected += exact
        assert [self.twins[id_] for id_ in self.table.walk(above, wanted)] == expected

    @rule(data=st.data())
    def look_for_shorter(self, data):
        id_ = self.pick(data, lambda twin: twin.parent and not twin.closed)
        if id_ is None:
            return
        twin = self.twins[id_]
        before = [t for t in twin.parent.below if not t.closed and t.run < twin.run]
        last = max(before, key=lambda t: t.run, default=None)
        is_prefix = last is not None and twin.run[: len(last.run)] == last.run
        shorter = self.table.shorter(id_)
        assert (self.twins[shorter] if shorter != NONE else None) is (last if is_prefix else None)

    @invariant()
    def the_same(self):
        roots = [id_ for id_, twin in self.twins.items() if not twin.parent]
        self.table.check_integrity(roots)
        assert set(self.table) == {id_ for id_, twin in self.twins.items() if twin.parent}
        assert len(self.table) == len(self.twins) - len(roots)
        for id_, twin in self.twins.items():
            node = self.handles[id_]
            assert node == self.table.node(id_)
            assert (node.key, tuple(node.tokens), node.closed) == (twin.key, twin.run, twin.closed)
            assert (node.start, node.is_leaf, node.is_hollow) == (twin.start, not twin.below, twin.hollow)
            assert (self.twins[node.parent.id] if node.parent else None) is twin.parent
            below = [self.twins[child] for child in self.table.children(id_)]
            assert [child.run for child in below] == sorted(child.run for child in twin.below)
            assert set(below) == set(twin.below)
        for node in self.stale:
            with pytest.raises(AssertionError, match="gone"):
                node.key  # noqa: B018


NodesMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestNodeTable = NodesMachine.TestCase
