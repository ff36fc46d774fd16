"""Rows and handles by example; any history against a tree of plain objects is in tests/property/test_nodes_machine.py."""

import numpy as np
import pytest

from keepwarm.engine.layout import BLOCK_TOKENS
from keepwarm.engine.nodes import NONE, PAGE_ROWS, NodeList, NodeTable, pack, unpack
from tests.unit.engine.conftest import tokens

KEY = bytes(range(32))


def ids(*ids_):
    return np.array(ids_, np.int32)


def table_with_root():
    table = NodeTable()
    return table, table.add_root(KEY)


def add(table, parent, *ids_, closed=False):
    return table.add(parent, KEY, pack(ids(*ids_)), closed=closed)


@pytest.mark.parametrize("some", [[], [0], [2**24 - 1, 0, 65_536, 255, 256]])
def test_packed_tokens_come_back(some):
    assert unpack(pack(ids(*some))).tolist() == some


def test_packed_tokens_sort_as_the_ids_do():
    runs = [[], [0], [0, 1], [1], [255, 300], [256], [256, 0], [65_535], [65_536], [2**24 - 1]]
    packed = [pack(ids(*run)) for run in runs]
    assert packed == sorted(packed)


@pytest.mark.parametrize("token", [-1, 2**24])
def test_a_token_that_does_not_fit_is_our_bug(token):
    with pytest.raises(AssertionError, match="token id outside"):
        pack(ids(5, token))


def test_a_handle_says_what_was_put_in():
    table, root = table_with_root()
    above = table.node(table.add(root, KEY, pack(tokens(BLOCK_TOKENS)), closed=False))
    node = table.node(table.add(above.id, KEY[::-1], pack(tokens(7)), closed=True))
    assert (node.key, node.start, node.n_tokens, node.end, node.closed) == (KEY[::-1], 64, 7, 71, True)
    assert node.tokens.tolist() == tokens(7).tolist() and node.tokens.dtype == np.int32
    assert (node.slot, node.disk_bytes, node.locks, node.pins) == (-1, 0, 0, 0)
    assert (node.is_leaf, node.is_hollow, above.is_leaf) == (True, True, False)
    assert node.parent == above != node
    assert above.parent is not None and above.parent.parent is None and above.parent.key == KEY


def test_a_handle_of_a_block_that_went_is_never_taken_for_its_successor():
    table, root = table_with_root()
    old = table.node(add(table, root, 1))
    assert old.is_there
    table.remove(old.id)
    with pytest.raises(AssertionError, match="gone"):
        old.slot  # noqa: B018 - raises already while nothing stands in its place
    new = table.node(add(table, root, 1))
    assert new.id == old.id and new != old and new.is_there and not old.is_there
    for field in ("row", "key", "parent", "start", "n_tokens", "end", "tokens", "closed", "slot", "disk_bytes"):
        with pytest.raises(AssertionError, match="gone"):
            getattr(old, field)
    for field in ("locks", "pins", "is_leaf", "is_hollow"):
        with pytest.raises(AssertionError, match="gone"):
            getattr(old, field)


def test_ids_are_used_again_before_the_table_grows():
    table, root = table_with_root()
    first = [add(table, root, i) for i in range(PAGE_ROWS + 5)]
    for id_ in first:
        table.remove(id_)
    assert len(table) == 0
    again = [add(table, root, i) for i in range(PAGE_ROWS + 5)]
    assert sorted(again) == sorted(first)
    assert [unpack(table.packed(id_)).tolist() for id_ in again] == [[i] for i in range(PAGE_ROWS + 5)]
    table.check_integrity([root])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("gone", [True, False])
def test_an_open_and_a_closed_child_of_the_same_tokens_are_two(first, gone):
    table, root = table_with_root()
    both = {closed: add(table, root, 4, 5, closed=closed) for closed in (first, not first)}
    add(table, root, 4)
    for closed, id_ in both.items():
        assert table.child(root, pack(ids(4, 5)), closed=closed) == id_
    table.remove(both[gone])
    assert table.child(root, pack(ids(4, 5)), closed=gone) == NONE
    assert table.child(root, pack(ids(4, 5)), closed=not gone) == both[not gone]
    table.check_integrity([root])


def test_a_closed_child_does_not_hide_the_shorter_open_one():
    table, root = table_with_root()
    short = add(table, root, 1)
    add(table, root, 1, 2, closed=True)
    assert table.shorter(add(table, root, 1, 2, 3)) == short


def test_a_list_of_nodes_gives_handles():
    table, root = table_with_root()
    nodes = [table.node(add(table, root, i)) for i in range(3)]
    kept = NodeList(nodes[:2], table)
    assert list(kept) == nodes[:2] and kept[1:] == (nodes[1],) and len(kept) == 2
    assert nodes[1] in kept and nodes[2] not in kept
