"""Large buffers without a page fault in the hot path.

A page fault costs about 12 µs on the machines measured: 350 ms for the state of 5,120 tokens (docs/decisions/0004). So
buffers are mapped once, in huge pages where the kernel gives them, and used again.
"""

import mmap

import numpy as np
from numpy.typing import NDArray


def arena(n_bytes: int) -> NDArray[np.uint8]:
    """Anonymous memory of at least `n_bytes`; pages come when first written."""
    area = mmap.mmap(-1, max(n_bytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(area, np.uint8)


def release(buffer: NDArray[np.uint8], start: int, end: int) -> None:
    """Give the whole pages within bytes start..end-1 of an arena back to the system; they read as zeros from then on."""
    base: object = buffer.base
    area = base.obj if isinstance(base, memoryview) else base
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if isinstance(area, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") and last > first:
        area.madvise(mmap.MADV_DONTNEED, first, last - first)


def touched(n_bytes: int) -> NDArray[np.uint8]:
    """Like `arena`, with every page written once."""
    buffer = arena(n_bytes)
    buffer[:: mmap.PAGESIZE] = 0
    return buffer
