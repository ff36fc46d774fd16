"""Large buffers without a page fault in the hot path.

A page fault costs about 12 µs on the machines measured: 350 ms for the state of 5,120 tokens (docs/decisions/0004). So
buffers are mapped once, in huge pages where the kernel gives them, and used again.
"""

import mmap

import numpy as np
from numpy.typing import NDArray

POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14, for which Python has no name


def arena(n_bytes: int) -> NDArray[np.uint8]:
    """Anonymous memory of at least `n_bytes`; pages come when first written."""
    area = mmap.mmap(-1, max(n_bytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(area, np.uint8)


def populate(buffer: NDArray[np.uint8], start: int, end: int) -> None:
    """Fault in the pages of bytes start..end-1 of an arena, changing nothing: safe while another thread writes there.

    Where the kernel cannot, they come when they are first written.
    """
    area = _mapping(buffer)
    first, last = start // mmap.PAGESIZE * mmap.PAGESIZE, -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
    if area is not None:
        try:
            area.madvise(POPULATE_WRITE, first, min(last, len(area)) - first)
        except OSError:
            pass


def release(buffer: NDArray[np.uint8], start: int, end: int) -> None:
    """Give the whole pages within bytes start..end-1 of an arena back to the system; they read as zeros from then on."""
    area = _mapping(buffer)
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if area is not None and hasattr(mmap, "MADV_DONTNEED") and last > first:
        area.madvise(mmap.MADV_DONTNEED, first, last - first)


def _mapping(buffer: NDArray[np.uint8]) -> mmap.mmap | None:
    base: object = buffer.base
    area = base.obj if isinstance(base, memoryview) else base
    return area if isinstance(area, mmap.mmap) else None


def touched(n_bytes: int) -> NDArray[np.uint8]:
    """Like `arena`, with every page written once."""
    buffer = arena(n_bytes)
    buffer[:: mmap.PAGESIZE] = 0
    return buffer
