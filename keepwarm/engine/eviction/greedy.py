"""Greedy-dual values, until the index speaks `Policy`. Pure.

The same rule as the first version of `cost`, behind the methods that the prefix index calls today.
"""

import heapq
from collections.abc import Set as AbstractSet

DEPTH_COST = 1.0 / 4096  # prefill time per token doubles over about 4,096 tokens (413 against 1,140 tokens/s at 512)


class GreedyDual:
    """Values of blocks by id. The caller says which ids may go, and offers each one when it becomes one that may."""

    def __init__(self) -> None:
        self._age = 0.0
        self._value: dict[int, float] = {}
        self._hits: dict[int, int] = {}
        self._heap: list[tuple[float, int]] = []  # offers; stale ones are dropped when met

    def __len__(self) -> int:
        return len(self._value)

    def touch(self, block: int, depth: int) -> None:
        """Block `block`, which begins at token `depth`, was stored or hit."""
        hits = self._hits[block] = self._hits.get(block, 0) + 1
        self._value[block] = self._age + hits * (1.0 + depth * DEPTH_COST)
        self.offer(block)

    def offer(self, block: int) -> None:
        """The block may go from now on (a child, lock or pin less)."""
        heapq.heappush(self._heap, (self._value[block], block))
        if len(self._heap) > 4 * len(self._value) + 64:  # stale offers stay in a bounded proportion
            self._heap = [(value, known) for known, value in self._value.items()]
            heapq.heapify(self._heap)

    def forget(self, block: int) -> None:
        """The block is gone."""
        del self._value[block], self._hits[block]

    def victim(self, evictable: AbstractSet[int]) -> int | None:
        """The cheapest of `evictable` to lose, or None. The caller then removes it and calls `forget`."""
        while self._heap:
            value, block = heapq.heappop(self._heap)
            if self._value.get(block) == value and block in evictable:
                self._age = max(self._age, value)
                return block
        return None
