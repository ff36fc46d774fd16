"""The plain way to evaluate a prompt on the scripted model, and its cells' values: what everything restored must equal."""

import numpy as np

from keepwarm.engine.chunks import next_rows, pieces
from keepwarm.engine.layout import parse


def evaluate(model, prompt, *, stream=0, start=0, n_tokens=None, rows_max=512):
    """Evaluate tokens start..n_tokens-1 of `prompt`, and as many more as the granularity rule needs; where that ended."""
    parts = pieces(prompt.n_tokens, prompt.marks, model.granularity)
    wanted = prompt.n_tokens if n_tokens is None else n_tokens
    model.forget(stream, start, -1)
    pos = start
    while pos < wanted:
        rows = next_rows(pos, parts, model.granularity, rows_max)
        model.evaluate(stream, prompt.tokens[pos : pos + rows], pos, want_logits=False)
        pos += rows
    return pos


def values(model, stream=0):
    """The stream's cells, shape (n_cells,), uint64; each says how it and all before it came about."""
    return np.ascontiguousarray(parse(model.save(stream)).k[0]).view(np.uint64)[:, 0].copy()
