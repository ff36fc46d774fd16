"""The default: the leaf with the fewest expected hits goes first. A first version: how often and how lately it was read.

Greedy-dual with frequency over leaves (Cherkasova, HP Labs 1998): a block's value is that of the last victim plus its
reads times what its tokens cost to compute again.
"""

from array import array
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from keepwarm.engine.eviction.facts import BlockFacts
from keepwarm.engine.eviction.leaves import Leaves

DEPTH_COST = 1.0 / 4096  # prefill time per token doubles over about 4,096 tokens (413 against 1,140 tokens/s at 512)
SCALE = 1024  # values are ints


class Cost:
    """Values by block id."""

    name = "cost"

    def __init__(self, n_blocks_max: int) -> None:
        self._n_blocks_max = n_blocks_max
        self._values = array("q")
        self._weights = array("q")
        self._leaves = Leaves(self._values)
        self._age = 0
        self._n_blocks = 0

    def __len__(self) -> int:
        return self._n_blocks

    def stored(self, block: int, facts: BlockFacts, now_s: float) -> None:  # noqa: ARG002
        if block >= len(self._values):
            n_more = block + 1 - len(self._values)
            self._values.extend([0] * n_more)
            self._weights.extend([0] * n_more)
        self._n_blocks += 1
        self._weights[block] = int(SCALE * (1.0 + facts.depth * DEPTH_COST))
        self._values[block] = max(self._age + self._weights[block], self._values[block])

    def hit(self, blocks: Sequence[int], now_s: float) -> None:  # noqa: ARG002
        for block in blocks:
            self._values[block] = max(self._age, self._values[block]) + self._weights[block]

    def offer(self, block: int) -> None:
        self._leaves.offer(block)

    def forget(self, block: int) -> None:  # noqa: ARG002
        self._n_blocks -= 1

    def victim(self, evictable: AbstractSet[int], now_s: float) -> int | None:  # noqa: ARG002
        block = self._leaves.first(evictable)
        if block is not None:
            self._age = max(self._age, self._values[block])
        return block
