"""The prefix index against a naive twin: a dictionary of whole prompts with the pieces they were stored with.

Blocks also go to disk, get lost there, are leased, and leave either tier: then less is found, never something else, and what
is locked or leased stays.
"""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from keepwarm.engine.chunks import pieces, storable, usable
from keepwarm.engine.eviction import POLICIES, policy
from keepwarm.engine.prefix import PrefixIndex, root_key

ROOTS = [root_key("model", tenant) for tenant in ("a", "b")]


def bits(tokens, parts, g, n):
    """A string per token that says how its bits come about: equal strings, equal bits (the rule itself, naively)."""
    out = []
    for piece in parts:
        whole = piece.end - (piece.end - piece.start) % g
        for i in range(piece.start, min(piece.end, n)):
            group = "whole" if i < whole else f"rest of {piece.end - whole}"
            out.append((int(tokens[i]), piece.start % g if g > 1 else 0, group, piece.start if g > 1 else 0))
    return out[:n]


class PrefixMachine(RuleBasedStateMachine):
    @initialize(g=st.sampled_from([1, 8, 64]), room=st.integers(4, 40), name=st.sampled_from(POLICIES))
    def start(self, g, room, name):
        self.g, self.room = g, room
        self.index = PrefixIndex(policy(name, room), policy(name, room))
        self.stored = {root: [] for root in ROOTS}  # what was ever stored, as bit strings
        self.evicted = False
        self.locked = []
        self.pinned = []

    def prompt(self, seed, n, fork, marks):
        tokens = np.random.default_rng(seed).integers(0, 3, 300).astype(np.int32)
        tokens[fork:] = np.random.default_rng(seed + 99).integers(0, 3, 300 - fork)
        return tokens[:n], pieces(n, sorted(m for m in marks if m <= n), self.g)

    prompts = {
        "root": st.sampled_from(ROOTS),
        "seed": st.integers(0, 2),
        "n": st.integers(2, 300),
        "fork": st.integers(0, 300),
        "marks": st.sets(st.integers(1, 300), max_size=3),
    }

    @rule(done=st.integers(0, 300), **prompts)
    def store(self, root, seed, n, fork, marks, done):
        tokens, parts = self.prompt(seed, n, fork, marks)
        n_kept = storable(min(done, n), parts, self.g)
        have, wanted = self.index.missing(root, tokens, parts, n_kept)
        self.index.lock(have.nodes)
        path = list(have.nodes)
        for extent in wanted:
            above = path[-1] if path else None
            node = self.index.child(root, above, tokens, extent)
            if node is None or node.is_hollow:
                if len(self.index) >= self.room:
                    self.evicted = True
                    if self.index.evict_host() is None:
                        break
                    node = self.index.child(root, above, tokens, extent)  # may have gone with what hung on it
                if node is None:
                    node, _ = self.index.add(root, above, tokens, extent, slot=0)
                else:
                    self.index.fill(node, 0)
            self.index.lock([node])
            path.append(node)
        self.index.unlock(path)
        reached = path[-1].end if path else 0
        self.stored[root].append(bits(tokens, parts, self.g, min(n_kept, reached)))

    @rule(want_logits=st.booleans(), hold=st.booleans(), **prompts)
    def match(self, root, seed, n, fork, marks, want_logits, hold):
        tokens, parts = self.prompt(seed, n, fork, marks)
        found = self.index.match(root, tokens, parts)
        n_used = usable(found.n_tokens, parts, self.g, want_logits=want_logits)
        wanted = bits(tokens, parts, self.g, n)
        at = 0
        for node in found.nodes:  # tokens are compared, whatever the keys say
            take = min(len(node.tokens), found.n_tokens - at)
            assert (node.tokens[:take] == tokens[at : at + take]).all()
            at += take
        assert at == found.n_tokens
        best = max((shared(wanted, stored) for stored in self.stored[root]), default=0)
        best_used = usable(best, parts, self.g, want_logits=want_logits)
        if want_logits or self.g == 1:  # without logits an open remainder is never read
            assert n_used <= best_used
            if not self.evicted:
                assert n_used == best_used
        if hold:
            nodes = [node for node in found.nodes if node.start < n_used]
            self.index.lock(nodes)
            self.locked.append(nodes)

    @rule()
    def release(self):
        if self.locked:
            self.index.unlock(self.locked.pop())

    def pick(self, data, wanted):
        nodes = sorted(filter(wanted, self.index.nodes()), key=lambda node: node.id)
        return data.draw(st.sampled_from(nodes)) if nodes else None

    @rule(data=st.data())
    def write(self, data):
        """On disk is always a whole chain from its root."""
        above = [None, *(node for node in self.index.nodes() if node.disk_bytes)]
        node = self.pick(data, lambda node: not node.disk_bytes and node.slot >= 0 and (parent_of(node) in above))
        if node is not None:
            self.index.stored(node, 100 + node.n_tokens)

    @rule(data=st.data())
    def lose_on_disk(self, data):
        node = self.pick(data, lambda node: node.disk_bytes)
        if node is not None:
            self.evicted = True
            self.index.leave_disk(node)

    @rule(data=st.data())
    def read_from_disk(self, data):
        node = self.pick(data, lambda node: node.disk_bytes and node.slot < 0)
        if node is not None:
            self.index.fill(node, 0)

    @rule(host=st.booleans())
    def evict(self, host):
        keys = {node.key for node in self.index.nodes()}
        gone = self.index.evict_host() if host else self.index.evict_disk()
        if gone is not None:
            self.evicted = True
            assert (gone if host else gone[0]).key in keys

    @rule(data=st.data())
    def pin(self, data):
        node = self.pick(data, lambda node: True)
        path = []
        while node is not None:
            path.insert(0, node)
            node = parent_of(node)
        if not any(node.is_hollow for node in path):
            self.index.pin(path)
            self.pinned.append(self.index.keep(path))

    @rule()
    def unpin(self):
        if self.pinned:
            self.index.unpin(self.pinned.pop(0))

    @rule()
    def reclaim(self):
        """What is said to be reclaimable can be had, one after the other."""
        n, n_evicted = self.index.n_reclaimable(), 0
        while self.index.evict_host() is not None:
            n_evicted += 1
        self.evicted |= n_evicted > 0
        assert n_evicted == n

    @invariant()
    def consistent(self):
        self.index.check_integrity()
        assert len(self.index) <= self.room + 6
        there = set(self.index.nodes())
        assert all(node in there and node.locks for nodes in self.locked for node in nodes)
        assert all(node in there and node.pins for nodes in self.pinned for node in nodes)


def parent_of(node):
    """The block before it in its chain, None for the first."""
    return node.parent if node.parent.parent is not None else None


def shared(wanted, stored):
    n = 0
    for a, b in zip(wanted, stored, strict=False):
        if a != b:
            break
        n += 1
    return n


PrefixMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPrefixIndex = PrefixMachine.TestCase
