"""What every tier promises: slots of one size, each used once, never more than the budget. New tiers join `TIERS`."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.engine.tiers import HostTier

TIERS = {"host": HostTier}  # name: (budget_bytes, slot_bytes) -> Tier
SLOT_BYTES = 96


@pytest.fixture(params=sorted(TIERS))
def tier_of(request):
    """Makes a tier of the kind under test for a budget in bytes."""
    return lambda budget_bytes: TIERS[request.param](budget_bytes, SLOT_BYTES)


@pytest.mark.parametrize(
    "budget_bytes, n_slots",
    [(0, 0), (SLOT_BYTES - 1, 0), (SLOT_BYTES, 1), (5 * SLOT_BYTES, 5), (6 * SLOT_BYTES - 1, 5)],
)
def test_never_more_slots_than_the_budget(tier_of, budget_bytes, n_slots):
    tier = tier_of(budget_bytes)
    assert (tier.n_slots, tier.n_free, tier.slot_bytes) == (n_slots, n_slots, SLOT_BYTES)
    taken = [tier.take() for _ in range(n_slots)]
    assert len(set(taken)) == n_slots
    assert None not in taken
    assert tier.take() is None
    assert tier.n_free == 0
    tier.check_integrity()


def test_a_freed_slot_is_room_again(tier_of):
    tier = tier_of(2 * SLOT_BYTES)
    first, second = tier.take(), tier.take()
    tier.free(first)
    assert tier.n_free == 1
    assert tier.take() == first
    assert tier.take() is None
    tier.free(second)
    tier.free(first)
    assert tier.n_free == tier.n_slots == 2
    tier.check_integrity()


def test_a_slot_keeps_its_own_bytes(tier_of):
    tier = tier_of(4 * SLOT_BYTES)
    slots = [tier.take() for _ in range(4)]
    for i, slot in enumerate(slots):
        assert tier.bytes_of(slot).shape == (SLOT_BYTES,)
        tier.bytes_of(slot)[:] = i + 1
    tier.free(slots.pop(1))
    other = tier.take()
    tier.bytes_of(other)[:] = 99
    assert [set(tier.bytes_of(slot).tolist()) for slot in slots] == [{1}, {3}, {4}]
    assert set(tier.bytes_of(other).tolist()) == {99}


def test_a_slot_that_is_not_taken_can_be_neither_read_nor_freed(tier_of):
    tier = tier_of(3 * SLOT_BYTES)
    slot = tier.take()
    tier.free(slot)
    with pytest.raises(AssertionError):
        tier.free(slot)
    with pytest.raises(AssertionError):
        tier.bytes_of(slot)


def test_it_says_what_it_is_called(tier_of, request):
    assert tier_of(SLOT_BYTES).name == request.node.callspec.params["tier_of"]


@pytest.mark.parametrize("kind", sorted(TIERS))
@given(n_slots=st.integers(0, 6), wishes=st.lists(st.integers(-1, 9), max_size=60))
def test_any_order_of_taking_and_freeing_keeps_the_account(kind, n_slots, wishes):
    tier = TIERS[kind](n_slots * SLOT_BYTES, SLOT_BYTES)
    held = {}
    for mark, wish in enumerate(wishes):
        if wish < 0 or wish >= len(held):
            slot = tier.take()
            assert (slot is None) == (len(held) == n_slots)
            if slot is not None:
                assert slot not in held
                held[slot] = mark
                tier.bytes_of(slot)[:] = mark
        else:
            slot = sorted(held)[wish]
            del held[slot]
            tier.free(slot)
        assert tier.n_free == n_slots - len(held)
        assert all(np.all(tier.bytes_of(slot) == mark) for slot, mark in held.items())
        tier.check_integrity()


# --- memory of the host tier


def test_populating_changes_no_byte_and_uses_no_slot():
    tier = HostTier(8 * 4096, 4096)
    first = tier.take()
    tier.bytes_of(first)[:] = 7
    for _ in range(2):
        tier.populate(1 << 20)
    assert tier.n_used == 1
    assert (tier.bytes_of(first) == 7).all()
    assert [tier.take() for _ in range(7)] == list(range(1, 8))
    tier.populate(1 << 20)
    tier.check_integrity()


def test_pages_of_free_slots_go_back_and_come_again_empty():
    tier = HostTier(4 * 4096, 4096)
    slots = [tier.take() for _ in range(4)]
    for slot in slots:
        tier.bytes_of(slot)[:] = slot + 1
    tier.free(slots[1])
    tier.limit(3)
    tier.give_back()
    assert [tier.bytes_of(slot)[0] for slot in (0, 2, 3)] == [1, 3, 4]
    assert tier.take() is None
    tier.limit(4)
    assert tier.take() == 1
    assert not tier.bytes_of(1).any()  # the system had its page
    tier.check_integrity()
