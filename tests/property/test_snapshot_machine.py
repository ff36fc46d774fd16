"""The store of whole states against a naive twin, a list of prompts' cold values by tenant: equal tokens, equal bits.

Whatever is restored must go on like a cold evaluation of the same prompt. The store is restarted over its directory now and
then; what was leased must be there afterwards, and what is not there is only ever missing, never wrong.
"""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from keepwarm.core.prompt import Prompt
from keepwarm.engine.chunks import next_rows, storable, usable
from keepwarm.engine.disk import DiskTier
from keepwarm.engine.files import Files
from keepwarm.engine.leasefile import LeaseFiles
from keepwarm.engine.model import ModelFault
from keepwarm.engine.prefix import root_key
from keepwarm.engine.ram import RamTier
from keepwarm.engine.scripted import ScriptedModel
from keepwarm.engine.snapshot_index import cut_at
from keepwarm.engine.snapshots import SnapshotStore
from keepwarm.engine.store import NoRoom

N_MAX = 200
SIZE = 24  # bytes of a state
PAGE = 4096  # a file on disk takes about one


@st.composite
def prompts(draw):
    """Much alike, so that they meet: one text, at most one fork, marks at the same few places."""
    n = draw(st.sampled_from([1, 2, 3, 65, 70, 128, 200]) | st.integers(1, N_MAX))
    fork = draw(st.sampled_from([0, 1, 64, 100, n, n, n]))
    tokens = np.random.default_rng(0).integers(97, 100, n).astype(np.int32)
    tokens[fork:] += 10
    marks = draw(
        st.sampled_from([(), (), (n,), (70,), (50, 64), (50, 128), (64, 150)]) | st.sets(st.integers(1, n), max_size=2)
    )
    return Prompt(draw(st.sampled_from("aab")), tokens, tuple(sorted(m for m in marks if m <= n)))


class SnapshotMachine(RuleBasedStateMachine):
    @initialize(
        g=st.sampled_from([1, 8, 64]),
        ram=st.integers(0, 12),
        pages=st.sampled_from([None, 0, 2, 5, 100]),
        policy_name=st.sampled_from(["lru", "s3fifo", "cost"]),
    )
    def start(self, g, ram, pages, policy_name):
        self.model = ScriptedModel(n_streams=4, n_ctx=N_MAX + 8, granularity=g, forgets=True)
        self.g, self.n_ram, self.pages, self.policy_name = g, ram, pages, policy_name
        self.directory = tempfile.TemporaryDirectory()
        self.store, self.disk = None, None
        self.saved = set()  # (tenant, tokens, cuts) of all that was ever stored
        self.held = []  # (what is held, its prompt)
        self.pinned = {}  # pin: its prompt and how much of it
        self.open()

    def open(self):
        disk = None
        if self.pages is not None:
            root = Path(self.directory.name)
            self.disk = DiskTier(root, self.pages * PAGE, root_key("m"))
            disk = self.disk, LeaseFiles(Files(), root)
        self.store = SnapshotStore(
            RamTier(self.n_ram * SIZE), identity=("m",), granularity=self.g, disk=disk, policy_name=self.policy_name
        )

    def close(self):
        self.store.close()
        if self.disk:
            self.disk.close()

    def name(self, prompt, n):
        cuts = tuple(p.end for p in self.store.pieces(prompt) if p.closed and p.end <= n)
        return prompt.tenant, prompt.tokens[:n].tobytes(), cuts

    def prefill(self, prompt, *, stream=0, start=0, end=None, rows_max=64, saves=True):
        """As the engine's loop does; where it stopped."""
        points = self.store.snapshot_points(prompt)
        parts, pos = cut_at(self.store.pieces(prompt), points, start), start
        if not start:
            self.model.forget(stream, 0, -1)
        wanted = prompt.n_tokens if end is None else min(end, prompt.n_tokens)
        while pos < wanted:
            rows = next_rows(pos, parts, self.g, rows_max)
            self.model.evaluate(stream, prompt.tokens[pos : pos + rows], pos, want_logits=False)
            pos += rows
            if pos in points and saves:
                self.save(prompt, pos, stream)
        return pos

    def save(self, prompt, pos, stream, pin=None):
        added = self.store.save(prompt, pos, self.model, stream, spend=pin is not None, pin=pin)
        assert added in (0, storable(pos, self.store.pieces(prompt), self.g))
        if added:
            self.saved.add(self.name(prompt, added))

    def cold(self, prompt):
        parts, pos = self.store.pieces(prompt), 0
        self.model.forget(2, 0, -1)
        while pos < prompt.n_tokens:
            rows = next_rows(pos, parts, self.g, 512)
            self.model.evaluate(2, prompt.tokens[pos : pos + rows], pos, want_logits=False)
            pos += rows
        return self.model.save(2)

    @rule(prompt=prompts(), rows_max=st.sampled_from([2, 64, 512]), decoded=st.integers(0, 3))
    def turn(self, prompt, rows_max, decoded):
        """Read, prefill, decode, and save what can be saved."""
        held = self.store.hold(prompt, want_logits=True)
        self.model.forget(0, 0, -1)
        n = self.store.restore(held, self.model, 0)
        self.store.release(held)
        assert n == held.n_tokens <= max(prompt.n_tokens - 2, 0)
        assert not n or self.name(prompt, n) in self.saved
        pos = self.prefill(prompt, start=n, rows_max=rows_max)
        assert np.array_equal(self.model.save(0), self.cold(prompt))
        for i in range(decoded):
            self.model.evaluate(0, prompt.tokens[:1], pos + i, want_logits=True)
        self.save(prompt, pos, 0)

    @rule(prompt=prompts(), end=st.integers(0, N_MAX))
    def turn_cut_short(self, prompt, end):
        pos = self.prefill(prompt, end=end)
        self.save(prompt, pos, 0)

    @rule(prompt=prompts(), pin=st.sampled_from("xyz"))
    def lease(self, prompt, pin):
        pos = self.prefill(prompt)
        points = self.store.snapshot_points(prompt)
        n = storable(pos, self.store.pieces(prompt), self.g)
        if n != pos:
            n = points[-1] if points else 0
        if not n:
            return  # the engine never leases so little
        try:
            self.save(prompt, pos, 0, pin=pin)
        except NoRoom:
            return
        except ModelFault:
            if n == pos:  # else what was saved on the way may have found no room
                raise
            return
        faults = []
        self.store.make_durable(pin, faults.append)
        self.store.flush()
        if faults == [None]:
            self.pinned[pin] = prompt, n
        else:
            self.store.unpin(pin)
            self.pinned.pop(pin, None)

    @rule(pin=st.sampled_from("xyz"))
    def unpin(self, pin):
        self.store.unpin(pin)
        self.pinned.pop(pin, None)

    @rule(prompt=prompts(), want_logits=st.booleans())
    def hold(self, prompt, want_logits):
        held = self.store.hold(prompt, want_logits=want_logits)
        parts = self.store.pieces(prompt)
        assert usable(held.n_tokens, parts, self.g, want_logits=want_logits) == held.n_tokens
        self.held.append((held, prompt))

    @rule()
    def restore_and_release(self):
        if not self.held:
            return
        held, prompt = self.held.pop(0)
        self.model.forget(1, 0, -1)
        assert self.store.restore(held, self.model, 1) == held.n_tokens  # whatever else was evicted meanwhile
        self.prefill(prompt, stream=1, start=held.n_tokens, saves=False)
        assert np.array_equal(self.model.save(1), self.cold(prompt))
        self.store.release(held)

    @rule(n=st.integers(0, 12))
    def memory_is_short(self, n):
        self.store.limit_host(n * SIZE)

    @rule()
    def restart(self):
        for held, _ in self.held:
            self.store.release(held)
        self.held.clear()
        self.close()
        self.open()
        if self.disk:
            assert set(self.store.pins) == set(self.pinned)
        else:
            self.pinned.clear()

    @invariant()
    def every_byte_is_accounted_for(self):
        self.store.flush()
        self.store.check_integrity()
        status = self.store.status()
        for pool in status.pools:
            assert pool.bytes_free + pool.bytes_resident + pool.bytes_leased == pool.bytes_total
            assert min(pool.bytes_free, pool.bytes_resident, pool.bytes_leased) >= 0
        if self.disk:
            assert self.disk.bytes_used == sum(s.disk_bytes for s in self.store._index)
            assert self.disk.bytes_used <= self.disk.bytes_total

    @invariant()
    def what_is_leased_is_there(self):
        for prompt, n in self.pinned.values():
            held = self.store.hold(prompt, want_logits=False, uses=False)
            assert held.n_tokens >= n
            self.store.release(held)

    def teardown(self):
        if not hasattr(self, "store") or self.store is None:
            return
        for held, _ in self.held:
            self.store.release(held)
        for pin in ("x", "y", "z"):
            self.store.unpin(pin)
        self.store.flush()
        assert not any(s.locks or s.pins for s in self.store._index), "something is kept for ever"
        self.close()
        self.directory.cleanup()


SnapshotMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestSnapshotStore = SnapshotMachine.TestCase
