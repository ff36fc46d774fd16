"""What of the snapshots is on disk: writes in the background, leases, and the index's recovery at start.

As `durable.py` does for blocks: one writer thread does everything that changes the disk, in the order it was asked, so a
lease's end never overtakes its beginning, and what is to be written is locked until that is done or given up. A lease
answers when the state and then the lease's own file are durable. Without a lease a snapshot is written when it was hit
twice. At start heads are read, never bodies; a lease whose state is not there is given up.
"""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from msgspec.structs import replace

from keepwarm.core.clock import Clock
from keepwarm.engine import StoreStatus
from keepwarm.engine.disk import DiskTier
from keepwarm.engine.governor import pool
from keepwarm.engine.leasefile import LeaseFiles
from keepwarm.engine.ram import RamTier
from keepwarm.engine.reuse import Done
from keepwarm.engine.snapshot_index import Snapshot, SnapshotIndex
from keepwarm.engine.tiers import BlockHead, BlockLost, TierFault, TierFull

HITS_TO_DISK = 2  # a conversation hits its last turn's snapshot once and moves on; what is hit again is shared
WAITING_MAX = 8  # snapshots of no lease waiting to be written; more are not admitted, their turns come again


class SnapshotDisk:
    """The disk side of one index. Public methods are called with the index's lock held, unless they say otherwise."""

    def __init__(
        self,
        index: SnapshotIndex,
        lock: threading.Lock,
        ram: RamTier,
        disk: DiskTier,
        leases: LeaseFiles,
        clock: Clock,
    ) -> None:
        self._index, self._lock, self._ram = index, lock, ram
        self._leases, self._clock = leases, clock
        self.disk = disk
        self._writer = ThreadPoolExecutor(1, "write")
        self._writing: set[bytes] = set()
        self.n_written = self.n_write_faults = self.n_evicted = 0
        self.scan_s = 0.0

    def recover(self) -> dict[str, Snapshot]:
        """Know what is on disk; the leases that are whole. What exceeds the budget goes. Before any other call."""
        begin = self._clock.monotonic()
        by_key: dict[bytes, Snapshot] = {}
        for head in self.disk.heads():
            snapshot = self._index.adopt(head.parent, head.tokens, head.n_bytes, at_mark=True)
            self._index.put(snapshot, begin, disk_bytes=self.disk.cost(head))
            by_key[head.key] = snapshot
        whole: dict[str, Snapshot] = {}
        for pin, keys in self._leases.all():
            if len(keys) == 1 and keys[0] in by_key:
                whole[pin] = by_key[keys[0]]
                self._index.pin(whole[pin], begin)
            else:
                self._leases.delete(pin)
        self._make_room(0)
        self.scan_s = self._clock.monotonic() - begin
        return whole

    # --- asked for

    def admit(self, snapshot: Snapshot, *, asked: bool = False) -> None:
        """Write it soon, if it was `asked` for or hit often enough, lies in RAM alone, and not too much is waiting."""
        if (
            (snapshot.hits < HITS_TO_DISK and not asked)
            or not snapshot.in_ram
            or snapshot.disk_bytes
            or snapshot.key in self._writing
        ):
            return
        if len(self._writing) < WAITING_MAX:
            self._index.lock(snapshot, self._clock.monotonic())
            self._writing.add(snapshot.key)
            self._writer.submit(self._write, snapshot)

    def lease(self, pin: str, snapshot: Snapshot, done: Done) -> None:
        """Make the pinned state and a record of its lease durable, then call `done` from the writer's thread."""
        self._index.lock(snapshot, self._clock.monotonic())
        self._writer.submit(self._lease, pin, snapshot, done)

    def drop(self, pin: str) -> None:
        """Delete the lease's record soon; its snapshot is unpinned by the caller."""
        self._writer.submit(self._drop, pin)

    def room(self) -> int:
        """Bytes a new lease may take: the budget without what is leased, or leased and still to be written."""
        waiting = sum(snapshot.n_bytes for snapshot in self._index if snapshot.kept_in_ram)
        return self.disk.bytes_total - self._bytes_leased() - waiting

    def _bytes_leased(self) -> int:
        return sum(snapshot.disk_bytes for snapshot in self._index if snapshot.pins)

    # --- the writer's thread: no lock held

    def _lease(self, pin: str, snapshot: Snapshot, done: Done) -> None:
        fault = self._write(snapshot)
        if fault is None:
            try:
                self._leases.write(pin, (snapshot.key,))
            except (TierFull, TierFault) as exc:
                self.n_write_faults += 1
                fault = exc
                self._drop(pin)  # it may have been written all the same, as in durable.py
        done(fault)

    def _drop(self, pin: str) -> None:
        try:
            self._leases.delete(pin)
        except (TierFull, TierFault):
            self.n_write_faults += 1  # at the next start its object is not live, so it is dropped then

    def _write(self, snapshot: Snapshot) -> TierFull | TierFault | None:
        """Have the locked snapshot on disk, and unlock it."""
        fault: TierFull | TierFault | None = None
        try:
            if not snapshot.disk_bytes:
                body = np.empty(snapshot.n_bytes, np.uint8)
                self._ram.read(snapshot.key, body)
                self._keep(head_of(snapshot), snapshot, body)
        except (TierFull, TierFault) as exc:
            self.n_write_faults += 1
            fault = exc
        except BlockLost:
            fault = TierFault("the state was lost before it was written")
        finally:
            with self._lock:
                self._writing.discard(snapshot.key)
                self._index.unlock(snapshot, self._clock.monotonic())
        return fault

    def _keep(self, head: BlockHead, snapshot: Snapshot, body: "np.ndarray[tuple[int], np.dtype[np.uint8]]") -> None:
        with self._lock:
            self._make_room(self.disk.cost(head))
        self.disk.write(((head, body),))
        self.n_written += 1
        with self._lock:
            self._index.put(snapshot, self._clock.monotonic(), disk_bytes=self.disk.cost(head))

    def _make_room(self, n_bytes: int) -> None:
        """Evict until so many bytes are free, if that can be; `write` says when it cannot."""
        may_go = sum(s.disk_bytes for s in self._index if not s.pins and not s.locks)
        if n_bytes > self.disk.bytes_total - self.disk.bytes_used + may_go:
            return
        while n_bytes > self.disk.bytes_total - self.disk.bytes_used:
            now_s = self._clock.monotonic()
            victim = self._index.disk_victim(now_s)
            if victim is None:
                return
            self.disk.delete(victim.key)
            self._index.put(victim, now_s, disk_bytes=0)
            self.n_evicted += 1

    # --- told

    def told(self, status: StoreStatus) -> StoreStatus:
        """The store's status with the disk's side of it."""
        leased, stored = self._bytes_leased(), sum(s.disk_bytes for s in self._index)
        whole = pool(
            "disk",
            total=max(self.disk.bytes_total, stored),
            resident=stored - leased,
            leased=leased,
            configured=self.disk.bytes_total,
            n_blocks=sum(s.disk_bytes > 0 for s in self._index),
        )
        damaged: Counter[str] = Counter()
        for cause, n in [*self.disk.damaged.items(), *self._leases.damaged.items()]:
            damaged[cause.value] += n
        return replace(
            status,
            pools=(*status.pools, whole),
            n_evicted_disk=self.n_evicted,
            n_written=self.n_written,
            n_write_faults=self.n_write_faults,
            damaged=dict(damaged),
            scan_s=round(self.scan_s, 3),
        )

    def flush(self) -> None:
        """Wait until everything asked for by now is done. No lock held."""
        self._writer.submit(int).result()

    def close(self) -> None:
        """Finish what was asked for and end the thread. No lock held."""
        self._writer.shutdown()


def head_of(snapshot: Snapshot) -> BlockHead:
    """The snapshot's head, as it is written: a chain of one block below its parent key."""
    return BlockHead(snapshot.key, snapshot.parent, 0, snapshot.tokens, False, snapshot.n_bytes)
