"""Where blocks' bytes live. `HostTier` keeps them in RAM, in one arena of equal slots within a byte budget.

Every tier has this shape; the store asks for room, writes, reads and frees by slot, and evicts by the index's choice.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from keepwarm.engine.memory import arena


class Tier(Protocol):
    """Room for blocks of one size. `n_free + n_used == n_slots`, always."""

    name: str
    slot_bytes: int
    n_slots: int

    @property
    def n_free(self) -> int: ...

    def take(self) -> int | None:
        """A free slot, or None when the budget is used up."""
        ...

    def bytes_of(self, slot: int) -> NDArray[np.uint8]:
        """The slot's bytes, shape (slot_bytes,), to write into or read from."""
        ...

    def free(self, slot: int) -> None: ...


class HostTier:
    """Host RAM: slots in one anonymous mapping, touched page by page as they are first used, then used again."""

    name = "host"

    def __init__(self, budget_bytes: int, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self.n_slots = budget_bytes // slot_bytes
        self._arena = arena(self.n_slots * slot_bytes)
        self._free: list[int] = []  # slots given back: touched pages, taken first
        self._next = 0  # slots from here on were never used
        self._used = np.zeros(self.n_slots, np.bool_)

    @property
    def n_free(self) -> int:
        return len(self._free) + self.n_slots - self._next

    def take(self) -> int | None:
        if self._free:
            slot = self._free.pop()
        elif self._next < self.n_slots:
            slot = self._next
            self._next += 1
        else:
            return None
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

    def check_integrity(self) -> None:
        """Assert that every slot is either free or used, once."""
        assert len(set(self._free)) == len(self._free)
        assert int(self._used.sum()) + self.n_free == self.n_slots
