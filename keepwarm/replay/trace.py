"""Recorded traffic as requests whose prompts are chains of numbered blocks.

Two formats, told apart by content. Mooncake (kvcache-ai/Mooncake, FAST'25): a JSON line per request, `timestamp` in ms,
`input_length` and `output_length` in tokens, `hash_ids` of 512-token blocks, the last maybe short. Agent sessions
(callanjfox/kv-cache-tester): a JSON file per session with `block_size`, requests with `t` in s, `in` and `out` in tokens and
`hash_ids` that are local to the session and cover whole blocks only; sessions are laid over each other by their times.

Invariant: a block number names a block together with all before it, so it has one parent and one depth in all requests.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from keepwarm.replay import ReplayError

MOONCAKE_BLOCK_TOKENS = 512

Half = Literal["first", "second", "whole"]
Tokens = Annotated[int, Meta(ge=0)]


class Request(Struct, frozen=True, gc=False):
    """One prompt: `blocks` cover its first tokens; those behind the last block count as input but are never stored.

    `n_output` is the length of its answer, which nothing here stores; None: the trace does not say.
    """

    time_s: float
    n_tokens: int
    blocks: tuple[int, ...]
    n_output: int | None = None


class Trace(Struct, frozen=True):
    """Requests in the order of their times."""

    name: str
    block_tokens: int
    requests: tuple[Request, ...]

    @property
    def n_tokens(self) -> int:
        return sum(request.n_tokens for request in self.requests)

    def half(self, which: Half) -> "Trace":
        """The first or second half of the requests, by number; the second starts with nothing stored."""
        middle = len(self.requests) // 2
        chosen = {"first": slice(middle), "second": slice(middle, None), "whole": slice(None)}
        name = self.name if which == "whole" else f"{self.name}, {which} half"
        return Trace(name=name, block_tokens=self.block_tokens, requests=self.requests[chosen[which]])


def read(path: Path) -> Trace:
    """The trace in a file, or the sessions of a directory as one trace. Raises ReplayError."""
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        if not files:
            raise ReplayError(f"{path} holds no *.json session; give a trace file or a directory of sessions")
        sessions = [_session(file, _content(file)) for file in files]
        return _laid_over(path.name, sessions, [str(file) for file in files])
    content = _content(path)
    first = content.lstrip().split(b"\n", 1)[0]
    try:
        msgspec.json.decode(first, type=_MooncakeLine)
    except msgspec.DecodeError:
        return _laid_over(path.stem, [_session(path, content)], [str(path)])
    return Trace(name=path.stem, block_tokens=MOONCAKE_BLOCK_TOKENS, requests=tuple(_mooncake(path, content)))


class _MooncakeLine(Struct):
    timestamp: float
    input_length: int
    hash_ids: list[int]
    output_length: Tokens | None = None


class _SessionRequest(Struct, rename={"n_tokens": "in", "n_output": "out"}):
    t: float = 0.0
    n_tokens: int = 0
    n_output: Tokens | None = None
    hash_ids: list[int] = []
    requests: list["_SessionRequest"] = []  # of a subagent, which is no request itself


class _Session(Struct):
    block_size: int
    requests: list[_SessionRequest]


class _Numbers:
    """Numbers for blocks, the same for the same ids in the same order from the start."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], int] = {}

    def chain(self, ids: Iterable[int], n_before: int) -> tuple[int, ...]:
        """`n_before` sets apart ids that mean something else in another session."""
        found, parent = [], -1 - n_before
        for id_ in ids:
            parent = self._known.setdefault((parent, id_), len(self._known))
            found.append(parent)
        return tuple(found)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise ReplayError(f"cannot read {path}: {exc.strerror}; give a trace file or a directory of sessions") from exc


def _mooncake(path: Path, content: bytes) -> Iterator[Request]:
    numbers = _Numbers()
    try:
        lines = [msgspec.json.decode(line, type=_MooncakeLine) for line in content.splitlines() if line.strip()]
    except msgspec.DecodeError as exc:
        raise ReplayError(f"{path} is no whole Mooncake trace: {exc}") from exc
    for line in sorted(lines, key=lambda line: line.timestamp):
        blocks = numbers.chain(line.hash_ids, 0)
        if line.input_length < (len(blocks) - 1) * MOONCAKE_BLOCK_TOKENS:
            raise ReplayError(f"{path}: {len(blocks):,} blocks for {line.input_length:,} tokens are not of 512 tokens")
        yield Request(
            time_s=line.timestamp / 1000, n_tokens=line.input_length, blocks=blocks, n_output=line.output_length
        )


def _session(path: Path, content: bytes) -> _Session:
    try:
        session = msgspec.json.decode(content, type=_Session)
    except msgspec.DecodeError as exc:
        raise ReplayError(
            f"{path} is in no known format; known are Mooncake's JSON lines and kv-cache-tester's sessions"
        ) from exc
    if session.block_size < 1:
        raise ReplayError(f"{path} has blocks of {session.block_size} tokens")
    return session


def _laid_over(name: str, sessions: Sequence[_Session], paths: Sequence[str]) -> Trace:
    sizes = {session.block_size for session in sessions}
    if len(sizes) > 1:
        raise ReplayError(f"{paths[0]} and others have blocks of {sorted(sizes)} tokens; replay one size at a time")
    numbers = _Numbers()
    requests = [
        Request(request.t, request.n_tokens, numbers.chain(request.hash_ids, i), request.n_output)
        for i, session in enumerate(sessions)
        for request in _flat(session.requests)
    ]
    requests.sort(key=lambda request: request.time_s)
    return Trace(name=name, block_tokens=sizes.pop(), requests=tuple(requests))


def _flat(requests: Iterable[_SessionRequest]) -> Iterator[_SessionRequest]:
    for request in requests:
        if request.hash_ids:
            yield request
        yield from _flat(request.requests)
