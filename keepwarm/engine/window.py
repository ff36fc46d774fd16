"""A sliding-window model's state with its forgotten cells put back as zeros. Numpy on bytes, no llama.cpp.

llama.cpp writes of the windowed layers only the cells that the window still reaches, and reads them into the first cells of
an empty stream. Then every later sum over cells runs in another order than in a stream that was computed from the start,
and unless the shift happens to fit the kernels, the bits differ (docs/decisions/0015). So before a state is read, empty
cells go in front of the windowed ones, at the positions that are missing: each cell comes to lie where it was computed.
No later token sees them, and a weight of zero times zero adds nothing.

The blob: u32 magic, u32 version, then a section for the layers that see all tokens and one for the windowed ones, each of
the form that layout.py gives from `n_stream` on.
"""

import struct

import numpy as np
from msgspec import Struct

from keepwarm.engine.layout import CELL_BYTES, COUNT, KV_HEAD, PLAIN_HEAD, TRANSPOSED_HEAD, LayoutFault
from keepwarm.engine.model import Blob

START = 8  # magic and version


class _Run(Struct, frozen=True):
    """Bytes of one layer's K or V: shape (n_rows, n_cells, n_bytes) from offset `at` on."""

    at: int
    n_rows: int
    n_bytes: int


class _Section(Struct, frozen=True):
    """Where one kind of layers has what. `count_at`: the cell count; the cells' positions follow it."""

    end: int
    count_at: int
    n_cells: int
    runs: tuple[_Run, ...]


def n_missing(blob: Blob) -> int:
    """How many cells of the windowed layers are not in the blob. Raises LayoutFault when it has not the form above."""
    return _missing(blob, _windowed(blob))


def padded_bytes(blob: Blob) -> int:
    """Size of the blob with these cells."""
    section = _windowed(blob)
    return len(blob) + _missing(blob, section) * (CELL_BYTES + sum(run.n_rows * run.n_bytes for run in section.runs))


def pad(blob: Blob, out: Blob) -> None:
    """Write the blob with these cells into `out`, shape (padded_bytes,)."""
    section = _windowed(blob)
    n, n_pad = section.n_cells, _missing(blob, section)
    meta_at = section.count_at + COUNT.size
    out[: section.count_at] = blob[: section.count_at]
    COUNT.pack_into(out.data, section.count_at, n + n_pad)
    meta = np.frombuffer(out.data, np.int32, 3 * (n + n_pad), meta_at).reshape(-1, 3)
    meta[n_pad:] = np.frombuffer(blob.data, np.int32, 3 * n, meta_at).reshape(-1, 3)
    meta[:n_pad] = meta[n_pad]
    meta[:n_pad, 0] = np.arange(n_pad)
    read, written = meta_at + CELL_BYTES * n, meta_at + CELL_BYTES * (n + n_pad)
    for run in section.runs:
        head = run.at - read
        out[written : written + head] = blob[read : run.at]
        written += head
        read = run.at + run.n_rows * n * run.n_bytes
        size = run.n_rows * (n + n_pad) * run.n_bytes
        rows = out[written : written + size].reshape(run.n_rows, n + n_pad, run.n_bytes)
        rows[:, :n_pad] = 0
        rows[:, n_pad:] = blob[run.at : read].reshape(run.n_rows, n, run.n_bytes)
        written += size
    out[written:] = blob[read:]


def _missing(blob: Blob, section: _Section) -> int:
    if not section.n_cells:
        return 0
    meta = np.frombuffer(blob.data, np.int32, 3 * section.n_cells, section.count_at + COUNT.size).reshape(-1, 3)
    first = int(meta[0, 0])
    if first < 0 or not np.array_equal(meta[:, 0], np.arange(first, first + section.n_cells)):
        raise LayoutFault("the windowed cells of a state are not in the order of their positions")
    return first


def _windowed(blob: Blob) -> _Section:
    try:
        raw = memoryview(blob.data)
        section = _section(raw, _section(raw, START).end)
    except struct.error as exc:
        raise LayoutFault(f"windowed state ends early: {exc}") from exc
    if section.end != len(blob):
        raise LayoutFault(f"windowed state has {len(blob):,} bytes, its headers say {section.end:,}")
    return section


def _section(raw: memoryview, at: int) -> _Section:
    (n_stream,) = COUNT.unpack_from(raw, at)
    at += COUNT.size
    found = _Section(at, at, 0, ())
    for _ in range(n_stream):
        (n_cells,) = COUNT.unpack_from(raw, at)
        if not n_cells:
            at += COUNT.size
        elif found.n_cells:
            raise LayoutFault("state blob has cells in several streams")
        else:
            found = _cells(raw, at, n_cells)
            at = found.end
    return _Section(at, found.count_at, found.n_cells, found.runs)


def _cells(raw: memoryview, count_at: int, n_cells: int) -> _Section:
    at = count_at + COUNT.size + CELL_BYTES * n_cells
    v_trans, n_layer = KV_HEAD.unpack_from(raw, at)
    at += KV_HEAD.size
    runs = []
    for layer in range(2 * n_layer):  # K of every layer, then V of every layer
        if layer < n_layer or not v_trans:
            _, n_bytes = PLAIN_HEAD.unpack_from(raw, at)
            n_rows, head = 1, PLAIN_HEAD.size
        else:
            _, n_bytes, n_rows = TRANSPOSED_HEAD.unpack_from(raw, at)
            head = TRANSPOSED_HEAD.size
        runs.append(_Run(at + head, n_rows, n_bytes))
        at += head + n_rows * n_cells * n_bytes
    return _Section(at, count_at, n_cells, tuple(runs))
