"""Buffers: as large as asked for, zero, writable, each its own."""

import mmap

import numpy as np
import pytest

from keepwarm.engine.memory import arena, touched


@pytest.mark.parametrize("make", [arena, touched])
@pytest.mark.parametrize("n_bytes", [0, 1, mmap.PAGESIZE, mmap.PAGESIZE + 1, 3_000_001])
def test_a_buffer_is_large_enough_zero_and_writable(make, n_bytes):
    buffer = make(n_bytes)
    assert buffer.dtype == np.uint8
    assert len(buffer) >= n_bytes
    assert not buffer.any()
    buffer[:] = 7
    assert (buffer == 7).all()


def test_two_buffers_share_nothing():
    one, other = arena(100), arena(100)
    one[:] = 1
    assert not other.any()
    assert not np.shares_memory(one, other)
