"""Where blocks' bytes live: the shape every tier has, and `HostTier`, which keeps them in RAM.

A block is written once under its key and never changes. A tier keeps within its byte budget, but does not choose what
goes: the store asks its eviction policy and deletes. `tests/conformance/test_tiers.py` holds every tier to this.
"""

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from keepwarm.core.prompt import Tokens
from keepwarm.engine.memory import arena, populate, release


class BlockHead(Struct, frozen=True):
    """What names a block and places it in its chain; stored with it, so that an index can be built from heads alone."""

    key: bytes  # 32 bytes (prefix.block_key)
    parent: bytes  # 32 bytes: the key of the block before it, or the chain's root
    start: int  # tokens before it; 0 directly below the root
    tokens: Tokens  # shape (n_tokens,): the ids its state belongs to
    closed: bool  # ends a piece at an irregular mark
    n_bytes: int  # of its body


class Damage(Enum):
    """Why a stored block cannot be used. It is deleted and counted under this, and computed again."""

    FOREIGN = "foreign"  # not written by this program
    STALE = "stale"  # another model, template, KV type or format
    TORN = "torn"  # an unfinished write, or a head that contradicts itself
    TRUNCATED = "truncated"  # shorter or longer than its head says
    FLIPPED = "flipped"  # the checksum of head or body is wrong
    UNREADABLE = "unreadable"  # the system cannot read it (EIO)
    ORPHANED = "orphaned"  # the block before it in the chain is gone


class BlockLost(Exception):
    """A block that was thought to be there cannot be had (any more). `damage` None: it was just not there."""

    def __init__(self, key: bytes, damage: Damage | None) -> None:
        super().__init__(f"block {key.hex()[:16]}: {damage.value if damage else 'missing'}")
        self.key, self.damage = key, damage


class TierFull(Exception):
    """A write does not fit: into the tier's budget, or onto the device (ENOSPC). Nothing of it was kept."""

    def __init__(self, n_bytes_needed: int, n_bytes_free: int) -> None:
        super().__init__(f"needs {n_bytes_needed:,} bytes, {n_bytes_free:,} are free")
        self.n_bytes_needed, self.n_bytes_free = n_bytes_needed, n_bytes_free


class TierFault(Exception):
    """A write could not be made durable (EIO and the like). Nothing of it was kept."""


class Tier(Protocol):
    """Blocks by key, within `bytes_total`. Thread-safe. `bytes_used <= bytes_total`, always."""

    name: str
    bytes_total: int

    @property
    def bytes_used(self) -> int: ...

    def cost(self, head: BlockHead) -> int:
        """Bytes of the budget that this block takes when it is stored."""
        ...

    def write(self, blocks: Sequence[tuple[BlockHead, NDArray[np.uint8]]]) -> None:
        """Store all of these or none; durable when it returns, as far as the tier is. Keys that are there are skipped.

        Raises TierFull, TierFault.
        """
        ...

    def read(self, key: bytes, into: NDArray[np.uint8]) -> None:
        """Fill `into`, shape (n_bytes,), with the block's body, verified. Raises BlockLost; a damaged block is deleted."""
        ...

    def delete(self, key: bytes) -> None:
        """Unknown keys are no error."""
        ...

    def heads(self) -> Iterator[BlockHead]:
        """What is there, in no order."""
        ...


class HostTier:
    """Host RAM: equal slots in one anonymous mapping, touched page by page as they are first used, then used again.

    Not by key: the index knows slots, so that blocks are cut into and assembled from them without a copy between.
    `n_free + n_used == n_slots`, always.
    """

    name = "host"

    def __init__(self, budget_bytes: int, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self.n_slots = budget_bytes // slot_bytes
        self.n_slots_max = self.n_slots  # at most so many are handed out now: less under memory pressure
        self._arena = arena(self.n_slots * slot_bytes)
        self._free: list[int] = []  # slots given back: touched pages, taken first
        self._next = 0  # slots from here on were never used
        self._used = np.zeros(self.n_slots, np.bool_)
        self._returned: set[int] = set()  # free slots whose pages the system has back
        self._n_populated = 0  # slots whose pages were faulted in ahead of their use

    @property
    def n_used(self) -> int:
        return self._next - len(self._free)

    @property
    def n_free(self) -> int:
        return max(0, self.n_slots_max - self.n_used)

    def take(self) -> int | None:
        if not self.n_free:
            return None
        if self._free:
            slot = self._free.pop()
            self._returned.discard(slot)
        else:
            slot = self._next
            self._next += 1
        assert not self._used[slot]
        self._used[slot] = True
        return slot

    def bytes_of(self, slot: int) -> NDArray[np.uint8]:
        assert self._used[slot]
        return self._arena[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def free(self, slot: int) -> None:
        assert self._used[slot]
        self._used[slot] = False
        self._free.append(slot)

    def limit(self, n_slots: int) -> None:
        """Hand out at most this many from now on; the caller frees those beyond it."""
        self.n_slots_max = max(0, min(n_slots, self.n_slots))

    def populate(self, n_bytes_ahead: int) -> None:
        """Fault in the pages of the slots that are used next, so that a turn need not; from one thread at a time."""
        end = min(self._next + n_bytes_ahead // self.slot_bytes, self.n_slots_max)
        for slot in range(max(self._n_populated, self._next), end):
            populate(self._arena, slot * self.slot_bytes, (slot + 1) * self.slot_bytes)
            self._n_populated = slot + 1

    def give_back(self) -> None:
        """Return the pages of free slots to the system."""
        for slot in self._free:
            if slot not in self._returned:
                release(self._arena, slot * self.slot_bytes, (slot + 1) * self.slot_bytes)
                self._returned.add(slot)

    def check_integrity(self) -> None:
        """Assert that every slot is either free or used, once."""
        assert len(set(self._free)) == len(self._free)
        assert int(self._used.sum()) == self.n_used
        assert self._returned <= set(self._free)
