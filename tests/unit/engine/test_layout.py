"""State blobs, written here by hand from the form that layout.py documents: read, cut and assembled, or refused."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.engine.layout import Assembler, Layout, LayoutFault, cut, parse


class Written:
    """A blob of random cells, and where its header fields are: name -> (offset, struct format)."""

    def __init__(self, layout, n_cells, stream, seed=0):
        self.layout, self.n_cells = layout, n_cells
        rng = np.random.default_rng(seed)
        self.k = rng.integers(0, 256, (layout.n_layer, n_cells, layout.k_row), np.uint8)
        self.v = rng.integers(0, 256, (layout.n_layer, layout.v_rows, n_cells, layout.v_bytes), np.uint8)
        self.raw, self.fields = bytearray(), {}
        self.put(magic=layout.magic, version=layout.version, n_stream=layout.n_stream)
        for i in range(layout.n_stream):
            self.put(**{f"n_cells of stream {i}": n_cells if i == stream else 0})
            if i == stream:
                self.put_stream(stream)
        self.blob = np.frombuffer(self.raw, np.uint8)

    def put(self, **fields):
        for name, value in fields.items():
            form = "<Q" if name.endswith("row_bytes") else "<i" if name.endswith("type") else "<I"
            self.fields[name] = len(self.raw), form
            self.raw += struct.pack(form, value)

    def put_stream(self, stream):
        layout = self.layout
        for pos in range(self.n_cells):
            self.raw += struct.pack("<i", pos)
            self.put(**{f"n_seq_id of cell {pos}": 1})
            self.raw += struct.pack("<i", stream)
        self.put(v_trans=int(layout.v_trans), n_layer=layout.n_layer)
        for i in range(layout.n_layer):
            self.put(**{f"k{i} type": layout.k_type, f"k{i} row_bytes": layout.k_row})
            self.raw += self.k[i].tobytes()
        for i in range(layout.n_layer):
            self.put(**{f"v{i} type": layout.v_type})
            if layout.v_trans:
                self.put(**{f"v{i} element_bytes": layout.v_bytes, f"v{i} n_embd": layout.v_rows})
            else:
                self.put(**{f"v{i} row_bytes": layout.v_bytes})
            self.raw += self.v[i].tobytes()

    def with_field(self, name, value):
        """The blob with another value in one field."""
        offset, form = self.fields[name]
        blob = self.blob.copy()
        blob[offset : offset + struct.calcsize(form)] = np.frombuffer(struct.pack(form, value), np.uint8)
        return blob


@st.composite
def layouts(draw):
    transposed = draw(st.booleans())
    return Layout(
        magic=draw(st.integers(0, 2**32 - 1)),
        version=draw(st.integers(0, 9)),
        n_stream=draw(st.integers(1, 9)),
        n_layer=draw(st.integers(1, 3)),
        k_type=draw(st.integers(0, 30)),
        k_row=draw(st.integers(1, 9)),
        v_type=draw(st.integers(0, 30)),
        v_trans=transposed,
        v_rows=draw(st.integers(1, 5)) if transposed else 1,
        v_bytes=draw(st.integers(1, 4)),
    )


@st.composite
def written(draw, cells_max=150):
    layout = draw(layouts())
    stream = draw(st.integers(0, layout.n_stream - 1))
    return Written(layout, draw(st.integers(1, cells_max)), stream, draw(st.integers(0, 9)))


@given(written())
def test_any_blob_is_read_as_it_was_written(w):
    cells = parse(w.blob)
    assert cells.layout == w.layout
    assert cells.positions.tolist() == list(range(w.n_cells))
    assert np.array_equal(cells.k, w.k)
    assert np.array_equal(cells.v, w.v)


@given(written(), st.data())
def test_cut_anywhere_and_assembled_gives_the_same_cells(w, data):
    cuts = sorted(data.draw(st.sets(st.integers(1, w.n_cells - 1), max_size=4))) if w.n_cells > 1 else []
    blocks = []
    for start, end in zip([0, *cuts], [*cuts, w.n_cells], strict=True):
        block = np.full((end - start) * w.layout.cell_bytes + 3, 0xEE, np.uint8)  # a slot may be longer than its block
        cut(parse(w.blob), start, end - start, block)
        blocks.append((block, end - start))
    n_used = data.draw(st.integers((cuts or [0])[-1] + 1, w.n_cells))  # the last block may hold more than is wanted
    size = w.layout.blob_bytes(w.n_cells)
    assembler = Assembler(w.layout, w.n_cells, np.full(size, 0xEE, np.uint8))
    assembler.blob(blocks, w.n_cells)  # what the buffer was used for before leaves no trace
    blob = assembler.blob(blocks, n_used)
    assert len(blob) == w.layout.blob_bytes(n_used)
    again = parse(blob)
    assert again.layout == w.layout
    assert again.positions.tolist() == list(range(n_used))
    assert np.array_equal(again.k, w.k[:, :n_used])
    assert np.array_equal(again.v, w.v[:, :, :n_used])


@given(written(cells_max=5))
def test_an_assembled_blob_of_stream_0_is_the_original_byte_by_byte(w):
    original = Written(w.layout, w.n_cells, 0)
    block = np.empty(w.n_cells * w.layout.cell_bytes, np.uint8)
    cut(parse(original.blob), 0, w.n_cells, block)
    size = w.layout.blob_bytes(w.n_cells)
    rebuilt = Assembler(w.layout, w.n_cells, np.empty(size, np.uint8)).blob([(block, w.n_cells)], w.n_cells)
    assert rebuilt.tobytes() == bytes(original.raw)


@given(written(cells_max=6), st.data())
def test_a_corrupted_header_is_refused_or_seen_in_the_layout(w, data):
    name = data.draw(st.sampled_from(sorted(w.fields)))
    size = struct.calcsize(w.fields[name][1])
    edges = [0, 1, 2, 3, 255, 2**16, 2**31 - 1]
    value = data.draw(st.sampled_from(edges) | st.integers(0, 2 ** (8 * size - 1) - 1))
    blob = w.with_field(name, value)
    if blob.tobytes() == w.blob.tobytes():
        return
    try:
        cells = parse(blob)
    except LayoutFault:
        return
    assert cells.layout != w.layout, f"{name} = {value} went unnoticed"


@given(written(cells_max=4), st.data())
def test_any_four_bytes_of_garbage_raise_layout_fault_or_nothing(w, data):
    blob = w.blob.copy()
    at = data.draw(st.integers(0, len(blob) - 4))
    blob[at : at + 4] = np.frombuffer(data.draw(st.binary(min_size=4, max_size=4)), np.uint8)
    try:
        parse(blob)
    except LayoutFault:
        pass


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(raw):
    with pytest.raises(LayoutFault):
        parse(np.frombuffer(raw, np.uint8))


@pytest.mark.parametrize("v_trans", [False, True])
@pytest.mark.parametrize("stream", [0, 2])
def test_every_truncated_blob_is_refused(v_trans, stream):
    layout = Layout(1, 2, 3, 2, 0, 5, 1, v_trans, 3 if v_trans else 1, 2)
    w = Written(layout, 3, stream)
    for n in range(len(w.blob)):
        with pytest.raises(LayoutFault):
            parse(w.blob[:n])
    with pytest.raises(LayoutFault):
        parse(np.append(w.blob, np.uint8(0)))


def test_a_cell_of_two_sequences_is_refused():
    w = Written(Layout(1, 2, 1, 1, 0, 4, 0, True, 2, 2), 3, 0)
    with pytest.raises(LayoutFault, match="several sequences"):
        parse(w.with_field("n_seq_id of cell 1", 2))


def test_a_state_without_cells_is_refused():
    with pytest.raises(LayoutFault, match="no cells"):
        parse(np.frombuffer(struct.pack("<IIIII", 1, 2, 2, 0, 0), np.uint8))


def test_layers_of_different_shapes_are_refused():
    w = Written(Layout(1, 2, 1, 2, 0, 4, 0, True, 2, 2), 3, 0)
    with pytest.raises(LayoutFault, match="layer 1 has K rows"):
        parse(w.with_field("k1 type", 8))
    with pytest.raises(LayoutFault, match="layer 1 has V rows"):
        parse(w.with_field("v1 type", 8))
