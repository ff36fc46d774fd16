"""Leases on disk: what was told durable is found again, after any fault and any power cut."""

import errno

import msgspec
import pytest
import xxhash

from keepwarm.engine import leasefile
from keepwarm.engine.files import Files
from keepwarm.engine.leasefile import LeaseFiles
from keepwarm.engine.tiers import Damage, TierFault, TierFull
from tests.faults import Crash, FaultyFiles

KEYS = tuple(bytes([n]) * 32 for n in range(5))


def names(root):
    return sorted(path.name for path in (root / "leases").iterdir())


def test_a_lease_comes_back_as_it_was(tmp_path):
    leases = LeaseFiles(Files(), tmp_path)
    written = {"pin-1": KEYS, "pin-2": KEYS[:1], "": (), "../../a/b\x00ü": KEYS[2:]}
    for pin_id, keys in written.items():
        leases.write(pin_id, keys)
    assert dict(LeaseFiles(Files(), tmp_path).all()) == written
    assert all(len(name) == 64 + len(".lease") for name in names(tmp_path))
    assert (tmp_path / "leases").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "leases").iterdir()} == {0o600}


def test_writing_again_replaces(tmp_path):
    leases = LeaseFiles(Files(), tmp_path)
    leases.write("pin", KEYS)
    leases.write("pin", KEYS[:2])
    assert leases.all() == [("pin", KEYS[:2])]


def test_deleting(tmp_path):
    leases = LeaseFiles(Files(), tmp_path)
    leases.write("pin", KEYS)
    leases.delete("pin")
    leases.delete("pin")
    assert leases.all() == []


def test_every_flipped_bit_and_every_cut_is_seen(tmp_path):
    content = bytearray(leasefile.encode("pin", KEYS))
    for at in range(len(content)):
        content[at] ^= 1 << at % 8
        assert leasefile.decode(bytes(content)) is Damage.FLIPPED
        content[at] ^= 1 << at % 8
        assert isinstance(leasefile.decode(bytes(content[:at])), Damage)
    assert leasefile.decode(bytes(content)) == ("pin", KEYS)


@pytest.mark.parametrize("body", [(2, "pin", []), (1, "pin"), (1, 5, []), "x"])
def test_another_versions_lease_is_stale(body):
    packed = msgspec.msgpack.encode(body)
    assert leasefile.decode(xxhash.xxh3_64_intdigest(packed).to_bytes(8, "little") + packed) is Damage.STALE


def test_what_is_damaged_is_deleted_and_counted(tmp_path):
    leases = LeaseFiles(Files(), tmp_path)
    for pin_id in ("a", "b", "c"):
        leases.write(pin_id, KEYS)
    paths = sorted((tmp_path / "leases").iterdir())
    paths[0].write_bytes(paths[0].read_bytes()[:-1])
    paths[1].rename(tmp_path / "leases" / ("0" * 64 + ".lease"))
    (tmp_path / "leases" / "x.1.2.tmp").write_bytes(b"half")
    (tmp_path / "leases" / "notes.txt").write_bytes(b"mine")
    (tmp_path / "leases" / "empty.lease").touch()
    assert len(leases.all()) == 1
    assert leases.damaged == {Damage.FLIPPED: 1, Damage.FOREIGN: 2, Damage.TORN: 1, Damage.TRUNCATED: 1}
    assert names(tmp_path) == [paths[2].name]


def test_a_lease_that_cannot_be_read_is_counted(tmp_path):
    files = FaultyFiles()
    leases = LeaseFiles(files, tmp_path)
    leases.write("pin", KEYS)
    files.faults["read", 1] = errno.EIO
    assert leases.all() == []
    assert leases.damaged == {Damage.UNREADABLE: 1}


@pytest.mark.parametrize("code, raised", [(errno.EIO, TierFault), (errno.ENOSPC, TierFull), (errno.EDQUOT, TierFull)])
@pytest.mark.parametrize("operation", ["create", "write", "sync", "close", "rename"])
def test_a_fault_leaves_the_lease_before(tmp_path, operation, code, raised):
    LeaseFiles(Files(), tmp_path).write("pin", KEYS)
    before = names(tmp_path)
    leases = LeaseFiles(FaultyFiles({(operation, 1): code}), tmp_path)
    with pytest.raises(raised):
        leases.write("pin", KEYS[:1])
    assert names(tmp_path) == before
    assert leases.all() == [("pin", KEYS)]
    leases.write("pin", KEYS[:1])
    assert leases.all() == [("pin", KEYS[:1])]


def test_faults_of_the_directory(tmp_path):
    files = FaultyFiles({("sync_dir", 1): errno.EIO, ("unlink", 1): errno.EIO, ("unlink", 2): errno.EIO})
    leases = LeaseFiles(files, tmp_path)
    with pytest.raises(TierFault):
        leases.write("pin", KEYS)
    assert leases.all() == [("pin", KEYS)]  # not known to be durable; whoever wanted it deletes it
    with pytest.raises(TierFault):
        leases.delete("other")
    with pytest.raises(TierFault):
        LeaseFiles(FaultyFiles({("names", 1): errno.EIO}), tmp_path).all()
    with pytest.raises(TierFault):
        LeaseFiles(FaultyFiles({("make_dir", 1): errno.EACCES}), tmp_path)


@pytest.mark.parametrize("lose", [False, True], ids=["all reached the disk", "only what was synced"])
@pytest.mark.parametrize("stop_after", range(1, 12))
def test_a_power_cut_leaves_the_lease_before_or_the_one_after(tmp_path, stop_after, lose):
    before = LeaseFiles(Files(), tmp_path)
    before.write("kept", KEYS)
    before.write("changed", KEYS)
    before.write("gone", KEYS)
    files = FaultyFiles(stop_after=stop_after)
    done = []

    def run():
        leases = LeaseFiles(files, tmp_path)
        leases.write("changed", KEYS[:1])
        done.append("changed")
        leases.delete("gone")
        done.append("gone")
        leases.all()

    with pytest.raises(Crash):
        run()
    if lose:
        files.lose_unsynced()
    after = LeaseFiles(Files(), tmp_path)
    found = dict(after.all())
    assert found["kept"] == KEYS
    assert found["changed"] in ((KEYS[:1],) if "changed" in done else (KEYS, KEYS[:1]))
    assert found.get("gone", KEYS) == KEYS
    assert "gone" not in done or "gone" not in found
    assert set(after.damaged) <= {Damage.TORN}
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]
