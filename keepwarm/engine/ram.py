"""A tier in RAM for blocks of any size, by key: whole-state snapshots, which do not fit slots of one size.

As every tier: a block is written once and never changes, and the budget is kept. Bodies are copied in and out, so nobody
else holds the tier's memory. Nothing here can be damaged, and nothing outlives the process.
"""

import threading
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from keepwarm.engine.tiers import BlockHead, BlockLost, TierFull


class RamTier:
    """Blocks by key in host RAM."""

    name = "host"

    def __init__(self, bytes_total: int) -> None:
        self.bytes_total = bytes_total
        self._stored: dict[bytes, tuple[BlockHead, NDArray[np.uint8]]] = {}
        self._bytes_used = 0
        self._lock = threading.Lock()

    @property
    def bytes_used(self) -> int:
        return self._bytes_used

    def cost(self, head: BlockHead) -> int:
        """The body alone: heads are held by the index anyway."""
        return head.n_bytes

    def write(self, blocks: Sequence[tuple[BlockHead, NDArray[np.uint8]]]) -> None:
        with self._lock:
            new = {head.key: (head, body) for head, body in blocks if head.key not in self._stored}
            n_needed, n_free = sum(self.cost(head) for head, _ in new.values()), self.bytes_total - self._bytes_used
            if new and n_needed > n_free:
                raise TierFull(n_needed, max(0, n_free))
            for key, (head, body) in new.items():
                assert body.nbytes == head.n_bytes
                self._stored[key] = (head, body.copy())
            self._bytes_used += n_needed

    def read(self, key: bytes, into: NDArray[np.uint8]) -> None:
        with self._lock:
            stored = self._stored.get(key)
        if stored is None:
            raise BlockLost(key, None)
        np.copyto(into, stored[1])  # outside the lock: a body is never written again

    def delete(self, key: bytes) -> None:
        with self._lock:
            stored = self._stored.pop(key, None)
            if stored is not None:
                self._bytes_used -= self.cost(stored[0])

    def heads(self) -> Iterator[BlockHead]:
        with self._lock:
            return iter([head for head, _ in self._stored.values()])

    def close(self) -> None:
        """Forget everything."""
        with self._lock:
            self._stored.clear()
            self._bytes_used = 0
