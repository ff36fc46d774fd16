"""The granularity rule as arithmetic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.engine.chunks import Piece, level_rows, next_rows, pieces, storable, usable

GRANULARITIES = st.sampled_from([1, 8, 16, 64])


@st.composite
def marked_prompts(draw):
    n = draw(st.integers(3, 400))
    marks = sorted(draw(st.sets(st.integers(1, n), max_size=4)))
    return n, marks


def test_a_mark_at_a_multiple_makes_no_piece():
    assert pieces(100, [64], 8) == (Piece(0, 100, closed=False),)
    assert pieces(100, [63], 8) == (Piece(0, 63, closed=True), Piece(63, 100, closed=False))
    assert pieces(100, [63], 1) == (Piece(0, 100, closed=False),)
    assert pieces(100, [100], 8) == (Piece(0, 100, closed=True),)


def test_marks_count_from_the_last_irregular_one():
    assert pieces(100, [3, 11, 12], 8) == (
        Piece(0, 3, closed=True),
        Piece(3, 12, closed=True),
        Piece(12, 100, closed=False),
    )


@pytest.mark.parametrize(
    "n_found, g, marks, expected",
    [
        (100, 1, [], 98),  # the last two tokens are always evaluated
        (99, 1, [], 98),
        (50, 1, [], 50),
        (50, 8, [], 48),
        (63, 8, [63], 63),  # a mark is reached to its last token
        (62, 8, [63], 56),
        (70, 8, [63], 63),
        (71, 8, [63], 71),
        (100, 8, [100], 96),
    ],
)
def test_usable(n_found, g, marks, expected):
    assert usable(n_found, pieces(100, marks, g), g, want_logits=True) == expected


def test_without_logits_everything_may_be_there():
    assert usable(100, pieces(100, [], 1), 1, want_logits=False) == 100


@given(marked_prompts(), GRANULARITIES, st.integers(0, 400), st.lists(st.integers(1, 512), min_size=1, max_size=50))
def test_any_walk_from_any_match_keeps_the_rule(prompt, g, n_found, limits):
    n, marks = prompt
    parts = pieces(n, marks, g)
    pos = usable(min(n_found, n), parts, g, want_logits=True)
    assert pos <= min(n_found, n - 2)
    k = 0
    while pos < n:
        rows = next_rows(pos, parts, g, limits[k % len(limits)])
        piece = next(p for p in parts if p.start <= pos < p.end)
        assert 0 < rows <= piece.end - pos
        whole_end = piece.end - (piece.end - piece.start) % g
        if pos < whole_end:
            assert (pos - piece.start) % g == 0
            assert rows % g == 0
            assert pos + rows <= whole_end
            assert rows >= 2 or piece.end - piece.start == 1
        else:
            assert (pos, pos + rows) == (whole_end, piece.end)
        assert rows <= max(limits[k % len(limits)], g, 3)
        pos += rows
        k += 1
    assert pos == n


@given(marked_prompts(), GRANULARITIES, st.integers(0, 400))
def test_storable_is_shareable(prompt, g, n_evaluated):
    n, marks = prompt
    parts = pieces(n, marks, g)
    kept = storable(min(n_evaluated, n), parts, g)
    assert kept <= min(n_evaluated, n)
    assert min(n_evaluated, n) - kept < g
    piece = next((p for p in parts if p.start < kept <= p.end), None)
    assert piece is None or (kept - piece.start) % g == 0 or (piece.closed and kept == piece.end)


def test_a_row_evaluated_alone_is_not_shared():
    assert storable(1, pieces(1, [], 1), 1) == 0


@pytest.mark.parametrize(
    "pos, n_tokens, expected",
    [
        (0, 800, 512),
        (30, 800, 482),  # two ubatches either way: they end at 512 and 800, not at 542 and 800
        (30, 530, 512),  # one ubatch would become two
        (30, 1054, 512),  # two would become three
        (30, 1053, 512),
        (30, 1024, 482),
        (512, 2000, 512),
        (1023, 1500, 512),
    ],
)
def test_ubatches_end_level_when_that_makes_no_more_of_them(pos, n_tokens, expected):
    assert level_rows(pos, n_tokens, 512) == expected


@given(st.integers(0, 3000), st.integers(1, 3000), st.integers(1, 600))
def test_level_rows_never_cost_an_ubatch(pos, n_left, rows_max):
    n_tokens, n_ubatches, at = pos + n_left, 0, pos
    while at < n_tokens:
        rows = level_rows(at, n_tokens, rows_max)
        assert 0 < rows <= rows_max
        at += min(rows, n_tokens - at)
        n_ubatches += 1
    assert n_ubatches == -(-n_left // rows_max)
