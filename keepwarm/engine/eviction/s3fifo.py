"""S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023), over leaves.

New blocks enter the small queue, a tenth of the store; what was read twice there moves to the main queue, the rest leaves
and is remembered as a ghost; a ghost that comes back enters the main queue at once. The main queue gives a block one more
round for each time it was read (at most three). A block that is no leaf yet keeps its place and is passed over; so when
its children have gone it is next in line, with the reads it got.
"""

from array import array
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from keepwarm.engine.eviction.facts import BlockFacts
from keepwarm.engine.eviction.ghosts import Ghosts, fingerprint
from keepwarm.engine.eviction.leaves import Leaves

SMALL_SHARE = 0.1  # of the store, as in the paper, and the next two
N_READS_MAX = 3
N_READS_TO_MAIN = 2
SMALL, MAIN = 0, 1


class S3Fifo:
    """Place, queue and reads by block id; the two queues share the stamps."""

    name = "s3fifo"

    def __init__(self, n_blocks_max: int) -> None:
        self._n_small_max = max(1, int(n_blocks_max * SMALL_SHARE))
        self._ghosts = Ghosts(max(1, n_blocks_max - self._n_small_max))
        self._stamps = array("q")
        self._keys = array("q")  # fingerprints, for the ghosts
        self._reads = bytearray()
        self._queue = bytearray()
        self._leaves = (Leaves(self._stamps), Leaves(self._stamps))
        self._n_in = [0, 0]
        self._n_stamps = 0

    def __len__(self) -> int:
        return sum(self._n_in)

    def stored(self, block: int, facts: BlockFacts, now_s: float) -> None:  # noqa: ARG002
        if block >= len(self._stamps):
            n_more = block + 1 - len(self._stamps)
            self._stamps.extend([0] * n_more)
            self._keys.extend([0] * n_more)
            self._reads.extend(bytes(n_more))
            self._queue.extend(bytes(n_more))
        print_ = fingerprint(facts.key)
        queue = MAIN if self._ghosts.has(print_) else SMALL
        self._ghosts.drop(print_)
        self._keys[block] = print_
        self._reads[block] = 0
        self._queue[block] = queue
        self._n_in[queue] += 1
        self._stamp(block)

    def hit(self, blocks: Sequence[int], now_s: float) -> None:  # noqa: ARG002
        reads = self._reads
        for block in blocks:
            if reads[block] < N_READS_MAX:
                reads[block] += 1

    def offer(self, block: int) -> None:
        self._leaves[self._queue[block]].offer(block)

    def forget(self, block: int) -> None:
        queue = self._queue[block]
        self._n_in[queue] -= 1
        if queue == SMALL:
            self._ghosts.put(self._keys[block])

    def victim(self, evictable: AbstractSet[int], now_s: float) -> int | None:  # noqa: ARG002
        found = self._from_small(evictable, self._n_small_max)
        if found is None:
            found = self._from_main(evictable)
        if found is None:  # the main queue has no leaf: the small one gives, whatever its share
            found = self._from_small(evictable, 0)
        return self._from_main(evictable) if found is None else found

    def _from_small(self, evictable: AbstractSet[int], n_kept: int) -> int | None:
        while self._n_in[SMALL] > n_kept and (block := self._first(SMALL, evictable)) is not None:
            if self._reads[block] < N_READS_TO_MAIN:
                return block
            self._leaves[SMALL].drop_first()
            self._queue[block] = MAIN
            self._reads[block] = 0
            self._n_in[SMALL] -= 1
            self._n_in[MAIN] += 1
            self._stamp(block)
            self._leaves[MAIN].offer(block)
        return None

    def _from_main(self, evictable: AbstractSet[int]) -> int | None:
        while (block := self._first(MAIN, evictable)) is not None:
            if self._reads[block] == 0:
                return block
            self._reads[block] -= 1
            self._stamp(block)
        return None

    def _first(self, queue: int, evictable: AbstractSet[int]) -> int | None:
        leaves = self._leaves[queue]
        while (block := leaves.first(evictable)) is not None and self._queue[block] != queue:
            leaves.drop_first()  # moved, or an id used again
        return block

    def _stamp(self, block: int) -> None:
        self._n_stamps += 1
        self._stamps[block] = self._n_stamps
