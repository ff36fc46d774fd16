"""The disk tier under faults: right bytes or an exception, nothing half-kept, exact accounts, whatever fails when."""

import errno
import os
import threading

import numpy as np
import pytest

from keepwarm.engine.disk import LOCK_ATTEMPTS, DirectoryLocked, DiskTier
from keepwarm.engine.files import Files, read_full, write_new
from keepwarm.engine.memory import arena
from keepwarm.engine.tiers import BlockLost, Damage, TierFault, TierFull
from tests.faults import SHORT, Crash, FaultyFiles, Flip, a_block, same_head

MODEL = bytes(range(32))
BLOCKS = [a_block(number) for number in range(3)]
OLD = [a_block(number) for number in (10, 11)]
COST = 4_096 + 8_192  # of each of them


@pytest.fixture
def open_tier(tmp_path):
    """Opens the directory's tier, closing the one before, and scans it."""
    opened = []

    def opens(files=None, *, bytes_total=1_000_000, fingerprint=MODEL):
        for tier in opened:
            tier.close()
        opened.append(
            DiskTier(tmp_path / "disk", bytes_total, fingerprint, files=files or FaultyFiles(), wait=lambda s: None)
        )
        opened[-1].found = list(opened[-1].heads())
        return opened[-1]

    yield opens
    for tier in opened:
        tier.close()


@pytest.fixture
def files_there(tmp_path):
    return lambda: sorted(path.name for path in (tmp_path / "disk" / "blocks").iterdir())


def path_of(tmp_path, head):
    return tmp_path / "disk" / "blocks" / f"{head.key.hex()}.kv"


def body_of(tier, head):
    into = np.empty(head.n_bytes, np.uint8)
    tier.read(head.key, into)
    return into


def holds(tier, blocks):
    """The tier has these blocks, right, and no others."""
    assert all(np.array_equal(body_of(tier, head), body) for head, body in blocks)
    assert tier.bytes_used == sum(tier.cost(head) for head, _ in blocks)
    assert {head.key for head in tier.heads()} == {head.key for head, _ in blocks}
    tier.check_integrity()
    return True


def damage_of(tier, head):
    with pytest.raises(BlockLost) as lost:
        body_of(tier, head)
    return lost.value.damage


# --- files


def test_files_are_for_nobody_else(open_tier, tmp_path):
    open_tier().write(BLOCKS)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "disk" / "blocks").iterdir()} == {0o600}
    assert (tmp_path / "disk").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "disk" / "blocks").stat().st_mode & 0o777 == 0o700


def test_blocks_outlive_the_process(open_tier):
    open_tier().write(BLOCKS)
    tier = open_tier()
    found = {head.key: head for head in tier.found}
    assert all(same_head(found[head.key], head) for head, _ in BLOCKS)
    assert holds(tier, BLOCKS)
    assert not tier.damaged


def test_a_budget_that_shrank_takes_nothing_new(open_tier):
    open_tier().write(BLOCKS)
    tier = open_tier(bytes_total=COST)
    assert len(tier.found) == 3
    assert tier.bytes_used == 3 * COST
    with pytest.raises(TierFull) as full:
        tier.write(OLD)
    assert full.value.n_bytes_free == 0
    for head, _ in BLOCKS:
        tier.delete(head.key)
    tier.write(OLD[:1])
    assert holds(tier, OLD[:1])


def test_one_sync_of_the_directory_a_batch(open_tier):
    files = FaultyFiles()
    open_tier(files).write(BLOCKS)
    assert (files.counts["sync_dir"], files.counts["sync"]) == (1, 3)


def test_a_scan_reads_no_body(open_tier):
    open_tier().write(BLOCKS)
    files = FaultyFiles()
    open_tier(files)
    assert files.counts["read"] == 3


def test_one_process_a_directory(tmp_path):
    waits = []
    one = DiskTier(tmp_path, 0, MODEL)
    with pytest.raises(DirectoryLocked, match="--data-dir") as locked:
        DiskTier(tmp_path, 0, MODEL, wait=waits.append)
    assert len(waits) == LOCK_ATTEMPTS - 1
    assert "\n" not in str(locked.value)
    other = DiskTier(tmp_path, 0, MODEL, wait=lambda s: one.close())
    other.close()
    other.close()


def test_a_directory_that_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TierFault):
        DiskTier(tmp_path / "file", 0, MODEL)


def test_short_writes_and_reads_are_gone_on_with(tmp_path):
    body = a_block(1)[1]
    files = FaultyFiles({("write", n): SHORT for n in range(1, 9)} | {("read", n): SHORT for n in range(1, 9)})
    write_new(files, tmp_path / "file", (body[:10], body[10:10], body[10:]))
    assert (tmp_path / "file").read_bytes() == body.tobytes()
    into = np.zeros(6_000, np.uint8)
    fd = files.open(tmp_path / "file")
    assert read_full(files, fd, (into[:100], into[100:100], into[100:]), 0) == 5_000
    files.close(fd)
    assert np.array_equal(into[:5_000], body)
    assert (files.counts["write"], files.counts["read"]) == (9, 4)


# --- what a scan finds


def test_what_a_scan_cannot_use_is_deleted_and_counted(open_tier, tmp_path, files_there):
    tier = open_tier()
    blocks = [a_block(number) for number in range(8)]
    tier.write(blocks)
    paths = [path_of(tmp_path, head) for head, _ in blocks]
    paths[0].write_bytes(paths[0].read_bytes()[:-1])
    paths[1].write_bytes(paths[1].read_bytes() + b"x")
    paths[2].write_bytes(b"")
    paths[3].write_bytes(paths[3].read_bytes()[:4_000])
    content = bytearray(paths[4].read_bytes())
    content[200] ^= 1
    paths[4].write_bytes(content)
    paths[5].write_bytes(b"something else " * 1_000)
    paths[6].replace(paths[6].with_name("0" * 64 + ".kv"))
    (paths[0].parent / f"{'1' * 64}.77.0.tmp").write_bytes(b"half a block")
    (paths[0].parent / "notes.txt").write_bytes(b"mine")
    (paths[0].parent / ("2" * 64 + ".kv")).write_bytes(bytes(20_000))
    tier = open_tier()
    assert tier.damaged == {Damage.TRUNCATED: 4, Damage.FLIPPED: 1, Damage.FOREIGN: 3, Damage.TORN: 2}
    assert files_there() == [paths[7].name]
    assert holds(tier, blocks[7:])


def test_another_models_blocks_are_stale(open_tier, files_there):
    open_tier().write(BLOCKS)
    tier = open_tier(fingerprint=bytes(32))
    assert tier.damaged == {Damage.STALE: 3}
    assert (tier.bytes_used, files_there()) == (0, [])


def test_long_headers(open_tier, tmp_path):
    block = a_block(1, n_tokens=5_000)
    open_tier().write([block])
    assert holds(open_tier(), [block])
    path = path_of(tmp_path, block[0])
    path.write_bytes(path.read_bytes()[:8_192])
    assert open_tier().damaged == {Damage.TRUNCATED: 1}


def test_what_the_system_will_not_remove_stays_counted_and_is_tried_again(open_tier, files_there):
    files = FaultyFiles()
    tier = open_tier(files)
    tier.write(BLOCKS)
    files.faults["unlink", 1] = errno.EIO
    tier.delete(BLOCKS[0][0].key)
    assert damage_of(tier, BLOCKS[0][0]) is None
    assert tier.bytes_used == 3 * COST
    assert len(files_there()) == 3
    tier.write([])
    assert tier.bytes_used == 2 * COST
    assert holds(tier, BLOCKS[1:])
    files.faults["unlink", files.counts["unlink"] + 1] = errno.EIO
    tier.delete(BLOCKS[1][0].key)
    files.faults["unlink", files.counts["unlink"] + 1] = errno.EIO
    tier.write([BLOCKS[1]])  # over the file that could not be removed
    assert holds(tier, BLOCKS[1:])


# --- faults of a write


@pytest.mark.parametrize("code, raised", [(errno.EIO, TierFault), (errno.ENOSPC, TierFull), (errno.EMFILE, TierFault)])
@pytest.mark.parametrize(
    "operation, nth", [(op, n) for op in ("create", "write", "sync", "close", "rename") for n in (1, 2, 3)] + [("sync_dir", 1)]
)  # fmt: skip
def test_a_write_that_fails_keeps_nothing(open_tier, files_there, operation, nth, code, raised):
    open_tier().write(OLD)
    files = FaultyFiles()
    tier = open_tier(files)
    before = files_there()
    files.faults[operation, files.counts[operation] + nth] = code
    with pytest.raises(raised):
        tier.write(BLOCKS)
    assert files_there() == before
    assert all(damage_of(tier, head) is None for head, _ in BLOCKS)
    assert holds(tier, OLD)
    tier.write(BLOCKS)
    assert holds(open_tier(), OLD + BLOCKS)


@pytest.mark.parametrize("operation, nth", [("write", 2), ("rename", 1), ("rename", 3), ("sync_dir", 1)])
@pytest.mark.parametrize("n_stuck", [1, 2, 3])
def test_a_write_that_fails_where_nothing_can_be_removed_either(open_tier, files_there, operation, nth, n_stuck):
    files = FaultyFiles({(operation, nth): errno.EIO} | {("unlink", n): errno.EROFS for n in range(1, n_stuck + 1)})
    tier = open_tier(files)
    with pytest.raises(TierFault):
        tier.write(BLOCKS)
    assert tier.bytes_used == COST * len(files_there())
    assert all(damage_of(tier, head) is None for head, _ in BLOCKS)
    files.faults.clear()
    tier.write(OLD)
    assert holds(tier, OLD)
    assert len(files_there()) == 2


def test_a_full_device_tells_what_it_has(open_tier):
    files = FaultyFiles({("write", 1): errno.ENOSPC, ("write", 2): errno.ENOSPC, ("free_bytes", 2): errno.EIO})
    tier = open_tier(files)
    with pytest.raises(TierFull) as full:
        tier.write(BLOCKS)
    assert full.value.n_bytes_needed == 3 * COST
    assert full.value.n_bytes_free > 0
    with pytest.raises(TierFull) as full:
        tier.write(BLOCKS)
    assert full.value.n_bytes_free == 0


def test_readers_are_not_kept_waiting_by_a_slow_write(open_tier):
    """The disk stands still in the middle of a write; a block that is there is read meanwhile."""
    writing, go_on = threading.Event(), threading.Event()
    files = FaultyFiles()
    tier = open_tier(files)
    tier.write(OLD)

    def stand_still():
        if threading.current_thread().name == "writer":
            writing.set()
            assert go_on.wait(60)

    files._wait = stand_still
    writer = threading.Thread(target=tier.write, args=(BLOCKS,), name="writer")
    writer.start()
    assert writing.wait(60)
    assert all(np.array_equal(body_of(tier, head), body) for head, body in OLD)
    assert tier.bytes_used == 5 * COST  # reserved
    with pytest.raises(BlockLost):
        body_of(tier, BLOCKS[0][0])
    go_on.set()
    writer.join()
    assert holds(tier, OLD + BLOCKS)


# --- faults of a read


@pytest.mark.parametrize("operation", ["open", "read", "size", "close"])
def test_a_block_that_cannot_be_read_is_deleted(open_tier, files_there, operation):
    files = FaultyFiles()
    tier = open_tier(files)
    tier.write(BLOCKS)
    files.faults[operation, files.counts[operation] + 1] = errno.EIO
    assert damage_of(tier, BLOCKS[0][0]) is Damage.UNREADABLE
    assert tier.damaged == {Damage.UNREADABLE: 1}
    assert damage_of(tier, BLOCKS[0][0]) is None
    assert holds(tier, BLOCKS[1:])
    assert len(files_there()) == 2


@pytest.mark.parametrize(
    "at", [0, 8, 12, 16, 50, 90, 112, 120, 124, 128, 136, 150, 2_000, 4_095, *range(4_096, 9_096, 499)]
)
def test_a_bit_flipped_on_the_way_is_seen(open_tier, at):
    for operation in ("write", "read"):
        files = FaultyFiles()
        tier = open_tier(files)
        files.faults[operation, files.counts[operation] + 1] = Flip(at, at % 8)
        tier.write(BLOCKS[:1])
        assert isinstance(damage_of(tier, BLOCKS[0][0]), Damage)
        assert holds(tier, [])


@pytest.mark.parametrize(
    "fault, n_tokens",
    [({}, 8), ({}, 1_500), ({("open_direct", 1): errno.EINVAL}, 8), ({("read", 1): errno.EINVAL}, 8), ({("read", 1): SHORT}, 8)],
    ids=["as it should be", "long header", "file system without it", "device without it", "short"],
)  # fmt: skip
def test_reading_past_the_page_cache(open_tier, fault, n_tokens):
    head, body = a_block(1, 3 * 4_096, n_tokens)
    files = FaultyFiles()
    tier = open_tier(files)
    tier.write([(head, body)])
    files.cached = False
    files.counts.clear()
    files.faults = fault
    into = arena(head.n_bytes)
    tier.read(head.key, into)
    assert np.array_equal(into, body)
    assert files.counts["open_direct"] == 1
    assert files.counts["open"] + files.counts["open_direct"] == files.counts["close"] + (("open_direct", 1) in fault)


@pytest.mark.parametrize("fault, damage", [(errno.EIO, Damage.UNREADABLE), (Flip(5_000), Damage.FLIPPED)])
def test_faults_past_the_page_cache(open_tier, fault, damage):
    files = FaultyFiles()
    tier = open_tier(files)
    head, body = a_block(1, 3 * 4_096)
    tier.write([(head, body)])
    files.cached = False
    files.faults["read", 1] = fault
    with pytest.raises(BlockLost) as lost:
        tier.read(head.key, arena(head.n_bytes))
    assert lost.value.damage is damage
    assert files.counts["open_direct"] == 1
    assert holds(tier, [])


def test_every_header_byte_flipped_on_the_disk_is_seen(open_tier, tmp_path):
    tier = open_tier()
    head, body = a_block(1, 100)
    for at in [*range(400), *range(400, 4_096, 97), *range(4_088, 4_096)]:
        tier.write([(head, body)])
        with path_of(tmp_path, head).open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << at % 8]))
        if at % 2:
            assert isinstance(damage_of(tier, head), Damage), at
        else:
            assert list(tier.heads()) == [], at
        assert tier.bytes_used == 0
    assert not tier.damaged[Damage.UNREADABLE]


def test_a_whole_block_under_another_name_is_not_taken_for_it(open_tier, tmp_path):
    tier = open_tier()
    tier.write(BLOCKS)
    path_of(tmp_path, BLOCKS[0][0]).write_bytes(path_of(tmp_path, BLOCKS[1][0]).read_bytes())
    assert damage_of(tier, BLOCKS[0][0]) is Damage.FOREIGN
    assert holds(tier, BLOCKS[1:])


def test_files_that_others_changed(open_tier, tmp_path):
    tier = open_tier()
    tier.write(BLOCKS)
    path_of(tmp_path, BLOCKS[0][0]).unlink()
    os.truncate(path_of(tmp_path, BLOCKS[1][0]), 5_000)
    os.truncate(path_of(tmp_path, BLOCKS[2][0]), 20_000)
    assert [damage_of(tier, head) for head, _ in BLOCKS] == [None, Damage.TRUNCATED, Damage.TRUNCATED]
    assert holds(tier, [])
    assert tier.damaged == {Damage.TRUNCATED: 2}


def test_a_failed_read_does_not_delete_what_was_written_again_meanwhile(open_tier):
    files = FaultyFiles()
    tier = open_tier(files)
    head, body = BLOCKS[0]
    tier.write([(head, body)])
    reads, n_opened = [], files.counts["open"]

    def replaced_once():
        if files.counts["open"] > n_opened and not reads:
            reads.append(1)
            tier.delete(head.key)
            tier.write([(head, body)])

    files._wait = replaced_once
    files.faults["size", files.counts["size"] + 1] = errno.EIO
    assert damage_of(tier, head) is Damage.UNREADABLE
    assert not tier.damaged
    assert holds(tier, BLOCKS[:1])


# --- power cuts


@pytest.mark.parametrize("lose", [False, True], ids=["all reached the disk", "only what was synced"])
@pytest.mark.parametrize("stop_after", range(4, 40))
def test_a_power_cut_leaves_whole_blocks(open_tier, files_there, stop_after, lose):
    open_tier().write(OLD)
    files = FaultyFiles(stop_after=10_000)
    tier = open_tier(files)
    files.stop_after = files.n_operations + stop_after - 4
    durable = list(OLD)

    def run():
        tier.write(BLOCKS[:2])
        durable.extend(BLOCKS[:2])
        tier.write(BLOCKS[2:])
        durable.extend(BLOCKS[2:])
        while True:
            tier.delete(OLD[0][0].key)
            tier.write(OLD)

    with pytest.raises(Crash):
        run()
    os.close(tier._lock_fd)
    tier._lock_fd = None
    if lose:
        files.lose_unsynced()
    after = open_tier()
    known = {head.key: body for head, body in OLD + BLOCKS}
    assert all(np.array_equal(body_of(after, head), known[head.key]) for head in after.found)
    missing = {head.key for head, _ in durable} - {head.key for head in after.found}
    assert missing <= {OLD[0][0].key}
    assert OLD[0][0].key not in missing or len(durable) == 5  # only where it was deleted
    assert set(after.damaged) <= {Damage.TORN}
    assert after.bytes_used == COST * len(after.found) == COST * len(files_there())
    assert not [name for name in files_there() if name.endswith(".tmp")]


def test_real_files_do_what_the_faulty_ones_stand_for(tmp_path):
    files = Files()
    (tmp_path / "a").write_bytes(b"x")
    assert files.names(tmp_path) == ["a"]
    assert files.free_bytes(tmp_path) > 0
    with pytest.raises(FileExistsError):
        files.create(tmp_path / "a")
    files.unlink(tmp_path / "a")
    files.unlink(tmp_path / "a")
