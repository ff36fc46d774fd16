"""Each check of the kill harness sees what it is there to see."""

import msgspec
import pytest
from blake3 import blake3

from tests.crash.checks import damaged, left_over, object_violations, pool_violations, recomputed
from tests.crash.client import Reply
from tests.crash.ledger import Known, Ledger
from tests.crash.plan import KEYS, Act, Operation
from tests.crash.server import LogLine

NOW = 1000.0
READY = Known("cache-a", KEYS[0], 0, 3, 500, 2000, 2000, is_ready=True)
BODY = {"status": "ready", "tokens": 500, "expired_at": 2000}
POOL = {"name": "disk", "bytes_total": 12288, "bytes_free": 4096, "bytes_resident": 4096, "bytes_leased": 4096}


def known(**changes):
    return msgspec.structs.replace(READY, **changes)


def reply(code=200, **changes):
    return Reply(code, {}, BODY | changes)


@pytest.mark.parametrize(
    "entry, answer, now",
    [
        (READY, reply(), NOW),
        (known(is_ready=False), reply(status="pending"), NOW),
        (known(is_deleting=True), reply(404), NOW),
        (known(is_deleting=True), reply(), NOW),
        (known(is_deleting=True, is_deleted=True), reply(404), NOW),
        (READY, reply(status="inactive"), 2010.0),
        (READY, reply(status="inactive"), 2000.5),
        (known(expires_last=2100), reply(expired_at=2100), NOW),
    ],
)
def test_what_was_acknowledged_and_is_so_is_no_violation(entry, answer, now):
    assert not object_violations(entry, answer, now)


@pytest.mark.parametrize(
    "entry, answer, now, said",
    [
        (READY, reply(404), NOW, "acknowledged, and answered with 404"),
        (READY, reply(status="pending"), NOW, "acknowledged as ready, and pending"),
        (READY, reply(status="inactive"), NOW, "acknowledged as ready, and inactive"),
        (READY, reply(status="ready"), 2010.0, "ready after its end"),
        (READY, reply(expired_at=2100), NOW, "expires at 2100"),
        (READY, reply(tokens=499), NOW, "499 tokens"),
        (known(is_deleting=True, is_deleted=True), reply(), NOW, "deleted, and answered with 200"),
    ],
)
def test_what_was_acknowledged_and_is_not_so_is_a_violation(entry, answer, now, said):
    (found,) = object_violations(entry, answer, now)
    assert said in found


def test_only_a_computation_after_the_restart_is_one_too_many():
    before, ready, settled = LogLine("request"), LogLine("engine ready"), LogLine("cache object settled", "cache-a")
    assert not recomputed([before, settled, ready], [READY])
    assert not recomputed([ready, LogLine("cache object settled", "cache-b")], [READY])
    assert recomputed([before, ready, settled], [READY])
    assert recomputed([ready, LogLine("lease repaired", "cache-a")], [READY])


def test_books_that_do_not_add_up(tmp_path):
    blocks = tmp_path / "blocks"
    blocks.mkdir()
    (blocks / "one.kv").write_bytes(b"x" * 4097)
    assert not pool_violations([POOL], tmp_path, 12288)
    assert "is not 12,289" in pool_violations([POOL | {"bytes_total": 12289}], tmp_path, 12288)[0]
    assert "is not" in pool_violations([POOL | {"bytes_free": -4096, "bytes_resident": 12288}], tmp_path, 12288)[0]
    assert "of 8,191" in pool_violations([POOL], tmp_path, 8191)[0]
    (blocks / "two.kv").write_bytes(b"")
    assert not pool_violations([POOL], tmp_path, 12288)
    (blocks / "two.kv").write_bytes(b"x")
    assert "its files take 12,288" in pool_violations([POOL], tmp_path, 12288)[0]


def test_files_that_nobody_needs_and_leases_that_are_missing(tmp_path):
    blocks, leases = tmp_path / "blocks", tmp_path / "leases"
    blocks.mkdir()
    leases.mkdir()
    lease = leases / f"{blake3(b'cache-a').hexdigest()}.lease"
    lease.touch()
    assert not left_over(tmp_path, ["cache-a"])
    assert left_over(tmp_path, ["cache-a", "cache-b"]) == ["cache-b: ready, and its lease is not on disk"]
    assert left_over(tmp_path, [])[0].startswith("a lease of no ready object")
    (blocks / "k.1.2.tmp").touch()
    assert left_over(tmp_path, ["cache-a"]) == ["left over: blocks/k.1.2.tmp"]


def test_a_kill_tears_a_write_and_damages_nothing_else():
    assert not damaged({"torn": 3, "orphaned": 1, "flipped": 0})
    assert damaged({"torn": 3, "flipped": 1}) == ["1 blocks found damaged by a kill: flipped"]


def operation(act):
    return Operation(act, 0.0, 0, 0, 5)


def test_a_call_without_an_answer_widens_what_is_allowed():
    entry = known()
    ledger = Ledger([entry])
    ledger.reset_sent(entry, 10, NOW)
    assert entry.expires_first == 1010 and entry.expires_last == 2000 and entry.surely_live(NOW)
    assert not entry.surely_live(1009.5) and not entry.surely_expired(1500.0)
    ledger.told_expiry(entry, 1011)
    assert entry.surely_expired(1500.0)
    ledger.delete_sent(entry)
    assert not entry.surely_live(NOW) and ledger.pick(operation(Act.GET), KEYS[0], 0, NOW) is entry
    ledger.delete_acknowledged(entry)
    assert ledger.pick(operation(Act.GET), KEYS[0], 0, NOW) is None


def test_a_lifetime_is_reset_by_its_owner_alone_and_long_before_its_end():
    ledger = Ledger([known()])
    assert ledger.pick(operation(Act.RESET), KEYS[0], 0, NOW) is not None
    assert ledger.pick(operation(Act.RESET), KEYS[0], 2, NOW) is None
    assert ledger.pick(operation(Act.RESET), KEYS[0], 0, 1990.0) is None
    assert ledger.pick(operation(Act.GET), KEYS[1], 1, NOW) is None
