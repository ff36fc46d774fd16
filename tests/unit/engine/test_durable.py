"""The store with a disk tier, by example: leases, admission, recovery, damage; any history is in the property machine."""

import threading

import numpy as np
import pytest

from keepwarm.core.prompt import Prompt
from keepwarm.engine.disk import DiskTier
from keepwarm.engine.files import Files
from keepwarm.engine.leasefile import LeaseFiles
from keepwarm.engine.prefix import root_key
from keepwarm.engine.scripted import ScriptedModel
from keepwarm.engine.selftest import layout_of
from keepwarm.engine.store import NoRoom, PrefixStore, slot_bytes
from keepwarm.engine.tiers import Damage, HostTier, TierFault
from tests.cold import evaluate, values
from tests.unit.engine.conftest import tokens

PAGE = 4096
COST = 2 * PAGE  # of a block of the scripted model: a page of header, 24 bytes a token in the other


def prompt(n, *, seed=0, tenant="a", marks=()):
    return Prompt(tenant, tokens(n, seed), tuple(marks))


def joined(*parts, tenant="a"):
    return Prompt(tenant, np.concatenate(parts), ())


class Cabinet:
    """A model and a store over a directory, and what every test does with them."""

    def __init__(self, root, *, host_blocks=100, disk_blocks=100, g=1):
        self.root, self.host_blocks, self.disk_blocks = root, host_blocks, disk_blocks
        self.model = ScriptedModel(n_streams=3, n_ctx=2048, granularity=g)
        self.layout = layout_of(self.model)
        self.slot = slot_bytes(self.layout)
        self.damaged = []
        self.open()

    def open(self, identity=("m",)):
        self.disk = DiskTier(self.root, self.disk_blocks * COST, root_key(*identity))
        self.host = HostTier(self.host_blocks * self.slot, self.slot)
        self.store = PrefixStore(
            self.layout,
            self.host,
            identity=identity,
            granularity=self.model.granularity,
            n_ctx=self.model.n_ctx,
            disk=(self.disk, LeaseFiles(Files(), self.root)),
            policy_name="lru",
        )
        self.store.on_damage = self.damaged.append
        return self.store

    def close(self):
        self.store.close()
        self.disk.close()

    def reopen(self, **kwargs):
        self.close()
        return self.open(**kwargs)

    def save(self, prompt, *, pin=None, write_end=0):
        n_evaluated = evaluate(self.model, prompt)
        self.store.save(prompt, n_evaluated, self.model, 0, spend=False, pin=pin, write_end=write_end)
        self.store.flush()
        self.check()

    def lease(self, prompt, pin="object"):
        """Save under a lease and wait until it is durable; the fault, if that cannot be."""
        self.save(prompt, pin=pin)
        faults, told = [], threading.Event()
        self.store.make_durable(pin, lambda fault: (faults.append(fault), told.set()))
        assert told.wait(30)
        self.check()
        return faults[0]

    def read(self, prompt, *, want_logits=True):
        """What a turn over this prompt reads: (tokens, tier); the bits are compared with cold ones."""
        held = self.store.hold(prompt, want_logits=want_logits)
        n = self.store.restore(held, self.model, 1) if held.n_tokens else 0
        restored = values(self.model, 1) if n else []
        self.store.release(held)
        self.store.flush()
        evaluate(self.model, prompt)
        assert np.array_equal(restored, values(self.model)[:n])
        self.check()
        return n, held.tier

    def check(self):
        self.store.check_integrity()
        self.disk.check_integrity()
        for pool in self.store.status().pools:
            assert pool.bytes_free + pool.bytes_resident + pool.bytes_leased == pool.bytes_total

    @property
    def pool(self):
        """(free, resident, leased) of the disk, in blocks."""
        disk = self.store.status().pools[1]
        return disk.bytes_free // COST, disk.bytes_resident // COST, disk.bytes_leased // COST

    def block_files(self):
        return sorted((self.root / "blocks").iterdir())

    def flip(self, path, at=-1):
        raw = bytearray(path.read_bytes())
        raw[at] ^= 1
        path.write_bytes(raw)


@pytest.fixture
def cabinet(tmp_path):
    made = []

    def make(**kwargs):
        made.append(Cabinet(tmp_path / "store", **kwargs))
        return made[-1]

    yield make
    for one in made:
        one.close()


# --- leases


def test_a_lease_survives_the_process(cabinet):
    kept = cabinet()
    assert kept.lease(prompt(200)) is None
    assert kept.pool == (96, 0, 4)
    kept.reopen()
    assert kept.store.pins == ("object",)
    assert kept.pool == (96, 0, 4)
    assert kept.read(prompt(200), want_logits=False) == (200, "disk")
    assert kept.read(prompt(200)) == (198, "host")


def test_a_lease_that_was_given_back_does_not_come_back(cabinet):
    kept = cabinet()
    kept.lease(prompt(200))
    kept.store.unpin("object")
    kept.reopen()
    assert kept.store.pins == ()
    assert kept.pool == (96, 4, 0)  # best effort from then on, but still there


def test_a_lease_given_back_before_it_is_written_may_lose_its_blocks_and_is_answered(cabinet):
    kept = cabinet()
    kept.lease(prompt(128))
    writer, index = kept.store._durable._writer, kept.store._index
    busy, told, faults = threading.Event(), threading.Event(), []
    writer.submit(busy.wait)
    kept.store.make_durable("object", lambda fault: (faults.append(fault), told.set()))
    kept.store.unpin("object")
    for _ in range(2):
        kept.host.free(index.evict_host().slot)
        kept.disk.delete(index.evict_disk()[0].key)
    busy.set()
    assert told.wait(30)
    assert isinstance(faults[0], TierFault)
    kept.reopen()
    assert kept.store.pins == ()


def test_a_lease_larger_than_the_budget_is_refused_with_numbers_and_evicts_nothing(cabinet):
    kept = cabinet(disk_blocks=6)
    kept.lease(prompt(128), pin="one")
    for _ in range(2):
        kept.save(prompt(128, seed=1))
        kept.read(prompt(128, seed=1))
    assert kept.pool == (2, 2, 2)
    with pytest.raises(NoRoom) as refused:
        kept.save(prompt(5 * 64, seed=2), pin="two")
    assert (refused.value.n_bytes_needed, refused.value.n_bytes_free) == (5 * COST, 4 * COST)
    assert kept.pool == (2, 2, 2)
    assert kept.lease(prompt(4 * 64, seed=2), pin="two") is None  # best effort gives way to a lease that fits
    assert kept.pool == (0, 0, 6)


def test_leased_blocks_outlive_any_pressure_on_both_tiers(cabinet):
    kept = cabinet(host_blocks=8, disk_blocks=8)
    kept.lease(prompt(256))
    for seed in range(1, 6):
        for _ in range(3):
            kept.save(prompt(256, seed=seed))
            kept.read(prompt(256, seed=seed))
    assert kept.pool == (0, 4, 4)
    assert kept.read(prompt(256), want_logits=False) == (256, "disk")


def test_objects_share_their_common_blocks_on_disk(cabinet):
    kept = cabinet()
    kept.lease(joined(tokens(128), tokens(64, seed=1)), pin="one")
    kept.lease(joined(tokens(128), tokens(64, seed=2)), pin="two")
    assert kept.pool == (96, 0, 4)
    kept.store.unpin("one")
    assert kept.pool == (96, 1, 3)
    kept.reopen()
    assert kept.pool == (96, 1, 3)


def test_a_lease_with_a_lost_block_is_not_held_after_a_start(cabinet):
    kept = cabinet()
    kept.lease(prompt(200))
    kept.close()
    kept.block_files()[0].unlink()
    kept.open()
    assert kept.store.pins == ()
    assert list((kept.root / "leases").iterdir()) == []


# --- admission


def test_what_was_asked_for_once_stays_off_the_disk(cabinet):
    kept = cabinet()
    kept.save(prompt(300))
    kept.store.hold(prompt(300), want_logits=True, uses=False)  # a look is no use
    kept.store.flush()
    assert kept.block_files() == []


def test_what_a_breakpoint_asked_for_is_written_at_once(cabinet):
    kept = cabinet()
    kept.save(prompt(300), write_end=130)
    assert kept.pool[1] == 3  # blocks that begin before token 130
    kept.reopen()
    assert kept.read(prompt(300)) == (192, "disk")


def test_what_is_asked_for_twice_is_written(cabinet):
    kept = cabinet()
    kept.save(prompt(256))
    assert kept.read(prompt(256))[1] == "host"
    assert len(kept.block_files()) == 4
    kept.reopen()
    assert kept.read(prompt(256)) == (254, "disk")


def test_what_left_unwritten_and_comes_again_is_written(cabinet):
    kept = cabinet(host_blocks=4)
    kept.save(prompt(256))
    kept.save(prompt(256, seed=1))
    assert kept.block_files() == []
    kept.save(prompt(256))
    assert len(kept.block_files()) == 4
    assert kept.store.status().n_not_admitted == 8


# --- reading


@pytest.mark.parametrize("g", [1, 8, 64])
@pytest.mark.parametrize("host_blocks", [100, 3, 1])
def test_what_comes_from_disk_has_the_cold_bits(cabinet, g, host_blocks):
    kept = cabinet(g=g)
    kept.lease(prompt(300, marks=(130,)))
    kept.host_blocks = host_blocks  # fewer slots than blocks: the rest is read past the host tier
    kept.reopen()
    more = Prompt("a", np.concatenate([tokens(300), tokens(40, seed=3)]), (130,))
    assert kept.read(more)[0] >= 300 // g * g - 64


def test_a_context_on_disk_is_read_ahead_when_it_is_looked_up(cabinet):
    kept = cabinet()
    kept.lease(prompt(256))
    kept.reopen()
    looked = kept.store.hold(prompt(256), want_logits=True, uses=False)
    held = kept.store.hold(prompt(256), want_logits=True)
    assert kept.store.restore(held, kept.model, 1) == 254
    assert kept.store.n_unread(held) == 0
    kept.store.release(held)
    kept.store.release(looked)
    assert kept.store.status().n_hits_disk + kept.store.status().n_hits_host == 1  # a look is no hit


# --- damage


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_a_damaged_block_ends_the_match_and_is_told_and_filled_again(cabinet, which):
    kept = cabinet()
    kept.lease(prompt(256))
    kept.close()
    kept.open()
    node = sorted(kept.store._index.nodes(), key=lambda node: node.start)[which]
    kept.flip(kept.root / "blocks" / f"{node.key.hex()}.kv")
    n, _ = kept.read(prompt(256), want_logits=False)
    assert n == which * 64
    assert kept.damaged == ["object"]
    assert kept.store.status().damaged == {Damage.FLIPPED.value: 1}
    assert kept.pool == (97, 0, 3)
    assert kept.lease(prompt(256)) is None
    assert kept.pool == (96, 0, 4)
    kept.reopen()
    assert kept.store.pins == ("object",)
    assert kept.read(prompt(256), want_logits=False) == (256, "disk")


def test_blocks_behind_a_lost_one_are_deleted_at_the_start(cabinet):
    kept = cabinet()
    kept.save(prompt(256))
    kept.read(prompt(256))
    first = min(kept.store._index.nodes(), key=lambda node: node.start)
    kept.close()
    (kept.root / "blocks" / f"{first.key.hex()}.kv").unlink()
    kept.open()
    assert kept.store.status().damaged == {Damage.ORPHANED.value: 3}
    assert kept.block_files() == []
    kept.check()


def test_blocks_of_another_model_are_stale(cabinet):
    kept = cabinet()
    kept.lease(prompt(256))
    kept.reopen(identity=("another",))
    assert kept.store.status().damaged == {Damage.STALE.value: 4}
    assert kept.store.pins == ()
    assert kept.read(prompt(256)) == (0, None)


# --- budgets


def test_a_smaller_budget_at_the_next_start_is_kept(cabinet):
    kept = cabinet()
    kept.lease(prompt(128))
    for seed in (1, 2):
        kept.save(prompt(256, seed=seed))
        kept.read(prompt(256, seed=seed))
    kept.disk_blocks = 5
    kept.reopen()
    assert kept.pool == (0, 3, 2)
    assert len(kept.block_files()) == 5


def test_the_host_tier_shrinks_and_grows_and_loses_nothing_that_is_on_disk(cabinet):
    kept = cabinet(host_blocks=10)
    kept.lease(prompt(256))
    kept.save(prompt(256, seed=1))
    kept.store.limit_host(2 * kept.slot)
    kept.check()
    assert kept.store.bytes_total == 2 * kept.slot
    assert kept.read(prompt(256), want_logits=False)[0] == 256
    kept.store.limit_host(10 * kept.slot)
    kept.save(prompt(256, seed=2))
    assert kept.read(prompt(256), want_logits=False)[0] == 256


# --- break-even


def test_a_hit_slower_than_computing_is_computed_and_counted_but_a_leased_one_is_read(cabinet):
    kept = cabinet()
    kept.lease(prompt(256))
    kept.save(prompt(256, seed=1))
    kept.read(prompt(256, seed=1))
    kept.reopen()
    for _ in range(50):
        kept.store.speeds.observe_prefill(512, 512, 0.0001)  # computing is very fast
        kept.store.speeds.observe_restore("disk", 1 << 20, 10.0)  # and the disk very slow
    assert kept.read(prompt(256, seed=1))[0] < 254
    assert kept.store.status().n_tokens_recomputed == 254
    assert kept.read(prompt(256), want_logits=False) == (256, "disk")


def test_a_skipped_hit_is_tried_again_now_and_then(cabinet):
    kept = cabinet()
    kept.save(prompt(256, seed=1))
    kept.read(prompt(256, seed=1))
    kept.reopen()
    for _ in range(50):
        kept.store.speeds.observe_prefill(512, 512, 0.0001)
        kept.store.speeds.observe_restore("disk", 1 << 20, 10.0)
    tiers = []
    for _ in range(32):
        kept.store.limit_host(0)
        kept.store.limit_host(kept.store.bytes_configured)
        held = kept.store.hold(prompt(256, seed=1), want_logits=True)
        tiers.append(held.tier)
        kept.store.release(held)
        kept.store.flush()
    assert 1 <= tiers.count("disk") <= 4


def test_a_conversation_set_hits_as_much_after_a_restart_as_before(cabinet):
    kept = cabinet(host_blocks=400, disk_blocks=400)
    conversations = [[prompt(n, seed=seed) for n in (100, 230, 400)] for seed in range(6)]

    def replayed():
        n_read = n_asked = 0
        for turn in range(3):
            for conversation in conversations:
                n, _ = kept.read(conversation[turn])
                kept.save(conversation[turn])
                n_read, n_asked = n_read + n, n_asked + conversation[turn].n_tokens
        return n_read / n_asked

    cold = replayed()
    before = replayed()
    kept.reopen()
    assert replayed() == before > cold
