"""What of the prefix index is on disk: writes in the background, leases, and the index's recovery at start.

One writer thread does everything that changes the disk, in the order it was asked, so the budget has one owner and a
lease's end never overtakes its beginning. Nodes that are to be written are locked until that is done or given up.

- **Leases.** `lease` answers when all blocks and then the lease's own file are durable. Room is checked before (`room`),
  so nothing is evicted for a lease that cannot be had.
- **Admission.** Without a lease a block is written when it was asked for twice: a turn hit it, or it is stored again after
  leaving the host tier unwritten (a ghost). One-shot prompts never reach the disk.
- **Recovery.** Heads are read, never bodies; a block whose predecessor is gone is deleted; a lease whose blocks are not all
  there is given up and told as lost. Until then nothing is evicted.
"""

import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from keepwarm.core.clock import Clock
from keepwarm.engine import StoreStatus
from keepwarm.engine.disk import DiskTier
from keepwarm.engine.eviction import Ghosts
from keepwarm.engine.governor import pool
from keepwarm.engine.layout import BLOCK_TOKENS
from keepwarm.engine.leasefile import LeaseFiles
from keepwarm.engine.nodes import Node
from keepwarm.engine.prefix import Gone, PrefixIndex
from keepwarm.engine.reuse import Done
from keepwarm.engine.tiers import BlockHead, Damage, HostTier, TierFault, TierFull

WRITE_BLOCKS_MAX = 32  # blocks of one batch: one directory fsync for all of them, and 50 MB of a small model
WAITING_BLOCKS_MAX = 1024  # blocks of no lease waiting to be written; more are not admitted, their turns come again
GHOSTS_MAX = 65_536  # keys remembered of blocks that left unwritten: 6 MB


class Durable:
    """The disk side of one index. Public methods are called with the index's lock held, unless they say otherwise."""

    def __init__(
        self, index: PrefixIndex, lock: threading.Lock, host: HostTier, disk: DiskTier, leases: LeaseFiles, clock: Clock
    ) -> None:
        self._index, self._lock, self._host = index, lock, host
        self._leases, self._clock = leases, clock
        self.disk = disk
        self._ghosts = Ghosts(GHOSTS_MAX)
        self._writer = ThreadPoolExecutor(1, "write")
        self._writing: set[int] = set()
        self._costs: dict[int, int] = {}
        self.orphaned: Counter[Damage] = Counter()
        self.n_written = self.n_write_faults = self.n_evicted = self.n_not_admitted = 0
        self.scan_s = 0.0

    # --- start

    def recover(self, cell_bytes: int) -> dict[str, Sequence[Node]]:
        """Build the index from what is on disk; the leases that are whole, with their nodes. Before any other call."""
        begin = self._clock.monotonic()
        heads = sorted(self.disk.heads(), key=lambda head: head.start)
        known: dict[bytes, Node] = {}
        for head in heads:
            above = head.parent if head.start == 0 else known.get(head.parent)
            if above is None or head.n_bytes != len(head.tokens) * cell_bytes:
                self.disk.delete(head.key)
                self.orphaned[Damage.ORPHANED if above is None else Damage.STALE] += 1
                continue
            node = self._index.adopt(above, head.key, head.tokens, head.start, closed=head.closed)
            self._index.stored(node, self.disk.cost(head), now_s=begin)
            known[head.key] = node
        whole: dict[str, Sequence[Node]] = {}
        for pin, keys in self._leases.all():
            if all(key in known for key in keys):
                whole[pin] = self._index.keep(known[key] for key in keys)
                self._index.pin(whole[pin])
            else:
                self._leases.delete(pin)
        self._fit()
        self.scan_s = self._clock.monotonic() - begin
        return whole

    def _fit(self) -> None:
        """The budget may be smaller than at the last start."""
        while self.disk.bytes_used > self.disk.bytes_total:
            victim = self._evict()
            if victim is None:
                return
            self.disk.delete(victim.key)

    def _evict(self) -> Gone | None:
        """Take one block off the disk's side of the index; its file is the caller's to delete. None: nothing may go."""
        gone = self._index.evict_disk(self._clock.monotonic())
        if gone is None:
            return None
        block, slots = gone
        for slot in slots:
            self._host.free(slot)
        self.n_evicted += 1
        return block

    # --- admission

    def left_host(self, gone: Gone) -> None:
        """The block's host copy was evicted: if it lay nowhere else, its key is remembered."""
        if not gone.disk_bytes:
            self._ghosts.remember(gone.key)
            self.n_not_admitted += 1

    def is_ghost(self, node: Node) -> bool:
        """Whether the block was there before and left the host tier unwritten."""
        return node.key in self._ghosts

    def admit(self, nodes: Sequence[Node]) -> None:
        """Write these nodes (a chain from its root) soon, as far as they are not on disk, if the queue has room."""
        todo = [node for node in nodes if not node.disk_bytes and node.slot >= 0 and node.id not in self._writing]
        if todo and len(self._writing) + len(todo) <= WAITING_BLOCKS_MAX:
            self._submit(todo)

    def _submit(self, nodes: Sequence[Node]) -> None:
        self._index.lock(nodes)
        self._writing.update(node.id for node in nodes)
        self._writer.submit(self._write_all, nodes, None)

    # --- leases

    def cost(self, node_tokens: int, cell_bytes: int) -> int:
        """Bytes of the disk's budget that a block of so many tokens takes."""
        known = self._costs.get(node_tokens)
        if known is None:
            blank = BlockHead(bytes(32), bytes(32), 0, np.zeros(node_tokens, np.int32), False, node_tokens * cell_bytes)
            known = self._costs[node_tokens] = self.disk.cost(blank)
        return known

    def room(self, bytes_waiting: int) -> int:
        """Bytes a new lease may take: the budget without what is leased, or leased and still `bytes_waiting`."""
        return self.disk.bytes_total - self._index.disk_bytes_leased - bytes_waiting

    def lease(self, pin: str, nodes: Sequence[Node], done: Done) -> None:
        """Make the pinned nodes and a record of their lease durable, then call `done` from the writer's thread."""
        todo = [node for node in nodes if not node.disk_bytes]
        self._index.lock(todo)
        self._writing.update(node.id for node in todo)
        self._writer.submit(self._lease, pin, tuple(nodes), [node.key for node in nodes], todo, done)

    def drop(self, pin: str) -> None:
        """Delete the lease's record soon; its blocks are unpinned by the caller."""
        self._writer.submit(self._drop, pin)

    # --- the writer's thread: no lock held

    def _lease(
        self, pin: str, nodes: tuple[Node, ...], keys: list[bytes], todo: Sequence[Node], done: Done
    ) -> None:  # fmt: skip
        fault = self._write_all(todo, nodes)
        if fault is None:
            try:
                self._leases.write(pin, keys)
            except (TierFull, TierFault) as exc:
                fault = exc
                self._drop(pin)  # it may have been written all the same
        done(fault)

    def _drop(self, pin: str) -> None:
        try:
            self._leases.delete(pin)
        except (TierFull, TierFault):
            self.n_write_faults += (
                1  # the record stays; at the next start its object is not live, so it is dropped then
            )

    def _write_all(self, todo: Sequence[Node], wanted: Sequence[Node] | None) -> TierFull | TierFault | None:
        """Write in batches, root first. With `wanted` (a lease's nodes) each of them must then be on disk."""
        fault: TierFull | TierFault | None = None
        for at in range(0, len(todo), WRITE_BLOCKS_MAX):
            batch = todo[at : at + WRITE_BLOCKS_MAX]
            if fault is None:
                fault = self._write(batch)
            with self._lock:
                self._writing.difference_update(node.id for node in batch)
                self._index.unlock(batch)
        if wanted is not None and fault is None:
            with self._lock:
                if not all(node.is_there and node.disk_bytes for node in wanted):
                    fault = TierFault("a block of this lease was lost while it was written")
        return fault

    def _write(self, batch: Sequence[Node]) -> TierFull | TierFault | None:
        with self._lock:
            whole = [node for node in batch if not node.disk_bytes and node.slot >= 0 and _on_chain(node, batch)]
            blocks = [(head_of(node, self._host.slot_bytes), self._body(node)) for node in whole]
            needed = sum(self.disk.cost(head) for head, _ in blocks)
            gone = self._make_room(needed)
        for victim in gone or ():
            self.disk.delete(victim.key)
        if gone is None:
            return TierFull(needed, self.disk.bytes_total - self.disk.bytes_used)
        try:
            if blocks:
                self.disk.write(blocks)
        except (TierFull, TierFault) as exc:
            self.n_write_faults += 1
            return exc
        with self._lock:
            now_s = self._clock.monotonic()
            for node, (head, _) in zip(whole, blocks, strict=True):
                self._index.stored(node, self.disk.cost(head), now_s=now_s)
                self._ghosts.forget(node.key)
        self.n_written += len(whole)
        return None

    def _body(self, node: Node) -> NDArray[np.uint8]:
        n_bytes = self._host.slot_bytes // BLOCK_TOKENS * node.n_tokens
        return self._host.bytes_of(node.slot)[:n_bytes]

    def _make_room(self, needed: int) -> list[Gone] | None:
        """Blocks whose files must go so that `needed` bytes fit; None, and nothing evicted, when that cannot be."""
        free = self.disk.bytes_total - self.disk.bytes_used
        if needed > free + self._index.disk_bytes - self._index.disk_bytes_leased:
            return None
        gone: list[Gone] = []
        while free < needed:
            victim = self._evict()
            if victim is None:
                break  # the rest is locked; what has gone is gone
            free += self.cost(victim.n_tokens, self._host.slot_bytes // BLOCK_TOKENS)
            gone.append(victim)
        return gone

    def told(self, status: StoreStatus) -> StoreStatus:
        """The store's status with the disk's side of it."""
        index, disk = self._index, self.disk
        leased = index.disk_bytes_leased
        whole = pool(
            "disk",
            total=max(disk.bytes_total, index.disk_bytes),
            resident=index.disk_bytes - leased,
            leased=leased,
            configured=disk.bytes_total,
            n_blocks=index.n_on_disk,
        )
        return replace(
            status,
            pools=(*status.pools, whole),
            n_evicted_disk=self.n_evicted,
            n_written=self.n_written,
            n_write_faults=self.n_write_faults,
            n_not_admitted=self.n_not_admitted,
            damaged={cause.value: n for cause, n in (disk.damaged + self.orphaned).items()},
            scan_s=round(self.scan_s, 3),
        )

    def flush(self) -> None:
        """Wait until everything asked for by now is done. No lock held."""
        self._writer.submit(int).result()

    def close(self) -> None:
        """Finish what was asked for and end the thread. No lock held."""
        self._writer.shutdown()


def head_of(node: Node, slot_bytes: int) -> BlockHead:
    """The node's head, as it is written."""
    assert node.parent is not None
    n_bytes = slot_bytes // BLOCK_TOKENS * node.n_tokens
    return BlockHead(node.key, node.parent.key, node.start, node.tokens, node.closed, n_bytes)


def _on_chain(node: Node, batch: Sequence[Node]) -> bool:
    """Whether the node's predecessor is on disk, or is written with it: what is on disk is always a whole chain."""
    above = node.parent
    return above is None or above.parent is None or bool(above.disk_bytes) or above in batch
