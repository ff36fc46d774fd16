"""Which whole states are stored, and which of them a prompt may use. Pure: no bytes, no clock, no locks.

A *snapshot* is the state of tokens 0..n-1 of a model whose state cannot be cut into blocks (docs/decisions/0015). It may end
only where other prompts share the bits: at a mark, or at a multiple of g from its piece's start (chunks.py). The bits also
depend on the irregular marks before its end, so these are part of its parent key; its own key is over that and its tokens.
Tokens are compared on every match, the key only names the snapshot for the tiers.

A snapshot that a longer one of the same prompt has made superfluous goes first, unless it ends at a mark, which other
prompts share, or is hit again; then the eviction policy decides. Invariants: what is indexed lies in a tier; what is locked
stays where it lies; what is pinned stays on disk, or in RAM until it is there.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from blake3 import blake3

from keepwarm.core.prompt import Prompt, Tokens
from keepwarm.engine.chunks import Piece, usable
from keepwarm.engine.eviction import BlockFacts, Policy
from keepwarm.engine.prefix import BlockKey, block_key

ROWS_MIN = 2  # llama.cpp evaluates single rows with other code, so no piece is cut shorter


def snapshot_points(prompt: Prompt, parts: Sequence[Piece], g: int) -> tuple[int, ...]:
    """Where prefill should stop to save, ascending: the last mark, and the last place from which this prompt can go on."""
    marks = [mark for mark in prompt.marks if 0 < mark <= prompt.n_tokens]
    wanted = set(marks[-1:])
    if prompt.n_tokens not in wanted:  # a prompt that ends at a mark is kept for others; twice would be too dear
        wanted.add(usable(prompt.n_tokens, parts, g, want_logits=True))
    found = [0]
    for want in sorted(wanted):
        at = usable(want, parts, g, want_logits=False)
        if at - found[-1] >= (ROWS_MIN if g == 1 else 1):
            found.append(at)
    return tuple(found[1:])


def cut_at(parts: Sequence[Piece], points: Sequence[int], start: int) -> tuple[Piece, ...]:
    """The pieces cut at the snapshot points too, for `chunks.next_rows` of a prompt that is evaluated from `start` on.

    Points are multiples of g from their piece's start, or its end, so no bits change; none is cut too near to `start`.
    """
    found: list[Piece] = []
    for piece in parts:
        at = piece.start
        for point in points:
            if at < point < piece.end and point - start >= ROWS_MIN:
                found.append(Piece(at, point, closed=True))
                at = point
        found.append(Piece(at, piece.end, piece.closed))
    return tuple(found)


class Snapshot:
    """One stored state. `in_ram` and `disk_bytes` (0: not there) say where it lies."""

    __slots__ = (
        "at_mark", "disk_bytes", "hits", "id", "in_ram", "key", "locks", "n_bytes", "parent", "pins", "superseded", "tokens",
    )  # fmt: skip

    def __init__(self, id_: int, parent: BlockKey, tokens: Tokens, n_bytes: int, *, at_mark: bool) -> None:
        self.id, self.parent, self.tokens, self.n_bytes, self.at_mark = id_, parent, tokens, n_bytes, at_mark
        self.key = block_key(parent, tokens, closed=False)
        self.in_ram, self.disk_bytes = False, 0
        self.locks = self.pins = self.hits = 0
        self.superseded = False

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def is_hollow(self) -> bool:
        """Whether it lies nowhere: not yet, or not any more, since it was damaged while locked."""
        return not (self.in_ram or self.disk_bytes)

    @property
    def kept_in_ram(self) -> bool:
        """Whether its copy in RAM is the one that a promise rests on."""
        return bool(self.in_ram and self.pins and not self.disk_bytes)


class _Shelf:
    """What lies in one tier: what of it may go, and in which order."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._may_go: set[int] = set()
        self._there: set[int] = set()

    def refresh(self, snapshot: Snapshot, *, there: bool, may_go: bool, now_s: float) -> None:
        """Bring the shelf up to what is true of the snapshot now."""
        id_ = snapshot.id
        if there and id_ not in self._there:
            self._there.add(id_)
            self._policy.stored(id_, BlockFacts(snapshot.key, None, 0, snapshot.n_tokens, 0), now_s)
        elif not there and id_ in self._there:
            self._there.discard(id_)
            self._may_go.discard(id_)
            self._policy.forget(id_)
        if not (there and may_go):
            self._may_go.discard(id_)
        elif id_ not in self._may_go:
            self._may_go.add(id_)
            self._policy.offer(id_)

    def hit(self, snapshot: Snapshot, now_s: float) -> None:
        if snapshot.id in self._there:
            self._policy.hit((snapshot.id,), now_s)

    def victim(self, snapshots: dict[int, Snapshot], now_s: float) -> Snapshot | None:
        superseded = [id_ for id_ in self._may_go if snapshots[id_].superseded]
        if superseded:
            return snapshots[min(superseded)]
        id_ = self._policy.victim(self._may_go, now_s)
        return None if id_ is None else snapshots[id_]

    def check(self, there: set[int], may_go: set[int]) -> None:
        assert self._there == there
        assert self._may_go == may_go
        assert len(self._policy) == len(there)


class SnapshotIndex:
    """All snapshots of one engine. Callers serialise access, and move the bytes."""

    def __init__(self, ram: Policy, disk: Policy) -> None:
        self._by_parent: dict[BlockKey, dict[BlockKey, Snapshot]] = {}
        self._by_id: dict[int, Snapshot] = {}
        self._free_ids: list[int] = []
        self._ram, self._disk = _Shelf(ram), _Shelf(disk)

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(self._by_id.values())

    def exact(self, root: BlockKey, tokens: Tokens, parts: Sequence[Piece], n: int) -> Snapshot | None:
        """The snapshot of exactly the first `n` tokens, maybe a hollow one."""
        parent = chain_root(root, parts, n)
        found = self._by_parent.get(parent, {}).get(block_key(parent, tokens[:n], closed=False))
        return found if found is not None and np.array_equal(found.tokens, tokens[:n]) else None

    def prefixes(self, root: BlockKey, tokens: Tokens, parts: Sequence[Piece]) -> list[Snapshot]:
        """The snapshots that hold a prefix of this prompt with its bits, longest first."""
        ends = [0, *(piece.end for piece in parts if piece.closed)]
        found: list[Snapshot] = []
        for end in ends:
            parent = chain_root(root, parts, end)
            found.extend(
                snapshot
                for snapshot in self._by_parent.get(parent, {}).values()
                if end <= snapshot.n_tokens <= len(tokens)
                and not snapshot.is_hollow
                and snapshot.tokens[-1] == tokens[snapshot.n_tokens - 1]
                and chain_root(root, parts, snapshot.n_tokens) == parent
                and np.array_equal(snapshot.tokens, tokens[: snapshot.n_tokens])
            )
        return sorted(found, key=lambda snapshot: -snapshot.n_tokens)

    def match(
        self, root: BlockKey, tokens: Tokens, parts: Sequence[Piece], g: int, *, want_logits: bool
    ) -> Snapshot | None:
        """The longest snapshot that this prompt may go on from."""
        for snapshot in self.prefixes(root, tokens, parts):
            n = snapshot.n_tokens
            if usable(n, parts, g, want_logits=want_logits) == n:
                return snapshot
        return None

    def new(
        self, root: BlockKey, tokens: Tokens, parts: Sequence[Piece], n: int, n_bytes: int, *, at_mark: bool, now_s: float
    ) -> Snapshot:  # fmt: skip
        """Enter the first `n` tokens' state, locked, before it lies anywhere; shorter ones of the prompt are superseded."""
        hollow = self.exact(root, tokens, parts, n)
        snapshot = hollow or self.adopt(chain_root(root, parts, n), tokens[:n].copy(), n_bytes, at_mark=at_mark)
        assert snapshot.is_hollow
        snapshot.n_bytes = n_bytes
        for other in self.prefixes(root, tokens[:n], parts):
            if other.n_tokens < n and not other.at_mark:
                other.superseded = True
        self.lock(snapshot, now_s)
        return snapshot

    def adopt(self, parent: BlockKey, tokens: Tokens, n_bytes: int, *, at_mark: bool) -> Snapshot:
        """Enter a snapshot of known parent, as at a start."""
        id_ = self._free_ids.pop() if self._free_ids else len(self._by_id)
        snapshot = Snapshot(id_, parent, tokens, n_bytes, at_mark=at_mark)
        siblings = self._by_parent.setdefault(parent, {})
        assert snapshot.key not in siblings
        siblings[snapshot.key] = self._by_id[id_] = snapshot
        return snapshot

    def put(
        self, snapshot: Snapshot, now_s: float, *, in_ram: bool | None = None, disk_bytes: int | None = None
    ) -> None:
        """Say where the snapshot lies now; one that lies nowhere and is not locked is out of the index."""
        snapshot.in_ram = snapshot.in_ram if in_ram is None else in_ram
        snapshot.disk_bytes = snapshot.disk_bytes if disk_bytes is None else disk_bytes
        self._refresh(snapshot, now_s)

    def hit(self, snapshot: Snapshot, now_s: float) -> None:
        """A turn reads it."""
        snapshot.hits += 1
        snapshot.superseded = False
        self._ram.hit(snapshot, now_s)
        self._disk.hit(snapshot, now_s)

    def lock(self, snapshot: Snapshot, now_s: float) -> None:
        """Keep it where it lies until `unlock`; counted."""
        snapshot.locks += 1
        self._refresh(snapshot, now_s)

    def unlock(self, snapshot: Snapshot, now_s: float) -> None:
        assert snapshot.locks > 0
        snapshot.locks -= 1
        self._refresh(snapshot, now_s)

    def pin(self, snapshot: Snapshot, now_s: float) -> None:
        """Keep it for a cache object until `unpin`; counted."""
        snapshot.pins += 1
        self._refresh(snapshot, now_s)

    def unpin(self, snapshot: Snapshot, now_s: float) -> None:
        assert snapshot.pins > 0
        snapshot.pins -= 1
        self._refresh(snapshot, now_s)

    def _refresh(self, snapshot: Snapshot, now_s: float) -> None:
        if self._by_id.get(snapshot.id) is not snapshot:
            return  # lost to damage while it was pinned; its id may be another's by now
        self._ram.refresh(snapshot, there=snapshot.in_ram, may_go=_may_leave_ram(snapshot), now_s=now_s)
        self._disk.refresh(snapshot, there=bool(snapshot.disk_bytes), may_go=_may_leave_disk(snapshot), now_s=now_s)
        if snapshot.is_hollow and not snapshot.locks:
            siblings = self._by_parent[snapshot.parent]
            del siblings[snapshot.key], self._by_id[snapshot.id]
            if not siblings:
                del self._by_parent[snapshot.parent]
            self._free_ids.append(snapshot.id)

    def ram_victim(self, now_s: float) -> Snapshot | None:
        """What should leave RAM first; the caller deletes it there and says so with `put`."""
        return self._ram.victim(self._by_id, now_s)

    def disk_victim(self, now_s: float) -> Snapshot | None:
        """What should leave the disk first."""
        return self._disk.victim(self._by_id, now_s)

    def bytes_reclaimable(self) -> int:
        """Bytes in RAM that eviction could free now."""
        return sum(snapshot.n_bytes for snapshot in self if snapshot.in_ram and _may_leave_ram(snapshot))

    def check_integrity(self) -> None:
        """Assert what must always hold."""
        for parent, siblings in self._by_parent.items():
            for key, snapshot in siblings.items():
                assert (snapshot.parent, snapshot.key) == (parent, key)
                assert self._by_id[snapshot.id] is snapshot
                assert snapshot.in_ram or snapshot.disk_bytes or snapshot.locks
        assert sum(len(siblings) for siblings in self._by_parent.values()) == len(self._by_id)
        assert len(set(self._free_ids)) == len(self._free_ids)
        ram = {s.id for s in self if s.in_ram}
        disk = {s.id for s in self if s.disk_bytes}
        self._ram.check(ram, {s.id for s in self if s.in_ram and _may_leave_ram(s)})
        self._disk.check(disk, {s.id for s in self if s.disk_bytes and _may_leave_disk(s)})


def _may_leave_ram(snapshot: Snapshot) -> bool:
    return not (snapshot.locks or (snapshot.pins and not snapshot.disk_bytes))


def _may_leave_disk(snapshot: Snapshot) -> bool:
    return not (snapshot.locks or snapshot.pins)


def chain_root(root: BlockKey, parts: Sequence[Piece], n: int) -> BlockKey:
    """The parent key of a prompt's first `n` tokens: the tenant's root, and where irregular marks cut them."""
    cuts = [piece.end for piece in parts if piece.closed and piece.end <= n]
    return blake3(root + np.array(cuts, "<i8").tobytes()).digest() if cuts else root
