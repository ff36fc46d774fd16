"""The store of whole-state snapshots, for models whose state cannot be cut into blocks; in place of `store.PrefixStore`.

The same calls, keys, tiers and rules as there, but what is kept is one state per place (snapshot_index.py), saved while the
stream stands exactly there: the core stops prefill at `snapshot_points`, since what comes later cannot be taken off again.

- RAM holds copies by byte budget; a leased snapshot leaves it only once it is on disk.
- Disk holds what is leased, at once, and what was hit twice. One writer thread does all that changes the disk, in order.
- What lies on disk alone is read into RAM when it is looked up. What turns out damaged is dropped and counts as missing:
  `restore` then says 0.

Thread-safe by one lock, held for index work only; bytes are moved outside it, of snapshots that are locked.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from msgspec import Struct

from keepwarm.core.clock import Clock, SystemClock
from keepwarm.core.prompt import Prompt
from keepwarm.engine import StoreStatus
from keepwarm.engine.breakeven import Speeds
from keepwarm.engine.chunks import Piece, pieces, storable
from keepwarm.engine.disk import DiskTier
from keepwarm.engine.eviction import policy
from keepwarm.engine.governor import pool
from keepwarm.engine.leasebook import LeaseBook
from keepwarm.engine.leasefile import LeaseFiles
from keepwarm.engine.memory import touched
from keepwarm.engine.model import Blob, Model, ModelFault
from keepwarm.engine.prefix import BlockKey, root_key
from keepwarm.engine.ram import RamTier
from keepwarm.engine.reuse import Done
from keepwarm.engine.snapshot_disk import SnapshotDisk, head_of
from keepwarm.engine.snapshot_index import Snapshot, SnapshotIndex, snapshot_points
from keepwarm.engine.store import NoRoom
from keepwarm.engine.tiers import BlockLost, TierFull

LAYOUT_VERSION = "snapshots.1"  # of what a snapshot's bytes mean; part of every key
BYTES_TYPICAL = 1 << 20  # least size of a state, for how many a policy may have to know


class HeldSnapshot(Struct, frozen=True):
    """A locked match, or none. Give it back with `release`."""

    snapshot: Snapshot | None
    n_tokens: int
    tier: str | None = None  # where it lay when it was found

    @property
    def n_found(self) -> int:
        """A state is read whole or not at all."""
        return self.n_tokens


class SnapshotCounters(Struct):
    """Since the start of the process."""

    hits_host: int = 0
    hits_disk: int = 0
    misses: int = 0
    evicted_host: int = 0
    not_admitted: int = 0


class SnapshotStore:
    """One store for one model. `identity` names everything the bits depend on beside tokens and tenant.

    `disk` and its lease files go together; without them what is pinned stays in RAM. `on_damage` is called, from any thread
    and without locks, with each lease whose snapshot was lost.
    """

    def __init__(
        self,
        ram: RamTier,
        *,
        identity: Sequence[str],
        granularity: int,
        disk: tuple[DiskTier, LeaseFiles] | None = None,
        policy_name: str = "cost",
        clock: Clock | None = None,
    ) -> None:
        self.granularity, self.policy_name = granularity, policy_name
        self.speeds = Speeds()
        self.counters = SnapshotCounters()
        self.on_damage: Callable[[str], None] = lambda _pin: None
        self._identity, self._ram = tuple(identity), ram
        self._clock = clock or SystemClock()
        self._bytes_configured = ram.bytes_total
        disk_bytes = disk[0].bytes_total if disk else 0
        self._index = SnapshotIndex(
            policy(policy_name, ram.bytes_total // BYTES_TYPICAL + 1),
            policy(policy_name, disk_bytes // BYTES_TYPICAL + 1),
        )
        self._lock = threading.Lock()
        self._ram_writes = threading.Lock()  # taken before `_lock`: room that was made is used before more is
        self._reader = ThreadPoolExecutor(1, "read")
        self._reading: dict[bytes, Future[None]] = {}
        self._scratch = np.empty(0, np.uint8)
        self._durable: SnapshotDisk | None = None
        held: dict[str, Snapshot] = {}
        if disk:
            self._durable = SnapshotDisk(self._index, self._lock, ram, *disk, self._clock)
            with self._lock:
                held = self._durable.recover()
        self._leases = LeaseBook(self._lock, self._unpin, self._durable, held)

    # --- find and lock

    def pieces(self, prompt: Prompt) -> tuple[Piece, ...]:
        """The prompt's pieces at this model's granularity."""
        return pieces(prompt.n_tokens, prompt.marks, self.granularity)

    def snapshot_points(self, prompt: Prompt) -> tuple[int, ...]:
        """Where prefill must stop to save, ascending; `snapshot_index.cut_at` gives the pieces for its chunks."""
        return snapshot_points(prompt, self.pieces(prompt), self.granularity)

    def _root(self, tenant: str) -> BlockKey:
        return root_key(*self._identity, tenant)

    def hold(
        self, prompt: Prompt, *, want_logits: bool, uses: bool = True, end: int | None = None
    ) -> HeldSnapshot:  # fmt: skip
        """Find and lock the longest usable snapshot, and begin to read it when it lies on disk alone.

        `uses`: a turn is going to read it, which counts for eviction and admission; without, somebody only looks. `end`:
        of no more than this many tokens.
        """
        parts, root = self.pieces(prompt), self._root(prompt.tenant)
        now_s = self._clock.monotonic()
        with self._lock:
            known = prompt.tokens if end is None else prompt.tokens[:end]
            found = self._index.match(root, known, parts, self.granularity, want_logits=want_logits)
            tier = None if found is None else "host" if found.in_ram else "disk"
            if uses:
                self.counters.hits_host += tier == "host"
                self.counters.hits_disk += tier == "disk"
                self.counters.misses += tier is None
            if found is None:
                return HeldSnapshot(None, 0)
            self._index.lock(found, now_s)
            if uses:
                self._index.hit(found, now_s)
                if self._durable:
                    self._durable.admit(found)
            if not found.in_ram and self._durable and found.key not in self._reading:
                self._index.lock(found, now_s)
                self._reading[found.key] = self._reader.submit(self._read_ahead, self._durable.disk, found)
        return HeldSnapshot(found, found.n_tokens, tier)

    def release(self, held: HeldSnapshot) -> None:
        """Unlock. Exactly once for each `hold`."""
        if held.snapshot is not None:
            with self._lock:
                self._index.unlock(held.snapshot, self._clock.monotonic())

    def n_unread(self, held: HeldSnapshot) -> int:
        """Tokens of a match that are still on their way into RAM."""
        with self._lock:
            return held.n_tokens if held.snapshot is not None and held.snapshot.key in self._reading else 0

    def restore(self, held: HeldSnapshot, model: Model, stream: int) -> int:
        """Put the held state into an empty stream; how many tokens that are: 0 when it was found damaged.

        Compute thread only. Raises ModelFault.
        """
        snapshot = held.snapshot
        if snapshot is None:
            return 0
        with self._lock:
            reading = self._reading.get(snapshot.key)
        if reading is not None:
            reading.result()
        if snapshot.n_bytes > len(self._scratch):
            self._scratch = touched(snapshot.n_bytes)
        blob = self._scratch[: snapshot.n_bytes]
        begin = self._clock.monotonic()
        if not self._read(snapshot, blob):
            return 0
        model.load(stream, blob)
        if model.n_held(stream) != snapshot.n_tokens:
            raise ModelFault(f"a state of {snapshot.n_tokens} tokens came back as {model.n_held(stream)}")
        if held.tier == "host":
            self.speeds.observe_restore("host", snapshot.n_bytes, self._clock.monotonic() - begin)
        return snapshot.n_tokens

    def _read(self, snapshot: Snapshot, into: Blob) -> bool:
        """The locked snapshot's bytes, from where it lies; False when they are lost."""
        if snapshot.in_ram:
            self._ram.read(snapshot.key, into)  # locked, so it is there
            return True
        if not snapshot.disk_bytes or self._durable is None:
            return False
        try:
            self._durable.disk.read(snapshot.key, into)
        except BlockLost:
            self._lose(snapshot)
            return False
        return True

    def _lose(self, snapshot: Snapshot) -> None:
        """Its file turned out to be bad, and is deleted."""
        with self._lock:
            if not snapshot.disk_bytes:
                return  # told already
            self._index.put(snapshot, self._clock.monotonic(), disk_bytes=0)
            told = [] if snapshot.in_ram else [pin for pin, leased in self._leases.items() if leased is snapshot]
        for pin in told:
            self.on_damage(pin)

    def _read_ahead(self, disk: DiskTier, snapshot: Snapshot) -> None:
        """Bring a locked snapshot into RAM, if room can be had. The reader's thread."""
        body, begin = np.empty(snapshot.n_bytes, np.uint8), self._clock.monotonic()
        try:
            disk.read(snapshot.key, body)
            self.speeds.observe_restore("disk", snapshot.n_bytes, self._clock.monotonic() - begin)
            self._put_in_ram(snapshot, body)
        except BlockLost:
            self._lose(snapshot)
        finally:
            with self._lock:
                del self._reading[snapshot.key]
                self._index.unlock(snapshot, self._clock.monotonic())

    # --- save

    def n_missing(self, prompt: Prompt, n_evaluated: int) -> int:
        """How many of the first `n_evaluated` tokens prefill will have stored when it has got there, and are not yet."""
        parts = self.pieces(prompt)
        point = max((at for at in self.snapshot_points(prompt) if at <= n_evaluated), default=0)
        with self._lock:
            stored = self._index.prefixes(self._root(prompt.tenant), prompt.tokens[:n_evaluated], parts)
        return max(0, point - max((snapshot.n_tokens for snapshot in stored), default=0))

    def save(
        self, prompt: Prompt, n_evaluated: int, model: Model, stream: int, *, spend: bool, pin: str | None,
        write_end: int = 0,
    ) -> int:  # fmt: skip
        """Store the state of the first `n_evaluated` tokens if `stream` holds exactly these; the tokens that this added.

        Nothing is stored elsewhere than where the bits can be shared. With `pin` it stays until `unpin(pin)`: raises NoRoom
        when that cannot be had, before anything is evicted for it. A stream that is past the last snapshot point pins what
        was saved there; ModelFault when nothing was. `spend` changes nothing: a state is taken whole. One of up to
        `write_end` tokens was asked for by a breakpoint and goes to the disk at once. Compute thread only.
        """
        del spend
        parts, root = self.pieces(prompt), self._root(prompt.tenant)
        n = storable(n_evaluated, parts, self.granularity)
        with self._lock:
            snapshot = self._locked(root, prompt, parts, n)
        added = 0
        if snapshot is None and 0 < n == n_evaluated and model.n_held(stream) == n:
            snapshot = self._add(root, prompt, parts, model.save(stream), n, must=pin is not None)
            added = n if snapshot is not None else 0
        elif snapshot is None and pin is not None:
            points = [at for at in self.snapshot_points(prompt) if at <= n_evaluated]
            with self._lock:
                snapshot = self._locked(root, prompt, parts, points[-1] if points else 0)
        if snapshot is None and pin is not None:
            raise ModelFault(f"nothing was kept of {n_evaluated} tokens, and the stream holds {model.n_held(stream)}")
        if snapshot is not None:
            try:
                if pin is not None:
                    self._pin(pin, snapshot)
                elif self._durable and n <= write_end:
                    with self._lock:
                        self._durable.admit(snapshot, asked=True)
            finally:
                with self._lock:
                    self._index.unlock(snapshot, self._clock.monotonic())
        return added

    def _locked(self, root: BlockKey, prompt: Prompt, parts: Sequence[Piece], n: int) -> Snapshot | None:
        found = self._index.exact(root, prompt.tokens, parts, n) if n else None
        if found is None or found.is_hollow:
            return None
        self._index.lock(found, self._clock.monotonic())
        return found

    def _add(
        self, root: BlockKey, prompt: Prompt, parts: Sequence[Piece], blob: Blob, n: int, *, must: bool
    ) -> Snapshot | None:  # fmt: skip
        """Enter and keep a new state, locked. None, or NoRoom if it must, when there is no room for it."""
        if must:
            self._need_room(len(blob))
        now_s = self._clock.monotonic()
        with self._lock:
            snapshot = self._index.new(
                root, prompt.tokens, parts, n, len(blob), at_mark=n in prompt.marks, now_s=now_s
            )  # fmt: skip
        if self._put_in_ram(snapshot, blob):
            return snapshot
        with self._lock:
            self._index.unlock(snapshot, now_s)  # it lies nowhere, so it is out of the index
        if must:
            raise NoRoom(len(blob), self._ram.bytes_total - self._ram.bytes_used)
        return None

    def _put_in_ram(self, snapshot: Snapshot, body: Blob) -> bool:
        """Copy a locked snapshot's bytes into RAM if room can be made; whether it lies there now."""
        head = head_of(snapshot)
        with self._ram_writes:
            with self._lock:
                if snapshot.in_ram:
                    return True
                if not self._make_ram_room(self._ram.cost(head)):
                    return False
            try:
                self._ram.write(((head, body),))
            except TierFull:  # the budget was lowered meanwhile
                return False
            with self._lock:
                self._index.put(snapshot, self._clock.monotonic(), in_ram=True)
        return True

    def _make_ram_room(self, n_bytes: int) -> bool:
        """Evict until so many bytes are free; nothing is evicted when that cannot be. Lock held."""
        if n_bytes > self._ram.bytes_total - self._ram.bytes_used + self._index.bytes_reclaimable():
            return False
        while n_bytes > self._ram.bytes_total - self._ram.bytes_used:
            if not self._evict_from_ram():
                return False
        return True

    def _evict_from_ram(self) -> bool:
        now_s = self._clock.monotonic()
        victim = self._index.ram_victim(now_s)
        if victim is None:
            return False
        self._ram.delete(victim.key)
        self._index.put(victim, now_s, in_ram=False)
        self.counters.evicted_host += 1
        self.counters.not_admitted += not victim.disk_bytes
        return True

    # --- leases and the disk

    def check_room(self, prompt: Prompt) -> None:
        """Whether a lease of this prompt could fit, as far as the size of its state can be told before. Raises NoRoom."""
        parts = self.pieces(prompt)
        n = storable(prompt.n_tokens, parts, self.granularity)
        with self._lock:
            there = self._index.exact(self._root(prompt.tenant), prompt.tokens, parts, n) if n else None
            least = max((other.n_bytes for other in self._index if other.n_tokens <= n), default=0)  # states only grow
        if there is None or there.is_hollow:
            self._need_room(least)

    def _need_room(self, n_bytes: int) -> None:
        with self._lock:
            free = self._ram.bytes_total - self._ram.bytes_used + self._index.bytes_reclaimable()
            if n_bytes > free:
                raise NoRoom(n_bytes, max(free, 0))
            if self._durable and n_bytes > (free := self._durable.room()):
                raise NoRoom(n_bytes, max(free, 0))

    def _pin(self, pin: str, snapshot: Snapshot) -> None:
        with self._lock:
            self._index.pin(snapshot, self._clock.monotonic())
            self._leases.keep(pin, snapshot)

    def make_durable(self, pin: str, done: Done) -> None:
        """Call `done`, possibly from another thread, when the pinned state is on disk (at once without a disk tier)."""
        self._leases.make_durable(pin, done)

    def unpin(self, pin: str) -> None:
        """Give a pinned snapshot back to eviction. Unknown pins are no error."""
        self._leases.end(pin)

    def _unpin(self, snapshot: Snapshot) -> None:
        self._index.unpin(snapshot, self._clock.monotonic())

    @property
    def pins(self) -> tuple[str, ...]:
        """What is leased: after the start, the leases that are whole."""
        return self._leases.pins

    # --- budgets

    def prepare_host(self) -> None:
        """Nothing: every state gets memory of its own."""

    def limit_host(self, n_bytes: int) -> None:
        """Keep RAM within so many bytes from now on, as far as nothing locked or leased is in the way."""
        with self._lock:
            self._ram.bytes_total = max(0, min(n_bytes, self._bytes_configured))
            while self._ram.bytes_used > self._ram.bytes_total and self._evict_from_ram():
                pass

    @property
    def bytes_configured(self) -> int:
        """The RAM budget without memory pressure."""
        return self._bytes_configured

    @property
    def bytes_total(self) -> int:
        return max(self._ram.bytes_total, self._ram.bytes_used)

    @property
    def bytes_resident(self) -> int:
        """Bytes of snapshots in RAM that may leave it."""
        return self._ram.bytes_used - self.bytes_pinned

    @property
    def bytes_pinned(self) -> int:
        """Of snapshots that must stay in RAM: pinned, and not on disk (yet)."""
        return sum(snapshot.n_bytes for snapshot in self._index if snapshot.kept_in_ram)

    def status(self) -> StoreStatus:
        """What an operator sees; the pool of live KV is the engine's to add."""
        with self._lock:
            return self._status()

    def _status(self) -> StoreStatus:
        counters, speeds, configured = self.counters, self.speeds, self._bytes_configured
        leased = self.bytes_pinned
        used, n_in_ram = self._ram.bytes_used, sum(s.in_ram for s in self._index)
        total = max(self._ram.bytes_total, used)
        status = StoreStatus(
            n_not_admitted=counters.not_admitted,
            pools=(
                pool(
                    "host", total=total, resident=used - leased, leased=leased, configured=configured, n_blocks=n_in_ram
                ),
            ),
            policy=self.policy_name,
            n_leases=len(self._leases),
            n_hits_host=counters.hits_host,
            n_hits_disk=counters.hits_disk,
            n_misses=counters.misses,
            n_evicted_host=counters.evicted_host,
            prefill_tokens_per_s=speeds.prefill_tokens_per_s,
            host_bytes_per_s=speeds.host_bytes_per_s,
            disk_bytes_per_s=speeds.disk_bytes_per_s,
        )
        return self._durable.told(status) if self._durable else status

    def flush(self) -> None:
        """Wait until all that was to be read or written by now is."""
        self._reader.submit(int).result()
        if self._durable:
            self._durable.flush()

    def close(self) -> None:
        """Finish reading and writing, and end the threads."""
        self._reader.shutdown()
        if self._durable:
            self._durable.close()

    def check_integrity(self) -> None:
        """Assert index and tiers agree: free + resident + pinned = total."""
        with self._lock:
            self._index.check_integrity()
            self._status()
            assert all(leased.pins for _, leased in self._leases.items())
