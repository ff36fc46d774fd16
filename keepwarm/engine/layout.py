"""llama.cpp's per-sequence state blob: read, cut into blocks, assembled from blocks. Numpy on bytes, no llama.cpp.

The blob (little-endian; llama.cpp's `llama_state_seq_get_data`, read off its output and checked by the start-up self-test):

    u32 magic, u32 version, u32 n_stream
    for each stream: u32 n_cells, and for the one that is not 0:
        n_cells * (i32 pos, i32 n_seq_id = 1, i32 seq_id)
        u32 v_trans, u32 n_layer
        for each layer: i32 type, u64 row_bytes, n_cells * row_bytes                                     K
        for each layer: i32 type, u64 row_bytes, n_cells * row_bytes                                     V, flash attention
                    or: i32 type, u32 element_bytes, u32 n_embd, n_embd * (n_cells * element_bytes)      V, transposed

A *block* is the cells' bytes alone, shape (n_bytes,): K as (n_layer, cells, k_row), then V as (n_layer, v_rows, cells,
v_bytes), where v_rows is n_embd when V is transposed and 1 otherwise.
"""

import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from keepwarm.engine.model import Blob, ModelFault

BLOCK_TOKENS = 64  # small enough to lose little at a branch, large enough to copy in few strides (docs/decisions/0004)
CELL_BYTES = 12
HEADER = struct.Struct("<III")
COUNT = struct.Struct("<I")
KV_HEAD = struct.Struct("<II")
PLAIN_HEAD = struct.Struct("<iQ")
TRANSPOSED_HEAD = struct.Struct("<iII")


class LayoutFault(ModelFault):
    """The blob is not of the form above, so it cannot be cut: no caching for this model."""


class Layout(Struct, frozen=True):
    """What stays the same for a model and context: enough to compute every offset for any number of cells."""

    magic: int
    version: int
    n_stream: int
    n_layer: int
    k_type: int
    k_row: int  # bytes of one cell's K in one layer
    v_type: int
    v_trans: bool
    v_rows: int  # n_embd when transposed, else 1
    v_bytes: int  # bytes of one cell in one V row

    @property
    def cell_bytes(self) -> int:
        """Bytes of one token's KV in all layers."""
        return self.n_layer * (self.k_row + self.v_rows * self.v_bytes)

    @property
    def v_head(self) -> struct.Struct:
        return TRANSPOSED_HEAD if self.v_trans else PLAIN_HEAD

    def k_start(self, n_cells: int) -> int:
        """Offset of the first K layer's rows when all cells are in stream 0."""
        return HEADER.size + COUNT.size + CELL_BYTES * n_cells + KV_HEAD.size + PLAIN_HEAD.size

    def k_stride(self, n_cells: int) -> int:
        return PLAIN_HEAD.size + n_cells * self.k_row

    def v_start(self, n_cells: int) -> int:
        return self.k_start(n_cells) - PLAIN_HEAD.size + self.n_layer * self.k_stride(n_cells) + self.v_head.size

    def v_stride(self, n_cells: int) -> int:
        return self.v_head.size + self.v_rows * n_cells * self.v_bytes

    def blob_bytes(self, n_cells: int) -> int:
        """Size of the whole blob."""
        v_end = self.v_start(n_cells) - self.v_head.size + self.n_layer * self.v_stride(n_cells)
        return v_end + COUNT.size * (self.n_stream - 1)


class Cells(Struct, frozen=True):
    """A parsed blob: its layout, the cells' positions, and writable or readable views of their bytes."""

    layout: Layout
    positions: NDArray[np.int32]
    k: NDArray[np.uint8]  # (n_layer, n_cells, k_row)
    v: NDArray[np.uint8]  # (n_layer, v_rows, n_cells, v_bytes)


def _views(blob: Blob, layout: Layout, n_cells: int, shift: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    strided = np.lib.stride_tricks.as_strided
    row = layout.k_row
    k = strided(
        blob[layout.k_start(n_cells) + shift :],
        (layout.n_layer, n_cells, row),
        (layout.k_stride(n_cells), row, 1),
    )
    v_row = n_cells * layout.v_bytes
    v = strided(
        blob[layout.v_start(n_cells) + shift :],
        (layout.n_layer, layout.v_rows, n_cells, layout.v_bytes),
        (layout.v_stride(n_cells), v_row, layout.v_bytes, 1),
    )
    return k, v


def parse(blob: Blob) -> Cells:
    """Read a blob whole. Raises LayoutFault when it is not exactly of the known form."""
    try:
        return _parse(blob)
    except (struct.error, ValueError, OverflowError) as exc:  # a header counts or points beyond the blob
        raise LayoutFault(f"state blob ends early: {exc}") from exc


def _parse(blob: Blob) -> Cells:
    raw = memoryview(blob.data)
    magic, version, n_stream = HEADER.unpack_from(raw, 0)
    at, shift, n_cells = HEADER.size, 0, 0
    for _ in range(n_stream):
        (n_cells,) = COUNT.unpack_from(raw, at)
        at += COUNT.size
        if n_cells:
            break
        shift += COUNT.size
    if not n_cells:
        raise LayoutFault("state blob has no cells")
    meta = np.frombuffer(raw, np.int32, 3 * n_cells, at).reshape(n_cells, 3)
    at += CELL_BYTES * n_cells
    v_trans, n_layer = KV_HEAD.unpack_from(raw, at)
    at += KV_HEAD.size
    if v_trans > 1 or not n_layer:
        raise LayoutFault(f"state blob says v_trans = {v_trans}, n_layer = {n_layer}")
    k_type, k_row = PLAIN_HEAD.unpack_from(raw, at)
    v_at = at + n_layer * (PLAIN_HEAD.size + n_cells * k_row)
    if v_trans:
        v_type, v_bytes, v_rows = TRANSPOSED_HEAD.unpack_from(raw, v_at)
    else:
        v_type, v_bytes = PLAIN_HEAD.unpack_from(raw, v_at)
        v_rows = 1
    layout = Layout(magic, version, n_stream, n_layer, k_type, k_row, v_type, bool(v_trans), v_rows, v_bytes)
    if layout.blob_bytes(n_cells) != len(blob):
        raise LayoutFault(f"state blob has {len(blob)} bytes, its headers say {layout.blob_bytes(n_cells)}")
    _check_layer_heads(raw, layout, n_cells, shift)
    if blob[len(blob) - COUNT.size * (n_stream - 1) + shift :].any():
        raise LayoutFault("state blob has cells in several streams")
    if (meta[:, 1] != 1).any():
        raise LayoutFault("a cell belongs to several sequences")
    k, v = _views(blob, layout, n_cells, shift)
    return Cells(layout, meta[:, 0], k, v)


def _check_layer_heads(raw: memoryview, layout: Layout, n_cells: int, shift: int) -> None:
    """Every layer must have the first one's shape: the views stride over them."""
    for layer in range(layout.n_layer):
        at = layout.k_start(n_cells) + shift - PLAIN_HEAD.size + layer * layout.k_stride(n_cells)
        if PLAIN_HEAD.unpack_from(raw, at) != (layout.k_type, layout.k_row):
            raise LayoutFault(f"layer {layer} has K rows of another shape than layer 0")
        at = layout.v_start(n_cells) + shift - layout.v_head.size + layer * layout.v_stride(n_cells)
        wanted = (layout.v_type, layout.v_bytes, layout.v_rows) if layout.v_trans else (layout.v_type, layout.v_bytes)
        if layout.v_head.unpack_from(raw, at) != wanted:
            raise LayoutFault(f"layer {layer} has V rows of another shape than layer 0")


def block_views(layout: Layout, block: NDArray[np.uint8], n_cells: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """K and V views of a block's bytes: (n_layer, n_cells, k_row) and (n_layer, v_rows, n_cells, v_bytes)."""
    split = layout.n_layer * n_cells * layout.k_row
    end = n_cells * layout.cell_bytes
    k = block[:split].reshape(layout.n_layer, n_cells, layout.k_row)
    v = block[split:end].reshape(layout.n_layer, layout.v_rows, n_cells, layout.v_bytes)
    return k, v


def cut(cells: Cells, start: int, n_cells: int, into: NDArray[np.uint8]) -> None:
    """Copy cells start..start+n_cells-1 of a parsed blob into a block's bytes."""
    k, v = block_views(cells.layout, into, n_cells)
    k[...] = cells.k[:, start : start + n_cells]
    v[...] = cells.v[:, :, start : start + n_cells]


Blocks = Sequence[tuple[NDArray[np.uint8], int]]  # (a block's bytes, cells in it), in order


class Assembler:
    """Builds blobs out of blocks in one buffer, touched once and used again for every restore.

    With `pool`, layers are copied by its threads: transposed V is copied in runs of one block's cells (128 bytes), which
    keeps a core busy rather than the memory (measured for 5,000 tokens: 55 ms by one thread, 30 by two).
    """

    def __init__(
        self, layout: Layout, n_cells_max: int, buffer: NDArray[np.uint8], pool: ThreadPoolExecutor | None = None
    ) -> None:
        assert len(buffer) >= layout.blob_bytes(n_cells_max)
        self._layout, self._buffer, self._pool = layout, buffer, pool

    def blob(self, blocks: Blocks, n_cells: int) -> Blob:
        """The state of positions 0..n_cells-1 from (block bytes, cells in the block), in order; the last may have more.

        The result is a view that the next call overwrites.
        """
        out = self.blank(n_cells)
        self.patch(out, n_cells, blocks, 0, n_cells)
        return out

    def blank(self, n_cells: int) -> Blob:
        """A blob of `n_cells` cells without their bytes, to be patched; a view that the next call overwrites."""
        out = self._buffer[: self._layout.blob_bytes(n_cells)]
        self._write_heads(out, n_cells)
        return out

    def patch(self, out: Blob, n_cells: int, blocks: Blocks, start: int, end: int) -> None:
        """Write cells start..end-1 of a blob of `n_cells` cells that `blob` made from (block bytes, cells in the block)."""
        assert sum(held for _, held in blocks) >= end - start, (start, end)
        n_layer = self._layout.n_layer
        if self._pool is None:
            self._copy(out, n_cells, blocks, start, end, slice(0, n_layer))
        else:
            parts = (slice(0, n_layer // 2), slice(n_layer // 2, n_layer))
            list(self._pool.map(lambda layers: self._copy(out, n_cells, blocks, start, end, layers), parts))

    def _copy(self, out: Blob, n_cells: int, blocks: Blocks, start: int, end: int, layers: slice) -> None:
        k, v = _views(out, self._layout, n_cells, 0)
        at = start
        for block, held in blocks:
            take = min(held, end - at)
            block_k, block_v = block_views(self._layout, block, held)
            k[layers, at : at + take] = block_k[layers, :take]
            v[layers, :, at : at + take] = block_v[layers, :, :take]
            at += take

    def _write_heads(self, out: Blob, n_cells: int) -> None:
        layout, raw = self._layout, memoryview(out.data)
        HEADER.pack_into(raw, 0, layout.magic, layout.version, layout.n_stream)
        COUNT.pack_into(raw, HEADER.size, n_cells)
        meta_at = HEADER.size + COUNT.size
        meta = np.frombuffer(raw, np.int32, 3 * n_cells, meta_at).reshape(n_cells, 3)
        meta[:, 0] = np.arange(n_cells, dtype=np.int32)
        meta[:, 1], meta[:, 2] = 1, 0
        KV_HEAD.pack_into(raw, meta_at + CELL_BYTES * n_cells, layout.v_trans, layout.n_layer)
        for layer in range(layout.n_layer):
            at = layout.k_start(n_cells) - PLAIN_HEAD.size + layer * layout.k_stride(n_cells)
            PLAIN_HEAD.pack_into(raw, at, layout.k_type, layout.k_row)
            at = layout.v_start(n_cells) - layout.v_head.size + layer * layout.v_stride(n_cells)
            if layout.v_trans:
                TRANSPOSED_HEAD.pack_into(raw, at, layout.v_type, layout.v_bytes, layout.v_rows)
            else:
                PLAIN_HEAD.pack_into(raw, at, layout.v_type, layout.v_bytes)
        tail = COUNT.size * (layout.n_stream - 1)
        if tail:
            out[-tail:] = 0
