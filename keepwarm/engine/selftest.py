"""What the engine measures about a loaded model before it promises anything: state layout, granularity, exactness.

Every check compares logits bit by bit. `granularity` finds the smallest g of (1, 8, 16, 64) for which random splits into
multiples of g, in random streams, give the bits of the plain split, and for which restored and crowded runs do too. What
was not tested is not claimed: no g, no caching. Random tokens from a fixed seed, so a result can be repeated.

States that cannot be cut into blocks are restored whole in these checks (`whole`), as the snapshot store does.
"""

from collections.abc import Callable, Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from keepwarm.core.prompt import Tokens
from keepwarm.engine.chunks import next_rows, pieces
from keepwarm.engine.layout import BLOCK_TOKENS, Assembler, Layout, LayoutFault, cut, parse
from keepwarm.engine.memory import touched
from keepwarm.engine.model import Blob, DecodeStep, Model, ModelFault

CANDIDATES = (1, 8, 16, 64)
N_TOKENS = 560  # more than one ubatch of 512, with a remainder for every candidate
N_SPLITS = 3  # of some 16 ubatches each: a wrong candidate survives one now and then
SPLIT_ROWS_MAX = 64  # short ubatches take the code paths that differ
MARK_BEFORE_END = 28
SEED = 20261122

Report = Callable[[str], None]


class Check(Struct, frozen=True):
    """One comparison and how it came out."""

    name: str
    passed: bool
    detail: str = ""


def sample_tokens(n_vocab: int, n: int, seed: int = SEED) -> Tokens:
    """`n` token ids from the middle of the vocabulary, where no control tokens are; the same for the same seed."""
    low, high = n_vocab // 4, max(n_vocab // 2, n_vocab // 4 + 1)
    return np.random.default_rng(seed).integers(low, high, n).astype(np.int32)


def fill(
    model: Model, stream: int, tokens: Tokens, *, g: int, start: int = 0, marks: Sequence[int] = ()
) -> NDArray[np.float32]:
    """Evaluate tokens[start:] of a prompt in the plainest split; the last token's logits, shape (n_vocab,)."""
    parts, pos = pieces(len(tokens), marks, g), start
    if not start:
        model.forget(stream, 0, -1)
    while pos < len(tokens):
        rows = next_rows(pos, parts, g, model.n_ubatch)
        model.evaluate(stream, tokens[pos : pos + rows], pos, want_logits=pos + rows == len(tokens))
        pos += rows
    return model.logits(-1).copy()


def split(model: Model, stream: int, tokens: Tokens, *, g: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Evaluate a prompt in random ubatches of multiples of g (two rows or more); the last token's logits."""
    parts, pos = pieces(len(tokens), (), g), 0
    model.forget(stream, 0, -1)
    while pos < len(tokens):
        rows = next_rows(pos, parts, g, int(rng.integers(2, max(SPLIT_ROWS_MAX, 2 * g) + 1)))
        model.evaluate(stream, tokens[pos : pos + rows], pos, want_logits=pos + rows == len(tokens))
        pos += rows
    return model.logits(-1).copy()


def same(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    """Bit by bit."""
    return bool(np.array_equal(a.view(np.uint32), b.view(np.uint32)))


def layout_of(model: Model) -> Layout:
    """The model's state layout, by saving, cutting, assembling and comparing a real state.

    Raises LayoutFault when this model's state cannot be cut and put together again.
    """
    n = 2 * BLOCK_TOKENS + 5
    tokens = sample_tokens(model.n_vocab, n + 2)
    fill(model, 0, tokens[:n], g=BLOCK_TOKENS)
    try:
        blob = model.save(0).copy()
        layout = parse(blob).layout
        rebuilt = reassemble(blob, layout)
        if not np.array_equal(_bytes_of_cells(blob), _bytes_of_cells(rebuilt)):
            raise LayoutFault("a state cut into blocks and assembled again differs")
        model.load(1 % model.n_streams, rebuilt)
    except ModelFault as exc:
        raise LayoutFault(str(exc)) from exc
    return layout


def reassemble(blob: Blob, layout: Layout) -> Blob:
    """The state cut into blocks and put together again, as the store does it."""
    cells = parse(blob)
    n = len(cells.positions)
    blocks = []
    for start in range(0, n, BLOCK_TOKENS):
        held = min(BLOCK_TOKENS, n - start)
        block = np.empty(held * layout.cell_bytes, np.uint8)
        cut(cells, start, held, block)
        blocks.append((block, held))
    return Assembler(layout, n, touched(layout.blob_bytes(n))).blob(blocks, n)


def _bytes_of_cells(blob: Blob) -> NDArray[np.uint8]:
    cells = parse(blob)
    return np.concatenate([cells.k.ravel(), cells.v.ravel()])


def granularity(
    model: Model,
    report: Report,
    candidates: Sequence[int] = CANDIDATES,
    *,
    n_tokens: int = N_TOKENS,
    whole: bool = False,
) -> int | None:
    """The smallest granularity at which this model, here, is exact; None when none is."""
    for at, g in enumerate(candidates):
        report(f"measuring granularity: {g} ({at + 1} of {len(candidates)})")
        if all(check.passed for check in checks(model, g, n_tokens=n_tokens, whole=whole)):
            return g
    return None


def checks(
    model: Model,
    g: int,
    *,
    n_splits: int = N_SPLITS,
    seed: int = SEED,
    n_tokens: int = N_TOKENS,
    whole: bool = False,
) -> "list[Check]":
    """Cold = split = crowded = restored at granularity `g`. Stops at the first difference."""
    rng = np.random.default_rng(seed)
    tokens = sample_tokens(model.n_vocab, min(n_tokens + int(rng.integers(0, g + 1)), model.n_ctx - 2), seed)
    others = range(1, model.n_streams)
    for stream in range(model.n_streams):
        model.forget(stream, 0, -1)
    cold = fill(model, 0, tokens, g=g)
    done: list[Check] = []
    for trial in range(n_splits):
        stream = int(rng.integers(0, model.n_streams))
        passed = same(split(model, stream, tokens, g=g, rng=rng), cold)
        done.append(Check(f"random split {trial + 1} into multiples of {g}", passed))
        if not passed:
            return done
    done.append(Check("crowded: other streams busy", same(_crowded(model, tokens, g), cold)))
    for stream in others:
        model.forget(stream, 0, -1)
    cut_at = len(tokens) // 2 // g * g
    done.append(_restored(model, tokens, g, cut_at, cold, whole=whole))
    if whole:
        done.append(_restored_at_a_mark(model, tokens, g))
    for stream in range(model.n_streams):
        model.forget(stream, 0, -1)
    return done


def _crowded(model: Model, tokens: Tokens, g: int) -> NDArray[np.float32]:
    last = model.n_streams - 1
    fill(model, last, tokens[::-1].copy(), g=g)
    return fill(model, 1 % model.n_streams, tokens, g=g)


def _restored(
    model: Model,
    tokens: Tokens,
    g: int,
    cut_at: int,
    cold: NDArray[np.float32],
    *,
    whole: bool,
    marks: Sequence[int] = (),
) -> Check:
    name = f"restored at {cut_at} and continued"
    fill(model, 0, tokens[:cut_at], g=g, marks=marks)
    target = model.n_streams - 1
    try:
        blob = model.save(0)
        model.load(target, blob.copy() if whole else reassemble(blob, parse(blob).layout))
    except ModelFault as exc:
        return Check(name, passed=False, detail=str(exc))
    return Check(name, same(fill(model, target, tokens, g=g, start=cut_at, marks=marks), cold))


def _restored_at_a_mark(model: Model, tokens: Tokens, g: int) -> Check:
    """Near the end and at no multiple of anything: behind a window, the first cells of a state are gone by then."""
    mark = len(tokens) - MARK_BEFORE_END | 1
    cold = fill(model, 0, tokens, g=g, marks=(mark,))
    return _restored(model, tokens, g, mark, cold, whole=True, marks=(mark,))


def decode_checks(model: Model, n_tokens: int = 8) -> "list[Check]":
    """Strict decoding: one stream's tokens are the same alone and beside 1, 3 and 7 other decoding streams."""
    tokens = sample_tokens(model.n_vocab, 64)
    alone = _decode_strict(model, tokens, n_tokens, n_others=0)
    return [
        Check(f"strict decoding beside {n} other turns", same(_decode_strict(model, tokens, n_tokens, n), alone))
        for n in (1, 3, 7)
        if n < model.n_streams
    ]


def _decode_strict(model: Model, tokens: Tokens, n_tokens: int, n_others: int) -> NDArray[np.float32]:
    """Logits of stream 0's last step when every step of every stream is a call of its own, shape (n_vocab,)."""
    steps = sample_tokens(model.n_vocab, n_tokens, seed=SEED + 1)
    for stream in range(n_others + 1):
        fill(model, stream, np.roll(tokens, stream), g=1)
    last = np.empty(0, np.float32)
    for i, token in enumerate(steps):
        for stream in range(n_others + 1):
            model.decode([DecodeStep(stream, int(token) + (stream > 0), len(tokens) + i)])
            if stream == 0:
                last = model.logits(0).copy()
    for stream in range(n_others + 1):
        model.forget(stream, 0, -1)
    return last
