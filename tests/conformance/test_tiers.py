"""What every tier by key promises, over RAM, real files, and files that come short and slow."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from keepwarm.engine.disk import DiskTier
from keepwarm.engine.ram import RamTier
from keepwarm.engine.tiers import BlockLost, TierFull
from tests.faults import FaultyFiles, a_block, same_head

TIERS = ("ram", "disk", "faulty")


@pytest.fixture(params=TIERS)
def tier_of(request, tmp_path):
    """Makes a tier of the kind under test for a budget in bytes."""
    opened = []

    def tier(bytes_total):
        if request.param == "ram":
            return RamTier(bytes_total)
        files = FaultyFiles(seed=1, wait=lambda: threading.Event().wait(0)) if request.param == "faulty" else None
        opened.append(DiskTier(tmp_path / str(len(opened)), bytes_total, bytes(32), files=files))
        return opened[-1]

    yield tier
    for one in opened:
        one.check_integrity()
        one.close()


def body_of(tier, head):
    into = np.empty(head.n_bytes, np.uint8)
    tier.read(head.key, into)
    return into


def is_lost(tier, head):
    with pytest.raises(BlockLost) as lost:
        tier.read(head.key, np.empty(head.n_bytes, np.uint8))
    assert lost.value.key == head.key
    return lost.value.damage is None


@pytest.mark.parametrize("n_bytes", [0, 1, 4_095, 4_096, 4_097, 300_000])
@pytest.mark.parametrize("n_tokens", [0, 1, 64, 5_000])
def test_a_block_comes_back_as_it_was(tier_of, n_bytes, n_tokens):
    tier = tier_of(1_000_000)
    head, body = a_block(1, n_bytes, n_tokens)
    tier.write([(head, body)])
    assert np.array_equal(body_of(tier, head), body)
    (found,) = tier.heads()
    assert same_head(found, head)
    assert np.array_equal(body_of(tier, head), body)
    assert tier.bytes_used == tier.cost(head) >= n_bytes


def test_what_was_never_written_is_missing(tier_of):
    tier = tier_of(1_000_000)
    head, _ = a_block(1)
    assert is_lost(tier, head)
    tier.delete(head.key)
    assert list(tier.heads()) == []
    assert tier.bytes_used == 0


def test_a_deleted_block_is_missing_and_its_bytes_are_free(tier_of):
    tier = tier_of(1_000_000)
    (head, body), (other, its_body) = a_block(1), a_block(2)
    tier.write([(head, body), (other, its_body)])
    tier.delete(head.key)
    assert is_lost(tier, head)
    assert tier.bytes_used == tier.cost(other)
    assert [found.key for found in tier.heads()] == [other.key]
    tier.write([(head, body)])
    assert np.array_equal(body_of(tier, head), body)
    assert np.array_equal(body_of(tier, other), its_body)


def test_a_block_that_is_there_is_skipped(tier_of):
    tier = tier_of(1_000_000)
    head, body = a_block(1)
    tier.write([(head, body)])
    tier.write([(head, body), a_block(2), a_block(2)])
    assert tier.bytes_used == tier.cost(head) + tier.cost(a_block(2)[0])
    assert np.array_equal(body_of(tier, head), body)


def test_skipped_blocks_need_no_room(tier_of):
    blocks = [a_block(1), a_block(2)]
    tier = tier_of(2 * 16_384)
    tier.bytes_total = sum(tier.cost(head) for head, _ in blocks)
    tier.write(blocks)
    tier.write(blocks)
    tier.write([])
    assert tier.bytes_used == tier.bytes_total


def test_the_budget_is_kept_to_the_byte(tier_of):
    tier = tier_of(0)
    cost = tier.cost(a_block(1)[0])
    tier.bytes_total = 2 * cost
    tier.write([a_block(1)])
    with pytest.raises(TierFull) as full:
        tier.write([a_block(2), a_block(3)])
    assert (full.value.n_bytes_needed, full.value.n_bytes_free) == (2 * cost, cost)
    assert is_lost(tier, a_block(2)[0])
    assert tier.bytes_used == cost
    tier.write([a_block(2)])
    assert tier.bytes_used == tier.bytes_total
    with pytest.raises(TierFull):
        tier.write([a_block(3)])


def test_a_block_larger_than_the_whole_budget(tier_of):
    tier = tier_of(20_000)
    with pytest.raises(TierFull):
        tier.write([a_block(1), a_block(2, 20_001)])
    assert tier.bytes_used == 0
    assert list(tier.heads()) == []
    tier.write([a_block(1)])
    assert np.array_equal(body_of(tier, a_block(1)[0]), a_block(1)[1])


def test_a_budget_of_nothing_holds_nothing(tier_of):
    tier = tier_of(0)
    with pytest.raises(TierFull):
        tier.write([a_block(1)])
    tier.write([])
    assert tier.bytes_used == 0


def test_later_changes_of_the_callers_memory_change_nothing(tier_of):
    tier = tier_of(1_000_000)
    head, body = a_block(1)
    mine = body.copy()
    tier.write([(head, mine)])
    mine[:] = 0
    into = body_of(tier, head)
    into[:] = 0
    assert np.array_equal(body_of(tier, head), body)


def test_writers_together_never_exceed_the_budget(tier_of):
    tier = tier_of(0)
    cost = tier.cost(a_block(1)[0])
    tier.bytes_total = 10 * cost
    most = []

    def write(number):
        try:
            tier.write([a_block(number)])
        except TierFull:
            return 0
        finally:
            most.append(tier.bytes_used)
        return 1

    with ThreadPoolExecutor(4) as pool:
        n_written = sum(pool.map(write, range(30)))
    assert n_written == 10
    assert max(most) <= tier.bytes_total == tier.bytes_used
    assert len(list(tier.heads())) == 10


def test_writers_of_the_same_block_store_it_once(tier_of):
    tier = tier_of(1_000_000)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: tier.write([a_block(1), a_block(2)]), range(8)))
    assert tier.bytes_used == sum(tier.cost(a_block(number)[0]) for number in (1, 2))


def test_readers_writers_and_deleters_together(tier_of):
    """A read gives the right bytes or says that the block is missing, whoever writes and deletes it meanwhile."""
    tier = tier_of(1_000_000)
    blocks = [a_block(number, 3_000) for number in range(6)]

    def work(seed):
        draw = np.random.default_rng(seed)
        for _ in range(40):
            head, body = blocks[draw.integers(len(blocks))]
            match draw.integers(3):
                case 0:
                    tier.write([(head, body)])
                case 1:
                    tier.delete(head.key)
                case _:
                    try:
                        assert np.array_equal(body_of(tier, head), body)
                    except BlockLost as lost:
                        if lost.damage is not None:
                            raise

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert tier.bytes_used == sum(tier.cost(head) for head in tier.heads())
