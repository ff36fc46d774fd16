"""The prefix store: index, tiers and state layout together. Finds, locks, restores, saves and leases prefixes.

Thread-safe by one lock, held for index work only; bytes are copied outside it, in slots that are locked or not yet in
the index. A prompt's tenant is part of its chain's root, so nothing is ever found for another tenant.

What lies on disk alone is read ahead into host slots by a few threads as soon as it is looked up; a restore assembles
each block when it has arrived, so reading and putting together overlap (`reading.py`). What turns out to be damaged ends
the match there: `restore` says how much it really restored.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from keepwarm.core.clock import Clock, SystemClock
from keepwarm.core.prompt import Prompt
from keepwarm.engine import StoreStatus
from keepwarm.engine.breakeven import Speeds, fastest, worth
from keepwarm.engine.chunks import Piece, pieces, storable, usable
from keepwarm.engine.disk import DiskTier
from keepwarm.engine.durable import Durable
from keepwarm.engine.eviction import policy
from keepwarm.engine.governor import pool
from keepwarm.engine.layout import BLOCK_TOKENS, Assembler, Layout, cut, parse
from keepwarm.engine.leasebook import LeaseBook
from keepwarm.engine.leasefile import LeaseFiles
from keepwarm.engine.memory import touched
from keepwarm.engine.model import Blob, Model
from keepwarm.engine.nodes import Node
from keepwarm.engine.prefix import BlockKey, Missing, PrefixIndex, root_key
from keepwarm.engine.reading import Reading
from keepwarm.engine.reuse import Done
from keepwarm.engine.tiers import BlockLost, HostTier

BYTES_AHEAD = 256 << 20  # of the host tier kept ready for new blocks: 11,000 tokens of a small model, 2,000 of a 7B
SLACK = 8  # a buffer with up to an eighth more cells than wanted is loaded as it is


class NoRoom(Exception):
    """A leased prefix does not fit: numbers for the error message."""

    def __init__(self, n_bytes_needed: int, n_bytes_free: int) -> None:
        super().__init__(f"needs {n_bytes_needed:,} bytes, {n_bytes_free:,} can be freed")
        self.n_bytes_needed, self.n_bytes_free = n_bytes_needed, n_bytes_free


class Held(Struct, frozen=True):
    """A locked match: usable tokens and the nodes that cover them. Give it back with `release`."""

    nodes: tuple[Node, ...]
    n_tokens: int
    parts: tuple[Piece, ...] = ()
    want_logits: bool = True
    tier: str | None = None  # the slowest one it lay in when it was found
    n_found: int = 0  # tokens that could be read; the rest are faster computed


class _Assembled(Struct, frozen=True):
    """The assembly buffer: a blob of `n_cells` cells, of which the first `n_tokens` are these nodes' tokens."""

    nodes: tuple[Node, ...]
    n_tokens: int
    n_cells: int
    blob: Blob


def _n_same(there: _Assembled, held: Held) -> int:
    """How many of the held nodes the buffer has already, as far as they are held. A node's bytes never change."""
    n_same = 0
    for mine, has in zip(held.nodes, there.nodes, strict=False):
        if mine != has or min(mine.end, held.n_tokens) > there.n_tokens:
            break
        n_same += 1
    return n_same


class StoreCounters(Struct):
    """Since the start of the process."""

    hits_host: int = 0
    hits_disk: int = 0
    misses: int = 0
    tokens_recomputed: int = 0
    skips: int = 0  # hits that would be faster without reading all: breakeven.worth reads it now and then all the same
    evicted_host: int = 0


class PrefixStore:
    """One store for one model. `identity` names everything the bits depend on beside tokens and tenant.

    `disk` and its lease files go together; without them what is pinned stays in the host tier. `on_damage` is called, from a
    reading thread and without locks, with each lease that lost a block. With `breaks_even` False everything found is read,
    whatever it takes.
    """

    def __init__(  # noqa: PLR0913 - what a store is made of, each named at the one place that builds it
        self,
        layout: Layout,
        tier: HostTier,
        *,
        identity: Sequence[str],
        granularity: int,
        n_ctx: int,
        disk: tuple[DiskTier, LeaseFiles] | None = None,
        policy_name: str = "cost",
        breaks_even: bool = True,
        clock: Clock | None = None,
    ) -> None:
        self.granularity, self._breaks_even = granularity, breaks_even
        self._layout, self._tier, self._identity = layout, tier, tuple(identity)
        self._clock = clock or SystemClock()
        self.policy_name = policy_name
        n_disk = disk[0].bytes_total // tier.slot_bytes if disk else 1
        self._index = PrefixIndex(policy(policy_name, max(tier.n_slots, 1)), policy(policy_name, max(n_disk, 1)))
        self._lock = threading.Lock()
        self._assembled: _Assembled | None = None
        self._pool = ThreadPoolExecutor(2, "assemble")
        self._assembler = Assembler(layout, n_ctx, touched(layout.blob_bytes(n_ctx)), self._pool)
        self._bytes_configured = tier.n_slots * tier.slot_bytes
        self.speeds = Speeds()
        self.counters = StoreCounters()
        self.on_damage: Callable[[str], None] = lambda _pin: None
        self._durable: Durable | None = None
        self._reading: Reading | None = None
        held: dict[str, Sequence[Node]] = {}
        if disk:
            self._durable = Durable(self._index, self._lock, tier, *disk, self._clock)
            self._reading = Reading(disk[0], self.speeds, self._clock)
            with self._lock:
                held = self._durable.recover(layout.cell_bytes)
        self._leases = LeaseBook(self._lock, self._index.unpin, self._durable, held)

    # --- find and lock

    def pieces(self, prompt: Prompt) -> tuple[Piece, ...]:
        """The prompt's pieces at this model's granularity."""
        return pieces(prompt.n_tokens, prompt.marks, self.granularity)

    def snapshot_points(self, prompt: Prompt) -> tuple[int, ...]:
        """Where prefill must stop to save: nowhere, blocks are cut out of any state."""
        assert prompt.n_tokens
        return ()

    def _root(self, tenant: str) -> BlockKey:
        return root_key(*self._identity, tenant)

    def hold(self, prompt: Prompt, *, want_logits: bool, uses: bool = True, end: int | None = None) -> Held:
        """Find and lock the longest usable prefix, and begin to read what of it lies on disk alone.

        `uses`: a turn is going to read it, which counts for eviction and admission; without, somebody only looks. `end`:
        no more than this many tokens.
        """
        parts = self.pieces(prompt)
        now_s = self._clock.monotonic()
        with self._lock:
            found = self._index.match(self._root(prompt.tenant), prompt.tokens, parts)
            n_there = found.n_tokens if end is None else min(found.n_tokens, end)
            n_found = usable(n_there, parts, self.granularity, want_logits=want_logits)
            n = usable(self._worth(found.nodes, n_found, uses=uses), parts, self.granularity, want_logits=want_logits)
            nodes = tuple(node for node in found.nodes if node.start < n)
            self._index.lock(nodes)
            on_disk = [node for node in nodes if node.slot < 0]
            tier = None if not nodes else "disk" if on_disk else "host"
            if uses:
                self._index.touch(nodes, now_s)
                self._count(tier, n_found - n)
                if self._durable:
                    self._durable.admit(nodes)
            self._read_ahead(on_disk)
        return Held(nodes, n, parts, want_logits, tier, n_found)

    def _worth(self, nodes: Sequence[Node], n: int, *, uses: bool) -> int:
        """How many of the n found tokens to read. A leased prefix is read in any case: that is what was promised."""
        if not (self._breaks_even and self._durable) or any(node.pins for node in nodes):
            return n
        n_host = min(next((node.start for node in nodes if node.slot < 0), n), n)
        lies = n_host, n - n_host, self._layout.cell_bytes, self.speeds
        n_read = worth(*lies, self.counters.skips)
        self.counters.skips += uses and fastest(*lies) < n
        return n_read

    def _count(self, tier: str | None, n_skipped: int) -> None:
        self.counters.hits_host += tier == "host"
        self.counters.hits_disk += tier == "disk"
        self.counters.misses += tier is None
        self.counters.tokens_recomputed += n_skipped

    def release(self, held: Held) -> None:
        """Unlock. Exactly once for each `hold`."""
        with self._lock:
            self._index.unlock(held.nodes)

    # --- reading from disk

    def _read_ahead(self, nodes: Sequence[Node]) -> None:
        """Begin to read these nodes into slots, in order, as far as slots can be had. Lock held."""
        for node in nodes:
            assert self._reading
            if self._reading.has(node):
                continue
            slot = self._take()
            if slot is None:
                return
            self._index.lock((node,))
            into = self._tier.bytes_of(slot)[: node.n_tokens * self._layout.cell_bytes]
            self._reading.begin(node, into, partial(self._arrived, node, slot))

    def _arrived(self, node: Node, slot: int, lost: BlockLost | None) -> None:
        """A reading thread is done with a block."""
        assert self._reading
        with self._lock:
            self._reading.forget(node)
            if lost is None and node.slot < 0:
                self._index.fill(node, slot, now_s=self._clock.monotonic())
            else:
                self._tier.free(slot)
            damaged = self._lose(node) if lost is not None else []
            self._index.unlock((node,))
        for pin in damaged:
            self.on_damage(pin)

    def _lose(self, node: Node) -> list[str]:
        """The node's file turned out to be bad and is deleted; the leases that are to be told. Lock held."""
        if not node.disk_bytes:
            return []  # told already
        self._index.leave_disk(node)
        return [pin for pin, nodes in self._leases.items() if node in nodes]

    def n_unread(self, held: Held) -> int:
        """Tokens of a match that are not in host RAM yet."""
        with self._lock:
            return sum(node.n_tokens for node in held.nodes if node.slot < 0 and not node.is_hollow)

    def restore(self, held: Held, model: Model, stream: int) -> int:
        """Put the held tokens' state into an empty stream; returns how many tokens were restored. Compute thread only.

        Fewer than were held when a block was found damaged: then up to the last usable place before it. The blob
        assembled last is used again when it has room for the held tokens: only blocks that it does not hold yet are
        copied into it, so users who ask about one context in turn pay for loading, not for putting its blocks together.
        Cells that it has beyond are dropped from the stream. Raises ModelFault.
        """
        begin = self._clock.monotonic()
        nodes, n = held.nodes, held.n_tokens
        while n:
            lost = self._assemble(replace(held, nodes=nodes, n_tokens=n))
            if lost is None:
                break
            n = usable(lost.start, held.parts, self.granularity, want_logits=held.want_logits)
            nodes = tuple(node for node in nodes if node.start < n)
        if not n:
            return 0
        there = self._assembled
        assert there is not None
        model.load(stream, there.blob)
        if there.n_cells > n:
            model.forget(stream, n, -1)
        if held.tier == "host":
            self.speeds.observe_restore("host", n * self._layout.cell_bytes, self._clock.monotonic() - begin)
        return n

    def _assemble(self, held: Held) -> Node | None:
        """Have the held tokens in the assembly buffer; the first node that cannot be had, if one cannot."""
        there, self._assembled = self._assembled, None  # if copying fails, the buffer is nothing any more
        n = held.n_tokens
        if there is None or not n <= there.n_cells <= n + n // SLACK + BLOCK_TOKENS:
            n_same, n_cells, blob = 0, n, self._assembler.blank(n)
        else:
            n_same, n_cells, blob = _n_same(there, held), there.n_cells, there.blob
        at = held.nodes[n_same].start if n_same < len(held.nodes) else n
        todo = held.nodes[n_same:]
        while todo:
            ready, lost = self._ready(todo)
            if lost is not None:
                return lost
            end = min(todo[len(ready) - 1].end, n)
            self._assembler.patch(blob, n_cells, ready, at, end)
            todo, at = todo[len(ready) :], end
        n_there = max(n, there.n_tokens) if there is not None and n_same == len(held.nodes) else n
        nodes = there.nodes if there is not None and n_there > n else held.nodes
        self._assembled = _Assembled(nodes, n_there, n_cells, blob)
        return None

    def _ready(self, todo: Sequence[Node]) -> tuple[list[tuple[NDArray[np.uint8], int]], Node | None]:
        """Bytes of the first nodes that are there by now, at least one: waits for it or reads it. Or the lost one."""
        ready = [(self._tier.bytes_of(node.slot), node.n_tokens) for node in _leading(todo)]
        if ready:
            return ready, None
        first = todo[0]
        assert self._reading
        self._reading.wait(first)
        if first.slot >= 0:
            return [(self._tier.bytes_of(first.slot), first.n_tokens)], None
        if not first.is_hollow:  # no slot could be had for it
            scratch = np.empty(first.n_tokens * self._layout.cell_bytes, np.uint8)
            try:
                self._reading.now(first, scratch)
            except BlockLost:
                with self._lock:
                    damaged = self._lose(first)
                for pin in damaged:
                    self.on_damage(pin)
            else:
                return [(scratch, first.n_tokens)], None
        return [], first

    # --- save

    def n_missing(self, prompt: Prompt, n_evaluated: int) -> int:
        """How many of the first `n_evaluated` tokens could be stored and are not."""
        parts = self.pieces(prompt)
        n = storable(n_evaluated, parts, self.granularity)
        with self._lock:
            have, _ = self._index.missing(self._root(prompt.tenant), prompt.tokens, parts, n)
        return n - have.n_tokens

    def save(
        self, prompt: Prompt, n_evaluated: int, model: Model, stream: int, *, spend: bool, pin: str | None,
        write_end: int = 0,
    ) -> int:  # fmt: skip
        """Store what is new of the first `n_evaluated` tokens of `stream`; returns how many tokens were added.

        `spend`: the stream is not needed any more, so cells that are stored already are dropped before saving. With
        `pin` all of it stays until `unpin(pin)`; raises NoRoom when that cannot be had, before anything is evicted for
        it. Without it, what finds no room is not stored. Blocks that begin before `write_end` were asked for by a
        breakpoint, so they go to the disk without being seen twice. Compute thread only.
        """
        parts = self.pieces(prompt)
        n = storable(n_evaluated, parts, self.granularity)
        root = self._root(prompt.tenant)
        with self._lock:
            have, wanted = self._index.missing(root, prompt.tokens, parts, n)
            self._index.lock(have.nodes)
        path = list(have.nodes)
        try:
            if pin is not None:
                self._need_room(path, wanted)
            if wanted:
                self._add(prompt, root, path, wanted, model, stream, spend=spend)
            with self._lock:
                if pin is not None:
                    if len(path) < len(have.nodes) + len(wanted):
                        raise NoRoom(len(wanted) * self._tier.slot_bytes, self._tier.n_free * self._tier.slot_bytes)
                    self._index.pin(path)
                    self._leases.keep(pin, self._index.keep(path))
                elif self._durable and any(self._durable.is_ghost(node) for node in path[len(have.nodes) :]):
                    self._durable.admit(path)
                elif self._durable:
                    self._durable.admit([node for node in path if node.start < write_end])
        finally:
            with self._lock:
                self._index.unlock(path)
        return sum(node.n_tokens for node in path[len(have.nodes) :])

    def check_room(self, prompt: Prompt) -> None:
        """Whether a lease of this prompt fits, by what is there now. Raises NoRoom."""
        parts = self.pieces(prompt)
        n = storable(prompt.n_tokens, parts, self.granularity)
        with self._lock:
            have, wanted = self._index.missing(self._root(prompt.tenant), prompt.tokens, parts, n)
        self._need_room(have.nodes, wanted)

    def _need_room(self, path: Sequence[Node], wanted: Sequence[Missing]) -> None:
        with self._lock:
            free = self._tier.n_free + self._index.n_reclaimable()
            if len(wanted) > free:
                raise NoRoom(len(wanted) * self._tier.slot_bytes, free * self._tier.slot_bytes)
            if self._durable:
                lengths = [node.n_tokens for node in path if not node.pins] + [w.end - w.start for w in wanted]
                needed = sum(self._durable.cost(n, self._layout.cell_bytes) for n in lengths)
                room = self._durable.room(
                    self._index.n_pinned * self._durable.cost(BLOCK_TOKENS, self._layout.cell_bytes)
                )
                if needed > room:
                    raise NoRoom(needed, max(room, 0))

    def _add(
        self,
        prompt: Prompt,
        root: BlockKey,
        path: list[Node],
        wanted: Sequence[Missing],
        model: Model,
        stream: int,
        *,
        spend: bool,
    ) -> None:
        """Cut the wanted blocks out of the stream's state and put them into the index, each locked, until room ends."""
        start = wanted[0].start
        if spend:
            model.forget(stream, wanted[-1].end, -1)
            if start:
                model.forget(stream, 0, start)
        cells = parse(model.save(stream))
        first = int(cells.positions[0])
        assert np.array_equal(cells.positions[: wanted[-1].end - first], np.arange(first, wanted[-1].end))
        for extent in wanted:
            with self._lock:
                known = self._index.child(root, path[-1] if path else None, prompt.tokens, extent)
                if known is not None and not known.is_hollow:  # behind a damaged block
                    self._index.lock((known,))
                    path.append(known)
                    continue
                slot = self._take()
            if slot is None:
                return
            cut(cells, extent.start - first, extent.end - extent.start, self._tier.bytes_of(slot))
            with self._lock:
                path.append(self._enter(prompt, root, path[-1] if path else None, extent, slot, known, n_read=start))

    def _enter(
        self, prompt: Prompt, root: BlockKey, above: Node | None, extent: Missing, slot: int, known: Node | None, n_read: int
    ) -> Node:  # fmt: skip
        """Put a block that lies in `slot` into the index, locked. Lock held."""
        now_s = self._clock.monotonic()
        if known is not None:  # hollow, and gone if what hung on it made room
            known = self._index.child(root, above, prompt.tokens, extent)
        if known is not None and known.is_hollow:
            self._index.fill(known, slot, now_s=now_s, n_read=n_read)
            node = known
        else:
            node, superfluous = self._index.add(root, above, prompt.tokens, extent, slot, now_s=now_s, n_read=n_read)
            for gone in superfluous:
                if gone.slot >= 0:
                    self._tier.free(gone.slot)
                if gone.disk_bytes and self._durable:
                    self._durable.disk.delete(gone.key)
        self._index.lock((node,))
        return node

    def _take(self) -> int | None:
        slot = self._tier.take()
        while slot is None:
            if not self._evict():
                return None
            slot = self._tier.take()
        return slot

    def _evict(self) -> bool:
        """Free one host slot; False when nothing may go. Lock held."""
        gone = self._index.evict_host(self._clock.monotonic())
        if gone is None:
            return False
        self._tier.free(gone.slot)
        self.counters.evicted_host += 1
        if self._durable:
            self._durable.left_host(gone)
        return True

    # --- leases

    def make_durable(self, pin: str, done: Done) -> None:
        """Call `done`, possibly from another thread, when the pinned prefix is on disk (at once without a disk tier)."""
        self._leases.make_durable(pin, done)

    def unpin(self, pin: str) -> None:
        """Give a pinned prefix back to eviction. Unknown pins are no error."""
        self._leases.end(pin)

    @property
    def pins(self) -> tuple[str, ...]:
        """What is leased: after the start, the leases that are whole."""
        return self._leases.pins

    # --- budgets

    def prepare_host(self) -> None:
        """Have memory for the next blocks ready: without, 5,000 tokens' first blocks cost as much in page faults as to read."""
        self._tier.populate(BYTES_AHEAD)

    def limit_host(self, n_bytes: int) -> None:
        """Keep the host tier within so many bytes from now on, as far as nothing locked or leased is in the way."""
        with self._lock:
            self._tier.limit(n_bytes // self._tier.slot_bytes)
            while self._tier.n_used > self._tier.n_slots_max and self._evict():
                pass
            if self._tier.n_slots_max < self._tier.n_slots:
                self._tier.give_back()

    @property
    def bytes_configured(self) -> int:
        """The host tier's budget without memory pressure."""
        return self._bytes_configured

    @property
    def bytes_total(self) -> int:
        return max(self._tier.n_slots_max, self._tier.n_used) * self._tier.slot_bytes

    @property
    def bytes_resident(self) -> int:
        """Bytes of the host tier's blocks that are not pinned."""
        return self._tier.n_used * self._tier.slot_bytes - self.bytes_pinned

    @property
    def bytes_pinned(self) -> int:
        """Of blocks that must stay in the host tier: pinned, and not on disk (yet)."""
        return self._index.n_pinned * self._tier.slot_bytes

    def status(self) -> StoreStatus:
        """What an operator sees; the pool of live KV is the engine's to add."""
        with self._lock:
            return self._status()

    def _status(self) -> StoreStatus:
        counters, speeds, durable = self.counters, self.speeds, self._durable
        host = pool(
            "host",
            total=self.bytes_total,
            resident=self.bytes_resident,
            leased=self.bytes_pinned,
            configured=self._bytes_configured,
            n_blocks=self._tier.n_used,
        )
        status = StoreStatus(
            pools=(host,),
            policy=self.policy_name,
            n_leases=len(self._leases),
            n_hits_host=counters.hits_host,
            n_hits_disk=counters.hits_disk,
            n_misses=counters.misses,
            n_tokens_recomputed=counters.tokens_recomputed,
            n_evicted_host=counters.evicted_host,
            prefill_tokens_per_s=speeds.prefill_tokens_per_s,
            host_bytes_per_s=speeds.host_bytes_per_s,
            disk_bytes_per_s=speeds.disk_bytes_per_s,
        )
        return durable.told(status) if durable else status

    def flush(self) -> None:
        """Wait until all that was to be read or written by now is."""
        if self._reading:
            self._reading.flush()
        if self._durable:
            self._durable.flush()

    def close(self) -> None:
        """Finish writing and end the threads."""
        if self._reading:
            self._reading.close()
        if self._durable:
            self._durable.close()
        self._pool.shutdown()

    def check_integrity(self) -> None:
        """Assert index and tiers agree: free + resident + pinned = total."""
        with self._lock:
            self._index.check_integrity()
            slots = [node.slot for node in self._index.nodes() if node.slot >= 0]
            n_arriving = self._reading.n_arriving if self._reading else 0
            assert len(slots) == len(set(slots)) == self._tier.n_used - n_arriving
            self._status()


def _leading(nodes: Sequence[Node]) -> list[Node]:
    """The first nodes that lie in the host tier."""
    n = next((i for i, node in enumerate(nodes) if node.slot < 0), len(nodes))
    return list(nodes[:n])


def slot_bytes(layout: Layout) -> int:
    """Bytes of a full block."""
    return BLOCK_TOKENS * layout.cell_bytes
