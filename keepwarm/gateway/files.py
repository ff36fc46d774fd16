"""Uploaded files: from the last byte of an upload to their text, until they expire or are deleted.

    begin, append, query, cancel (gateway/uploads.py) → finish: on disk for good, then PROCESSING
        → its text is extracted in the background → ACTIVE | FAILED → expired by the clock, or deleted

A file is acknowledged when bytes, name and row are on the disk; its text is extracted from there, after a restart too.
Nothing of a file is ever in memory as a whole but its text while it is written or used. What is on disk and in no row is
removed at the start: uploads that were broken then.
"""

import asyncio
import re
from contextlib import aclosing

from keepwarm.config import Limits
from keepwarm.core.clock import Clock, Ids
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.file import FileState, StoredFile, unknown_file
from keepwarm.documents import DocumentFault
from keepwarm.documents.extraction import ReaderFault
from keepwarm.gateway.file_disk import FileDisk
from keepwarm.gateway.file_rows import FileRows
from keepwarm.gateway.reading import Reading
from keepwarm.gateway.ticking import tick_forever
from keepwarm.gateway.uploads import Quota, Upload, Uploads, check_turn, disk_fault
from keepwarm.telemetry import Log

SWEEP_S = 60.0  # how late an expired file's bytes go; look-ups go by the clock and are never late
EXPIRE_MAX = 1000  # files removed per sweep, so that a sweep stays short
RETRY_S = 0.5  # between attempts while the database is busy
UNSAID = ("", "application/octet-stream", "binary/octet-stream")  # what clients say that know nothing of a type
SUFFIX = re.compile(r"\.(\w{1,8})$")
OOXML = "application/vnd.openxmlformats-officedocument"
MEDIA_TYPES = {
    "pdf": "application/pdf",
    "docx": f"{OOXML}.wordprocessingml.document",
    "pptx": f"{OOXML}.presentationml.presentation",
    "xlsx": f"{OOXML}.spreadsheetml.sheet",
    "html": "text/html",
    "htm": "text/html",
    "md": "text/markdown",
    "csv": "text/csv",
    "json": "application/json",
    "xml": "application/xml",
    "png": "image/png",
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "gif": "image/gif",
    "webp": "image/webp",
    "mp3": "audio/mpeg",
    "wav": "audio/wav",
    "mp4": "video/mp4",
    "doc": "application/msword",
    "ppt": "application/vnd.ms-powerpoint",
    "xls": "application/vnd.ms-excel",
    "zip": "application/zip",
}
NOT_ITS_FAULT = "the document could not be read here, which is no fault of its own; upload it again"
DEFAULT_MEDIA_TYPE = "text/plain"  # reading it tells whether it is text


class Files:
    """All calls on files. Every call a client can cause names the tenant, but those that name an upload."""

    def __init__(
        self, limits: Limits, disk: FileDisk, rows: FileRows, reading: Reading, clock: Clock, ids: Ids, log: Log
    ) -> None:
        self._limits = limits
        self._disk = disk
        self._rows = rows
        self._reading = reading
        self._clock = clock
        self._ids = ids
        self._log = log
        self._quota = Quota(limits)
        self._queue: asyncio.Queue[StoredFile] = asyncio.Queue()  # what is in it is in a tenant's count, too
        self._settled: dict[str, asyncio.Event] = {}  # by key, of files in the queue or being read
        self.uploads = Uploads(limits, disk, self._quota, clock, ids)

    async def recover(self) -> None:
        """At start, before any client is answered: count what is there, remove what is not, read on where it broke off."""
        files = await self._rows.everyones()
        await self._disk.open({file.key for file in files})
        for file in files:
            self._quota.take(file.tenant, 1, file.n_bytes, is_checked=False)
            if file.state is FileState.PROCESSING:
                self._enqueue(file)

    async def finish(self, upload_id: str) -> StoredFile:
        """Make a file of an upload; a second call gives the same file.

        Raises ApiError: UNKNOWN_FILE, INVALID_REQUEST when bytes are missing or the client's id is taken, OVERLOADED.
        """
        upload = self.uploads.get(upload_id)
        async with upload.lock:
            check_turn(upload, upload.turn)
            upload.turn += 1  # who still writes to it does so no longer
            if upload.file_id is not None:
                return await self.get(upload.tenant, upload.file_id)
            announced = upload.new.n_bytes
            if announced is not None and announced != upload.n_bytes:
                message = f"{announced:,} bytes were announced and {upload.n_bytes:,} were received"
                raise ApiError(ErrorKind.INVALID_REQUEST, message)
            try:
                await self._disk.publish(upload.key, upload.n_bytes)
            except OSError as exc:
                raise disk_fault(exc) from exc
            file = await self._rows.insert(self._file(upload))
            if file is None:
                raise ApiError(ErrorKind.INVALID_REQUEST, f"you have a file {upload.new.id} already", param="file.name")
            upload.file_id = file.id
        self._enqueue(file)
        return file

    async def get(self, tenant: str, file_id: str, *, dialect: str | None = None) -> StoredFile:
        """Raises ApiError(UNKNOWN_FILE), also for a file of another dialect than `dialect`."""
        file = await self._rows.get(tenant, file_id, self._clock.now(), dialect=dialect)
        if file is None:
            raise unknown_file(file_id)
        return file

    async def settled(self, file: StoredFile, s_max: float) -> StoredFile:
        """The file once its text is there, or cannot be; as it is after `s_max`. Raises ApiError(UNKNOWN_FILE)."""
        waiting = self._settled.get(file.key)
        if waiting is not None:
            try:
                async with asyncio.timeout(s_max):
                    await waiting.wait()
            except TimeoutError:
                pass  # it is told as it is
        return await self.get(file.tenant, file.id)

    async def active(
        self, tenant: str, file_id: str, *, param: str | None = None, dialect: str | None = None
    ) -> StoredFile:
        """A file that can be used in a prompt. Raises ApiError: UNKNOWN_FILE, INVALID_REQUEST."""
        file = await self._rows.get(tenant, file_id, self._clock.now(), dialect=dialect)
        if file is None:
            raise unknown_file(file_id, param)
        if file.state is not FileState.ACTIVE:
            why = f": {file.error}" if file.error else ", it is still being read"
            message = f"The File {file.id} is not in an ACTIVE state and usage is not allowed{why}."
            raise ApiError(ErrorKind.INVALID_REQUEST, message, param=param)
        return file

    async def text_of(self, file: StoredFile) -> str:
        """The text of an active file. Raises ApiError(UNKNOWN_FILE) when it has just been deleted."""
        try:
            return await self._disk.read_text(file.key)
        except FileNotFoundError:
            raise unknown_file(file.id) from None

    async def page(self, tenant: str, dialect: str, limit: int, older_than: int | None = None) -> list[StoredFile]:
        """The tenant's files, newest first; `older_than` is the `seq` of the last one of the page before."""
        return await self._rows.page(tenant, dialect, self._clock.now(), limit, older_than)

    async def delete(self, tenant: str, file_id: str, *, dialect: str | None = None) -> None:
        """Raises ApiError(UNKNOWN_FILE)."""
        await self._remove(await self.get(tenant, file_id, dialect=dialect))

    async def work(self) -> None:
        """Extract texts; forever."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                file = await self._queue.get()
                tasks.create_task(self._process(file))

    async def tick_forever(self) -> None:
        """Sweep now and then."""
        await tick_forever(self.tick, SWEEP_S)

    async def tick(self) -> None:
        """Remove what the clock has expired: files, and uploads that nobody goes on with."""
        for file in await self._rows.expired(self._clock.now(), EXPIRE_MAX):
            await self._remove(file)
        await self.uploads.sweep()

    def _file(self, upload: Upload) -> StoredFile:
        now, new = self._clock.now(), upload.new
        return StoredFile(
            id=new.id or self._ids.new(new.id_prefix),
            tenant=upload.tenant,
            dialect=new.dialect,
            key=upload.key,
            name=new.name,
            media_type=media_type_of(new.media_type, new.name),
            n_bytes=upload.n_bytes,
            sha256=upload.digest.value(),
            created_at=now,
            updated_at=now,
            expires_at=None if new.ttl_s is None else now + new.ttl_s,
            state=FileState.PROCESSING,
        )

    def _enqueue(self, file: StoredFile) -> None:
        self._settled[file.key] = asyncio.Event()
        self._queue.put_nowait(file)

    async def _remove(self, file: StoredFile) -> None:
        """The row first: a file without its bytes must not be found, bytes without a row are a leftover at worst."""
        if await self._rows.delete(file.seq):
            self._quota.give_back(file.tenant, 1, file.n_bytes)
            await self.uploads.file_gone(file.key)
            await self._disk.remove(file.key)

    async def _process(self, file: StoredFile) -> None:
        try:
            state, error, fault = await self._extract(file)
            if not await self._settle(file, state, error):  # deleted meanwhile: its text came too late
                await self._disk.remove(file.key)
            elif fault is not None:
                self._log.error("file not read", file_id=file.id, tenant=file.tenant, error=fault)
            else:
                fields = {"tenant": file.tenant, "state": state.value, "n_bytes": file.n_bytes}
                self._log.info("file settled", file_id=file.id, **fields)
        finally:
            self._settled.pop(file.key).set()

    async def _settle(self, file: StoredFile, state: FileState, error: str | None) -> bool:
        """False when the file is gone."""
        while True:
            try:
                return await self._rows.settle(file.seq, state, self._clock.now(), error) is not None
            except ApiError as busy:
                if busy.kind is not ErrorKind.OVERLOADED:
                    raise
                await asyncio.sleep(RETRY_S)

    async def _extract(self, file: StoredFile) -> tuple[FileState, str | None, str | None]:
        """Put the text on disk. Its state then, why it has none, and what went wrong when that is no fault of its own."""
        try:
            order = self._reading.order(file.media_type)
            async with aclosing(self._disk.pieces(file.key)) as pieces:
                text = await self._reading.text(file.tenant, order, pieces)
            await self._disk.write_text(file.key, text)
        except DocumentFault as fault:
            return FileState.FAILED, f"the document {fault}", None
        except (ReaderFault, OSError) as exc:
            return FileState.FAILED, NOT_ITS_FAULT, type(exc).__name__
        return FileState.ACTIVE, None, None


def media_type_of(said: str | None, name: str) -> str:
    """The media type a client names, else what the name's suffix says, else plain text."""
    if said is not None and said.partition(";")[0].strip().lower() not in UNSAID:
        return said
    suffix = SUFFIX.search(name)
    return DEFAULT_MEDIA_TYPE if suffix is None else MEDIA_TYPES.get(suffix[1].lower(), DEFAULT_MEDIA_TYPE)
