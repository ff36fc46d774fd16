"""The disk as `bench store` needs it: forgotten by the page cache, read in order, and named.

Dropping the whole page cache needs root; elsewhere the kernel is asked to forget the files themselves, which it does for
all that is written back and mapped by nobody. What was done is told, since only the first forgets directories as well.
"""

import errno
import mmap
import os
from pathlib import Path
from typing import Literal

import psutil

from keepwarm.core.clock import Clock

DROP_CACHES = Path("/proc/sys/vm/drop_caches")
READ_BYTES = 1 << 20

Dropped = Literal[
    "the whole page cache (drop_caches)", "the files' pages (posix_fadvise)", "nothing: not supported here"
]


def drop_page_cache(directory: Path, *, whole: bool) -> Dropped:
    """Have the next reading of the files below `directory` come from the disk. `whole`: of every file, where permitted."""
    os.sync()
    if whole:
        try:
            DROP_CACHES.write_text("3\n", encoding="ascii")
        except OSError:
            pass  # not Linux, or not root
        else:
            return "the whole page cache (drop_caches)"
    if not hasattr(os, "posix_fadvise"):
        return "nothing: not supported here"
    for path in directory.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
    return "the files' pages (posix_fadvise)"


def write_joined(parts: list[Path], path: Path) -> int:
    """One file of all the others' bytes, synced; its size."""
    with path.open("wb") as file:
        for part in parts:
            file.write(part.read_bytes())
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def read_sequentially(path: Path, clock: Clock, *, direct: bool = False) -> tuple[int, float] | None:
    """Read the file as `dd bs=1M` does: bytes, and milliseconds. `direct`: past the page cache; None where it cannot be."""
    flags = getattr(os, "O_DIRECT", None) if direct else 0
    if flags is None:
        return None
    buffer = mmap.mmap(-1, READ_BYTES)  # begins at a page, as direct reading wants it
    begin, n_read = clock.monotonic(), 0
    try:
        fd = os.open(path, os.O_RDONLY | flags)
        try:
            while n := os.readv(fd, [buffer]):
                n_read += n
        finally:
            os.close(fd)
    except OSError as exc:
        if direct and exc.errno == errno.EINVAL:
            return None
        raise
    return n_read, (clock.monotonic() - begin) * 1000


def filesystem(path: Path) -> str:
    """What the directory is on: "ext4 on /dev/sda1"."""
    mounts = [part for part in psutil.disk_partitions(all=True) if path.resolve().is_relative_to(part.mountpoint)]
    if not mounts:
        return "unknown"
    nearest = max(mounts, key=lambda part: len(part.mountpoint))
    return f"{nearest.fstype} on {nearest.device}"
