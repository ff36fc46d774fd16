"""Read-ahead from the disk tier: a few threads read blocks into slots while the compute thread assembles earlier ones.

A node is read once at a time; who asked for it locks it until `arrived` is called, from the reading thread, with what was
lost if it was. No index and no lock of the store here.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
from numpy.typing import NDArray

from keepwarm.core.clock import Clock
from keepwarm.engine.breakeven import Speeds
from keepwarm.engine.nodes import Node
from keepwarm.engine.tiers import BlockLost, Tier

THREADS = 2  # more do not read faster from one disk, and take cores from the assembly (docs/benchmarks.md)

Arrived = Callable[[BlockLost | None], None]


class Reading:
    """Blocks on their way from one tier."""

    def __init__(self, tier: Tier, speeds: Speeds, clock: Clock) -> None:
        self._tier, self._speeds, self._clock = tier, speeds, clock
        self._threads = ThreadPoolExecutor(THREADS, "read")
        self._futures: dict[int, Future[None]] = {}  # by node id
        self._lock = threading.Lock()
        self._n_active = 0

    @property
    def n_arriving(self) -> int:
        """Blocks asked for that have not arrived."""
        with self._lock:
            return len(self._futures)

    def has(self, node: Node) -> bool:
        """Whether the node is on its way."""
        with self._lock:
            return node.id in self._futures

    def begin(self, node: Node, into: NDArray[np.uint8], arrived: Arrived) -> None:
        """Read the node's body into `into` soon, then call `arrived`."""
        with self._lock:
            assert node.id not in self._futures
            self._futures[node.id] = self._threads.submit(self._read, node, into, arrived)

    def wait(self, node: Node) -> None:
        """Wait until the node has arrived, or was lost; at once when it is not on its way."""
        with self._lock:
            future = self._futures.get(node.id)
        if future is not None:
            future.result()

    def flush(self) -> None:
        """Wait until everything asked for by now has arrived."""
        with self._lock:
            futures = list(self._futures.values())
        wait(futures)

    def now(self, node: Node, into: NDArray[np.uint8]) -> None:
        """Read the node's body in the calling thread. Raises BlockLost."""
        with self._lock:
            self._n_active += 1
        begin = self._clock.monotonic()
        try:
            self._tier.read(node.key, into)
        finally:
            with self._lock:
                spent, n_active = self._clock.monotonic() - begin, self._n_active
                self._n_active -= 1
        self._speeds.observe_restore("disk", len(into), spent / n_active)

    def _read(self, node: Node, into: NDArray[np.uint8], arrived: Arrived) -> None:
        lost: BlockLost | None = None
        try:
            self.now(node, into)
        except BlockLost as exc:
            lost = exc
        arrived(lost)

    def forget(self, node: Node) -> None:
        """The node has arrived. Called by `arrived` together with what it changes in the index."""
        with self._lock:
            del self._futures[node.id]

    def close(self) -> None:
        """Finish what was asked for and end the threads."""
        self._threads.shutdown()
