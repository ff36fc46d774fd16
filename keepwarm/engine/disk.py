"""The disk tier: one file per block in one directory, written whole or not at all, verified whenever it is read.

A file is written under a temporary name, synced and renamed; after one sync of the directory the batch is durable. So a
crash leaves whole blocks, and temporary names that the next `heads` removes. Whatever a fault does, a caller gets the
right bytes or an exception of tiers.py, and nothing half-kept stays: `bytes_used` is the sum of the costs of the files
that are there, and of those being written. It is known from `heads` on, which is called once before all else.

Block names come from keys, which are hashes; nothing a client says becomes a path. One process owns the directory, by a
lock on the file `lock` in it, until `close`. Writes take turns; reads run beside each other and beside them.
"""

import errno
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, count
from pathlib import Path

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from keepwarm.engine import blockfile
from keepwarm.engine.blockfile import PAGE_BYTES
from keepwarm.engine.files import Files, read_full, write_new
from keepwarm.engine.tiers import BlockHead, BlockLost, Damage, TierFault, TierFull

LOCK_ATTEMPTS = 10  # a process that was just told to stop may hold the lock a moment longer
LOCK_WAIT_S = 0.2
SCAN_THREADS = 4  # after a reboot a scan waits for the disk once a file; more threads gained nothing
FULL = (errno.ENOSPC, errno.EDQUOT)


class DirectoryLocked(Exception):
    """Another process keeps its blocks in this directory."""

    def __init__(self, root: Path) -> None:
        super().__init__(f"{root} is in use by another keepwarm process: stop it, or choose another --data-dir")


class DiskTier:
    """Blocks by key in `<root>/blocks`. Raises DirectoryLocked, and TierFault when the directory cannot be used.

    `fingerprint`, 32 bytes, names what every stored byte depends on: model, template, KV type, layout. Blocks with another
    one are stale. `wait` pauses between attempts to lock the directory.
    """

    name = "disk"

    def __init__(
        self,
        root: Path,
        bytes_total: int,
        fingerprint: bytes,
        *,
        files: Files | None = None,
        wait: Callable[[float], object] | None = None,
    ) -> None:
        assert len(fingerprint) == 32
        self.bytes_total = bytes_total
        self.damaged: Counter[Damage] = Counter()
        self._files = files or Files()
        self._fingerprint = fingerprint
        self._blocks = root / "blocks"
        self._stored: dict[bytes, _Stored] = {}
        self._undeleted: dict[Path, int] = {}  # files the system refuses to remove, with what they cost: tried again
        self._bytes_stored = 0
        self._bytes_reserved = 0  # of a write under way
        self._lock = threading.Lock()  # of the fields above
        self._writing = threading.Lock()  # taken before `_lock`
        self._n_temporary = count()
        try:
            self._files.make_dir(root)
            self._files.make_dir(self._blocks)
            self._lock_fd: int | None = _locked(self._files, root, wait or threading.Event().wait)
        except OSError as exc:
            raise TierFault(f"{root}: {exc.strerror}") from exc

    @property
    def bytes_used(self) -> int:
        with self._lock:
            return self._bytes_used()

    def _bytes_used(self) -> int:
        return self._bytes_stored + self._bytes_reserved + sum(self._undeleted.values())

    def cost(self, head: BlockHead) -> int:
        return blockfile.cost(head)

    def write(self, blocks: Sequence[tuple[BlockHead, NDArray[np.uint8]]]) -> None:
        with self._writing:
            self._delete_undeleted()
            with self._lock:
                new = {head.key: (head, body) for head, body in blocks if head.key not in self._stored}
                n_needed = sum(self.cost(head) for head, _ in new.values())
                n_free = self.bytes_total - self._bytes_used()
                if new and n_needed > n_free:
                    raise TierFull(n_needed, max(0, n_free))
                self._bytes_reserved = n_needed
            try:
                if new:
                    self._write_new(list(new.values()))
            except OSError as exc:
                if exc.errno in FULL:
                    raise TierFull(n_needed, self._free_on_device()) from exc
                raise TierFault(exc.strerror or str(exc)) from exc
            finally:
                with self._lock:
                    self._bytes_reserved = 0

    def _write_new(self, blocks: Sequence[tuple[BlockHead, NDArray[np.uint8]]]) -> None:
        temporary: list[Path] = []
        renamed: dict[bytes, _Stored] = {}
        try:
            for head, body in blocks:
                assert body.nbytes == head.n_bytes
                temporary.append(self._temporary(head.key))
                header = blockfile.encode(head, self._fingerprint, blockfile.checksum(body))
                write_new(self._files, temporary[-1], (header, body))
            with self._lock:
                for path, (head, _) in zip(temporary, blocks, strict=True):
                    self._files.rename(path, self._path(head.key))
                    renamed[head.key] = _Stored(blockfile.header_bytes(len(head.tokens)), head.n_bytes, self.cost(head))
                    self._keep(head.key, renamed[head.key])
            self._files.sync_dir(self._blocks)
        except BaseException:
            with self._lock:
                for path, (head, _) in list(zip(temporary, blocks, strict=False))[len(renamed) :]:
                    self._unlink(path, self.cost(head))
                for key, stored in renamed.items():
                    self._drop(key, stored)
            raise

    def read(self, key: bytes, into: NDArray[np.uint8]) -> None:
        with self._lock:
            stored = self._stored.get(key)
        if stored is None:
            raise BlockLost(key, None)
        assert into.nbytes == stored.n_bytes
        damage: Damage | None
        try:
            damage = self._fill(key, stored, into)
        except FileNotFoundError:
            damage = None
        except OSError:
            damage = Damage.UNREADABLE
        else:
            if damage is None:
                return
        with self._lock:
            if self._drop(key, stored) and damage:
                self.damaged[damage] += 1
        raise BlockLost(key, damage)

    def _fill(self, key: bytes, stored: "_Stored", into: NDArray[np.uint8]) -> Damage | None:
        header = _aligned(stored.n_header)
        n_read, n_file = self._read_file(self._path(key), header, into)
        if not n_read == n_file == stored.n_header + stored.n_bytes:
            return Damage.TRUNCATED
        found = blockfile.decode(header.tobytes(), self._fingerprint)
        if isinstance(found, Damage):
            return found
        head, body_sum = found
        if head.key != key or head.n_bytes != stored.n_bytes:
            return Damage.FOREIGN
        return None if blockfile.checksum(into) == body_sum else Damage.FLIPPED

    def _read_file(self, path: Path, header: NDArray[np.uint8], into: NDArray[np.uint8]) -> tuple[int, int]:
        """Bytes read into these two, and the file's size. Raises OSError.

        From the page cache if the file is there, as it is for a while after it was written. Else past it, where addresses
        and sizes allow: that takes half the processor's time, and the store's own RAM tier is the cache.
        """
        fd = self._files.open(path)
        try:
            n_file = self._files.size(fd)
            if not (_is_aligned(into) and n_file and not self._files.is_cached(fd, n_file - 1)):
                return read_full(self._files, fd, (header, into), 0), n_file
            n_read = self._read_direct(path, header, into)
            return read_full(self._files, fd, (header, into), 0) if n_read is None else n_read, n_file
        finally:
            self._files.close(fd)

    def _read_direct(self, path: Path, header: NDArray[np.uint8], into: NDArray[np.uint8]) -> int | None:
        """Bytes read, or None where this cannot be done. Raises OSError."""
        try:
            fd = self._files.open(path, direct=True)
            try:
                return read_full(self._files, fd, (header, into), 0)
            finally:
                self._files.close(fd)
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise
            return None

    def delete(self, key: bytes) -> None:
        """Not synced: a block that comes back after a power cut is a valid one."""
        with self._lock:
            stored = self._stored.get(key)
            if stored is not None:
                self._drop(key, stored)

    def heads(self) -> Iterator[BlockHead]:
        """Reads every header, never a body; what cannot be used is deleted and counted in `damaged`. Raises TierFault."""
        with self._writing:
            try:
                names = self._files.names(self._blocks)
            except OSError as exc:
                raise TierFault(exc.strerror or str(exc)) from exc
            with self._lock:
                self._stored.clear()
                self._undeleted.clear()
                self._bytes_stored = 0
            parts = [names[at::SCAN_THREADS] for at in range(SCAN_THREADS)]
            with ThreadPoolExecutor(SCAN_THREADS, "scan") as pool:
                return chain.from_iterable(list(pool.map(self._found_all, parts)))

    def _found_all(self, names: Sequence[str]) -> list[BlockHead]:
        return [head for name in names if (head := self._found(name)) is not None]

    def _found(self, name: str) -> BlockHead | None:
        """The block of this file, now accounted for; or None, and the file is gone."""
        n_file = 0
        try:
            n_file, head = self._inspect(name)
        except FileNotFoundError:
            return None
        except OSError:
            head = Damage.UNREADABLE
        with self._lock:
            if isinstance(head, Damage):
                self.damaged[head] += 1
                self._unlink(self._blocks / name, n_file)
                return None
            self._keep(head.key, _Stored(n_file - head.n_bytes, head.n_bytes, self.cost(head)))
        return head

    def _inspect(self, name: str) -> tuple[int, BlockHead | Damage]:
        """The file's size, and its head or what is wrong with it. Raises OSError."""
        fd = self._files.open(self._blocks / name)
        try:
            n_file = self._files.size(fd)
            key = blockfile.key_of(name)
            if key is None:
                return n_file, Damage.TORN if name.endswith(".tmp") else Damage.FOREIGN
            header = np.empty(PAGE_BYTES, np.uint8)
            n_read = read_full(self._files, fd, (header,), 0)
            n_header = blockfile.length(header[:n_read].tobytes())
            if isinstance(n_header, Damage):
                return n_file, n_header
            if n_header > n_file:
                return n_file, Damage.TRUNCATED
            if n_header > PAGE_BYTES:
                header = np.concatenate([header, np.empty(n_header - PAGE_BYTES, np.uint8)])
                read_full(self._files, fd, (header[PAGE_BYTES:],), PAGE_BYTES)
        finally:
            self._files.close(fd)
        found = blockfile.decode(header.tobytes(), self._fingerprint)
        if isinstance(found, Damage):
            return n_file, found
        if found[0].key != key:
            return n_file, Damage.FOREIGN
        return n_file, found[0] if blockfile.file_bytes(found[0]) == n_file else Damage.TRUNCATED

    def close(self) -> None:
        """Give the directory to others. Nothing is pending: a write has returned, or its caller waits for it."""
        if self._lock_fd is not None:
            self._files.close(self._lock_fd)
            self._lock_fd = None

    def check_integrity(self) -> None:
        """Assert that the accounts add up."""
        with self._lock:
            assert self._bytes_stored == sum(stored.cost for stored in self._stored.values())
            assert self._bytes_reserved == 0 or self._writing.locked()

    # --- with the lock held

    def _keep(self, key: bytes, stored: "_Stored") -> None:
        self._stored[key] = stored
        self._bytes_stored += stored.cost
        self._bytes_reserved = max(0, self._bytes_reserved - stored.cost)
        if self._undeleted:
            self._undeleted.pop(self._path(key), None)  # replaced

    def _drop(self, key: bytes, stored: "_Stored") -> bool:
        """Remove this block, unless it is gone or was written again meanwhile."""
        if self._stored.get(key) is not stored:
            return False
        del self._stored[key]
        self._bytes_stored -= stored.cost
        self._unlink(self._path(key), stored.cost)
        return True

    def _unlink(self, path: Path, cost: int) -> None:
        try:
            self._files.unlink(path)
        except OSError:
            self._undeleted[path] = cost

    # ---

    def _delete_undeleted(self) -> None:
        with self._lock:
            undeleted, self._undeleted = self._undeleted, {}
            for path, cost in undeleted.items():
                self._unlink(path, cost)

    def _free_on_device(self) -> int:
        try:
            return self._files.free_bytes(self._blocks)
        except OSError:
            return 0

    def _path(self, key: bytes) -> Path:
        return self._blocks / blockfile.name_of(key)

    def _temporary(self, key: bytes) -> Path:
        return self._blocks / f"{key.hex()}.{os.getpid()}.{next(self._n_temporary)}.tmp"


class _Stored(Struct, frozen=True):
    """What is remembered of a block. Compared by identity: the same key written again is another."""

    n_header: int
    n_bytes: int
    cost: int


def _is_aligned(buffer: NDArray[np.uint8]) -> bool:
    return buffer.ctypes.data % PAGE_BYTES == 0 == buffer.nbytes % PAGE_BYTES


def _aligned(n_bytes: int) -> NDArray[np.uint8]:
    """Memory that begins at a page."""
    area = np.empty(n_bytes + PAGE_BYTES, np.uint8)
    start = -area.ctypes.data % PAGE_BYTES
    return area[start : start + n_bytes]


def _locked(files: Files, root: Path, wait: Callable[[float], object]) -> int:
    for attempt in range(LOCK_ATTEMPTS):
        if attempt:
            wait(LOCK_WAIT_S)
        fd = files.lock(root / "lock")
        if fd is not None:
            return fd
    raise DirectoryLocked(root)
