"""Least recently used: the leaf that no turn has read or stored for longest goes.

The blocks of one turn are stamped in their order from the root; leaves only go, so a chain still leaves from its tail.
Here for comparison, and for whom a simple rule is worth more than hits.
"""

from array import array
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from keepwarm.engine.eviction.facts import BlockFacts
from keepwarm.engine.eviction.leaves import Leaves


class Lru:
    """Stamps by id, and the leaves in their order."""

    name = "lru"

    def __init__(self) -> None:
        self._stamps = array("q")
        self._leaves = Leaves(self._stamps)
        self._n_uses = 0
        self._n_blocks = 0

    def __len__(self) -> int:
        return self._n_blocks

    def stored(self, block: int, facts: BlockFacts, now_s: float) -> None:  # noqa: ARG002
        if block >= len(self._stamps):
            self._stamps.extend([0] * (block + 1 - len(self._stamps)))
        self._n_blocks += 1
        self._use(block)

    def hit(self, blocks: Sequence[int], now_s: float) -> None:  # noqa: ARG002
        for block in blocks:
            self._use(block)

    def offer(self, block: int) -> None:
        self._leaves.offer(block)

    def forget(self, block: int) -> None:  # noqa: ARG002
        self._n_blocks -= 1

    def victim(self, evictable: AbstractSet[int], now_s: float) -> int | None:  # noqa: ARG002
        return self._leaves.first(evictable)

    def _use(self, block: int) -> None:
        self._n_uses += 1
        self._stamps[block] = self._n_uses
