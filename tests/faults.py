"""A disk that fails on demand: `FaultyFiles` injects faults at chosen calls, stops the world, forgets what was not synced.

A fault is named by operation and count: ("write", 3) is the third write. An errno raises, a `Flip` changes a bit on its
way, `SHORT` does half of what was asked. `stop_after` ends the world behind so many operations: the next one does what a
power cut lets it do, raises `Crash`, and so does every later one, so that no clean-up runs. `lose_unsynced` then takes
back every name and byte that no sync had made durable.
"""

import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from msgspec import Struct

from keepwarm.engine.files import Buffer, Files
from keepwarm.engine.tiers import BlockHead

SHORT = "short"


class Flip(Struct, frozen=True):
    """One bit of the bytes of this call."""

    at: int
    bit: int = 0


Fault = int | str | Flip


class Crash(BaseException):
    """The machine lost power here."""


class FaultyFiles(Files):
    """The real files, with faults. `seed`: every read and write may come out short. `wait`: called before every operation."""

    def __init__(
        self,
        faults: Mapping[tuple[str, int], Fault] | None = None,
        *,
        stop_after: int | None = None,
        seed: int | None = None,
        wait: Callable[[], object] | None = None,
    ) -> None:
        self.faults = dict(faults or {})
        self.counts: Counter[str] = Counter()
        self.n_operations = 0
        self.stop_after = stop_after
        self.cached = True  # False: the page cache has nothing
        self._random = random.Random(seed) if seed is not None else None
        self._wait = wait
        self._guard = threading.Lock()
        self._unsynced: dict[int, Path] = {}  # descriptors of files being written
        self._torn: list[Path] = []
        self._undo: list[tuple[Path, Path | None, bytes | None]] = []  # (path now, path before, content before)

    def _enter(self, operation: str) -> Fault | None:
        if self._wait:
            self._wait()
        with self._guard:
            self.n_operations += 1
            if self.stop_after is not None and self.n_operations > self.stop_after:
                raise Crash(operation)
            self.counts[operation] += 1
            fault = self.faults.get((operation, self.counts[operation]))
        if isinstance(fault, int):
            raise OSError(fault, os.strerror(fault))
        return fault

    def _stops_now(self) -> bool:
        return self.stop_after is not None and self.n_operations == self.stop_after

    def _fewer(self, buffers: Sequence[Buffer], fault: Fault | None) -> list[Buffer]:
        n_bytes = sum(len(buffer) for buffer in buffers)
        if fault == SHORT:
            return _first(buffers, max(1, n_bytes // 2))
        if self._random:
            with self._guard:
                return _first(buffers, self._random.choice((n_bytes, max(1, n_bytes // 2), min(n_bytes, 100))))
        return list(buffers)

    def make_dir(self, path):
        self._enter("make_dir")
        super().make_dir(path)

    def create(self, path):
        self._enter("create")
        fd = super().create(path)
        self._unsynced[fd] = path
        return fd

    def write(self, fd, buffers):
        if self._stops_now():
            super().write(fd, _first(buffers, sum(len(buffer) for buffer in buffers) // 2))
        fault = self._enter("write")
        if isinstance(fault, Flip):
            whole = np.concatenate(list(buffers))
            whole[fault.at] ^= 1 << fault.bit
            buffers = (whole,)
        return super().write(fd, self._fewer(buffers, fault))

    def sync(self, fd):
        self._enter("sync")  # no more: the power is cut by `lose_unsynced`, and real syncs take milliseconds each
        self._unsynced.pop(fd, None)

    def open(self, path, *, direct=False):
        self._enter("open_direct" if direct else "open")
        return super().open(path, direct=direct)

    def is_cached(self, fd, offset):
        self._enter("is_cached")
        return self.cached and super().is_cached(fd, offset)

    def read(self, fd, buffers, offset):
        fault = self._enter("read")
        n = super().read(fd, self._fewer(buffers, fault), offset)
        if isinstance(fault, Flip):
            at = fault.at
            for buffer in buffers:
                if at < len(buffer):
                    buffer[at] ^= 1 << fault.bit
                    break
                at -= len(buffer)
        return n

    def size(self, fd):
        self._enter("size")
        return super().size(fd)

    def close(self, fd):
        super().close(fd)  # a close that fails has closed
        path = self._unsynced.pop(fd, None)
        if path is not None:
            self._torn.append(path)
        self._enter("close")

    def rename(self, path, to):
        self._enter("rename")
        before = to.read_bytes() if to.exists() else None
        super().rename(path, to)
        self._torn = [to if torn == path else torn for torn in self._torn]
        self._undo.append((to, path, before))

    def sync_dir(self, path):
        self._enter("sync_dir")
        self._undo = [entry for entry in self._undo if entry[0].parent != path]

    def unlink(self, path):
        self._enter("unlink")
        if path.is_file():
            self._undo.append((path, None, path.read_bytes()))
        super().unlink(path)

    def names(self, path):
        self._enter("names")
        return super().names(path)

    def free_bytes(self, path):
        self._enter("free_bytes")
        return super().free_bytes(path)

    def lose_unsynced(self) -> None:
        """What a power cut may take: names changed since their directory's sync go back, bytes never synced are torn."""
        for path in [*self._torn, *self._unsynced.values()]:
            if path.exists():
                os.truncate(path, path.stat().st_size // 2)
        for now, path, content in reversed(self._undo):
            if path is not None and now.exists():
                now.replace(path)
            if content is not None:
                now.write_bytes(content)
        self._undo, self._torn, self._unsynced = [], [], {}


def _first(buffers: Sequence[Buffer], n_bytes: int) -> list[Buffer]:
    """The first bytes of the buffers; views, so that reading fills the callers' own."""
    some = []
    for buffer in buffers:
        some.append(buffer[:n_bytes])
        n_bytes -= len(some[-1])
    return [buffer for buffer in some if len(buffer)]


def a_block(number: int, n_bytes: int = 5_000, n_tokens: int = 8) -> tuple[BlockHead, Buffer]:
    """A made-up block: the same number gives the same block."""
    draw = np.random.default_rng(number)
    body = draw.integers(0, 256, n_bytes, dtype=np.uint8)
    tokens = draw.integers(0, 50_000, n_tokens, dtype=np.int32)
    return BlockHead(draw.bytes(32), draw.bytes(32), number * 64, tokens, bool(number % 2), n_bytes), body


def same_head(one: BlockHead, other: BlockHead) -> bool:
    """Heads hold arrays, so `==` does not compare them."""
    return (
        (one.key, one.parent, one.start, one.closed, one.n_bytes)
        == (other.key, other.parent, other.start, other.closed, other.n_bytes)
        and one.tokens.dtype == other.tokens.dtype
        and np.array_equal(one.tokens, other.tokens)
    )
