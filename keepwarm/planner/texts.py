"""Traces of prompts as plain texts, as LMCache's agent traces are: a line of JSON each, one file or a directory of them.

A line has `timestamp` in microseconds, `input`, which is the whole prompt, and `output`. There are no messages and no
template: what is shared is told by the tokens of the texts, so places are those of a trace. Sessions are one traffic, each
at its own times.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta, Struct

from keepwarm.planner import PlanError
from keepwarm.planner.log import Bounds, numbered_lines, opened, within
from keepwarm.planner.numbers import BLOCK_TOKENS, PrefixNumbers, block_ends
from keepwarm.planner.traffic import Chain, Traffic, traced

Encode = Callable[[str], Sequence[int]]


class _Line(Struct):
    timestamp: Annotated[int, Meta(ge=0)]
    input: str
    output: str


def is_text_trace(path: Path) -> bool:
    """Whether it is such a file, or a directory of them. Raises PlanError."""
    if path.is_dir():
        return any(path.glob("*.jsonl"))
    with opened(path) as file:
        line = file.readline(Bounds().line_bytes_max)
    try:
        msgspec.json.decode(line, type=_Line)
    except msgspec.DecodeError:
        return False
    return True


def text_traffic(path: Path, encode: Encode, bounds: Bounds, on_bytes: Callable[[int], None]) -> Traffic:
    """All lines, with tokens by `encode`. `on_bytes` is told how long each was. Raises PlanError for any it cannot read."""
    numbers, chains, n_blocks = PrefixNumbers(), list[Chain](), 0
    for where, line in _lines(path, bounds, on_bytes):
        tokens = np.asarray(encode(line.input), np.int32)
        blocks = tuple(numbers.of(tokens, block_ends(len(tokens))).values())
        n_output = len(encode(line.output))
        if len(tokens):
            chains.append(Chain(line.timestamp / 1e6, len(tokens), blocks, n_output))
        n_blocks += len(blocks)
        within(len(chains), n_blocks, bounds, where)
    if not chains:
        raise PlanError(f"{path} has no prompt with a token in it")
    chains.sort(key=lambda chain: chain.at_s)
    return traced(path.stem, BLOCK_TOKENS, chains)


def _lines(path: Path, bounds: Bounds, on_bytes: Callable[[int], None]) -> Iterator[tuple[str, _Line]]:
    for file_path in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
        for number, line in numbered_lines(file_path, bounds, on_bytes):
            where = f"{file_path}, line {number:,}"
            try:
                yield where, msgspec.json.decode(line, type=_Line)
            except msgspec.DecodeError as exc:
                raise PlanError(f"{where}: no prompt with timestamp, input and output: {exc}") from exc
