"""The default: the block that can bring the fewest reads per second of room goes first.

Blocks are told apart by how often they were read and whether they are short (the tail of a prompt: rarely asked for
again). What becomes of each class at each age is learned while the server runs (hazard.py), also from blocks that are gone
but remembered. All blocks take one size of room and an equal time, so the value of a block is the chance of a read alone.

Victims are chosen in batches: the cheapest of all that may go, by one pass over arrays, then one after the other as long
as nothing changed about them. A block that may go only now, like the parent of a victim, joins if it is as cheap.
"""

import heapq
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import numpy as np
from numpy.typing import NDArray

from keepwarm.engine.eviction.facts import BlockFacts
from keepwarm.engine.eviction.ghosts import fingerprint
from keepwarm.engine.eviction.hazard import Hazards, age_index, age_index_of
from keepwarm.engine.eviction.watched import Watched

USES_MAX = 64
USE_STEPS = (1, 2, 3, 4, 6, 12, 24)  # uses up to each are one class
N_USES = len(USE_STEPS) + 1
USE_CLASS = np.searchsorted(np.array(USE_STEPS), np.arange(USES_MAX + 1)).astype(np.int64)
GHOSTS_PER_BLOCK = 4
GHOSTS_ENOUGH = 49_152  # half a MB; a larger store remembers as many as it has blocks
LEARN_SHARE = 16  # of the store's blocks: so many are read or stored between two times of learning,
LEARN_MIN = 64  # but no fewer
PRINT_MASK = 0xFFFFFFFF  # 32 bits of a fingerprint do: one look-up in 10^5 takes a block for another's ghost
PRIOR_TURNS = 4.0  # a turn's blocks share their fate, so turns are what is seen: this many count as much as the prior
BATCH_SHARE = 16  # of the blocks that may go
BATCH_MIN = 16
MEMORY_STORES = 30  # observations fade to half while this many times the store's blocks are stored


class Cost:
    """What is known of each block, by id, and of each that left, by fingerprint."""

    name = "cost"

    def __init__(self, n_blocks_max: int) -> None:
        self._half_life_blocks = MEMORY_STORES * n_blocks_max
        self._hazards = Hazards(N_USES * 2, N_USES)
        self._worth = self._hazards.worth(PRIOR_TURNS)
        n_ghosts = min(GHOSTS_PER_BLOCK * n_blocks_max, max(GHOSTS_ENOUGH, n_blocks_max))
        self._ghosts = Watched(n_ghosts)
        self._learn_every = max(LEARN_MIN, n_blocks_max // LEARN_SHARE)
        self._used_s = np.zeros(0, np.float32)  # since `_start_s`, so that four bytes stay exact enough for weeks
        self._class = np.zeros(0, np.int8)
        self._uses = np.zeros(0, np.uint8)
        self._prints = np.zeros(0, np.uint32)
        self._start_s: float | None = None
        self._n_blocks = 0
        self._block_tokens = 0  # the largest block seen: what is smaller is short
        self._watched_s = 0.0  # when all blocks and ghosts were last looked at
        self._now_s = 0.0
        self._n_turns = 0
        self._n_stored = 0  # since it last learned
        self._n_used = 0  # blocks read and stored, in all
        self._n_used_learned = 0  # when it last learned
        self._batch: list[tuple[float, int, float]] = []  # worth, id, last use when chosen
        self._bound = -1.0  # the dearest of the batch when it was chosen
        self._previous = -1  # the running turn's last block so far: its child belongs to the same turn

    def __len__(self) -> int:
        return self._n_blocks

    def stored(self, block: int, facts: BlockFacts, now_s: float) -> None:
        self._pass_time(now_s)
        if facts.parent is None or facts.parent != self._previous:
            self._turn()
        self._previous = block
        if block >= len(self._used_s):
            self._grow(block + 1)
        self._block_tokens = max(self._block_tokens, facts.n_tokens)
        print_ = fingerprint(facts.key) & PRINT_MASK or 1
        uses = 1
        ghost = self._ghosts.take(print_)
        if ghost is not None:
            class_, used_s, uses = ghost
            self._hazards.read_one(class_, self._now_s - used_s, self._now_s - max(used_s, self._watched_s))
            uses = min(uses + 1, USES_MAX)
        self._used_s[block] = self._now_s
        self._uses[block] = uses
        self._class[block] = int(USE_CLASS[uses]) * 2 + (facts.n_tokens < self._block_tokens)
        self._prints[block] = print_
        self._n_blocks += 1
        self._n_stored += 1
        self._n_used += 1

    def hit(self, blocks: Sequence[int], now_s: float) -> None:
        if not blocks:
            return
        self._pass_time(now_s)
        self._turn()
        self._previous = blocks[-1]
        self._n_used += len(blocks)
        ids = np.asarray(blocks, np.int64)
        used_s = self._used_s[ids].astype(np.float64)
        classes = self._class[ids].astype(np.int64)
        self._hazards.read(classes, self._now_s - used_s, self._now_s - np.maximum(used_s, self._watched_s))
        uses = np.minimum(self._uses[ids] + 1, USES_MAX)
        self._uses[ids] = uses
        self._used_s[ids] = self._now_s
        self._class[ids] = USE_CLASS[uses] * 2 + classes % 2

    def offer(self, block: int) -> None:
        if self._batch:
            worth = float(self._worth[self._class[block], age_index_of(self._now_s - self._used_s[block])])
            if worth <= self._bound:
                heapq.heappush(self._batch, (worth, block, float(self._used_s[block])))

    def forget(self, block: int) -> None:
        self._n_blocks -= 1
        self._ghosts.put(
            int(self._prints[block]), int(self._class[block]), float(self._used_s[block]), int(self._uses[block])
        )
        self._class[block] = -1  # not there
        if block == self._previous:
            self._previous = -1

    def victim(self, evictable: AbstractSet[int], now_s: float) -> int | None:
        self._pass_time(now_s)
        while evictable:
            while self._batch:
                _, block, used_s = heapq.heappop(self._batch)
                if block in evictable and self._used_s[block] == used_s:
                    return block
            self._choose(evictable)
        return None

    def _choose(self, evictable: AbstractSet[int]) -> None:
        ids = np.fromiter(evictable, np.int64, len(evictable))
        worths = self._worth[self._class[ids], age_index(self._now_s - self._used_s[ids].astype(np.float64))]
        n = min(len(ids), max(BATCH_MIN, len(ids) // BATCH_SHARE))
        cheapest = np.argpartition(worths, n - 1)[:n]
        self._bound = float(worths[cheapest].max())
        self._batch = list(
            zip(worths[cheapest].tolist(), ids[cheapest].tolist(), self._used_s[ids[cheapest]].tolist(), strict=True)
        )
        heapq.heapify(self._batch)

    def _pass_time(self, now_s: float) -> None:
        if self._start_s is None:
            self._start_s = now_s
        self._now_s = float(np.float32(now_s - self._start_s))  # as it will be kept, so that no age is below 0

    def _turn(self) -> None:
        self._n_turns += 1
        if self._n_used - self._n_used_learned >= self._learn_every:
            self._learn()

    def _learn(self) -> None:
        stored = np.flatnonzero(self._class >= 0)
        self._watch(self._class[stored], self._used_s[stored])
        self._watch(*self._ghosts.all())
        self._watched_s = self._now_s
        self._hazards.fade(0.5 ** (self._n_stored / self._half_life_blocks))
        self._n_stored = 0
        self._n_used_learned = self._n_used
        self._worth = self._hazards.worth(PRIOR_TURNS * max(1.0, self._n_used / self._n_turns))
        self._batch = []

    def _watch(self, classes: NDArray[np.int8], used_s: NDArray[np.float32]) -> None:
        since_s = used_s.astype(np.float64)
        unwatched_s = self._now_s - np.maximum(since_s, self._watched_s)
        self._hazards.watch(classes.astype(np.int64), self._now_s - since_s, unwatched_s)

    def _grow(self, n: int) -> None:
        n_more = n + n // 8 + 64 - len(self._used_s)
        self._used_s = np.concatenate((self._used_s, np.zeros(n_more, np.float32)))
        self._class = np.concatenate((self._class, np.full(n_more, -1, np.int8)))
        self._uses = np.concatenate((self._uses, np.zeros(n_more, np.uint8)))
        self._prints = np.concatenate((self._prints, np.zeros(n_more, np.uint32)))
