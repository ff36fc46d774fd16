"""The granularity rule: where a prompt may be cut so that its bits do not change. Pure arithmetic on positions.

For a loaded model there is a granularity g: every split of a run of tokens into ubatches whose sizes are multiples of g,
plus one last ubatch for the remainder, gives the same logits, bit for bit (docs/decisions/0002). So a prompt is a chain of
*pieces*. A piece ends at a mark whose distance from the piece's start is not a multiple of g (the remainder gets a ubatch
of its own there), or at the prompt's end; a mark at a multiple of g changes no bits and makes no piece.

    tokens   |----------------------|------------|------------|
             0                      mark         mark         n
    g = 8    |8 8 8 8 8 8 8 8 8 ..3|8 8 8 ..  .. 8 8 8 .. .. 5|     first mark irregular, second at a multiple of 8

With g = 1 a ubatch must still have two rows or more, unless the piece has only one: llama.cpp evaluates single rows with
other code, which differs now and then.
"""

from collections.abc import Sequence

from msgspec import Struct


class Piece(Struct, frozen=True):
    """Tokens start..end-1. `closed`: ends at an irregular mark, so its remainder is always a ubatch of its own."""

    start: int
    end: int
    closed: bool


def pieces(n_tokens: int, marks: Sequence[int], g: int) -> tuple[Piece, ...]:
    """The pieces of a prompt with ascending marks in 1..n_tokens. An irregular mark at the prompt's end closes it too."""
    found, start = [], 0
    for mark in marks:
        if start < mark <= n_tokens and (mark - start) % g:
            found.append(Piece(start, mark, closed=True))
            start = mark
    if start < n_tokens:
        found.append(Piece(start, n_tokens, closed=False))
    return tuple(found)


def usable(n_found: int, parts: Sequence[Piece], g: int, *, want_logits: bool) -> int:
    """The longest match that may be used, given that the first `n_found` tokens are stored with this prompt's bits.

    A match ends at a multiple of g from its piece's start or at a piece's end. Where logits are wanted, the last two
    tokens at least are evaluated. Never leaves a single row of a longer piece to evaluate when g is 1.
    """
    n_tokens = parts[-1].end if parts else 0
    end = min(n_found, n_tokens - 2) if want_logits else n_found
    for piece in reversed(parts):
        if piece.start >= end:
            continue
        if end >= piece.end:
            return piece.end
        cut = piece.start + (end - piece.start) // g * g
        if g == 1 and piece.end - cut == 1:
            cut -= 1
        return cut
    return 0


def next_rows(pos: int, parts: Sequence[Piece], g: int, rows_max: int) -> int:
    """How many tokens the next ubatch takes from position `pos`, at most `rows_max` (but at least what the rule needs)."""
    piece = next(p for p in parts if p.start <= pos < p.end)
    whole_end = piece.end - (piece.end - piece.start) % g
    if pos >= whole_end:
        return piece.end - pos
    left = whole_end - pos
    rows = min(left, max(rows_max // g, 1) * g)
    if g > 1 or left < 2:
        return rows
    rows = max(rows, 2)
    if left - rows == 1:
        rows = rows - 1 if rows > 2 else rows + 1
    return rows


def level_rows(pos: int, n_tokens: int, rows_max: int) -> int:
    """The most rows to take from `pos`, so that ubatches end at multiples of `rows_max` when that makes no more of them.

    An ubatch attends to all cells up to its end, padded (llama.cpp: to 256). Behind a restored prefix of 30 tokens whole
    ubatches would end 30 tokens into the next padding every time: 5 % more time for 800 tokens.
    """
    n_left, rows = n_tokens - pos, rows_max - pos % rows_max
    n_after = max(0, n_left - rows)
    return rows if 1 + -(-n_after // rows_max) <= -(-n_left // rows_max) else rows_max


def storable(n_evaluated: int, parts: Sequence[Piece], g: int) -> int:
    """How many of the first `n_evaluated` tokens have bits that other prompts may share (an open remainder has not)."""
    if g == 1 and parts and parts[-1].end == 1:
        return 0  # a prompt of one token is a single row, whose bits no longer prompt has
    for piece in parts:
        if n_evaluated >= piece.end and piece.closed:
            continue
        if n_evaluated <= piece.start:
            return piece.start
        return piece.start + (min(n_evaluated, piece.end) - piece.start) // g * g
    return parts[-1].end if parts else 0
