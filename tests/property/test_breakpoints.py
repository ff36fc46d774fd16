"""The rules of breakpoints against a naive twin that walks back over blocks and never saw a digest.

Conversations grow, change, are cut short and are marked at random, over random times. A block's tokens end with one that
occurs nowhere else, so that a prefix in tokens is a prefix in blocks.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Struct

from keepwarm.cache.breakpoints import Chosen, Entry, choose
from keepwarm.core.prompt import Breakpoint, Tokens

ROOT = b"root"
TOKENS_MIN = 12
SHORT_S, LONG_S = 300, 3600
Block = tuple[int, ...]


class Request(Struct, frozen=True):
    """Blocks, lifetimes of those that are marked by their number, and how long after the last request it comes."""

    blocks: tuple[Block, ...]
    marks: Mapping[int, int | None]
    after_s: float


class Twin:
    """Who wrote what until when, by blocks."""

    def __init__(self) -> None:
        self.known: dict[tuple[Block, ...], tuple[int, float]] = {}  # lifetime, expiry

    def ask(self, request: Request, now: float) -> tuple[int, int, int, int]:
        """Read (A), write of five minutes, write of an hour, input."""
        blocks = request.blocks
        marks = {n: s for n, s in request.marks.items() if s is not None and length(blocks[:n]) >= TOKENS_MIN}
        read = 0
        for mark in sorted(marks, reverse=True):
            for n in range(mark, max(0, mark - 20), -1):
                if read == 0 and self.known.get(blocks[:n], (0, -1.0))[1] > now:
                    read = n
        renewed = {n: max(s, self.known[blocks[:n]][0] if self.lives(blocks[:n], now) else 0) for n, s in marks.items()}
        if read:
            renewed.setdefault(read, self.known[blocks[:read]][0])
        self.known |= {blocks[:n]: (ttl_s, now + ttl_s) for n, ttl_s in renewed.items()}
        a, b, c = (
            length(blocks[:n])
            for n in (read, max((n for n, s in marks.items() if s == LONG_S), default=0), max(marks, default=0))
        )
        b = max(a, b)
        return a, c - b, b - a, length(blocks) - c

    def lives(self, prefix: tuple[Block, ...], now: float) -> bool:
        return prefix in self.known and self.known[prefix][1] > now


def length(blocks: Sequence[Block]) -> int:
    return sum(map(len, blocks))


def tokens_of(blocks: Sequence[Block]) -> Tokens:
    return np.array([token for block in blocks for token in block], np.int32)


def enter(known: dict[int, dict[bytes, Entry]], entries: Sequence[Entry]) -> None:
    for entry in entries:
        known.setdefault(entry.n_tokens, {})[entry.digest] = entry


def usage(chosen: Chosen, n_tokens: int) -> tuple[int, int, int, int]:
    """As the engine counts when all that may be read is stored: read, written short, written long, fresh."""
    written, long = (max(0, end - chosen.read_end) for end in (chosen.write_end, chosen.write_long_end))
    return chosen.read_end, written - long, long, n_tokens - chosen.read_end - written


def block(n: int, n_tokens: int) -> Block:
    return (*range(n_tokens - 1), 1000 + n)


grown = st.tuples(st.sampled_from([0, 1, 2, 3, 8, 18, 19, 20, 21, 22]), st.integers(0, 4), st.integers(1, 4))


@st.composite
def conversations(draw: st.DrawFn) -> list[Request]:
    requests: list[Request] = []
    known: tuple[Block, ...] = ()
    for _ in range(draw(st.integers(1, 7))):
        known = known[: draw(st.one_of(st.just(len(known)), st.integers(0, len(known))))]  # goes on, or changes there
        n_blocks, first, n_tokens = draw(grown)
        known += tuple(block((first + i) % 5, n_tokens) for i in range(n_blocks))
        known = known or (block(0, 1),)
        anywhere = st.lists(st.integers(1, len(known)), max_size=4, unique=True)
        where = draw(st.just([len(known)]) | anywhere)  # at the end, as most clients do: long stretches have no mark
        n_long = draw(st.integers(0, len(where)))
        marks: dict[int, int | None] = {n: LONG_S if i < n_long else SHORT_S for i, n in enumerate(sorted(where))}
        if draw(st.booleans()):
            marks.setdefault(draw(st.integers(1, len(known))), None)  # without a lifetime
        requests.append(Request(known, marks, draw(st.sampled_from([0.0, 1.0, 299.0, 300.0, 301.0, 3599.0, 3600.0]))))
    return requests


@settings(max_examples=200)
@given(conversations())
def test_reads_writes_and_lifetimes_equal_the_twin(requests: list[Request]) -> None:
    twin, known, now = Twin(), dict[int, dict[bytes, Entry]](), 1000.0
    for request in requests:
        now += request.after_s
        tokens = tokens_of(request.blocks)
        breakpoints = [
            Breakpoint(length(request.blocks[:n]), ttl_s, n) for n, ttl_s in sorted(request.marks.items())
        ]  # fmt: skip
        chosen = choose(breakpoints, tokens, known, root=ROOT, tokens_min=TOKENS_MIN, now=now)
        assert usage(chosen, len(tokens)) == twin.ask(request, now)
        enter(known, chosen.kept)
        mine = sorted((entry.n_tokens, entry.expires_at) for group in known.values() for entry in group.values())
        assert mine == sorted((length(prefix), until) for prefix, (_, until) in twin.known.items())


@settings(max_examples=50)
@given(st.lists(st.integers(0, 3), min_size=20, max_size=80), st.data())
def test_no_prefix_is_read_that_no_earlier_request_had(ids: list[int], data: st.DataObject) -> None:
    """Straight from the promise, with tokens that repeat: what is read is the beginning of an earlier prompt, marked."""
    known: dict[int, dict[bytes, Entry]] = {}
    earlier: list[tuple[list[int], int]] = []
    for _ in range(4):
        cut = data.draw(st.integers(0, len(ids)))
        ids = ids[:cut] + data.draw(st.lists(st.integers(0, 3), min_size=20, max_size=60))
        ends = sorted(data.draw(st.sets(st.integers(1, len(ids)), max_size=4)))
        breakpoints = [Breakpoint(end, SHORT_S, n) for n, end in enumerate(ends, 1)]
        tokens = np.array(ids, np.int32)
        chosen = choose(breakpoints, tokens, known, root=ROOT, tokens_min=TOKENS_MIN, now=0.0)
        n = chosen.read_end
        assert not n or any(end == n and ids[:n] == there[:n] for there, end in earlier)
        assert chosen.read_end <= chosen.write_end >= chosen.write_long_end
        earlier += [(ids, end) for end in ends if end >= TOKENS_MIN]
        enter(known, chosen.kept)
