"""Leaves in the order of a stamp, with one entry per block however often it is offered.

An entry may be old: its block may have been stamped again, be no leaf for now, or be gone. That is found out when the
entry comes up, not when it happens, so a hit costs nothing here. Invariants: an entry's stamp is never above its block's,
and a block that was offered has an entry until that entry comes up while the block may not go.
"""

import heapq
from array import array
from collections.abc import Set as AbstractSet

ID_BITS = 32
ID_MASK = (1 << ID_BITS) - 1


class Leaves:
    """A queue of block ids; `stamps` is the owner's, by block id, and only grows for a block."""

    def __init__(self, stamps: "array[int]") -> None:
        self._stamps = stamps
        self._entries: list[int] = []  # (stamp, id) in one int: a third of a tuple's bytes
        self._queued = bytearray()  # by id: 1 when it has an entry

    def __len__(self) -> int:
        return len(self._entries)

    def offer(self, block: int) -> None:
        """Put the block in its place, if it has none."""
        if block >= len(self._queued):
            self._queued.extend(bytes(block + 1 - len(self._queued)))
        if not self._queued[block]:
            self._queued[block] = 1
            heapq.heappush(self._entries, self._stamps[block] << ID_BITS | block)

    def first(self, evictable: AbstractSet[int]) -> int | None:
        """The block of `evictable` with the smallest stamp among those offered, or None. It keeps its entry."""
        entries = self._entries
        while entries:
            block = entries[0] & ID_MASK
            if block not in evictable:
                self._queued[block] = 0
                heapq.heappop(entries)
                continue
            current = self._stamps[block] << ID_BITS | block
            if entries[0] == current:
                return block
            heapq.heapreplace(entries, current)
        return None

    def drop_first(self) -> None:
        """Take out what `first` returned."""
        self._queued[heapq.heappop(self._entries) & ID_MASK] = 0
