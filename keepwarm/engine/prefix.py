"""The prefix index: which tokens are stored, as a tree of blocks, and in which tiers. Pure: no bytes, no clock, no locks.

One tree per root (tenant, model, template, KV type ...: `root_key`). A node is a block of up to 64 tokens; a chain of
nodes is a stored prefix. Blocks are aligned to the start of their piece (chunks.py); a *closed* node ends at an irregular
mark and its children begin a new piece, an open one may be short at the end of what was stored. Tokens are compared on
every match; keys name blocks for the tiers. Nodes are rows of arrays (nodes.py); what is handed out are handles.

A match may end inside a node: at a multiple of g from the piece's start every prefix of a node has the right bits.

A node's bytes lie in host RAM (`slot`), on disk (`disk_bytes`), or in both. What may go (a policy chooses among it,
shelf.py):

    from the host   nodes without locks that are on disk as well, or that are leaves without leases
    from the disk   nodes without locks or leases whose children are not on disk, and that have a host copy or no children

So what is on disk is always a whole chain from its root, and a node that lies nowhere is out of the tree. The one
exception is a *hollow* node: its bytes were damaged while it had children, locks or leases. A match ends before it, the
next save fills it again, and it goes with the last thing that held it. A node with locks or pins is never taken out.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from blake3 import blake3
from msgspec import Struct

from keepwarm.core.prompt import Tokens
from keepwarm.engine.chunks import Piece
from keepwarm.engine.eviction import BlockFacts, Policy, policy
from keepwarm.engine.layout import BLOCK_TOKENS
from keepwarm.engine.nodes import NONE, TOKEN_BYTES, Node, NodeList, NodeTable, pack
from keepwarm.engine.shelf import Shelf

BlockKey = bytes  # 32 bytes


def root_key(*parts: str) -> BlockKey:
    """Key of a chain's root: everything beside the tokens that the state depends on, and the tenant."""
    return blake3("\x00".join(parts).encode()).digest()


def block_key(parent: BlockKey, tokens: Tokens, *, closed: bool) -> BlockKey:
    """Key of a block: blake3 of its parent's key, whether it ends a piece, and its token ids."""
    return blake3(parent + (b"\x01" if closed else b"\x00") + tokens.astype("<i4").tobytes()).digest()


class Gone(Struct, frozen=True):
    """What was known of a block when it left a tier, or the index: its handle may be of no use any more.

    `slot` is the host slot for the caller to free (-1: none), `disk_bytes` what it takes, or took, on disk (0: nothing).
    """

    key: BlockKey
    n_tokens: int
    slot: int
    disk_bytes: int


class Found(Struct, frozen=True):
    """A match: the nodes from the root's child on, and how many tokens they cover (the last node maybe in part)."""

    nodes: tuple[Node, ...]
    n_tokens: int


class Missing(Struct, frozen=True):
    """A block that an insertion wants: give it bytes and call `add`."""

    start: int
    end: int
    closed: bool


class DoubleInsert(Exception):
    """Our bug: a block was added where one stands."""


def extents(parts: Sequence[Piece], n_tokens: int) -> Iterator[Missing]:
    """The blocks that hold the first `n_tokens` of a prompt."""
    for piece in parts:
        end = min(piece.end, n_tokens)
        for start in range(piece.start, end, BLOCK_TOKENS):
            stop = min(start + BLOCK_TOKENS, end)
            yield Missing(start, stop, piece.closed and stop == piece.end)


class PrefixIndex:
    """All trees of one engine. Callers serialise access; methods return what the caller must do with the tiers."""

    def __init__(self, host: Policy | None = None, disk: Policy | None = None) -> None:
        self._roots: dict[BlockKey, int] = {}
        self._table = NodeTable()
        self._host = Shelf(policy("lru", 1) if host is None else host)  # a policy that knows no block yet is falsy
        self._disk = Shelf(policy("lru", 1) if disk is None else disk)
        self.n_pinned = 0  # nodes with at least one pin that lie in the host tier alone
        self.disk_bytes = 0  # of all nodes on disk
        self.disk_bytes_leased = 0  # of those with a pin
        self.n_on_disk = 0

    def __len__(self) -> int:
        return len(self._table)

    def nodes(self) -> Iterator[Node]:
        return map(self._table.node, self._table)

    def keep(self, nodes: Iterable[Node]) -> NodeList:
        """The same nodes, locked or pinned ones, in little memory."""
        return NodeList(nodes, self._table)

    # --- find

    def match(self, root: BlockKey, tokens: Tokens, parts: Sequence[Piece]) -> Found:
        """The longest stored prefix with this prompt's bits; chunks.usable then says how much of it may be used.

        Changes nothing. The result is safe only while locked.
        """
        table, above = self._table, self._roots.get(root)
        if above is None:
            return Found((), 0)
        wanted = list(extents(parts, len(tokens)))
        blocks = _blocks(tokens, wanted)
        ids = table.walk(above, blocks)
        n = wanted[len(ids) - 1].end if ids else 0
        if len(ids) < len(wanted):
            packed, closed = blocks[len(ids)]
            best, n_more = table.nearest(ids[-1] if ids else above, packed)
            if closed:  # the same tokens, but the remainder was not evaluated by itself: other bits
                n_more = min(n_more, len(packed) // TOKEN_BYTES - 1)
            if n_more:
                ids.append(best)
                n += n_more
        return Found(table.handles(ids), n)

    def missing(
        self, root: BlockKey, tokens: Tokens, parts: Sequence[Piece], n_tokens: int
    ) -> tuple[Found, list[Missing]]:
        """What is there of the first `n_tokens`, whole blocks only, and the blocks that must be added after them.

        `Found.n_tokens` is the start of the first missing block, or `n_tokens`; its last node may cover more than asked.
        Behind a hollow block some of the others may be there: `child` tells.
        """
        table, above = self._table, self._roots.get(root)
        wanted = list(extents(parts, n_tokens))
        if above is None:
            return Found((), 0), wanted
        blocks = _blocks(tokens, wanted)
        ids = table.walk(above, blocks)
        if len(ids) == len(wanted) - 1 and not wanted[-1].closed:
            packed, _ = blocks[-1]
            best, n = table.nearest(ids[-1] if ids else above, packed)
            if n == len(packed) // TOKEN_BYTES:  # a longer block stands there already
                ids.append(best)
        n = wanted[len(ids) - 1].end if ids else 0
        return Found(table.handles(ids), n), wanted[len(ids) :]

    def child(self, root: BlockKey, parent: Node | None, tokens: Tokens, extent: Missing) -> Node | None:
        """The node of exactly this block, hollow or not."""
        above = self._roots.get(root) if parent is None else parent.row
        if above is None:
            return None
        child = self._table.child(above, pack(tokens[extent.start : extent.end]), closed=extent.closed)
        return None if child == NONE else self._table.node(child)

    # --- blocks come and go

    def add(
        self, root: BlockKey, parent: Node | None, tokens: Tokens, extent: Missing, slot: int, *, now_s: float = 0.0,
        n_read: int = 0,
    ) -> tuple[Node, list[Gone]]:  # fmt: skip
        """Add one block in the host tier under `parent` (None: the root) and return it, with nodes it makes superfluous.

        Superfluous nodes (shorter, unused siblings whose tokens the new block begins with) are out of the index already:
        the caller frees their bytes.
        """
        above = self._root(root) if parent is None else parent.row
        id_ = self._insert(above, tokens[extent.start : extent.end], extent.start, closed=extent.closed)
        superfluous = []
        if not extent.closed:
            shorter = self._table.shorter(id_)
            if shorter != NONE and self._is_idle(shorter):
                superfluous.append(self._gone(shorter))
                self._unlink(shorter)
        node = self._table.node(id_)
        self.fill(node, slot, now_s=now_s, n_read=n_read)
        return node, superfluous

    def adopt(self, head_parent: Node | BlockKey, key: BlockKey, tokens: Tokens, start: int, *, closed: bool) -> Node:
        """Add a block found on disk at start, hollow until `stored` says what it takes. Raises DoubleInsert.

        `head_parent` is the node before it, or the key of its chain's root.
        """
        above = head_parent.row if isinstance(head_parent, Node) else self._root(head_parent)
        node = self._table.node(self._insert(above, tokens, start, closed=closed))
        assert node.key == key
        return node

    def _root(self, root: BlockKey) -> int:
        known = self._roots.get(root)
        if known is None:
            known = self._roots[root] = self._table.add_root(root)
        return known

    def _insert(self, above: int, piece: Tokens, start: int, *, closed: bool) -> int:
        table, packed = self._table, pack(piece)
        if table.child(above, packed, closed=closed) != NONE:
            raise DoubleInsert(f"{'closed ' if closed else ''}block at {start}")
        id_ = table.add(above, block_key(table.key(above), piece, closed=closed), packed, closed=closed)
        assert table.starts[id_] == start
        self._refresh(above)
        return id_

    def fill(self, node: Node, slot: int, *, now_s: float = 0.0, n_read: int = 0) -> None:
        """The node's bytes are in this slot of the host tier now, too."""
        table, id_ = self._table, node.row
        assert table.slots[id_] < 0 and slot >= 0
        table.slots[id_] = slot
        self.n_pinned += bool(table.pins[id_] and not table.disk_bytes[id_])
        self._host.policy.stored(id_, self._facts(id_, n_read), now_s)
        self._refresh(id_)

    def stored(self, node: Node, n_bytes: int, *, now_s: float = 0.0, n_read: int = 0) -> None:
        """The node's bytes are on disk now, too, where they take `n_bytes` of the budget."""
        table, id_ = self._table, node.row
        assert not table.disk_bytes[id_] and n_bytes
        self.n_pinned -= bool(table.pins[id_] and table.slots[id_] >= 0)
        table.disk_bytes[id_] = n_bytes
        self.n_on_disk += 1
        self.disk_bytes += n_bytes
        self.disk_bytes_leased += n_bytes if table.pins[id_] else 0
        above = table.parents[id_]
        table.n_disk_children[above] += 1
        self._disk.policy.stored(id_, self._facts(id_, n_read), now_s)
        self._refresh(above)
        self._refresh(id_)

    def leave_disk(self, node: Node) -> None:
        """The node's copy on disk is gone, or damaged."""
        self._leave_disk(node.row)

    def _leave_host(self, id_: int) -> None:
        table = self._table
        assert table.slots[id_] >= 0
        table.slots[id_] = NONE
        self.n_pinned -= bool(table.pins[id_] and not table.disk_bytes[id_])
        self._host.forget(id_)
        self._refresh(id_)
        self._prune(id_)

    def _leave_disk(self, id_: int) -> None:
        table, n_bytes = self._table, self._table.disk_bytes[id_]
        assert n_bytes
        self.disk_bytes_leased -= n_bytes if table.pins[id_] else 0
        self.n_pinned += bool(table.pins[id_] and table.slots[id_] >= 0)
        self._off_disk(id_)
        self._refresh(table.parents[id_])
        self._refresh(id_)
        self._prune(id_)

    def _off_disk(self, id_: int) -> None:
        table = self._table
        self.n_on_disk -= 1
        self.disk_bytes -= table.disk_bytes[id_]
        table.disk_bytes[id_] = 0
        table.n_disk_children[table.parents[id_]] -= 1
        self._disk.forget(id_)

    def _prune(self, id_: int) -> None:
        """Take out a hollow node that nothing holds any more, and then its parent, if that is one, too."""
        table = self._table
        above = table.parents[id_]
        while above != NONE and table.is_hollow(id_) and self._is_idle(id_):
            self._unlink(id_)
            id_, above = above, table.parents[above]

    def _unlink(self, id_: int) -> None:
        """Take the node out of the tree and its bytes out of the accounts; the caller frees them."""
        table = self._table
        above = table.parents[id_]
        if table.slots[id_] >= 0:
            self._host.forget(id_)
        if table.disk_bytes[id_]:
            self._off_disk(id_)
        table.remove(id_)
        if table.is_root(above) and table.is_leaf(above):
            del self._roots[table.key(above)]
            table.remove(above)
        else:
            self._refresh(above)

    # --- what may go

    def _is_idle(self, id_: int) -> bool:
        """Nothing below it, nobody uses it."""
        table = self._table
        return table.is_leaf(id_) and not table.locks[id_] and not table.pins[id_]

    def _may_leave(self, id_: int) -> tuple[bool, bool]:
        """Whether its copies in the host tier and on disk may go."""
        table = self._table
        if table.locks[id_]:
            return False, False
        on_host, on_disk, pinned = table.slots[id_] >= 0, table.disk_bytes[id_] > 0, table.pins[id_] > 0
        leaf = table.is_leaf(id_)
        may_leave_host = on_host and (on_disk or (leaf and not pinned))
        return may_leave_host, on_disk and not pinned and not table.n_disk_children[id_] and (on_host or leaf)

    def _refresh(self, id_: int) -> None:
        """The node changed: it may go now, or may go no more. A root lies nowhere."""
        host, disk = self._may_leave(id_)
        self._host.refresh(id_, host)
        self._disk.refresh(id_, disk)

    def evict_host(self, now_s: float = 0.0) -> Gone | None:
        """Take the block out of the host tier that is cheapest to lose there; the caller frees its slot."""
        victim = self._host.victim(now_s)
        if victim is None:
            return None
        gone = self._gone(victim)
        self._leave_host(victim)
        return gone

    def evict_disk(self, now_s: float = 0.0) -> tuple[Gone, list[int]] | None:
        """Take the block off the disk that is cheapest to lose there; the caller deletes its file. None: nothing may go.

        Also host slots for the caller to free: when no other block may go, one goes with what hangs on it in the host
        tier alone.
        """
        victim, below, table = self._disk.victim(now_s), list[int](), self._table
        if victim is None:
            victim = next(filter(self._goes_with_all_below, table), None)
            if victim is None:
                return None
            below = [child for child in reversed(table.below(victim)) if table.slots[child] >= 0]  # leaves first
        gone, slots = self._gone(victim), [table.slots[child] for child in below]
        for child in below:
            self._leave_host(child)
        self._leave_disk(victim)
        return gone, slots

    def _gone(self, id_: int) -> Gone:
        table = self._table
        return Gone(table.key(id_), table.n_tokens(id_), table.slots[id_], table.disk_bytes[id_])

    def _goes_with_all_below(self, id_: int) -> bool:
        """Whether it lies on disk alone, with nothing on disk, locked or leased at it or below."""
        table = self._table
        if not table.disk_bytes[id_] or table.slots[id_] >= 0 or table.n_disk_children[id_]:
            return False
        if table.locks[id_] or table.pins[id_]:
            return False
        return not any(table.locks[one] or table.pins[one] or table.disk_bytes[one] for one in table.below(id_))

    def n_reclaimable(self) -> int:
        """Host copies that eviction could free one after the other.

        Those on disk as well, without locks; and those with no lock or pin on them or below them, nor a block on disk.
        """
        table = self._table
        parents, slots, on_disk = np.asarray(table.parents), np.asarray(table.slots), np.asarray(table.disk_bytes) > 0
        locks, held = np.asarray(table.locks), (np.asarray(table.locks) > 0) | (np.asarray(table.pins) > 0)
        stays = bytearray(len(parents))  # what is in the host tier alone and no leaf, whatever else goes
        for id_ in np.flatnonzero(held | (on_disk & ~on_disk[parents])).tolist():
            up = id_
            while up != NONE and not stays[up]:
                stays[up] = 1
                up = table.parents[up]
        kept = np.where(on_disk, locks > 0, np.frombuffer(stays, np.uint8) > 0)
        return int(np.count_nonzero((slots >= 0) & ~kept))

    # --- who holds what

    def touch(self, nodes: Sequence[Node], now_s: float = 0.0) -> None:
        """A turn reads these nodes."""
        table, ids = self._table, [node.row for node in nodes]
        self._host.policy.hit([id_ for id_ in ids if table.slots[id_] >= 0], now_s)
        self._disk.policy.hit([id_ for id_ in ids if table.disk_bytes[id_]], now_s)

    def lock(self, nodes: Sequence[Node]) -> None:
        """Keep the nodes, in every tier, until `unlock`; counted."""
        locks = self._table.locks
        for node in nodes:
            id_ = node.row
            locks[id_] += 1
            if locks[id_] == 1:
                self._refresh(id_)

    def unlock(self, nodes: Sequence[Node]) -> None:
        locks = self._table.locks
        for node in reversed(nodes):
            id_ = node.row
            assert locks[id_] > 0
            locks[id_] -= 1
            if not locks[id_]:
                self._refresh(id_)
                self._prune(id_)

    def pin(self, nodes: Sequence[Node]) -> None:
        """Keep the nodes for a lease until `unpin`; counted."""
        table = self._table
        for node in nodes:
            id_ = node.row
            table.pins[id_] += 1
            if table.pins[id_] == 1:
                self.n_pinned += table.slots[id_] >= 0 and not table.disk_bytes[id_]
                self.disk_bytes_leased += table.disk_bytes[id_]
                self._refresh(id_)

    def unpin(self, nodes: Sequence[Node]) -> None:
        table = self._table
        for node in reversed(nodes):
            id_ = node.row
            assert table.pins[id_] > 0
            table.pins[id_] -= 1
            if not table.pins[id_]:
                self.n_pinned -= table.slots[id_] >= 0 and not table.disk_bytes[id_]
                self.disk_bytes_leased -= table.disk_bytes[id_]
                self._refresh(id_)
                self._prune(id_)

    def _facts(self, id_: int, n_read: int) -> BlockFacts:
        table = self._table
        above = table.parents[id_]
        parent = None if table.is_root(above) else above
        return BlockFacts(table.key(id_), parent, table.starts[id_], table.n_tokens(id_), n_read)

    def check_integrity(self) -> None:
        """Assert what must always hold; called in tests and when the engine is idle."""
        table, host, disk = self._table, self._host, self._disk
        table.check_integrity(self._roots.values())
        assert all(table.key(id_) == key and not table.is_leaf(id_) for key, id_ in self._roots.items())
        ids = list(table)
        assert list(host.evictable) == [id_ for id_ in ids if self._may_leave(id_)[0]]
        assert list(disk.evictable) == [id_ for id_ in ids if self._may_leave(id_)[1]]
        assert (len(host.evictable), len(disk.evictable)) == (len(list(host.evictable)), len(list(disk.evictable)))
        assert not any(table.is_hollow(id_) and self._is_idle(id_) for id_ in ids), "a hollow node that nothing holds"
        on_host = {id_ for id_ in ids if table.slots[id_] >= 0}
        on_disk = {id_ for id_ in ids if table.disk_bytes[id_]}
        pinned = {id_ for id_ in ids if table.pins[id_]}
        assert len(host.policy) == len(on_host) and len(disk.policy) == self.n_on_disk == len(on_disk)
        assert self.n_pinned == len((pinned & on_host) - on_disk)
        assert self.disk_bytes == sum(table.disk_bytes[id_] for id_ in on_disk)
        assert self.disk_bytes_leased == sum(table.disk_bytes[id_] for id_ in on_disk & pinned)


def _blocks(tokens: Tokens, wanted: Sequence[Missing]) -> list[tuple[bytes, bool]]:
    """The packed tokens of each of these blocks, which follow each other from the start, and whether it is closed."""
    packed = pack(tokens[: wanted[-1].end if wanted else 0])
    return [(packed[TOKEN_BYTES * one.start : TOKEN_BYTES * one.end], one.closed) for one in wanted]
