"""The directory of uploaded files: <key> holds a file's bytes, <key>.txt its extracted text. Off the event loop.

A key is random and ours; nothing a client said becomes part of a path. A file is on the disk for good, name and bytes,
before anyone is told it is there. What no row of the database knows is a leftover, and is removed at the start.
"""

import asyncio
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

READ_BYTES = 1 << 18
THREADS = 4  # a disk is not faster with more, and none of them holds up the rest of the server
TEXT_SUFFIX = ".txt"
NEW_SUFFIX = ".new"
KEY = re.compile(r"[a-z0-9]{8,64}")


class FileDisk:
    """Files under `directory`, by key."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._threads = ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="files")

    async def open(self, known: Collection[str]) -> None:
        """Make the directory and remove all that belongs to none of these keys."""
        await self.run(lambda: self._open(frozenset(known)))

    async def create(self, key: str) -> None:
        """An empty file that was not there."""
        path = self._path(key)
        await self.run(lambda: os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)))

    @asynccontextmanager
    async def writing(self, key: str) -> AsyncIterator[int]:
        """A descriptor to write the file with. Raises OSError."""
        path = self._path(key)
        async with self._held() as held:
            file = await self.run(lambda: held.enter_context(path.open("r+b", buffering=0)))
            yield file.fileno()

    async def publish(self, key: str, n_bytes: int) -> None:
        """The file's `n_bytes` and its name are on the disk when this returns. Raises OSError."""
        path = self._path(key)

        def sync() -> None:
            os.truncate(path, n_bytes)  # a write that failed in the middle may have left more
            _sync(path)
            _sync(self._directory)

        await self.run(sync)

    async def write_text(self, key: str, text: str) -> None:
        """The text of a file, whole or not at all. Raises OSError."""
        path = self._path(key)

        def write() -> None:
            new = path.with_suffix(NEW_SUFFIX)
            with new.open("w", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path.with_suffix(TEXT_SUFFIX))
            _sync(self._directory)

        await self.run(write)

    async def read_text(self, key: str) -> str:
        """Raises OSError."""
        path = self._path(key).with_suffix(TEXT_SUFFIX)

        def read() -> str:
            with path.open(encoding="utf-8", newline="") as file:
                return file.read()

        return await self.run(read)

    async def remove(self, key: str) -> None:
        """The file and its text; there is none is no error."""
        path = self._path(key)

        def remove() -> None:
            for suffix in ("", TEXT_SUFFIX, NEW_SUFFIX):
                path.with_suffix(suffix).unlink(missing_ok=True)

        await self.run(remove)

    async def pieces(self, key: str) -> AsyncGenerator[bytes, None]:
        """The file's bytes. Raises OSError."""
        path = self._path(key)
        async with self._held() as held:
            file = await self.run(lambda: held.enter_context(path.open("rb", buffering=0)))
            while piece := await self.run(lambda: file.read(READ_BYTES)):
                yield piece

    async def run(self, call: Callable[[], T]) -> T:
        """`call` on a thread. What a thread has begun it ends, also when nobody waits for it: only then this is left."""
        future = asyncio.get_running_loop().run_in_executor(self._threads, call)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise

    def close(self) -> None:
        """Wait for the threads."""
        self._threads.shutdown(wait=True)

    @asynccontextmanager
    async def _held(self) -> AsyncIterator[ExitStack]:
        """What a thread enters there is closed at the end, also when nobody waited for the thread."""
        held = ExitStack()
        try:
            yield held
        finally:
            await self.run(held.close)

    def _path(self, key: str) -> Path:
        assert KEY.fullmatch(key), "keys are ours"
        return self._directory / key

    def _open(self, known: frozenset[str]) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in self._directory.iterdir():
            if path.stem not in known or path.suffix == NEW_SUFFIX:
                path.unlink()


def write_at(fd: int, data: bytes | bytearray, offset: int) -> None:
    """All of `data`. Raises OSError."""
    left = memoryview(data)
    while left:
        n = os.pwrite(fd, left, offset)
        left, offset = left[n:], offset + n


def cut(fd: int, n_bytes: int) -> "Digest":
    """Shorten the file to `n_bytes` and give the digest of what is left. Raises OSError."""
    os.ftruncate(fd, n_bytes)
    digest = Digest()
    offset = 0
    while offset < n_bytes:
        piece = os.pread(fd, min(READ_BYTES, n_bytes - offset), offset)
        if not piece:
            raise OSError(f"the file ends at byte {offset:,}, {n_bytes:,} were written")
        digest.add(piece)
        offset += len(piece)
    return digest


class Digest:
    """sha256 on the way."""

    def __init__(self) -> None:
        self._hash = sha256()

    def add(self, data: bytes | bytearray) -> None:
        self._hash.update(data)

    def value(self) -> bytes:
        return self._hash.digest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
