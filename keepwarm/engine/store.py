"""The prefix store: index, tier and state layout together. Finds, locks, restores, saves and pins prefixes.

Thread-safe by one lock, held for index work only; bytes are copied outside it, in slots that are locked or not yet in
the index. A prompt's tenant is part of its chain's root, so nothing is ever found for another tenant.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from keepwarm.core.prompt import Prompt
from keepwarm.engine.chunks import Piece, pieces, storable, usable
from keepwarm.engine.layout import BLOCK_TOKENS, Assembler, Layout, cut, parse
from keepwarm.engine.memory import touched
from keepwarm.engine.model import Blob, Model
from keepwarm.engine.prefix import BlockKey, Missing, Node, PrefixIndex, root_key
from keepwarm.engine.tiers import Tier

SLACK = 8  # a buffer with up to an eighth more cells than wanted is loaded as it is


class NoRoom(Exception):
    """A pinned prefix does not fit: numbers for the error message."""

    def __init__(self, n_bytes_needed: int, n_bytes_free: int) -> None:
        super().__init__(f"needs {n_bytes_needed:,} bytes, {n_bytes_free:,} can be freed")
        self.n_bytes_needed, self.n_bytes_free = n_bytes_needed, n_bytes_free


class Held(Struct, frozen=True):
    """A locked match: usable tokens and the nodes that cover them. Give it back with `release`."""

    nodes: tuple[Node, ...]
    n_tokens: int


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
        if mine is not has or min(mine.end, held.n_tokens) > there.n_tokens:
            break
        n_same += 1
    return n_same


class PrefixStore:
    """One store for one model. `identity` names everything the bits depend on beside tokens and tenant."""

    def __init__(self, layout: Layout, tier: Tier, *, identity: Sequence[str], granularity: int, n_ctx: int) -> None:
        self.granularity = granularity
        self._layout, self._tier, self._identity = layout, tier, tuple(identity)
        self._index = PrefixIndex()
        self._pins: dict[str, tuple[Node, ...]] = {}
        self._lock = threading.Lock()
        self._assembled: _Assembled | None = None
        self._pool = ThreadPoolExecutor(2, "assemble")
        self._assembler = Assembler(layout, n_ctx, touched(layout.blob_bytes(n_ctx)), self._pool)

    def pieces(self, prompt: Prompt) -> tuple[Piece, ...]:
        """The prompt's pieces at this model's granularity."""
        return pieces(prompt.n_tokens, prompt.marks, self.granularity)

    def _root(self, tenant: str) -> BlockKey:
        return root_key(*self._identity, tenant)

    def hold(self, prompt: Prompt, *, want_logits: bool) -> Held:
        """Find and lock the longest usable prefix."""
        parts = self.pieces(prompt)
        with self._lock:
            found = self._index.match(self._root(prompt.tenant), prompt.tokens, parts)
            n = usable(found.n_tokens, parts, self.granularity, want_logits=want_logits)
            nodes = tuple(node for node in found.nodes if node.start < n)
            self._index.lock(nodes)
            self._index.touch(nodes)
        return Held(nodes, n)

    def release(self, held: Held) -> None:
        """Unlock. Exactly once for each `hold`."""
        with self._lock:
            self._index.unlock(held.nodes)

    def restore(self, held: Held, model: Model, stream: int) -> None:
        """Put the held tokens' state into an empty stream. Compute thread only. Raises ModelFault.

        The blob assembled last is used again when it has room for the held tokens: only blocks that it does not hold yet
        are copied into it, so users who ask about one context in turn pay for loading, not for putting its blocks
        together. Cells that it has beyond are dropped from the stream.
        """
        there, self._assembled = self._assembled, None  # if copying fails, the buffer is nothing any more
        if there is None or not held.n_tokens <= there.n_cells <= held.n_tokens + held.n_tokens // SLACK + BLOCK_TOKENS:
            blob = self._assembler.blob(self._bytes(held.nodes), held.n_tokens)
            there = _Assembled(held.nodes, held.n_tokens, held.n_tokens, blob)
        else:
            n_same = _n_same(there, held)
            if n_same < len(held.nodes):
                start = held.nodes[n_same].start
                self._assembler.patch(there.blob, there.n_cells, self._bytes(held.nodes[n_same:]), start, held.n_tokens)
                there = _Assembled(held.nodes, held.n_tokens, there.n_cells, there.blob)
        self._assembled = there
        model.load(stream, there.blob)
        if there.n_cells > held.n_tokens:
            model.forget(stream, held.n_tokens, -1)

    def _bytes(self, nodes: Sequence[Node]) -> list[tuple[NDArray[np.uint8], int]]:
        return [(self._tier.bytes_of(node.slot), len(node.tokens)) for node in nodes]

    def n_missing(self, prompt: Prompt, n_evaluated: int) -> int:
        """How many of the first `n_evaluated` tokens could be stored and are not."""
        parts = self.pieces(prompt)
        n = storable(n_evaluated, parts, self.granularity)
        with self._lock:
            have, _ = self._index.missing(self._root(prompt.tenant), prompt.tokens, parts, n)
        return n - have.n_tokens

    def save(self, prompt: Prompt, n_evaluated: int, model: Model, stream: int, *, spend: bool, pin: str | None) -> int:
        """Store what is new of the first `n_evaluated` tokens of `stream`; returns how many tokens were added.

        `spend`: the stream is not needed any more, so cells that are stored already are dropped before saving. With
        `pin` all of it stays until `unpin(pin)`; raises NoRoom when that cannot be had. Without it, what finds no room is
        not stored. Compute thread only.
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
                self._need_room(len(wanted))
            if wanted:
                self._add(prompt, root, path, wanted, model, stream, spend=spend)
            with self._lock:
                if pin is not None:
                    if len(path) < len(have.nodes) + len(wanted):
                        raise NoRoom(len(wanted) * self._tier.slot_bytes, self._tier.n_free * self._tier.slot_bytes)
                    self._unpin(pin)
                    self._index.pin(path)
                    self._pins[pin] = tuple(path)
        finally:
            with self._lock:
                self._index.unlock(path)
        return sum(len(node.tokens) for node in path[len(have.nodes) :])

    def _need_room(self, n_blocks: int) -> None:
        with self._lock:
            free = self._tier.n_free + self._index.n_reclaimable()
        if n_blocks > free:
            raise NoRoom(n_blocks * self._tier.slot_bytes, free * self._tier.slot_bytes)

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
                slot = self._take()
            if slot is None:
                return
            cut(cells, extent.start - first, extent.end - extent.start, self._tier.bytes_of(slot))
            with self._lock:
                node, superfluous = self._index.add(root, path[-1] if path else None, prompt.tokens, extent, slot)
                for gone in superfluous:
                    self._tier.free(gone.slot)
                self._index.lock((node,))
            path.append(node)

    def _take(self) -> int | None:
        slot = self._tier.take()
        while slot is None:
            victim = self._index.evict()
            if victim is None:
                return None
            self._tier.free(victim.slot)
            slot = self._tier.take()
        return slot

    def unpin(self, pin: str) -> None:
        """Give a pinned prefix back to eviction. Unknown pins are no error."""
        with self._lock:
            self._unpin(pin)

    def _unpin(self, pin: str) -> None:
        nodes = self._pins.pop(pin, None)
        if nodes:
            self._index.unpin(nodes)

    @property
    def bytes_total(self) -> int:
        return self._tier.n_slots * self._tier.slot_bytes

    @property
    def bytes_resident(self) -> int:
        """Bytes of blocks that are not pinned."""
        return (self._tier.n_slots - self._tier.n_free) * self._tier.slot_bytes - self.bytes_pinned

    @property
    def bytes_pinned(self) -> int:
        return self._index.n_pinned * self._tier.slot_bytes

    @property
    def tier_name(self) -> str:
        return self._tier.name

    def close(self) -> None:
        """End the threads that assemble."""
        self._pool.shutdown()

    def check_integrity(self) -> None:
        """Assert index and tier agree: free + resident + pinned = total."""
        with self._lock:
            self._index.check_integrity()
            slots = [node.slot for node in self._index.nodes()]
            assert len(slots) == len(set(slots)) == self._tier.n_slots - self._tier.n_free


def slot_bytes(layout: Layout) -> int:
    """Bytes of a full block."""
    return BLOCK_TOKENS * layout.cell_bytes
