"""What the tier in RAM does beside what every tier does (tests/conformance/test_tiers.py)."""

import numpy as np
import pytest

from keepwarm.engine.ram import RamTier
from keepwarm.engine.tiers import BlockLost
from tests.faults import a_block


def test_it_costs_what_the_bodies_take():
    tier = RamTier(10_000)
    tier.write([a_block(1, 10), a_block(2, 9_990)])
    assert tier.bytes_used == tier.bytes_total


def test_nothing_is_left_after_close():
    tier = RamTier(10_000)
    head, body = a_block(1)
    tier.write([(head, body)])
    tier.close()
    assert tier.bytes_used == 0
    with pytest.raises(BlockLost):
        tier.read(head.key, np.empty(head.n_bytes, np.uint8))
