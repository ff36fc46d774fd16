"""The kill harness can fail: what a crash must not do is done by hand while the server is down, and the round says so."""

import itertools
import shutil
import sqlite3

import pytest

from keepwarm.core.clock import SystemClock
from tests.crash.plan import Victim, plan_round
from tests.crash.rounds import RoundFailed, opened

SEED = 7


def no_blocks(data_dir):
    for path in (data_dir / "store" / "blocks").iterdir():
        path.unlink()


def flipped_bodies(data_dir):
    for path in (data_dir / "store" / "blocks").glob("*.kv"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)


def no_leases(data_dir):
    shutil.rmtree(data_dir / "store" / "leases")


def no_objects(data_dir):
    with sqlite3.connect(next(data_dir.glob("*.db"))) as database:
        database.execute("DELETE FROM cache_objects")
    database.close()


SABOTAGES = (
    (no_blocks, "computed again after the restart"),
    (flipped_bodies, "damaged by a kill: flipped"),
    (no_leases, "computed again after the restart"),
    (no_objects, "acknowledged, and answered with 404"),
)


def numbers(victim):
    """Rounds with enough of a load before the kill, and no second one."""
    for number in itertools.count():
        plan = plan_round(SEED, number)
        if plan.victim is victim and plan.n_answers > 30 and plan.again_s is None:
            yield number


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_round_in_which_something_is_lost_fails_and_says_how_to_do_it_again(tmp_path):
    waiting = [sabotage for sabotage, _ in SABOTAGES]
    gateway_rounds = numbers(Victim.GATEWAY)
    with opened(SEED, tmp_path, SystemClock(), between=lambda data_dir: waiting.pop(0)(data_dir)) as run:
        run.round(next(numbers(Victim.ENGINE)))  # leaves objects to lose
        for _, said in SABOTAGES:
            number = next(gateway_rounds)
            with pytest.raises(RoundFailed, match=said) as failed:
                run.round(number)
            kept = tmp_path / f"failed-round-{number}"
            assert f"--seed {SEED} --only-round {number} --from {kept}" in str(failed.value)
            assert (kept / "keepwarm.db").is_file()
    assert not waiting
