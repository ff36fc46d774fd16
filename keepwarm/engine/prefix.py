"""The prefix index: which tokens are stored, as a tree of blocks, and in which tiers. Pure: no bytes, no clock, no locks.

One tree per root (tenant, model, template, KV type ...: `root_key`). A node is a block of up to 64 tokens; a chain of
nodes is a stored prefix. Blocks are aligned to the start of their piece (chunks.py); a *closed* node ends at an irregular
mark and its children begin a new piece, an open one may be short at the end of what was stored. Tokens are compared on
every match; keys name blocks for the tiers.

A match may end inside a node: at a multiple of g from the piece's start every prefix of a node has the right bits.
Children are kept sorted by their tokens, so the longest common prefix is found beside the insertion point.

A node's bytes lie in host RAM (`slot`), on disk (`disk_bytes`), or in both. What may go (a policy chooses among it):

    from the host   nodes without locks that are on disk as well, or that are leaves without leases
    from the disk   nodes without locks or leases whose children are not on disk, and that have a host copy or no children

So what is on disk is always a whole chain from its root, and a node that lies nowhere is out of the tree. The one
exception is a *hollow* node: its bytes were damaged while it had children, locks or leases. A match ends before it, the
next save fills it again, and it goes with the last thing that held it.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import numpy as np
from blake3 import blake3
from msgspec import Struct

from keepwarm.core.prompt import Tokens
from keepwarm.engine.chunks import Piece
from keepwarm.engine.eviction import BlockFacts, Policy, policy
from keepwarm.engine.layout import BLOCK_TOKENS

BlockKey = bytes  # 32 bytes
TOKEN_BYTES, SORTABLE = 4, ">i4"


def root_key(*parts: str) -> BlockKey:
    """Key of a chain's root: everything beside the tokens that the state depends on, and the tenant."""
    return blake3("\x00".join(parts).encode()).digest()


def block_key(parent: BlockKey, tokens: Tokens, *, closed: bool) -> BlockKey:
    """Key of a block: blake3 of its parent's key, whether it ends a piece, and its token ids."""
    return blake3(parent + (b"\x01" if closed else b"\x00") + tokens.astype("<i4").tobytes()).digest()


class Node:
    """One stored block. `slot` is its place in the host tier (-1: none), `disk_bytes` what it takes on disk (0: nothing).

    Its tokens are kept once, in the form that sorts (`_sortable`); without children it holds no containers.
    """

    __slots__ = (
        "children", "closed", "closed_children", "disk_bytes", "id", "key", "locks", "n_disk_children", "parent", "pins",
        "slot", "sortable", "start",
    )  # fmt: skip

    def __init__(
        self, id_: int, key: BlockKey, parent: "Node | None", start: int, sortable: bytes, closed: bool
    ) -> None:
        self.id, self.key, self.parent, self.start = id_, key, parent, start
        self.sortable, self.closed = sortable, closed
        self.children: list[Node] | None = None  # open blocks, sorted
        self.closed_children: dict[bytes, Node] | None = None
        self.n_disk_children = 0
        self.locks = 0
        self.pins = 0
        self.slot = -1
        self.disk_bytes = 0

    @property
    def n_tokens(self) -> int:
        return len(self.sortable) // TOKEN_BYTES

    @property
    def tokens(self) -> Tokens:
        """The token ids, shape (n_tokens,), a copy."""
        return np.frombuffer(self.sortable, SORTABLE).astype(np.int32)

    @property
    def end(self) -> int:
        return self.start + self.n_tokens

    @property
    def is_leaf(self) -> bool:
        return not (self.children or self.closed_children)

    def below(self) -> "list[Node]":
        """Its children."""
        return [*(self.children or ()), *(self.closed_children or {}).values()]

    @property
    def is_hollow(self) -> bool:
        """Its bytes are nowhere."""
        return self.slot < 0 and not self.disk_bytes

    @property
    def leaves_host(self) -> bool:
        """Whether its host copy may go."""
        return self.slot >= 0 and not self.locks and bool(self.disk_bytes or (self.is_leaf and not self.pins))

    @property
    def leaves_disk(self) -> bool:
        """Whether its copy on disk may go."""
        held = self.locks or self.pins or self.n_disk_children
        return bool(self.disk_bytes) and not held and (self.slot >= 0 or self.is_leaf)

    @property
    def is_idle(self) -> bool:
        """Nothing below it, nobody uses it."""
        return self.is_leaf and not self.locks and not self.pins


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


def _sortable(tokens: Tokens) -> bytes:
    """Bytes that sort as the tokens do (token ids are never negative)."""
    return tokens.astype(SORTABLE).tobytes()


def _order(node: Node) -> bytes:
    return node.sortable


def common_length(a: Tokens, b: Tokens) -> int:
    """How many tokens two sequences share from the start."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def extents(parts: Sequence[Piece], n_tokens: int) -> Iterator[Missing]:
    """The blocks that hold the first `n_tokens` of a prompt."""
    for piece in parts:
        end = min(piece.end, n_tokens)
        for start in range(piece.start, end, BLOCK_TOKENS):
            stop = min(start + BLOCK_TOKENS, end)
            yield Missing(start, stop, closed=piece.closed and stop == piece.end)


class Shelf:
    """One tier's side of the index: which nodes may leave it, and the policy that says which one first."""

    def __init__(self, chooses: Policy) -> None:
        self.policy = chooses
        self.evictable: set[int] = set()

    def refresh(self, node: Node, *, may_leave: bool) -> None:
        """The node changed; may it leave the tier now?"""
        if not may_leave:
            self.evictable.discard(node.id)
        elif node.id not in self.evictable:
            self.evictable.add(node.id)
            self.policy.offer(node.id)

    def forget(self, node: Node) -> None:
        """The node is not in this tier any more."""
        self.evictable.discard(node.id)
        self.policy.forget(node.id)


class PrefixIndex:
    """All trees of one engine. Callers serialise access; methods return what the caller must do with the tiers."""

    def __init__(self, host: Policy | None = None, disk: Policy | None = None) -> None:
        self._roots: dict[BlockKey, Node] = {}
        self._nodes: dict[int, Node] = {}
        self._host = Shelf(policy("lru", 1) if host is None else host)  # a policy that knows no block yet is falsy
        self._disk = Shelf(policy("lru", 1) if disk is None else disk)
        self._next_id = 0
        self.n_pinned = 0  # nodes with at least one pin that lie in the host tier alone
        self.disk_bytes = 0  # of all nodes on disk
        self.disk_bytes_leased = 0  # of those with a pin
        self.n_on_disk = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def match(self, root: BlockKey, tokens: Tokens, parts: Sequence[Piece]) -> Found:
        """The longest stored prefix with this prompt's bits; chunks.usable then says how much of it may be used.

        Changes nothing. The result is safe only while locked.
        """
        node = self._roots.get(root)
        nodes: list[Node] = []
        if node is None:
            return Found((), 0)
        at = 0
        sortable = _sortable(tokens)
        for extent in extents(parts, len(tokens)):
            key = sortable[TOKEN_BYTES * extent.start : TOKEN_BYTES * extent.end]
            child = _exact(node, key, closed=extent.closed)
            if child is None or child.is_hollow:
                wanted = tokens[extent.start : extent.end]
                best, n = _nearest(node, key, wanted)
                if extent.closed:  # the same tokens, but the remainder was not evaluated by itself: other bits
                    n = min(n, len(wanted) - 1)
                if best is not None and n:
                    nodes.append(best)
                    at += n
                break
            nodes.append(child)
            node, at = child, extent.end
        return Found(tuple(nodes), at)

    def missing(
        self, root: BlockKey, tokens: Tokens, parts: Sequence[Piece], n_tokens: int
    ) -> tuple[Found, list[Missing]]:
        """What is there of the first `n_tokens`, whole blocks only, and the blocks that must be added after them.

        `Found.n_tokens` is the start of the first missing block, or `n_tokens`; its last node may cover more than asked.
        Behind a hollow block some of the others may be there: `child` tells.
        """
        node = self._roots.get(root)
        nodes: list[Node] = []
        wanted = list(extents(parts, n_tokens))
        sortable = _sortable(tokens[:n_tokens])
        for i, extent in enumerate(wanted):
            key = sortable[TOKEN_BYTES * extent.start : TOKEN_BYTES * extent.end]
            child = _exact(node, key, closed=extent.closed) if node else None
            if child is None and node is not None and not extent.closed and i == len(wanted) - 1:
                piece = tokens[extent.start : extent.end]
                best, n = _nearest(node, key, piece)
                if n == len(piece):  # a longer block stands there already
                    child = best
            if child is None or child.is_hollow:
                return Found(tuple(nodes), extent.start), wanted[i:]
            nodes.append(child)
            node = child
        return Found(tuple(nodes), n_tokens), []

    def child(self, root: BlockKey, parent: Node | None, tokens: Tokens, extent: Missing) -> Node | None:
        """The node of exactly this block, hollow or not."""
        above = parent or self._roots.get(root)
        return _exact(above, _sortable(tokens[extent.start : extent.end]), closed=extent.closed) if above else None

    def add(
        self, root: BlockKey, parent: Node | None, tokens: Tokens, extent: Missing, slot: int, *, now_s: float = 0.0,
        n_read: int = 0,
    ) -> tuple[Node, list[Node]]:  # fmt: skip
        """Add one block in the host tier under `parent` (None: the root) and return it, with nodes it makes superfluous.

        Superfluous nodes (shorter, unused siblings whose tokens the new block begins with) are out of the index already:
        the caller frees their bytes.
        """
        parent = parent or self._root(root)
        node = self._insert(parent, tokens[extent.start : extent.end], extent.start, closed=extent.closed)
        superfluous = []
        if not node.closed:
            siblings = parent.children or []
            i = bisect_left(siblings, node.sortable, key=_order)
            shorter = siblings[i - 1] if i else None
            if shorter is not None and node.sortable.startswith(shorter.sortable) and shorter.is_idle:
                self._unlink(shorter)
                superfluous.append(shorter)
        self.fill(node, slot, now_s=now_s, n_read=n_read)
        return node, superfluous

    def adopt(self, head_parent: "Node | BlockKey", key: BlockKey, tokens: Tokens, start: int, *, closed: bool) -> Node:
        """Add a block found on disk at start, hollow until `stored` says what it takes. Raises DoubleInsert.

        `head_parent` is the node before it, or the key of its chain's root.
        """
        parent = head_parent if isinstance(head_parent, Node) else self._root(head_parent)
        node = self._insert(parent, tokens, start, closed=closed)
        assert node.key == key
        return node

    def _root(self, root: BlockKey) -> Node:
        known = self._roots.get(root)
        if known is None:
            known = self._roots[root] = Node(-1, root, None, 0, b"", closed=True)
        return known

    def _insert(self, parent: Node, piece: Tokens, start: int, *, closed: bool) -> Node:
        key = _sortable(piece)
        if _exact(parent, key, closed=closed) is not None:
            raise DoubleInsert(f"{'closed ' if closed else ''}block at {start}")
        node = Node(self._next_id, block_key(parent.key, piece, closed=closed), parent, start, key, closed)
        self._next_id += 1
        if closed:
            parent.closed_children = parent.closed_children or {}
            parent.closed_children[key] = node
        else:
            parent.children = parent.children or []
            insort(parent.children, node, key=_order)
        self._nodes[node.id] = node
        self._refresh(parent)
        return node

    def fill(self, node: Node, slot: int, *, now_s: float = 0.0, n_read: int = 0) -> None:
        """The node's bytes are in this slot of the host tier now, too."""
        assert node.slot < 0 and slot >= 0
        node.slot = slot
        self.n_pinned += bool(node.pins and not node.disk_bytes)
        self._host.policy.stored(node.id, _facts(node, n_read), now_s)
        self._refresh(node)

    def stored(self, node: Node, n_bytes: int, *, now_s: float = 0.0, n_read: int = 0) -> None:
        """The node's bytes are on disk now, too, where they take `n_bytes` of the budget."""
        assert not node.disk_bytes and n_bytes
        self.n_pinned -= bool(node.pins and node.slot >= 0)
        node.disk_bytes = n_bytes
        self.n_on_disk += 1
        self.disk_bytes += n_bytes
        self.disk_bytes_leased += n_bytes if node.pins else 0
        assert node.parent is not None
        node.parent.n_disk_children += 1
        self._disk.policy.stored(node.id, _facts(node, n_read), now_s)
        self._refresh(node.parent)
        self._refresh(node)

    def leave_host(self, node: Node) -> int:
        """The node's host copy is gone; returns the slot for the caller to free."""
        slot, node.slot = node.slot, -1
        assert slot >= 0
        self.n_pinned -= bool(node.pins and not node.disk_bytes)
        self._host.forget(node)
        self._refresh(node)
        self._prune(node)
        return slot

    def leave_disk(self, node: Node) -> None:
        """The node's copy on disk is gone, or damaged."""
        n_bytes, node.disk_bytes = node.disk_bytes, 0
        assert n_bytes and node.parent is not None
        self.n_on_disk -= 1
        self.disk_bytes -= n_bytes
        self.disk_bytes_leased -= n_bytes if node.pins else 0
        self.n_pinned += bool(node.pins and node.slot >= 0)
        node.parent.n_disk_children -= 1
        self._disk.forget(node)
        self._refresh(node.parent)
        self._refresh(node)
        self._prune(node)

    def _prune(self, node: Node) -> None:
        """Take out a hollow node that nothing holds any more, and then its parent, if that is one, too."""
        while node.is_hollow and node.is_idle and node.parent is not None and node.id in self._nodes:
            above = node.parent
            self._unlink(node)
            node = above

    def _unlink(self, node: Node) -> None:
        """Take the node out of the tree and its bytes out of the accounts; the caller frees them."""
        parent = node.parent
        assert parent is not None
        if node.closed:
            assert parent.closed_children is not None
            del parent.closed_children[node.sortable]
        else:
            assert parent.children is not None
            i = bisect_left(parent.children, node.sortable, key=_order)
            assert parent.children[i] is node
            del parent.children[i]
        del self._nodes[node.id]
        if node.slot >= 0:
            self._host.forget(node)
        if node.disk_bytes:
            self.n_on_disk -= 1
            self.disk_bytes -= node.disk_bytes
            parent.n_disk_children -= 1
            self._disk.forget(node)
        if parent.parent is None and parent.is_leaf:
            self._roots.pop(parent.key, None)
        else:
            self._refresh(parent)

    def _refresh(self, node: Node) -> None:
        if node.id < 0:
            return
        self._host.refresh(node, may_leave=node.leaves_host)
        self._disk.refresh(node, may_leave=node.leaves_disk)

    def evict_host(self, now_s: float = 0.0) -> tuple[Node, int] | None:
        """Take the block out of the host tier that is cheapest to lose there, with its slot for the caller to free."""
        victim = self._host.policy.victim(self._host.evictable, now_s)
        if victim is None:
            return None
        node = self._nodes[victim]
        return node, self.leave_host(node)

    def evict_disk(self, now_s: float = 0.0) -> tuple[Node, list[int]] | None:
        """Take the block off the disk that is cheapest to lose there; the caller deletes its file. None: nothing may go.

        Also host slots for the caller to free: when no other block may go, one goes with what hangs on it in the host
        tier alone.
        """
        victim = self._disk.policy.victim(self._disk.evictable, now_s)
        node = (
            self._nodes[victim]
            if victim is not None
            else next(filter(_goes_with_all_below, self._nodes.values()), None)
        )
        if node is None:
            return None
        below = [] if victim is not None else _below(node)
        slots = [self.leave_host(child) for child in reversed(below) if child.slot >= 0]  # leaves first
        self.leave_disk(node)
        return node, slots

    def touch(self, nodes: Sequence[Node], now_s: float = 0.0) -> None:
        """A turn reads these nodes."""
        self._host.policy.hit([node.id for node in nodes if node.slot >= 0], now_s)
        self._disk.policy.hit([node.id for node in nodes if node.disk_bytes], now_s)

    def lock(self, nodes: Sequence[Node]) -> None:
        """Keep the nodes, in every tier, until `unlock`; counted."""
        for node in nodes:
            node.locks += 1
            if node.locks == 1:
                self._refresh(node)

    def unlock(self, nodes: Sequence[Node]) -> None:
        for node in reversed(nodes):
            assert node.locks > 0
            node.locks -= 1
            if not node.locks:
                self._refresh(node)
                self._prune(node)

    def pin(self, nodes: Sequence[Node]) -> None:
        """Keep the nodes for a lease until `unpin`; counted."""
        for node in nodes:
            node.pins += 1
            if node.pins == 1:
                self.n_pinned += bool(node.slot >= 0 and not node.disk_bytes)
                self.disk_bytes_leased += node.disk_bytes
                self._refresh(node)

    def unpin(self, nodes: Sequence[Node]) -> None:
        for node in reversed(nodes):
            assert node.pins > 0
            node.pins -= 1
            if not node.pins:
                self.n_pinned -= bool(node.slot >= 0 and not node.disk_bytes)
                self.disk_bytes_leased -= node.disk_bytes
                self._refresh(node)
                self._prune(node)

    def n_reclaimable(self) -> int:
        """Host copies that eviction could free one after the other.

        Those on disk as well, without locks; and those with no lock or pin on them or below them.
        """
        kept: set[int] = set()
        for node in self._nodes.values():
            if node.locks or node.pins:
                up: Node | None = node
                while up is not None and up.id not in kept:
                    kept.add(up.id)
                    up = up.parent
        on_host = [node for node in self._nodes.values() if node.slot >= 0]
        return sum(not node.locks if node.disk_bytes else node.id not in kept for node in on_host)

    def nodes(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def check_integrity(self) -> None:
        """Assert what must always hold; called in tests and when the engine is idle."""
        seen = 0
        for root in self._roots.values():
            stack = [root]
            while stack:
                node = stack.pop()
                below = node.below()
                assert node.n_disk_children == sum(bool(child.disk_bytes) for child in below)
                for child in below:
                    seen += 1
                    assert child.parent is node
                    assert child.start == node.end
                    assert self._nodes[child.id] is child
                    assert (child.id in self._host.evictable) == child.leaves_host
                    assert (child.id in self._disk.evictable) == child.leaves_disk
                    assert not (child.is_hollow and child.is_idle), "a hollow node that nothing holds"
                stack.extend(below)
        nodes = self._nodes.values()
        assert seen == len(self._nodes)
        assert len(self._host.policy) == sum(node.slot >= 0 for node in nodes)
        assert len(self._disk.policy) == self.n_on_disk == sum(bool(node.disk_bytes) for node in nodes)
        assert self.n_pinned == sum(node.pins > 0 and node.slot >= 0 and not node.disk_bytes for node in nodes)
        assert self.disk_bytes == sum(node.disk_bytes for node in nodes)
        assert self.disk_bytes_leased == sum(node.disk_bytes for node in nodes if node.pins)


def _facts(node: Node, n_read: int) -> BlockFacts:
    parent = node.parent.id if node.parent is not None and node.parent.id >= 0 else None
    return BlockFacts(node.key, parent, node.start, node.n_tokens, n_read)


def _exact(node: Node, key: bytes, *, closed: bool) -> Node | None:
    if closed:
        return node.closed_children.get(key) if node.closed_children else None
    children = node.children
    if not children:
        return None
    if len(children) == 1:  # most chains do not branch
        return children[0] if children[0].sortable == key else None
    i = bisect_left(children, key, key=_order)
    return children[i] if i < len(children) and children[i].sortable == key else None


def _below(node: Node) -> list[Node]:
    """All nodes under this one, each behind its parent."""
    found = node.below()
    for child in found:
        found += child.below()
    return found


def _goes_with_all_below(node: Node) -> bool:
    """Whether it lies on disk alone, with nothing on disk, locked or leased at it or below."""
    if not node.disk_bytes or node.slot >= 0 or node.locks or node.pins or node.n_disk_children:
        return False
    return not any(child.locks or child.pins or child.disk_bytes for child in _below(node))


def _nearest(node: Node, key: bytes, wanted: Tokens) -> tuple[Node | None, int]:
    """The child with bytes that shares most tokens with `wanted`, and how many.

    Beside the insertion point in each direction, the first that is not hollow.
    """
    children = node.children or []
    i = bisect_left(children, key, key=_order)
    before = next((child for child in reversed(children[:i]) if not child.is_hollow), None)
    behind = next((child for child in children[i:] if not child.is_hollow), None)
    best, best_n = None, 0
    for child in (before, behind, *(node.closed_children or {}).values()):
        n = common_length(child.tokens, wanted) if child is not None and not child.is_hollow else 0
        if n > best_n:
            best, best_n = child, n
    return best, best_n
