"""The thin seam to the operating system: the few file operations the disk tier uses, one system call each.

`Files` does them; tests put one in its place that fails, stops or tears at a chosen call. What must be done about short
reads and writes is below it, in `write_new` and `read_full`, so that it is tested too. Everything raises OSError as the
system gave it. Directories are 0700 and files 0600: a block holds what a user wrote.
"""

import errno
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Buffer = NDArray[np.uint8]  # one dimension, contiguous


class Files:
    """One system call each; thread-safe, since nothing is kept."""

    def make_dir(self, path: Path) -> None:
        """The directory and those above it, for nobody else; there already is no error."""
        path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def create(self, path: Path) -> int:
        """A descriptor to write a file that was not there."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def write(self, fd: int, buffers: Sequence[Buffer]) -> int:
        """Bytes written, maybe fewer than asked for."""
        return os.writev(fd, [buffer.data for buffer in buffers])

    def sync(self, fd: int) -> None:
        os.fsync(fd)

    def open(self, path: Path, *, direct: bool = False) -> int:
        """A descriptor to read at chosen places: the system reads nothing ahead of what is asked for.

        `direct`: from the device into the caller's memory, past the page cache. Offsets, sizes and addresses must then be
        multiples of a page; where a file system does not have it, this or the first read fails with EINVAL.
        """
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = os.open(path, flags | getattr(os, "O_DIRECT", 0) if direct else flags)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        return fd

    def read(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """Bytes read, maybe fewer than asked for; 0 at the end."""
        return os.preadv(fd, [buffer.data for buffer in buffers], offset)

    def is_cached(self, fd: int, offset: int) -> bool:
        """Whether the page cache has the byte at this place. True also where the system cannot tell."""
        if not hasattr(os, "RWF_NOWAIT"):
            return True
        try:
            os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT)
        except OSError as exc:
            return exc.errno != errno.EAGAIN
        return True

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def close(self, fd: int) -> None:
        os.close(fd)

    def rename(self, path: Path, to: Path) -> None:
        """Replaces what is there."""
        path.replace(to)

    def sync_dir(self, path: Path) -> None:
        """Make names created, renamed and removed in it durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def unlink(self, path: Path) -> None:
        """Not there is no error."""
        path.unlink(missing_ok=True)

    def names(self, path: Path) -> list[str]:
        return [entry.name for entry in path.iterdir()]

    def free_bytes(self, path: Path) -> int:
        """What the device has left for us."""
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize

    def lock(self, path: Path) -> int | None:
        """A descriptor that holds the file's lock until it is closed or the process ends; None when another has it."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        except OSError:
            os.close(fd)
            raise
        return fd


def write_new(files: Files, path: Path, buffers: Sequence[Buffer]) -> None:
    """Write a new file and make its bytes durable; its name is so after `sync_dir`. On an error the caller unlinks it."""
    fd = files.create(path)
    try:
        rest = [buffer for buffer in buffers if len(buffer)]
        while rest:
            rest = _after(rest, files.write(fd, rest))
        files.sync(fd)
    finally:
        files.close(fd)


def read_full(files: Files, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
    """Fill the buffers from `offset` on; bytes read, fewer only where the file ends."""
    rest, n_read = [buffer for buffer in buffers if len(buffer)], 0
    while rest:
        n = files.read(fd, rest, offset + n_read)
        if not n:
            break
        n_read += n
        rest = _after(rest, n)
    return n_read


def _after(buffers: Sequence[Buffer], n_bytes: int) -> list[Buffer]:
    """What is left of the buffers behind their first bytes."""
    rest = []
    for buffer in buffers:
        if n_bytes < len(buffer):
            rest.append(buffer[n_bytes:])
        n_bytes = max(0, n_bytes - len(buffer))
    return rest
