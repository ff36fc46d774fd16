"""Leases on disk: one small file per lease, so that a promise made before a crash is known after it.

A file holds a version, the pin's id and its blocks' keys in MessagePack, behind the xxh3 of these bytes; its name is the
blake3 of the id, since ids are not ours to make paths of. `write` and `delete` are durable when they return; what a crash
leaves is the lease before or the one after. A damaged file is deleted and counted: its lease is not known any more.
"""

import errno
import itertools
import os
import struct
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import xxhash
from blake3 import blake3

from keepwarm.engine.files import Files, read_full, write_new
from keepwarm.engine.tiers import Damage, TierFault, TierFull

SUFFIX = ".lease"
VERSION = 1
BYTES_MAX = 64 * 1024 * 1024  # 1.9 million blocks; a longer file is damaged, and is not read

_SUM = struct.Struct("<Q")


class LeaseFiles:
    """The leases in `<root>/leases`. Used by one thread at a time. Raises TierFault when the directory cannot be used."""

    def __init__(self, files: Files, root: Path) -> None:
        self.damaged: Counter[Damage] = Counter()
        self._files = files
        self._dir = root / "leases"
        self._n_temporary = itertools.count()
        try:
            files.make_dir(self._dir)
        except OSError as exc:
            raise TierFault(f"{self._dir}: {exc.strerror}") from exc

    def write(self, pin_id: str, keys: Sequence[bytes]) -> None:
        """Keep this lease, in place of an older one with its id; durable when it returns. Raises TierFull, TierFault.

        After an exception the older one is what is kept, except if only the last sync failed: then either may be.
        """
        content = encode(pin_id, keys)
        temporary = self._dir / f"{_stem(pin_id)}.{os.getpid()}.{next(self._n_temporary)}.tmp"
        try:
            write_new(self._files, temporary, (np.frombuffer(content, np.uint8),))
            self._files.rename(temporary, self._dir / (_stem(pin_id) + SUFFIX))
            self._files.sync_dir(self._dir)
        except OSError as exc:
            self._unlink(temporary)
            raise self._fault(exc, len(content)) from exc

    def delete(self, pin_id: str) -> None:
        """Durable when it returns. Unknown ids are no error. Raises TierFull, TierFault."""
        try:
            self._files.unlink(self._dir / (_stem(pin_id) + SUFFIX))
            self._files.sync_dir(self._dir)
        except OSError as exc:
            raise self._fault(exc, 0) from exc

    def all(self) -> list[tuple[str, tuple[bytes, ...]]]:
        """Every lease's id and keys. What is damaged is deleted and counted in `damaged`. Raises TierFault."""
        try:
            names = self._files.names(self._dir)
        except OSError as exc:
            raise TierFault(exc.strerror or str(exc)) from exc
        found = []
        for name in names:
            lease = self._lease(name)
            if isinstance(lease, Damage):
                self.damaged[lease] += 1
                self._unlink(self._dir / name)
            else:
                found.append(lease)
        return found

    def _lease(self, name: str) -> tuple[str, tuple[bytes, ...]] | Damage:
        if not name.endswith(SUFFIX):
            return Damage.TORN if name.endswith(".tmp") else Damage.FOREIGN
        try:
            fd = self._files.open(self._dir / name)
            try:
                n_file = self._files.size(fd)
                content = np.empty(min(n_file, BYTES_MAX), np.uint8)
                n_read = read_full(self._files, fd, (content,), 0)
            finally:
                self._files.close(fd)
        except OSError:
            return Damage.UNREADABLE
        if n_read != n_file:
            return Damage.TRUNCATED
        lease = decode(content.tobytes())
        if not isinstance(lease, Damage) and name != _stem(lease[0]) + SUFFIX:
            return Damage.FOREIGN
        return lease

    def _unlink(self, path: Path) -> None:
        try:
            self._files.unlink(path)
        except OSError:
            pass  # found damaged, and tried again, at the next start

    def _fault(self, exc: OSError, n_bytes: int) -> TierFull | TierFault:
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
            return TierFault(exc.strerror or str(exc))
        try:
            return TierFull(n_bytes, self._files.free_bytes(self._dir))
        except OSError:
            return TierFull(n_bytes, 0)


def encode(pin_id: str, keys: Sequence[bytes]) -> bytes:
    """A lease file's content."""
    body = msgspec.msgpack.encode((VERSION, pin_id, list(keys)))
    return _SUM.pack(xxhash.xxh3_64_intdigest(body)) + body


def decode(content: bytes) -> tuple[str, tuple[bytes, ...]] | Damage:
    """The lease's id and keys, or why the file cannot be used."""
    if len(content) <= _SUM.size:
        return Damage.TRUNCATED
    body = content[_SUM.size :]
    if _SUM.unpack_from(content)[0] != xxhash.xxh3_64_intdigest(body):
        return Damage.FLIPPED
    try:
        version, pin_id, keys = msgspec.msgpack.decode(body, type=tuple[int, str, tuple[bytes, ...]])
    except msgspec.DecodeError:
        return Damage.STALE  # whole, so another version wrote it
    return (pin_id, keys) if version == VERSION else Damage.STALE


def _stem(pin_id: str) -> str:
    return blake3(pin_id.encode()).hexdigest()
