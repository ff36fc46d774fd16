"""One tier's side of the prefix index: which blocks may leave it, and the policy that says which one first. Pure.

Where all that is in host RAM lies on disk as well, every block may leave: ids are kept as a byte each by id, not as a set
of ints, which takes many times as much. Invariant: what may leave is in the tier, so its policy knows it.
"""

from collections.abc import Iterator
from collections.abc import Set as AbstractSet

import numpy as np

from keepwarm.engine.eviction import Policy


class IdSet(AbstractSet[int]):
    """A set of small ids, seen from outside. Iterates over what it had when that began, ascending."""

    __slots__ = ("flags", "n")

    def __init__(self) -> None:
        self.flags = bytearray()  # by id: 1 inside
        self.n = 0

    def __contains__(self, id_: object) -> bool:
        return isinstance(id_, int) and 0 <= id_ < len(self.flags) and self.flags[id_] == 1

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        return iter(np.flatnonzero(np.frombuffer(self.flags, np.uint8)).tolist())


class Shelf:
    """Which blocks may leave one tier, and its policy."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._evictable = IdSet()

    @property
    def evictable(self) -> AbstractSet[int]:
        return self._evictable

    def refresh(self, block: int, may_leave: bool) -> None:
        """The block changed; may it leave the tier now?"""
        ids = self._evictable
        if block >= len(ids.flags):
            ids.flags.extend(bytes(block + 1 - len(ids.flags)))
        if ids.flags[block] == may_leave:
            return
        ids.flags[block] = may_leave
        if may_leave:
            ids.n += 1
            self.policy.offer(block)
        else:
            ids.n -= 1

    def forget(self, block: int) -> None:
        """The block is not in this tier any more."""
        self.refresh(block, False)
        self.policy.forget(block)

    def victim(self, now_s: float) -> int | None:
        """The block to lose first, of those that may go."""
        return self.policy.victim(self._evictable, now_s)
