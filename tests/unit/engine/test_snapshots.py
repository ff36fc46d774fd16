"""The store of whole states, over the scripted model that forgets: what is kept where, and what outlives what."""

import numpy as np
import pytest

from keepwarm.core.prompt import Prompt
from keepwarm.engine.chunks import next_rows, pieces, storable, usable
from keepwarm.engine.disk import DiskTier
from keepwarm.engine.eviction import policy
from keepwarm.engine.files import Files
from keepwarm.engine.leasefile import LeaseFiles
from keepwarm.engine.model import ModelFault
from keepwarm.engine.prefix import root_key
from keepwarm.engine.ram import RamTier
from keepwarm.engine.scripted import ScriptedModel
from keepwarm.engine.snapshot_index import SnapshotIndex, cut_at, snapshot_points
from keepwarm.engine.snapshots import SnapshotStore
from keepwarm.engine.store import NoRoom

SIZE = 24  # bytes of the scripted model's whole state


def prompt(n, *, marks=(), tenant="a", seed=0, fork=None):
    tokens = np.random.default_rng(seed).integers(97, 123, n).astype(np.int32)
    if fork is not None:
        tokens[fork:] += 30
    return Prompt(tenant, tokens, tuple(marks))


def prefill(store, model, what, *, stream=0, start=0, rows_max=64, saves=True):
    """Evaluate a prompt from `start` on and save at its snapshot points, as the engine's loop does; where it stopped."""
    points = store.snapshot_points(what)
    parts, pos = cut_at(store.pieces(what), points, start), start
    if not start:
        model.forget(stream, 0, -1)
    stops = []
    while pos < what.n_tokens:
        rows = next_rows(pos, parts, store.granularity, rows_max)
        model.evaluate(stream, what.tokens[pos : pos + rows], pos, want_logits=pos + rows == what.n_tokens)
        pos += rows
        if pos in points:
            stops.append(pos)
            if saves:
                store.save(what, pos, model, stream, spend=False, pin=None)
    return stops


class Rig:
    """A model, and stores over one directory, one after the other as restarts make them."""

    def __init__(self, root, *, g=8, ram=100, disk=None):
        self.model = ScriptedModel(n_streams=3, n_ctx=2048, granularity=g, forgets=True)
        self.g, self.root, self.ram, self.disk_bytes, self.disk, self.store = g, root, ram, disk, None, None
        self.told = []
        self.restart()

    def restart(self):
        self.close()
        disk = None
        if self.disk_bytes is not None:
            self.disk = DiskTier(self.root, self.disk_bytes, root_key("m"))
            disk = self.disk, LeaseFiles(Files(), self.root)
        ram = RamTier(self.ram * SIZE)
        self.store = SnapshotStore(ram, identity=("m",), granularity=self.g, disk=disk, policy_name="lru")
        self.store.on_damage = self.told.append

    def close(self):
        if self.store:
            self.store.flush()
            self.store.check_integrity()
            self.store.close()
        if self.disk:
            self.disk.close()

    def found(self, what, *, want_logits=True):
        """What a turn reads, without reading it."""
        held = self.store.hold(what, want_logits=want_logits, uses=False)
        self.store.release(held)
        return held.n_tokens, held.tier

    def read(self, what, *, want_logits=True):
        """How much is restored, into stream 1."""
        held = self.store.hold(what, want_logits=want_logits)
        self.model.forget(1, 0, -1)
        n = self.store.restore(held, self.model, 1)
        self.store.release(held)
        return n

    def lease(self, what, pin):
        """A cache object is made: computed, pinned, made durable. The fault, if there was one."""
        prefill(self.store, self.model, what)
        self.store.save(what, what.n_tokens, self.model, 0, spend=True, pin=pin)
        faults = []
        self.store.make_durable(pin, faults.append)
        self.store.flush()
        (fault,) = faults
        return fault


@pytest.fixture
def rig_of(tmp_path):
    made = []

    def rig(**options):
        made.append(Rig(tmp_path / str(len(made)), **options))
        return made[-1]

    yield rig
    for one in made:
        one.close()


@pytest.fixture
def rig(rig_of):
    return rig_of()


@pytest.mark.parametrize(
    "n, marks, g, expected",
    [
        (100, (), 8, (96,)),
        (97, (), 8, (88,)),  # two tokens are evaluated, so 96 is too far
        (98, (), 8, (96,)),
        (100, (50,), 8, (50, 98)),  # a piece begins at 50
        (100, (30, 50), 8, (50, 98)),
        (100, (48,), 8, (48, 96)),
        (100, (100,), 8, (100,)),  # an object: kept for others, to its last token
        (50, (100,), 8, (48,)),
        (100, (), 1, (98,)),
        (100, (97,), 1, (97,)),  # 98 would be a single row behind it
        (100, (99,), 1, (98,)),  # 100 would be
        (1, (1,), 1, ()),
        (2, (), 8, ()),
        (5, (3,), 8, (3,)),
        (7, (), 8, ()),
    ],
)
def test_prefill_stops_at_the_last_mark_and_before_the_end(n, marks, g, expected):
    what = prompt(n, marks=marks)
    assert snapshot_points(what, pieces(n, marks, g), g) == expected


@pytest.mark.parametrize("g", [1, 8, 64])
@pytest.mark.parametrize("n", [1, 2, 3, 64, 65, 66, 129, 300])
@pytest.mark.parametrize("rows_max", [2, 7, 64, 512])
def test_stopping_at_the_points_changes_no_bits(rig_of, g, n, rows_max):
    rig = rig_of(g=g)
    for marks in [(), (n,), (n // 2 or 1,), (max(1, n - 1),), (max(1, n // 3), max(1, n - 2))]:
        what = prompt(n, marks=sorted(set(marks)))
        parts, pos = rig.store.pieces(what), 0
        rig.model.forget(2, 0, -1)
        while pos < n:
            rows = next_rows(pos, parts, g, 512)
            rig.model.evaluate(2, what.tokens[pos : pos + rows], pos, want_logits=True)
            pos += rows
        cold = rig.model.logits(-1).copy()
        stops = prefill(rig.store, rig.model, what, rows_max=rows_max)
        assert np.array_equal(rig.model.logits(-1), cold)
        assert stops == list(rig.store.snapshot_points(what))
        assert all(storable(at, parts, g) == at == usable(at, parts, g, want_logits=False) for at in stops)


@pytest.mark.parametrize("g", [1, 8, 64])
def test_a_restored_turn_goes_on_with_the_same_bits(rig_of, g):
    rig = rig_of(g=g)
    what = prompt(300, marks=(177,))
    prefill(rig.store, rig.model, what)
    cold = rig.model.logits(-1).copy()
    n = rig.read(what)
    assert 300 - 2 - g < n <= 298
    prefill(rig.store, rig.model, what, stream=1, start=n)
    assert np.array_equal(rig.model.logits(-1), cold)


def test_nothing_is_found_before_or_for_others(rig):
    assert rig.found(prompt(100)) == (0, None)
    prefill(rig.store, rig.model, prompt(100))
    assert rig.found(prompt(100)) == (96, "host")
    assert rig.found(prompt(100, tenant="b")) == (0, None)
    assert rig.found(prompt(100, seed=1)) == (0, None)
    assert rig.found(prompt(100, fork=95)) == (0, None)
    assert rig.found(prompt(97)) == (0, None)  # two tokens at least are evaluated
    assert rig.found(prompt(97), want_logits=False) == (96, "host")


def test_marks_are_part_of_what_a_prompt_is(rig):
    prefill(rig.store, rig.model, prompt(200, marks=(50,)))
    assert rig.found(prompt(200, marks=(50,))) == (194, "host")
    assert rig.found(prompt(200)) == (0, None)  # 50 is no place where its bits are shared
    assert rig.found(prompt(210, marks=(50, 190))) == (50, "host")  # 194 lies in another piece
    prefill(rig.store, rig.model, prompt(200))
    assert rig.found(prompt(200)) == (192, "host")
    assert rig.found(prompt(200, marks=(50,))) == (194, "host")
    assert rig.found(prompt(200, marks=(48,))) == (192, "host")  # a regular mark changes no bits


def test_the_same_tokens_cut_otherwise_before_the_same_place_are_others(rig):
    cut = prompt(200, marks=(50, 64))  # 64 is a place in both, but 50 to 63 were evaluated by themselves here
    prefill(rig.store, rig.model, cut)
    assert rig.found(prompt(150, marks=(50, 64))) == (64, "host")
    assert rig.found(prompt(150, marks=(64,))) == (0, None)
    assert rig.found(prompt(150)) == (0, None)


def test_no_single_row_is_left_to_evaluate(rig_of):
    rig = rig_of(g=1)
    prefill(rig.store, rig.model, prompt(101))
    assert rig.found(prompt(101), want_logits=False) == (99, "host")
    assert rig.found(prompt(100), want_logits=False) == (0, None)
    assert rig.found(prompt(99), want_logits=False) == (99, "host")


def test_a_stream_that_stands_elsewhere_is_never_taken(rig):
    what = prompt(96)  # its end is a place where bits are shared, but its turn decoded on from there
    prefill(rig.store, rig.model, what, saves=False)
    rig.model.evaluate(0, prompt(3).tokens, 96, want_logits=True)
    assert rig.store.save(what, 96, rig.model, 0, spend=True, pin=None) == 0
    assert rig.found(prompt(200)) == (0, None)
    with pytest.raises(ModelFault, match="nothing was kept of 96 tokens, and the stream holds 99"):
        rig.store.save(what, 96, rig.model, 0, spend=True, pin="x")
    assert rig.store.pins == ()


def test_what_is_in_the_middle_of_a_ubatch_is_not_taken(rig):
    what = prompt(100)
    prefill(rig.store, rig.model, what, saves=False)
    assert rig.store.save(what, 100, rig.model, 0, spend=True, pin=None) == 0


def test_a_turn_cut_short_keeps_what_it_evaluated(rig):
    what = prompt(100)
    rig.model.evaluate(0, what.tokens[:64], 0, want_logits=False)
    assert rig.store.save(what, 64, rig.model, 0, spend=True, pin=None) == 64
    assert rig.store.save(what, 64, rig.model, 0, spend=True, pin=None) == 0
    assert rig.read(what) == 64


def test_missing_is_what_prefill_will_have_saved(rig):
    what = prompt(300, marks=(100,))
    assert rig.store.snapshot_points(what) == (100, 292)
    assert [rig.store.n_missing(what, n) for n in (0, 99, 100, 291, 292, 300)] == [0, 0, 100, 100, 292, 292]
    prefill(rig.store, rig.model, prompt(150, marks=(100,)))
    assert [rig.store.n_missing(what, n) for n in (99, 100, 200, 300)] == [0, 0, 0, 292 - 148]
    prefill(rig.store, rig.model, what)
    assert rig.store.n_missing(what, 300) == 0


def test_the_longer_one_of_a_conversation_makes_the_shorter_go_first(rig_of):
    rig = rig_of(ram=3)
    other, shared = prompt(80, seed=1), prompt(400, marks=(80,))
    prefill(rig.store, rig.model, other)
    prefill(rig.store, rig.model, prompt(100))
    prefill(rig.store, rig.model, prompt(200))
    prefill(rig.store, rig.model, prompt(80, seed=3))  # something has to go: not the oldest, the superfluous
    assert rig.found(other)[0] == 72
    assert rig.found(prompt(200))[0] == 192
    assert rig.found(prompt(100))[0] == 0
    assert rig.store.snapshot_points(shared) == (80, 392)


def test_what_ends_at_a_mark_or_is_hit_again_is_not_superfluous(rig_of):
    rig = rig_of(ram=4)
    prefill(rig.store, rig.model, prompt(100, marks=(56,)))  # 56 and 96
    prefill(rig.store, rig.model, prompt(200, marks=(56,)))  # 192 makes 96 superfluous, not 56
    assert rig.read(prompt(100, marks=(56,))) == 96  # but it is used again
    prefill(rig.store, rig.model, prompt(80, seed=3))
    prefill(rig.store, rig.model, prompt(80, seed=4))  # by now the oldest goes
    assert rig.found(prompt(100, marks=(56,)))[0] == 96
    assert rig.found(prompt(70, marks=(56,)))[0] == 0


def test_the_budget_is_kept_and_accounted_for(rig_of):
    rig = rig_of(ram=3)
    for seed in range(6):
        prefill(rig.store, rig.model, prompt(100, seed=seed))
        rig.store.check_integrity()
        assert rig.store.bytes_resident <= rig.store.bytes_total == 3 * SIZE
    assert rig.store.bytes_resident == 3 * SIZE
    assert rig.store.status().n_evicted_host == 3
    rig.store.limit_host(SIZE)
    assert rig.store.bytes_resident == rig.store.bytes_total == SIZE
    assert rig.store.bytes_configured == 3 * SIZE
    assert rig.found(prompt(100, seed=5))[0] == 96
    rig.store.limit_host(1000 * SIZE)
    assert rig.store.bytes_total == 3 * SIZE


def test_what_is_held_stays(rig_of):
    rig = rig_of(ram=2)
    prefill(rig.store, rig.model, prompt(100))
    held = rig.store.hold(prompt(100), want_logits=True)
    for seed in range(1, 5):
        prefill(rig.store, rig.model, prompt(100, seed=seed))
    rig.model.forget(1, 0, -1)
    assert rig.store.restore(held, rig.model, 1) == 96
    rig.store.release(held)
    prefill(rig.store, rig.model, prompt(100, seed=9))
    prefill(rig.store, rig.model, prompt(100, seed=10))
    assert rig.found(prompt(100))[0] == 0


def test_a_pinned_one_stays_until_it_is_given_back(rig_of):
    rig = rig_of(ram=2)
    what = prompt(50, marks=(50,))
    assert rig.lease(what, "x") is None
    assert rig.store.bytes_pinned == SIZE
    for seed in range(1, 4):
        prefill(rig.store, rig.model, prompt(100, seed=seed))
    assert rig.found(prompt(100, marks=(50,)))[0] == 50
    rig.store.unpin("x")
    rig.store.unpin("x")
    assert rig.store.bytes_pinned == 0
    for seed in range(4, 6):
        prefill(rig.store, rig.model, prompt(100, seed=seed))
    assert rig.found(prompt(100, marks=(50,)))[0] == 0


def test_no_room_is_said_before_anything_goes(rig_of):
    rig = rig_of(ram=2)
    rig.lease(prompt(50, marks=(50,)), "x")
    rig.lease(prompt(50, marks=(50,), seed=1), "y")
    what = prompt(50, marks=(50,), seed=2)
    with pytest.raises(NoRoom, match="needs 24 bytes, 0 can be freed"):
        rig.store.check_room(what)
    with pytest.raises(NoRoom):
        rig.lease(what, "z")
    assert rig.store.pins == ("x", "y")
    rig.store.check_room(prompt(50, marks=(50,)))  # it is there
    assert rig.lease(prompt(50, marks=(50,)), "z") is None  # the same text for another object
    rig.store.unpin("x")
    assert rig.found(prompt(100, marks=(50,)))[0] == 50


def test_a_lease_outlives_the_process(rig_of):
    rig = rig_of(disk=1 << 20)
    what = prompt(50, marks=(50,))
    assert rig.lease(what, "x") is None
    prefill(rig.store, rig.model, prompt(100, seed=1))
    cold = prompt(120, marks=(50,))
    prefill(rig.store, rig.model, cold, saves=False)
    logits = rig.model.logits(-1).copy()
    rig.restart()
    assert rig.store.pins == ("x",)
    assert rig.found(prompt(100, seed=1))[0] == 0  # nobody asked twice for that
    assert rig.found(cold) == (50, "disk")
    assert rig.read(cold) == 50
    prefill(rig.store, rig.model, cold, stream=1, start=50, saves=False)
    assert np.array_equal(rig.model.logits(-1), logits)
    assert rig.found(cold)[1] == "host"  # it was brought into RAM
    rig.store.unpin("x")
    rig.restart()
    assert rig.store.pins == ()
    assert rig.found(cold)[0] == 50  # may be evicted now, but was not


def test_a_leased_one_may_leave_ram_when_it_is_on_disk(rig_of):
    rig = rig_of(ram=1, disk=1 << 20)
    assert rig.lease(prompt(50, marks=(50,)), "x") is None
    assert rig.store.bytes_pinned == 0
    prefill(rig.store, rig.model, prompt(100, seed=1))
    assert rig.found(prompt(100, seed=1)) == (96, "host")
    assert rig.read(prompt(100, marks=(50,))) == 50


def test_what_is_hit_twice_is_written_and_what_is_not_is_not(rig_of):
    rig = rig_of(disk=1 << 20)
    prefill(rig.store, rig.model, prompt(100))
    prefill(rig.store, rig.model, prompt(100, seed=1))
    assert rig.read(prompt(100)) == 96
    assert rig.read(prompt(100)) == 96
    assert rig.read(prompt(100, seed=1)) == 96
    rig.found(prompt(100, seed=1))  # looking is no use of it
    rig.restart()
    assert rig.found(prompt(100)) == (96, "disk")
    assert rig.found(prompt(100, seed=1)) == (0, None)


def test_a_disk_that_is_full_of_leases_takes_no_more(rig_of):
    rig = rig_of(disk=2 * 4096 + 1000)  # a file takes a page for its head and its bytes
    assert rig.lease(prompt(50, marks=(50,)), "x") is None
    refused = None
    for seed in range(1, 6):
        try:
            fault = rig.lease(prompt(50, marks=(50,), seed=seed), f"y{seed}")
        except NoRoom as exc:
            fault = exc
        refused = refused or fault
    assert refused is not None
    assert rig.found(prompt(100, marks=(50,)))[0] == 50
    assert rig.disk.bytes_used <= rig.disk.bytes_total


def test_the_disk_evicts_what_is_not_leased(rig_of):
    rig = rig_of(disk=3 * 4096)
    for seed in range(5):
        prefill(rig.store, rig.model, prompt(100, seed=seed))
        rig.read(prompt(100, seed=seed))
        rig.read(prompt(100, seed=seed))
        rig.store.flush()
        assert rig.disk.bytes_used <= rig.disk.bytes_total
    assert rig.store.status().n_evicted_disk > 0
    rig.restart()
    assert rig.found(prompt(100, seed=4))[0] == 96
    assert rig.found(prompt(100, seed=0))[0] == 0


def test_a_damaged_one_is_missing_and_its_lease_is_told(rig_of):
    rig = rig_of(disk=1 << 20)
    what = prompt(50, marks=(50,))
    rig.lease(what, "x")
    rig.restart()
    (file,) = (rig.root / "blocks").iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert rig.read(prompt(100, marks=(50,))) == 0
    rig.store.flush()
    assert rig.told == ["x"]
    assert rig.found(prompt(100, marks=(50,))) == (0, None)
    assert rig.store.status().damaged == {"flipped": 1}
    assert rig.lease(what, "x") is None  # computed again, under the same pin
    rig.restart()
    assert rig.store.pins == ("x",)
    assert rig.read(prompt(100, marks=(50,))) == 50


def test_a_lease_whose_file_is_gone_is_given_up_at_the_start(rig_of):
    rig = rig_of(disk=1 << 20)
    rig.lease(prompt(50, marks=(50,)), "x")
    (file,) = (rig.root / "blocks").iterdir()
    file.unlink()
    rig.restart()
    assert rig.store.pins == ()
    rig.restart()
    assert rig.store.pins == ()


def test_the_status_adds_up(rig_of):
    rig = rig_of(disk=1 << 20)
    rig.lease(prompt(50, marks=(50,)), "x")
    prefill(rig.store, rig.model, prompt(100, seed=1))
    rig.read(prompt(100, seed=1))
    rig.read(prompt(100, seed=2))
    status = rig.store.status()
    assert [pool.name for pool in status.pools] == ["host", "disk"]
    for pool in status.pools:
        assert pool.bytes_free + pool.bytes_resident + pool.bytes_leased == pool.bytes_total
    assert [pool.n_blocks for pool in status.pools] == [2, 1]
    assert (status.n_leases, status.n_hits_host, status.n_misses, status.n_written) == (1, 1, 1, 1)
    assert status.pools[1].bytes_leased > 0 == status.pools[0].bytes_leased


def test_ids_are_used_again_and_the_index_forgets_what_lies_nowhere():
    index = SnapshotIndex(policy("lru", 10), policy("lru", 10))
    what = prompt(64)
    first = index.new(b"r", what.tokens, pieces(64, (), 8), 64, 24, at_mark=False, now_s=0.0)
    index.check_integrity()
    index.unlock(first, 0.0)  # it never came to lie anywhere
    assert len(index) == 0
    second = index.new(b"r", what.tokens, pieces(64, (), 8), 56, 24, at_mark=False, now_s=0.0)
    assert second.id == first.id
    index.put(second, 0.0, in_ram=True)
    index.unlock(second, 0.0)
    index.check_integrity()
    assert index.ram_victim(0.0) is second
    assert index.disk_victim(0.0) is None
