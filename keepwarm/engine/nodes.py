"""The prefix index's blocks as rows of arrays: what is known of a block, its place in its tree, its key and token ids.

A block is an id, a row of every column; `Node` is a handle to one. Ids are small and used again. Each use has its own
generation, so a handle that outlived its block is found out (an AssertionError) and never reads its successor's row.

Token ids take 3 bytes each, big-endian, so *packed* tokens sort and compare as bytes (vocabularies are below 2**24). Keys
and packed tokens lie in pages that are never moved: they may be read without the index's lock by who holds the block.

Most blocks have one child at most, whose id stands in a column; a block with several has an array of their ids, sorted
by packed tokens. So the child that shares most tokens with others stands beside their insertion point. Open and closed
children stand together: of equal tokens there is one of each at most.

Around 260 bytes a block, of which 224 are key and tokens; columns grow by a sixteenth. Invariant: a row is a root (no
parent), a block (a length) or free.
"""

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
from msgspec import Struct

from keepwarm.core.prompt import Tokens
from keepwarm.engine.layout import BLOCK_TOKENS

NONE, SEVERAL = -1, -2  # instead of an id
TOKEN_BYTES = 3
KEY_BYTES = 32
ROW_BYTES = KEY_BYTES + TOKEN_BYTES * BLOCK_TOKENS
PAGE_ROWS = 256
CLOSED = 128  # beside a length of up to 64 in one byte
GENERATIONS = 1 << 32
GONE = "this block is gone"


def pack(tokens: Tokens) -> bytes:
    """Token ids, 0..2**24 - 1, as bytes that sort as the ids do."""
    assert not int(np.bitwise_or.reduce(tokens)) >> 8 * TOKEN_BYTES, "a token id outside 0..2**24 - 1"
    wide = tokens.astype(">i4").view(np.uint8)
    packed = np.empty(TOKEN_BYTES * len(tokens), np.uint8)
    for i in range(TOKEN_BYTES):
        packed[i::TOKEN_BYTES] = wide[i + 1 :: 4]
    return packed.tobytes()


def unpack(packed: bytes) -> Tokens:
    """The token ids, shape (n_tokens,)."""
    wide = np.zeros((len(packed) // TOKEN_BYTES, 4), np.uint8)
    wide[:, 1:] = np.frombuffer(packed, np.uint8).reshape(-1, TOKEN_BYTES)
    return wide.view(">i4").astype(np.int32).ravel()


class Node(Struct, frozen=True, gc=False):
    """One stored block, as long as it is in the index. `slot` is its place in the host tier (-1: none), `disk_bytes` what
    it takes on disk (0: nothing). A root is one, too, without tokens.

    Two handles of one block are equal. What is read of every block of every turn saves itself a call.
    """

    id: int
    generation: int
    table: "NodeTable"

    @property
    def row(self) -> int:
        """The id, after making sure that the block is still there."""
        assert self.table.generations[self.id] == self.generation, GONE
        return self.id

    @property
    def is_there(self) -> bool:
        """Whether the block is still in the index. What is locked or pinned is."""
        return self.table.generations[self.id] == self.generation

    @property
    def key(self) -> bytes:
        return self.table.key(self.row)

    @property
    def parent(self) -> "Node | None":
        """None for a root."""
        parent = self.table.parents[self.row]
        return None if parent == NONE else self.table.node(parent)

    @property
    def start(self) -> int:
        table, id_ = self.table, self.id
        assert table.generations[id_] == self.generation, GONE
        return table.starts[id_]

    @property
    def n_tokens(self) -> int:
        return self.table.n_tokens(self.row)

    @property
    def end(self) -> int:
        return self.table.end(self.row)

    @property
    def tokens(self) -> Tokens:
        """The token ids, shape (n_tokens,), a copy."""
        return unpack(self.table.packed(self.row))

    @property
    def closed(self) -> bool:
        return self.table.is_closed(self.row)

    @property
    def slot(self) -> int:
        table, id_ = self.table, self.id
        assert table.generations[id_] == self.generation, GONE
        return table.slots[id_]

    @property
    def disk_bytes(self) -> int:
        table, id_ = self.table, self.id
        assert table.generations[id_] == self.generation, GONE
        return table.disk_bytes[id_]

    @property
    def locks(self) -> int:
        return self.table.locks[self.row]

    @property
    def pins(self) -> int:
        table, id_ = self.table, self.id
        assert table.generations[id_] == self.generation, GONE
        return table.pins[id_]

    @property
    def is_leaf(self) -> bool:
        return self.table.is_leaf(self.row)

    @property
    def is_hollow(self) -> bool:
        """Its bytes are nowhere."""
        return self.table.is_hollow(self.row)


class NodeList(Sequence[Node]):
    """Nodes that something keeps in the index for long, a lease say: 4 bytes each, and no handles before they are asked for."""

    __slots__ = ("_ids", "_table")

    def __init__(self, nodes: Iterable[Node], table: "NodeTable") -> None:
        self._table = table
        self._ids = array("i", [node.row for node in nodes])

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[Node]:
        return map(self._table.node, self._ids)

    @overload
    def __getitem__(self, i: int) -> Node: ...
    @overload
    def __getitem__(self, i: slice) -> tuple[Node, ...]: ...
    def __getitem__(self, i: int | slice) -> Node | tuple[Node, ...]:
        if isinstance(i, slice):
            return tuple(map(self._table.node, self._ids[i]))
        return self._table.node(self._ids[i])

    def __contains__(self, node: object) -> bool:
        return isinstance(node, Node) and node.table is self._table and node.row in self._ids


class NodeTable:
    """The columns, by id, and the trees' shape. The index alone writes; what blocks are *for* is its business."""

    def __init__(self) -> None:
        self.parents = array("i")
        self.starts = array("i")
        self.slots = array("i")
        self.disk_bytes = array("I")
        self.locks = array("H")
        self.pins = array("I")
        self.n_disk_children = array("I")
        self.generations = array("I")
        self._lengths = bytearray()  # tokens, and CLOSED; 0: a root, or free
        self._children = array("i")  # the only child's id, NONE or SEVERAL
        self._siblings: dict[int, array[int]] = {}  # children of those that have several, sorted by packed tokens
        self._pages: list[bytearray] = []
        self._free = array("i")
        self._n_roots = 0

    def __len__(self) -> int:
        """Blocks, without roots."""
        return len(self.parents) - len(self._free) - self._n_roots

    def __iter__(self) -> Iterator[int]:
        """The ids of all blocks."""
        return (id_ for id_, length in enumerate(self._lengths) if length)

    def node(self, id_: int) -> Node:
        return Node(id_, self.generations[id_], self)

    def handles(self, ids: Iterable[int]) -> tuple[Node, ...]:
        return tuple([Node(id_, self.generations[id_], self) for id_ in ids])

    # --- what is known of a block

    def key(self, id_: int) -> bytes:
        page, at = self._place(id_)
        return bytes(page[at : at + KEY_BYTES])

    def packed(self, id_: int) -> bytes:
        """Its tokens, as `pack` gives them."""
        page, at = self._place(id_)
        at += KEY_BYTES
        return bytes(page[at : at + TOKEN_BYTES * self.n_tokens(id_)])

    def _place(self, id_: int) -> tuple[bytearray, int]:
        return self._pages[id_ // PAGE_ROWS], id_ % PAGE_ROWS * ROW_BYTES

    def n_tokens(self, id_: int) -> int:
        return self._lengths[id_] & ~CLOSED

    def end(self, id_: int) -> int:
        return self.starts[id_] + self.n_tokens(id_)

    def is_closed(self, id_: int) -> bool:
        return self._lengths[id_] >= CLOSED

    def is_root(self, id_: int) -> bool:
        return self.parents[id_] == NONE

    def is_leaf(self, id_: int) -> bool:
        return self._children[id_] == NONE

    def is_hollow(self, id_: int) -> bool:
        return self.slots[id_] < 0 and not self.disk_bytes[id_]

    # --- children

    def children(self, id_: int) -> Sequence[int]:
        """The ids of its children, sorted by their tokens."""
        only = self._children[id_]
        return self._siblings[id_] if only == SEVERAL else () if only == NONE else (only,)

    def below(self, id_: int) -> list[int]:
        """The ids of all blocks under this one, each behind its parent."""
        found = list(self.children(id_))
        for child in found:
            found += self.children(child)
        return found

    def child(self, id_: int, packed: bytes, *, closed: bool) -> int:
        """The child of exactly these tokens, or NONE."""
        only = self._children[id_]  # most chains do not branch
        if only != SEVERAL:
            return only if only != NONE and self._is(only, packed, closed=closed) else NONE
        siblings = self._siblings[id_]
        i = bisect_left(siblings, packed, key=self.packed)
        return next((child for child in siblings[i : i + 2] if self._is(child, packed, closed=closed)), NONE)

    def _is(self, id_: int, packed: bytes, *, closed: bool) -> bool:
        if self._lengths[id_] != len(packed) // TOKEN_BYTES + CLOSED * closed:
            return False
        page = self._pages[id_ // PAGE_ROWS]
        return page.startswith(packed, id_ % PAGE_ROWS * ROW_BYTES + KEY_BYTES)

    def walk(self, id_: int, blocks: Iterable[tuple[bytes, bool]]) -> list[int]:
        """The ids of the blocks below this one with exactly these tokens, closed or not, as far as they have bytes."""
        found: list[int] = []
        lengths, pages, slots, disk_bytes = self._lengths, self._pages, self.slots, self.disk_bytes
        for packed, closed in blocks:
            child = self._children[id_]
            if child >= 0:  # most chains do not branch; so this is `_is`, in place
                page, at = pages[child // PAGE_ROWS], child % PAGE_ROWS * ROW_BYTES + KEY_BYTES
                if lengths[child] != len(packed) // TOKEN_BYTES + CLOSED * closed or not page.startswith(packed, at):
                    break
            else:
                child = self.child(id_, packed, closed=closed)
            if child == NONE or (slots[child] < 0 and not disk_bytes[child]):
                break
            found.append(child)
            id_ = child
        return found

    def nearest(self, id_: int, packed: bytes) -> tuple[int, int]:
        """The child with bytes that shares most tokens with these, and how many; NONE and 0 when none shares any.

        Beside the insertion point in each direction, the first that is not hollow.
        """
        siblings = self.children(id_)
        i = bisect_left(siblings, packed, key=self.packed)
        before = (siblings[j] for j in range(i - 1, -1, -1))
        behind = (siblings[j] for j in range(i, len(siblings)))
        best, best_n = NONE, 0
        for side in (before, behind):
            child = next((child for child in side if not self.is_hollow(child)), NONE)
            n = _n_shared(self.packed(child), packed) if child != NONE else 0
            if n > best_n:
                best, best_n = child, n
        return best, best_n

    def shorter(self, id_: int) -> int:
        """The open sibling before it whose tokens it begins with, or NONE."""
        siblings = self.children(self.parents[id_])
        if len(siblings) == 1:
            return NONE
        packed = self.packed(id_)
        i = bisect_left(siblings, packed, key=self.packed)
        before = (siblings[j] for j in range(i - 1, -1, -1))
        child = next((child for child in before if not self.is_closed(child)), NONE)
        return child if child != NONE and packed.startswith(self.packed(child)) else NONE

    # --- rows come and go

    def add_root(self, key: bytes) -> int:
        """A new root, hollow and without tokens."""
        self._n_roots += 1
        return self._new(NONE, key, b"", 0, closed=False)

    def add(self, parent: int, key: bytes, packed: bytes, *, closed: bool) -> int:
        """A new block at the end of `parent`, hollow."""
        id_ = self._new(parent, key, packed, self.end(parent), closed=closed)
        only = self._children[parent]
        if only == NONE:
            self._children[parent] = id_
        else:
            if only != SEVERAL:
                self._siblings[parent] = array("i", [only])
                self._children[parent] = SEVERAL
            insort(self._siblings[parent], id_, key=self.packed)
        return id_

    def _new(self, parent: int, key: bytes, packed: bytes, start: int, *, closed: bool) -> int:
        id_ = self._free.pop() if self._free else self._grow()
        page, at = self._place(id_)
        page[at : at + KEY_BYTES] = key
        page[at + KEY_BYTES : at + KEY_BYTES + len(packed)] = packed
        self.parents[id_], self.starts[id_] = parent, start
        self._lengths[id_] = len(packed) // TOKEN_BYTES + CLOSED * closed
        return id_

    def _grow(self) -> int:
        id_ = len(self.parents)
        for column in (self.parents, self.slots, self._children):
            column.append(NONE)
        for column in (self.starts, self.disk_bytes, self.locks, self.pins, self.n_disk_children, self.generations):
            column.append(0)
        self._lengths.append(0)
        if id_ % PAGE_ROWS == 0:
            self._pages.append(bytearray(PAGE_ROWS * ROW_BYTES))
        return id_

    def remove(self, id_: int) -> None:
        """Take a leaf or an empty root out; its id may be used again at once."""
        assert self.is_leaf(id_) and not self.locks[id_] and not self.pins[id_] and not self.n_disk_children[id_]
        parent = self.parents[id_]
        if parent == NONE:
            self._n_roots -= 1
        elif self._children[parent] == id_:
            self._children[parent] = NONE
        else:
            siblings = self._siblings[parent]
            i = bisect_left(siblings, self.packed(id_), key=self.packed)
            del siblings[i if siblings[i] == id_ else i + 1]
            if len(siblings) == 1:
                self._children[parent] = self._siblings.pop(parent)[0]
        self.parents[id_] = self.slots[id_] = NONE
        self._lengths[id_] = self.disk_bytes[id_] = 0
        self.generations[id_] = (self.generations[id_] + 1) % GENERATIONS
        self._free.append(id_)

    def check_integrity(self, roots: Iterable[int]) -> None:
        """Assert that the trees below these roots are whole, and that all other rows are free."""
        seen = list(roots)
        for id_ in seen:
            children = self.children(id_)
            order = [(self.packed(child), self.is_closed(child)) for child in children]
            assert len(set(order)) == len(order) and [packed for packed, _ in order] == sorted(p for p, _ in order)
            assert all(self.parents[child] == id_ and self.starts[child] == self.end(id_) for child in children)
            assert self.n_disk_children[id_] == sum(self.disk_bytes[child] > 0 for child in children)
            seen += children
        assert sorted([*seen, *self._free]) == list(range(len(self.parents)))
        assert all(self.n_tokens(id_) for id_ in seen if not self.is_root(id_))
        assert self._n_roots == sum(map(self.is_root, seen))
        assert set(self._siblings) == {id_ for id_ in seen if self._children[id_] == SEVERAL}


def _n_shared(a: bytes, b: bytes) -> int:
    """How many tokens two packed runs share from the start."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(np.frombuffer(a, np.uint8, n) != np.frombuffer(b, np.uint8, n))
    return (int(differ[0]) if len(differ) else n) // TOKEN_BYTES
