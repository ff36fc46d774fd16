"""Uploads under way: bytes go to the disk as they arrive, and a broken one can be gone on with.

An upload is known by an id that cannot be guessed, which is all that who goes on with it needs. It is in memory alone:
after a restart, or an hour without a byte, it is unknown and its bytes are gone. At most one request writes to it; a
later one takes over from one whose client has gone without a word. What it takes of its tenant's limits (`Quota`) is
taken when it begins, as far as its size is announced, and given back whichever way it ends.
"""

import asyncio
from collections.abc import AsyncIterator

from msgspec import Struct

from keepwarm.config import Limits
from keepwarm.core.clock import Clock, Ids
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.file import NewFile
from keepwarm.gateway.file_disk import Digest, FileDisk, cut, write_at

WRITE_BYTES = 1 << 16  # written at once: what a server hands over at a time, so that an upload holds no more than two
DISK_RETRY_S = 60  # told with an upload that a full disk keeps out


class Uploaded(Struct, frozen=True):
    """What an upload has come to. `file_id` is set once it is a file."""

    upload_id: str
    n_bytes: int
    file_id: str | None = None


class Quota:
    """What each tenant keeps, uploads under way included: pure counting."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held: dict[str, tuple[int, int]] = {}  # files and bytes

    def held(self, tenant: str) -> tuple[int, int]:
        """Files and bytes."""
        return self._held.get(tenant, (0, 0))

    def take(self, tenant: str, n_files: int, n_bytes: int, *, is_checked: bool = True) -> None:
        """Raises ApiError(QUOTA_EXCEEDED) with the numbers, and takes nothing then."""
        had_files, had_bytes = self.held(tenant)
        limits = self._limits
        if is_checked and had_files + n_files > limits.files_per_tenant_max:
            message = f"you have {had_files:,} files, limit {limits.files_per_tenant_max:,} (files_per_tenant_max)"
            raise ApiError(ErrorKind.QUOTA_EXCEEDED, f"{message}; delete one first")
        if is_checked and had_bytes + n_bytes > limits.file_bytes_per_tenant_max:
            message = f"your files have {had_bytes:,} bytes and this one needs {n_bytes:,} more"
            limit = f"limit {limits.file_bytes_per_tenant_max:,} (file_bytes_per_tenant_max)"
            raise ApiError(ErrorKind.QUOTA_EXCEEDED, f"{message}, {limit}; delete one first")
        self._held[tenant] = had_files + n_files, had_bytes + n_bytes

    def give_back(self, tenant: str, n_files: int, n_bytes: int) -> None:
        had_files, had_bytes = self.held(tenant)
        left = had_files - n_files, had_bytes - n_bytes
        assert min(left) >= 0, "what is given back was taken"
        if left == (0, 0):
            self._held.pop(tenant, None)
        else:
            self._held[tenant] = left


class Upload:
    """One upload. `lock` is held by who changes its file; `turn` counts the requests that have written to it."""

    def __init__(self, upload_id: str, tenant: str, key: str, new: NewFile, touched_s: float) -> None:
        self.id = upload_id
        self.tenant = tenant
        self.key = key
        self.new = new
        self.n_reserved = new.n_bytes or 0
        self.n_bytes = 0
        self.digest = Digest()
        self.touched_s = touched_s
        self.file_id: str | None = None
        self.is_gone = False
        self.lock = asyncio.Lock()
        self.turn = 0

    def told(self) -> Uploaded:
        return Uploaded(self.id, self.n_bytes, self.file_id)


class Uploads:
    """All uploads under way."""

    def __init__(self, limits: Limits, disk: FileDisk, quota: Quota, clock: Clock, ids: Ids) -> None:
        self._limits = limits
        self._disk = disk
        self._quota = quota
        self._clock = clock
        self._ids = ids
        self._uploads: dict[str, Upload] = {}
        self._by_key: dict[str, Upload] = {}  # the same: no more than the files and uploads that `Quota` allows

    def __len__(self) -> int:
        return len(self._uploads)

    async def begin(self, tenant: str, new: NewFile) -> Uploaded:
        """Raises ApiError: BODY_TOO_LARGE, QUOTA_EXCEEDED, OVERLOADED."""
        self._check_size(new.n_bytes or 0)
        self._quota.take(tenant, 1, new.n_bytes or 0)
        upload = Upload(self._ids.new("u") + self._ids.new(""), tenant, self._ids.new(""), new, self._clock.monotonic())
        self._uploads[upload.id] = self._by_key[upload.key] = upload
        try:
            await self._disk.create(upload.key)
        except OSError as exc:
            await self._forget(upload)
            raise disk_fault(exc) from exc
        return upload.told()

    def get(self, upload_id: str) -> Upload:
        """Raises ApiError(UNKNOWN_FILE)."""
        upload = self._uploads.get(upload_id)
        if upload is None:
            hours = f"{self._limits.upload_idle_s_max / 3600:g} hours"
            message = f"there is no such upload: it never was, was cancelled, or had no byte for {hours}; begin anew"
            raise ApiError(ErrorKind.UNKNOWN_FILE, message)
        return upload

    async def append(self, upload_id: str, offset: int, pieces: AsyncIterator[bytes]) -> Uploaded:
        """Write what `pieces` give from `offset` on; the last bytes before an error of theirs are kept, too.

        `offset` may lie before what was received, whose rest is then forgotten: a client that heard no answer sends its
        chunk again. Raises ApiError: UNKNOWN_FILE, INVALID_REQUEST, BODY_TOO_LARGE, QUOTA_EXCEEDED, OVERLOADED,
        CLIENT_CLOSED when another request has taken over, and what `pieces` raise.
        """
        upload = self.get(upload_id)
        upload.turn += 1
        turn = upload.turn
        try:
            async with self._disk.writing(upload.key) as fd:
                await self._rewind(upload, turn, fd, offset)
                waiting = bytearray()
                try:
                    async for piece in pieces:
                        check_turn(upload, turn)
                        if not waiting and len(piece) >= WRITE_BYTES:
                            await self._write(upload, turn, fd, piece)
                            continue
                        waiting += piece
                        if len(waiting) >= WRITE_BYTES:
                            full, waiting = waiting, bytearray()
                            await self._write(upload, turn, fd, full)
                finally:
                    if waiting and upload.turn == turn:
                        await self._write(upload, turn, fd, waiting)
                check_turn(upload, turn)
        except OSError as exc:
            raise disk_fault(exc) from exc
        return upload.told()

    async def cancel(self, upload_id: str) -> None:
        """Raises ApiError(UNKNOWN_FILE)."""
        upload = self.get(upload_id)
        async with upload.lock:
            await self._forget(upload)

    async def sweep(self) -> None:
        """Forget the uploads that had no byte for too long."""
        oldest_s = self._clock.monotonic() - self._limits.upload_idle_s_max
        for upload in [upload for upload in self._uploads.values() if upload.touched_s <= oldest_s]:
            async with upload.lock:
                if upload.touched_s <= oldest_s:
                    await self._forget(upload)

    async def file_gone(self, key: str) -> None:
        """The file that an upload became is no more: nobody needs its answer again."""
        upload = self._by_key.get(key)
        if upload is not None:
            await self._forget(upload)

    async def _forget(self, upload: Upload) -> None:
        """An upload that has become a file leaves the file; any other leaves nothing."""
        if upload.is_gone:
            return
        upload.is_gone = True
        upload.turn += 1
        del self._uploads[upload.id], self._by_key[upload.key]
        if upload.file_id is None:
            self._quota.give_back(upload.tenant, 1, upload.n_reserved)
            await self._disk.remove(upload.key)

    async def _rewind(self, upload: Upload, turn: int, fd: int, offset: int) -> None:
        async with upload.lock:
            check_turn(upload, turn)
            if upload.file_id is not None:
                raise ApiError(ErrorKind.INVALID_REQUEST, "the upload is finished, nothing can be added to it")
            if not 0 <= offset <= upload.n_bytes:
                message = f"the offset is {offset:,} and {upload.n_bytes:,} bytes were received; go on from there"
                raise ApiError(ErrorKind.INVALID_REQUEST, message)
            if offset < upload.n_bytes:
                upload.digest = await self._disk.run(lambda: cut(fd, offset))
                upload.n_bytes = offset

    async def _write(self, upload: Upload, turn: int, fd: int, data: bytes | bytearray) -> None:
        async with upload.lock:
            check_turn(upload, turn)
            n_bytes = upload.n_bytes + len(data)
            announced = upload.new.n_bytes
            if announced is not None and n_bytes > announced:
                message = f"the upload has {n_bytes:,} bytes or more, {announced:,} were announced"
                raise ApiError(ErrorKind.INVALID_REQUEST, message)
            self._check_size(n_bytes)
            if n_bytes > upload.n_reserved:
                self._quota.take(upload.tenant, 0, n_bytes - upload.n_reserved)
                upload.n_reserved = n_bytes
            digest, offset = upload.digest, upload.n_bytes

            def write() -> None:
                write_at(fd, data, offset)
                digest.add(data)
                upload.n_bytes = n_bytes  # here: also when nobody waits for the thread any more

            await self._disk.run(write)
            upload.touched_s = self._clock.monotonic()

    def _check_size(self, n_bytes: int) -> None:
        limit = self._limits.file_bytes_max
        if n_bytes > limit:
            message = f"the file has {n_bytes:,} bytes or more, limit {limit:,} (file_bytes_max)"
            raise ApiError(ErrorKind.BODY_TOO_LARGE, message)


def check_turn(upload: Upload, turn: int) -> None:
    """Raises ApiError(CLIENT_CLOSED)."""
    if upload.is_gone or upload.turn != turn:
        raise ApiError(ErrorKind.CLIENT_CLOSED, "the upload was cancelled, or goes on in a later request")


def disk_fault(exc: OSError) -> ApiError:
    """The error for a disk that is full, or fails."""
    message = f"the file cannot be written here: {exc.strerror or 'the disk fails'}; try again later"
    return ApiError(ErrorKind.OVERLOADED, message, retry_after_s=DISK_RETRY_S)
