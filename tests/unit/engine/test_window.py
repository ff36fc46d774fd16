"""Forgotten cells are put back as zeros, everything else stays: on blobs of the form that llama.cpp writes."""

import struct

import numpy as np
import pytest

from keepwarm.engine.layout import LayoutFault
from keepwarm.engine.window import n_missing, pad, padded_bytes

N_STREAM = 3


def layers(values, *, trans):
    """K then V of two layers, values of shape (2, 2, n_cells, 4) uint8."""
    n = values.shape[2]
    parts = [struct.pack("<II", trans, 2)]
    parts += [struct.pack("<iQ", 1, 4) + values[0, layer].tobytes() for layer in range(2)]
    for layer in range(2):
        if trans:  # two rows of two bytes a cell
            rows = values[1, layer].reshape(n, 2, 2).transpose(1, 0, 2)
            parts.append(struct.pack("<iII", 1, 2, 2) + rows.tobytes())
        else:
            parts.append(struct.pack("<iQ", 1, 4) + values[1, layer].tobytes())
    return b"".join(parts)


def section(first, values, *, trans, stream=1):
    n = values.shape[2]
    meta = np.stack([np.arange(first, first + n), np.ones(n), np.full(n, stream)], 1).astype("<i4").tobytes()
    counts = [struct.pack("<I", 0)] * N_STREAM
    counts[stream] = struct.pack("<I", n) + meta + layers(values, trans=trans)
    return struct.pack("<I", N_STREAM) + b"".join(counts)


def blob_of(n, first, *, trans, stream=1, zeros=False):
    """The state of n tokens whose windowed cells begin at `first`, or at 0 with zeros before `first`."""
    values = np.random.default_rng(n).integers(1, 255, (2, 2, 2, n, 4)).astype(np.uint8)
    windowed = values[1].copy()
    if zeros:
        windowed[:, :, :first] = 0
    else:
        windowed = windowed[:, :, first:]
    raw = struct.pack("<II", 7, 2) + section(0, values[0], trans=trans, stream=stream)
    raw += section(0 if zeros else first, windowed, trans=trans, stream=stream)
    return np.frombuffer(raw, np.uint8).copy()


@pytest.mark.parametrize("trans", [0, 1])
@pytest.mark.parametrize("stream", range(N_STREAM))
@pytest.mark.parametrize("n, first", [(1, 0), (9, 0), (9, 1), (9, 8), (100, 37)])
def test_a_padded_state_has_every_cell_in_its_place(trans, stream, n, first):
    blob = blob_of(n, first, trans=trans, stream=stream)
    assert n_missing(blob) == first
    out = np.full(padded_bytes(blob), 255, np.uint8)
    pad(blob, out)
    assert np.array_equal(out, blob_of(n, first, trans=trans, stream=stream, zeros=True))
    assert n_missing(out) == 0


def test_an_empty_state_misses_nothing():
    raw = struct.pack("<II", 7, 2) + 2 * struct.pack("<IIII", 3, 0, 0, 0)
    assert n_missing(np.frombuffer(raw, np.uint8)) == 0


@pytest.mark.parametrize("n_cut", [1, 4, 30, 200])
def test_a_state_of_another_form_is_a_fault(n_cut):
    blob = blob_of(20, 5, trans=1)
    with pytest.raises(LayoutFault):
        n_missing(blob[:-n_cut])
    with pytest.raises(LayoutFault, match="its headers say"):
        n_missing(np.concatenate([blob, blob[:n_cut]]))


def test_cells_in_another_order_are_a_fault():
    values = np.random.default_rng(0).integers(0, 9, (2, 2, 4, 4)).astype(np.uint8)
    raw = bytearray(struct.pack("<II", 7, 2) + section(0, values, trans=1) + section(3, values, trans=1))
    at = (
        len(raw) - len(section(3, values, trans=1)) + 4 + 4 + 4
    )  # behind n_stream, stream 0's count and the cells' count
    raw[at : at + 4] = struct.pack("<i", 5)
    with pytest.raises(LayoutFault, match="order of their positions"):
        n_missing(np.frombuffer(bytes(raw), np.uint8))
