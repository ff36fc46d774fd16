"""The prefix index: which tokens are stored, as a tree of blocks. Pure: no state bytes, no clock, no locks.

One tree per root (tenant, model, template, KV type ...: `root_key`). A node is a block of up to 64 tokens; a chain of
nodes is a stored prefix. Blocks are aligned to the start of their piece (chunks.py); a *closed* node ends at an irregular
mark and its children begin a new piece, an open one may be short at the end of what was stored. Tokens are compared on
every match; keys only name blocks for the tiers.

A match may end inside a node: at a multiple of g from the piece's start every prefix of a node has the right bits.
Children are kept sorted by their tokens, so the longest common prefix is found beside the insertion point.

Nodes with children, locks or pins stay; the others are leaves that eviction may take (engine/eviction.py).
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence

import numpy as np
from blake3 import blake3
from msgspec import Struct

from keepwarm.core.prompt import Tokens
from keepwarm.engine.chunks import Piece
from keepwarm.engine.eviction import GreedyDual
from keepwarm.engine.layout import BLOCK_TOKENS

BlockKey = bytes  # 32 bytes


def root_key(*parts: str) -> BlockKey:
    """Key of a chain's root: everything beside the tokens that the state depends on, and the tenant."""
    return blake3("\x00".join(parts).encode()).digest()


def block_key(parent: BlockKey, tokens: Tokens, *, closed: bool) -> BlockKey:
    """Key of a block: blake3 of its parent's key, whether it ends a piece, and its token ids."""
    return blake3(parent + (b"\x01" if closed else b"\x00") + tokens.astype("<i4").tobytes()).digest()


class Node:
    """One stored block. `slot` is where the tier keeps its bytes."""

    __slots__ = (
        "children",
        "closed",
        "closed_children",
        "id",
        "key",
        "locks",
        "parent",
        "pins",
        "slot",
        "start",
        "tokens",
    )

    def __init__(
        self, id_: int, key: BlockKey, parent: "Node | None", start: int, tokens: Tokens, closed: bool
    ) -> None:
        self.id, self.key, self.parent, self.start = id_, key, parent, start
        self.tokens, self.closed = tokens, closed
        self.children: list[tuple[bytes, Node]] = []  # open blocks, sorted by sortable token bytes
        self.closed_children: dict[bytes, Node] = {}
        self.locks = 0
        self.pins = 0
        self.slot = -1

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def evictable(self) -> bool:
        return not (self.children or self.closed_children or self.locks or self.pins or self.parent is None)


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
    return tokens.astype(">i4").tobytes()


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


class PrefixIndex:
    """All trees of one engine. Callers serialise access; methods return what the caller must do with the tier."""

    def __init__(self) -> None:
        self._roots: dict[BlockKey, Node] = {}
        self._nodes: dict[int, Node] = {}
        self._evictable: set[int] = set()
        self._policy = GreedyDual()
        self._next_id = 0
        self.n_pinned = 0  # nodes with at least one pin

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
        for extent in extents(parts, len(tokens)):
            wanted = tokens[extent.start : extent.end]
            child = self._exact(node, wanted, closed=extent.closed)
            if child is None:
                best, n = self._nearest(node, wanted)
                if extent.closed:  # the same tokens, but the remainder was not evaluated by itself: other bits
                    n = min(n, len(wanted) - 1)
                if best is not None and n:
                    nodes.append(best)
                    at += n
                break
            nodes.append(child)
            node, at = child, extent.end
        return Found(tuple(nodes), at)

    def _exact(self, node: Node, wanted: Tokens, *, closed: bool) -> Node | None:
        if closed:
            return node.closed_children.get(_sortable(wanted))
        key = _sortable(wanted)
        i = bisect_left(node.children, key, key=lambda c: c[0])
        if i < len(node.children) and node.children[i][0] == key:
            return node.children[i][1]
        return None

    def _nearest(self, node: Node, wanted: Tokens) -> tuple[Node | None, int]:
        """The child that shares most tokens with `wanted`, and how many."""
        key = _sortable(wanted)
        i = bisect_left(node.children, key, key=lambda c: c[0])
        around = [child for _, child in node.children[max(i - 1, 0) : i + 1]]
        around.extend(node.closed_children.values())
        best, best_n = None, 0
        for child in around:
            n = common_length(child.tokens, wanted)
            if n > best_n:
                best, best_n = child, n
        return best, best_n

    def missing(
        self, root: BlockKey, tokens: Tokens, parts: Sequence[Piece], n_tokens: int
    ) -> tuple[Found, list[Missing]]:
        """What is there of the first `n_tokens`, whole blocks only, and the blocks that must be added after them.

        `Found.n_tokens` is the start of the first missing block, or `n_tokens`; its last node may cover more than asked.
        """
        node = self._roots.get(root)
        nodes: list[Node] = []
        wanted = list(extents(parts, n_tokens))
        for i, extent in enumerate(wanted):
            piece = tokens[extent.start : extent.end]
            child = self._exact(node, piece, closed=extent.closed) if node else None
            if child is None and node is not None and not extent.closed and i == len(wanted) - 1:
                best, n = self._nearest(node, piece)
                if n == len(piece):  # a longer block stands there already
                    child = best
            if child is None:
                return Found(tuple(nodes), extent.start), wanted[i:]
            nodes.append(child)
            node = child
        return Found(tuple(nodes), n_tokens), []

    def add(
        self, root: BlockKey, parent: Node | None, tokens: Tokens, extent: Missing, slot: int
    ) -> tuple[Node, list[Node]]:
        """Add one block under `parent` (None: the root) and return it, with nodes that it makes superfluous.

        Superfluous nodes (shorter, unused siblings whose tokens the new block begins with) are out of the index already:
        the caller frees their slots.
        """
        if parent is None:
            parent = self._roots.get(root)
            if parent is None:
                parent = self._roots[root] = Node(-1, root, None, 0, tokens[:0], closed=True)
        piece = tokens[extent.start : extent.end].copy()
        node = Node(
            self._next_id,
            block_key(parent.key, piece, closed=extent.closed),
            parent,
            extent.start,
            piece,
            extent.closed,
        )
        self._next_id += 1
        node.slot = slot
        superfluous = []
        key = _sortable(piece)
        if extent.closed:
            if key in parent.closed_children:
                raise DoubleInsert(f"closed block at {extent.start}")
            parent.closed_children[key] = node
        else:
            i = bisect_left(parent.children, key, key=lambda c: c[0])
            if i < len(parent.children) and parent.children[i][0] == key:
                raise DoubleInsert(f"block at {extent.start}")
            parent.children.insert(i, (key, node))
            if i and key.startswith(parent.children[i - 1][0]) and parent.children[i - 1][1].evictable:
                shorter = parent.children[i - 1][1]
                self._unlink(shorter)
                superfluous.append(shorter)
        self._nodes[node.id] = node
        self._policy.touch(node.id, node.start)
        self._refresh(parent)
        self._refresh(node)
        return node, superfluous

    def _unlink(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        key = _sortable(node.tokens)
        if node.closed:
            del parent.closed_children[key]
        else:
            i = bisect_left(parent.children, key, key=lambda c: c[0])
            assert parent.children[i][1] is node
            del parent.children[i]
        del self._nodes[node.id]
        self._evictable.discard(node.id)
        self._policy.forget(node.id)
        if parent.parent is None and not parent.children and not parent.closed_children:
            self._roots.pop(parent.key, None)
        else:
            self._refresh(parent)

    def _refresh(self, node: Node) -> None:
        if not node.evictable:
            self._evictable.discard(node.id)
        elif node.id not in self._evictable:
            self._evictable.add(node.id)
            self._policy.offer(node.id)

    def evict(self) -> Node | None:
        """Take out the leaf that is cheapest to lose; the caller frees its slot. None when nothing may go."""
        victim = self._policy.victim(self._evictable)
        if victim is None:
            return None
        node = self._nodes[victim]
        self._unlink(node)
        return node

    def touch(self, nodes: Sequence[Node]) -> None:
        """The nodes were used."""
        for node in nodes:
            self._policy.touch(node.id, node.start)

    def lock(self, nodes: Sequence[Node]) -> None:
        """Keep the nodes until `unlock`; counted."""
        for node in nodes:
            node.locks += 1
            self._refresh(node)

    def unlock(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            assert node.locks > 0
            node.locks -= 1
            self._refresh(node)

    def pin(self, nodes: Sequence[Node]) -> None:
        """Keep the nodes for a cache object until `unpin`; counted."""
        for node in nodes:
            self.n_pinned += node.pins == 0
            node.pins += 1
            self._refresh(node)

    def unpin(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            assert node.pins > 0
            node.pins -= 1
            self.n_pinned -= node.pins == 0
            self._refresh(node)

    @property
    def n_evictable(self) -> int:
        """Leaves that could go now; more may follow when they have gone."""
        return len(self._evictable)

    def n_reclaimable(self) -> int:
        """All nodes that eviction could free one after the other: those with no lock or pin on them or below them."""
        kept: set[int] = set()
        for node in self._nodes.values():
            if node.locks or node.pins:
                up: Node | None = node
                while up is not None and up.id not in kept:
                    kept.add(up.id)
                    up = up.parent
        return len(self._nodes) - len(kept - {-1})

    def nodes(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def check_integrity(self) -> None:
        """Assert what must always hold; called in tests and when the engine is idle."""
        seen = 0
        for root in self._roots.values():
            stack = [root]
            while stack:
                node = stack.pop()
                below = [child for _, child in node.children] + list(node.closed_children.values())
                for child in below:
                    seen += 1
                    assert child.parent is node
                    assert child.start == node.end
                    assert self._nodes[child.id] is child
                    assert (child.id in self._evictable) == child.evictable
                stack.extend(below)
        assert seen == len(self._nodes) == len(self._policy)
        assert self.n_pinned == sum(node.pins > 0 for node in self._nodes.values())
