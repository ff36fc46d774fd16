"""A prefix store without bytes, under one policy, over a trace: how many tokens would have been read.

The store's own rules: blocks of one size in a tree, a match from the root on, the prompt's blocks held while its turn
runs, every prompt stored whole while there is something to evict, leaves only. So a prompt longer than the store keeps its
beginning. Answers are not stored: a trace has their tokens only in the prompt of the next turn.
"""

from collections.abc import Callable

from msgspec import Struct

from keepwarm.engine.eviction import BlockFacts, Policy
from keepwarm.replay.trace import Request, Trace

REPORT_EVERY = 256  # requests


class Outcome(Struct, frozen=True):
    """What a policy read of a trace at one capacity."""

    n_tokens: int
    n_tokens_read: int
    n_evicted: int

    @property
    def hit_rate(self) -> float:
        return self.n_tokens_read / self.n_tokens if self.n_tokens else 0.0


def simulate(
    trace: Trace, policy: Policy, n_blocks_max: int, progress: Callable[[int], None] = lambda _: None
) -> Outcome:
    """Replay `trace`; `progress` is called with the number of requests done since its last call."""
    store = _Store(policy, n_blocks_max, trace.block_tokens)
    n_read = 0
    for i, request in enumerate(trace.requests, 1):
        n_read += store.turn(request)
        if i % REPORT_EVERY == 0:
            progress(REPORT_EVERY)
    progress(len(trace.requests) % REPORT_EVERY)
    return Outcome(n_tokens=trace.n_tokens, n_tokens_read=n_read, n_evicted=store.n_evicted)


class _Store:
    """Which blocks are there, by the small ids the policy knows them by."""

    def __init__(self, policy: Policy, n_blocks_max: int, block_tokens: int) -> None:
        self._policy, self._n_blocks_max, self._block_tokens = policy, n_blocks_max, block_tokens
        self._ids: dict[int, int] = {}  # by block number
        self._blocks: list[int] = []  # block number by id, and the next two
        self._parents: list[int] = []
        self._n_children: list[int] = []
        self._free: list[int] = []
        self._evictable: set[int] = set()
        self._tail = -1  # the last block that the running turn holds; those before it have a child
        self.n_evicted = 0

    def turn(self, request: Request) -> int:
        """Read what is there, store the rest; returns the tokens read."""
        held: list[int] = []
        for block in request.blocks:
            id_ = self._ids.get(block)
            if id_ is None:
                break
            held.append(id_)
        n_read = min(len(held) * self._block_tokens, request.n_tokens)
        if held:
            self._policy.hit(held, request.time_s)
            self._evictable.discard(held[-1])
        self._tail = held[-1] if held else -1
        for depth in range(len(held), len(request.blocks)):
            id_ = self._room(request.time_s)
            if id_ is None:
                break
            self._store(id_, request, depth, n_read)
        tail, self._tail = self._tail, -1
        if tail >= 0:
            self._release(tail)
        return n_read

    def _room(self, now_s: float) -> int | None:
        if len(self._ids) < self._n_blocks_max:
            if self._free:
                return self._free.pop()
            self._blocks.append(-1)
            self._parents.append(-1)
            self._n_children.append(0)
            return len(self._blocks) - 1
        id_ = self._policy.victim(self._evictable, now_s)
        if id_ is None:
            return None
        self._evictable.remove(id_)
        self._policy.forget(id_)
        del self._ids[self._blocks[id_]]
        self.n_evicted += 1
        parent = self._parents[id_]
        if parent >= 0:
            self._n_children[parent] -= 1
            self._release(parent)
        return id_

    def _store(self, id_: int, request: Request, depth: int, n_read: int) -> None:
        block, parent = request.blocks[depth], self._tail
        self._ids[block] = id_
        self._blocks[id_], self._parents[id_], self._n_children[id_] = block, parent, 0
        if parent >= 0:
            self._n_children[parent] += 1
        facts = BlockFacts(
            key=block.to_bytes(8, "little"),
            parent=parent if parent >= 0 else None,
            depth=depth * self._block_tokens,
            n_tokens=min(self._block_tokens, request.n_tokens - depth * self._block_tokens),
            n_read=n_read,
        )
        self._policy.stored(id_, facts, request.time_s)
        self._tail = id_

    def _release(self, id_: int) -> None:
        """The block may go, unless it has children or the running turn holds it."""
        if self._n_children[id_] == 0 and id_ != self._tail:
            self._evictable.add(id_)
            self._policy.offer(id_)
