"""What a store tells an eviction policy about its blocks, and what it asks.

Ids are small ints, reused after `forget`; a policy keeps its numbers in arrays by id, so the memory it takes goes with the
largest id. `now_s` never goes back. Everything a policy learns comes through these methods: it reads no clock.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple, Protocol


class BlockFacts(NamedTuple):
    """What is known of a block when it is stored."""

    key: bytes  # its identity across evictions, a digest
    parent: int | None  # id of the block before it in its chain; None directly below the root
    depth: int  # tokens before it
    n_tokens: int
    n_read: int  # tokens of the prompt it came with that were read from the store; 0: nothing of it was known


class Policy(Protocol):
    """Which block is cheapest to lose. Calls come in the order of what happened, from one thread."""

    name: str

    def __len__(self) -> int:
        """Blocks stored and not forgotten."""
        ...

    def stored(self, block: int, facts: BlockFacts, now_s: float) -> None:
        """The block is there; the one before it in its chain was stored earlier."""
        ...

    def hit(self, blocks: Sequence[int], now_s: float) -> None:
        """A turn read these blocks, in order from the root."""
        ...

    def offer(self, block: int) -> None:
        """The block may go from now on: a child, a lock or a pin less."""
        ...

    def forget(self, block: int) -> None:
        """The block is gone, evicted or damaged."""
        ...

    def victim(self, evictable: AbstractSet[int], now_s: float) -> int | None:
        """The cheapest of `evictable` to lose, or None; the caller removes it and calls `forget`."""
        ...
