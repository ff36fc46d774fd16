"""The whole store on a disk that crashes, against a plain model: what was saved, what is leased, what every cell must be.

Blocks may be lost to eviction, damage and crashes, never wrong: whatever is restored equals a cold evaluation. A lease that
was acknowledged is a full hit until it is given back, through restarts, crashes of the process, power cuts (nothing that
was not synced survives) and bit flips, behind which its owner leases it again as the gateway does.
"""

import tempfile
import threading
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from keepwarm.core.prompt import Prompt
from keepwarm.engine.chunks import storable
from keepwarm.engine.disk import DiskTier
from keepwarm.engine.leasefile import LeaseFiles
from keepwarm.engine.prefix import root_key
from keepwarm.engine.scripted import ScriptedModel
from keepwarm.engine.selftest import layout_of
from keepwarm.engine.store import NoRoom, PrefixStore, slot_bytes
from keepwarm.engine.tiers import HostTier
from tests.cold import evaluate, values
from tests.faults import Crash, FaultyFiles

N_MAX = 300
COST = 8192  # of a block on disk: a page of header, a page of cells


@st.composite
def prompts(draw):
    """Much alike, so that they meet: one text, at most one fork, a mark at the same place."""
    n = draw(st.sampled_from([65, 70, 128, 200]) | st.integers(3, N_MAX))
    fork = draw(st.sampled_from([1, 64, 100, n, n, n]))
    tokens = np.random.default_rng(0).integers(97, 100, n).astype(np.int32)
    tokens[fork:] += 10
    marks = draw(st.sampled_from([(), (), (70,)]))
    return Prompt(draw(st.sampled_from("aab")), tokens, tuple(m for m in marks if m <= n))


class DurableMachine(RuleBasedStateMachine):
    @initialize(
        g=st.sampled_from([1, 8]),
        host=st.sampled_from([6, 12, 40]),
        disk=st.sampled_from([4, 10, 60]),
        policy=st.sampled_from(["lru", "s3fifo", "cost"]),
    )
    def start(self, g, host, disk, policy):
        self.directory = tempfile.TemporaryDirectory()
        self.model = ScriptedModel(n_streams=3, n_ctx=N_MAX + 8, granularity=g)
        self.layout = layout_of(self.model)
        self.blocks = host, disk
        self.policy = policy
        self.leased = {}  # pin: prompt
        self.open()

    def open(self):
        host, disk = self.blocks
        slot = slot_bytes(self.layout)
        self.files = FaultyFiles()
        self.disk = DiskTier(Path(self.directory.name), disk * COST, root_key("m"), files=self.files)
        self.damaged = []
        self.store = PrefixStore(
            self.layout,
            HostTier(host * slot, slot),
            identity=("m",),
            granularity=self.model.granularity,
            n_ctx=N_MAX + 8,
            disk=(self.disk, LeaseFiles(self.files, Path(self.directory.name))),
            policy_name=self.policy,
        )
        self.store.on_damage = self.damaged.append

    def kept(self, prompt):
        return storable(prompt.n_tokens, self.store.pieces(prompt), self.store.granularity)

    def read(self, prompt):
        """What a turn restores of `prompt`, compared with cold cells; how many tokens."""
        held = self.store.hold(prompt, want_logits=False)
        try:
            n = self.store.restore(held, self.model, 2) if held.n_tokens else 0
            restored = values(self.model, 2) if n else np.empty(0, np.uint64)
        finally:
            self.store.release(held)
            self.store.flush()
        evaluate(self.model, prompt, stream=1)
        n_promised = min(n, self.kept(prompt))
        assert len(restored) == n
        assert np.array_equal(restored[:n_promised], values(self.model, 1)[:n_promised])
        return n

    def lease_now(self, prompt, pin):
        """As the engine does, reading first what is there; the fault, or None when acknowledged. Raises NoRoom."""
        self.read(prompt)
        self.store.save(prompt, evaluate(self.model, prompt), self.model, 0, spend=False, pin=pin)
        faults, told = [], threading.Event()
        self.store.make_durable(pin, lambda fault: (faults.append(fault), told.set()))
        self.store.flush()
        return faults[0] if told.is_set() else "unknown"

    @rule(prompt=prompts())
    def save(self, prompt):
        self.store.save(prompt, evaluate(self.model, prompt), self.model, 0, spend=False, pin=None)

    @rule(prompt=prompts())
    def use(self, prompt):
        self.read(prompt)

    @rule(prompt=prompts(), pin=st.sampled_from("xyz"))
    def lease(self, prompt, pin):
        before, refused, fault = self.store.status().pools[1], None, None
        try:
            fault = self.lease_now(prompt, pin)
        except NoRoom as exc:
            refused = exc
        assert fault is None
        if refused:
            assert refused.n_bytes_free < refused.n_bytes_needed
            assert self.store.status().pools[1].bytes_leased == before.bytes_leased
        else:
            self.leased[pin] = prompt

    @rule(pin=st.sampled_from("xyz"))
    def give_back(self, pin):
        self.store.unpin(pin)
        self.leased.pop(pin, None)

    @rule()
    def restart(self):
        self.store.close()
        self.disk.close()
        self.open()
        assert set(self.store.pins) == set(self.leased)

    @rule(prompt=prompts(), pin=st.sampled_from("xyz"), after=st.integers(0, 60), power=st.booleans())
    def crash(self, prompt, pin, after, power):
        """The world stops somewhere in a lease, some reads and writes."""
        self.store.flush()
        self.files.stop_after = self.files.n_operations + after
        uncertain = None
        try:
            fault = self.lease_now(prompt, pin)
            if fault is None:
                self.leased[pin] = prompt
            else:
                uncertain = pin
        except NoRoom:
            pass
        except Crash:
            uncertain = None  # while reading: nothing was asked of the leases
        self.store.close()
        self.files.stop_after = None
        self.disk.close()
        if power:
            self.files.lose_unsynced()
        self.open()
        found = set(self.store.pins)
        if uncertain is not None:  # the old lease of that name, the new one, or none
            found.discard(pin)
            self.leased.pop(pin, None)
            self.store.unpin(pin)
        assert found == set(self.leased)

    @rule(which=st.integers(0, 200), at=st.integers(-3000, -1) | st.integers(0, 400))
    def flip(self, which, at):
        """A bit of some block flips; every owner reads and, told of damage, leases again."""
        self.store.flush()
        files = sorted((Path(self.directory.name) / "blocks").iterdir())
        if not files:
            return
        path = files[which % len(files)]
        raw = bytearray(path.read_bytes())
        raw[at % len(raw)] ^= 4
        path.write_bytes(raw)
        self.store.limit_host(0)  # so that it is the disk that is read
        self.store.limit_host(self.store.bytes_configured)
        for pin, prompt in list(self.leased.items()):
            n_read = self.read(prompt)
            assert n_read >= self.kept(prompt) or pin in self.damaged
        for pin in set(self.damaged) & set(self.leased):
            self.lease_again(pin)
        self.damaged.clear()

    def lease_again(self, pin):
        try:
            fault = self.lease_now(self.leased[pin], pin)
        except NoRoom:  # its blocks were leased, but the host tier has no room to compute them
            self.give_back(pin)
        else:
            assert fault is None

    @invariant()
    def what_is_leased_is_a_full_hit(self):
        for prompt in self.leased.values():
            assert self.read(prompt) >= self.kept(prompt)

    @invariant()
    def the_accounts_add_up(self):
        self.store.flush()
        self.store.check_integrity()
        self.disk.check_integrity()
        pool = self.store.status().pools[1]
        names = list((Path(self.directory.name) / "blocks").iterdir())
        on_disk = sum(-(-path.stat().st_size // 4096) * 4096 for path in names)
        assert not any(path.suffix == ".tmp" for path in names)
        assert on_disk == pool.bytes_resident + pool.bytes_leased == self.disk.bytes_used <= self.disk.bytes_total
        assert bool(pool.bytes_leased) == any(self.kept(prompt) for prompt in self.leased.values())

    def teardown(self):
        if not hasattr(self, "store"):
            return
        self.store.close()
        self.disk.close()
        self.directory.cleanup()


DurableMachine.TestCase.settings = settings(max_examples=20, stateful_step_count=15, deadline=None)
TestDurableStore = DurableMachine.TestCase
