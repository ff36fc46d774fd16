"""Uploaded files: their way to disk and to their text, who sees them, when they go, and what a restart finds."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from msgspec.structs import replace

from keepwarm.config import Limits
from keepwarm.core.clock import RandomIds
from keepwarm.core.document import document_text
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.file import FileState, NewFile, StoredFile
from keepwarm.core.request import ChatRequest, DocumentPart, FilePart, Mark, Message, TextPart
from keepwarm.documents import DocumentFault, Order
from keepwarm.documents.extraction import Document, ReaderFault
from keepwarm.gateway.documents import Documents
from keepwarm.gateway.file_disk import FileDisk
from keepwarm.gateway.file_rows import FileRows
from keepwarm.gateway.files import Files, media_type_of
from keepwarm.gateway.reading import Reading
from keepwarm.storage import Storage, database_path
from tests.world import FakeClock, capturing_log

pytestmark = pytest.mark.anyio

LIMITS = Limits(files_per_tenant_max=3, file_bytes_max=100, file_bytes_per_tenant_max=150)
NEW = NewFile("gemini", "a.txt", "text/plain", ttl_s=LIMITS.file_ttl_s)


class Reader:
    """Reads a document as its bytes twice; waits for `gate` where there is one."""

    def __init__(self) -> None:
        self.gate: asyncio.Event | None = None
        self.fault: Exception | None = None
        self.read: list[bytes] = []
        self.began = asyncio.Semaphore(0)

    async def __call__(self, order: Order, document: Document, s_max: float, environment: Mapping[str, str]) -> str:
        data = document if isinstance(document, bytes) else b"".join([piece async for piece in document])
        self.read.append(data)
        self.began.release()
        if self.gate is not None:
            await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        return data.decode() * 2


@dataclass
class Place:
    """The service and all it stands on."""

    files: Files
    documents: Documents
    reader: Reader
    clock: FakeClock
    directory: Path
    disk: FileDisk

    async def upload(self, data: bytes = b"ab", new: NewFile = NEW, tenant: str = "t") -> StoredFile:
        upload = await self.files.uploads.begin(tenant, new)
        await self.files.uploads.append(upload.upload_id, 0, pieces(data))
        return await self.files.finish(upload.upload_id)

    async def active(self, data: bytes = b"ab", new: NewFile = NEW, tenant: str = "t") -> StoredFile:
        return await self.files.settled(await self.upload(data, new, tenant), 60.0)

    def on_disk(self) -> set[str]:
        return {path.name for path in self.directory.iterdir()}


async def pieces(*data: bytes) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece


@asynccontextmanager
async def place(tmp_path: Path, limits: Limits = LIMITS, clock: FakeClock | None = None) -> AsyncIterator[Place]:
    clock, reader = clock or FakeClock(), Reader()
    storage = await asyncio.to_thread(Storage.open, database_path(tmp_path), 1.0)
    disk = FileDisk(tmp_path / "files")
    reading = Reading(limits, reader)
    files = Files(limits, disk, FileRows(storage), reading, clock, RandomIds(), capturing_log()[0])
    try:
        await files.recover()
        async with asyncio.TaskGroup() as tasks:
            work = tasks.create_task(files.work())
            yield Place(files, Documents(limits, reading, files), reader, clock, tmp_path / "files", disk)
            work.cancel()
    finally:
        await asyncio.to_thread(disk.close)
        await asyncio.to_thread(storage.close)


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Place]:
    async with place(tmp_path) as made:
        yield made


async def test_a_file_is_read_in_the_background_and_its_text_kept_beside_it(here: Place):
    here.reader.gate = asyncio.Event()
    file = await here.upload(b"ab")
    assert file.state is FileState.PROCESSING
    assert (file.n_bytes, file.sha256) == (2, hashlib.sha256(b"ab").digest())
    with pytest.raises(ApiError, match="not in an ACTIVE state") as caught:
        await here.files.active("t", file.id, param="p")
    assert (caught.value.kind, caught.value.param) == (ErrorKind.INVALID_REQUEST, "p")
    assert (await here.files.settled(file, 0.0)).state is FileState.PROCESSING
    here.reader.gate.set()
    settled = await here.files.settled(file, 60.0)
    assert settled == replace(file, state=FileState.ACTIVE)
    assert await here.files.text_of(settled) == "abab"
    assert here.on_disk() == {file.key, f"{file.key}.txt"}
    assert (here.directory / file.key).stat().st_mode & 0o777 == 0o600


async def test_a_document_that_cannot_be_read_fails_alone_and_says_why(here: Place):
    here.reader.fault = DocumentFault("is encrypted")
    failed = await here.active()
    here.reader.fault = ReaderFault("the process did not start")
    ours = await here.active()
    here.reader.fault = None
    picture = await here.active(new=replace(NEW, media_type="image/png"))
    assert [file.state for file in (failed, ours, picture)] == [FileState.FAILED] * 3
    assert failed.error == "the document is encrypted"
    assert "no fault of its own" in (ours.error or "")
    assert "image/png" in (picture.error or "")
    with pytest.raises(ApiError, match="is encrypted"):
        await here.files.active("t", failed.id)


async def test_files_are_their_tenants_and_lists_their_dialects(here: Place):
    mine, kimis = await here.active(), await here.active(new=NewFile("kimi"))
    other = await here.active(tenant="u")
    assert await here.files.page("t", "gemini", 10) == [mine]
    assert await here.files.page("t", "kimi", 10) == [kimis]
    for tenant, file, dialect in (("t", other, None), ("u", mine, None), ("t", kimis, "gemini"), ("t", mine, "kimi")):
        for call in (here.files.get, here.files.delete, here.files.active):
            with pytest.raises(ApiError) as caught:
                await call(tenant, file.id, dialect=dialect)
            assert caught.value.kind is ErrorKind.UNKNOWN_FILE
    assert (await here.files.get("t", kimis.id)).id == kimis.id


async def test_pages_go_from_the_newest_on(here: Place):
    made = [await here.active() for _ in range(3)]
    first = await here.files.page("t", "gemini", 2)
    rest = await here.files.page("t", "gemini", 2, first[-1].seq)
    assert [file.id for file in (*first, *rest)] == [file.id for file in reversed(made)]


async def test_it_expires_by_the_clock_and_the_sweep_removes_its_bytes(here: Place):
    file, kept = await here.active(), await here.active(new=NewFile("kimi"))
    here.clock.advance(48 * 3600 - 1)
    assert await here.files.get("t", file.id) == file
    await here.files.tick()
    assert file.key in here.on_disk()
    here.clock.advance(1)
    for call in (here.files.get, here.files.active, here.files.delete):
        with pytest.raises(ApiError) as caught:
            await call("t", file.id)
        assert caught.value.kind is ErrorKind.UNKNOWN_FILE
    assert await here.files.page("t", "gemini", 9) == []
    await here.files.tick()
    assert here.on_disk() == {kept.key, f"{kept.key}.txt"}
    assert await here.files.get("t", kept.id) == kept


async def test_a_deleted_file_leaves_nothing_and_makes_room(here: Place):
    files = [await here.active(b"a" * 10) for _ in range(3)]
    with pytest.raises(ApiError, match=r"you have 3 files, limit 3 \(files_per_tenant_max\)") as caught:
        await here.upload()
    assert caught.value.kind is ErrorKind.QUOTA_EXCEEDED
    await here.upload(tenant="u")
    for file in files:
        await here.files.delete("t", file.id)
    assert not here.on_disk() & {file.key for file in files}
    assert len(here.files.uploads) == 1, "the other tenant's, whose answer may have been lost"
    await here.upload()


async def test_a_file_deleted_while_it_is_read_leaves_nothing(here: Place):
    here.reader.gate = asyncio.Event()
    file = await here.upload()
    await here.reader.began.acquire()
    await here.files.delete("t", file.id)
    here.reader.gate.set()
    with pytest.raises(ApiError):
        await here.files.settled(file, 60.0)
    assert here.on_disk() == set()


async def test_limits_are_told_with_their_numbers(here: Place):
    with pytest.raises(ApiError, match=r"101 bytes or more, limit 100 \(file_bytes_max\)") as caught:
        await here.files.uploads.begin("t", replace(NEW, n_bytes=101))
    assert caught.value.kind is ErrorKind.BODY_TOO_LARGE
    unannounced = await here.files.uploads.begin("t", NEW)
    with pytest.raises(ApiError, match="limit 100"):
        await here.files.uploads.append(unannounced.upload_id, 0, pieces(b"a" * 101))
    await here.files.uploads.cancel(unannounced.upload_id)
    await here.files.uploads.begin("t", replace(NEW, n_bytes=100))
    message = r"your files have 100 bytes and this one needs 51 more, limit 150 \(file_bytes_per_tenant_max\)"
    with pytest.raises(ApiError, match=message) as caught:
        await here.files.uploads.begin("t", replace(NEW, n_bytes=51))
    assert caught.value.kind is ErrorKind.QUOTA_EXCEEDED
    growing = await here.files.uploads.begin("t", NEW)
    with pytest.raises(ApiError, match=message):
        await here.files.uploads.append(growing.upload_id, 0, pieces(b"a" * 51))


async def test_an_id_of_the_clients_choice_is_taken_once(here: Place):
    file = await here.active(new=replace(NEW, id="mine"))
    assert file.id == "mine"
    assert (await here.active(new=replace(NEW, id="mine"), tenant="u")).id == "mine"
    with pytest.raises(ApiError, match="you have a file mine already"):
        await here.upload(new=replace(NEW, id="mine"))


async def test_a_restart_reads_on_counts_and_removes_what_is_in_no_row(tmp_path: Path):
    clock = FakeClock()
    async with place(tmp_path, clock=clock) as before:
        whole = await before.active(b"a" * 40)
        before.reader.gate = asyncio.Event()
        unread = await before.upload(b"b" * 40)
        for _ in range(2):
            await before.reader.began.acquire()
        broken = await before.files.uploads.begin("t", NEW)
        await before.files.uploads.append(broken.upload_id, 0, pieces(b"c" * 40))
        assert len(before.on_disk()) == 4, "two files, one text, and what came of an upload"
        (before.directory / f"{whole.key}.new").touch()
        before.reader.gate = None
    async with place(tmp_path, clock=clock) as after:
        assert (await after.files.settled(unread, 60.0)).state is FileState.ACTIVE
        assert after.reader.read == [b"b" * 40]
        assert after.on_disk() == {whole.key, f"{whole.key}.txt", unread.key, f"{unread.key}.txt"}
        with pytest.raises(ApiError, match="there is no such upload"):
            after.files.uploads.get(broken.upload_id)
        with pytest.raises(ApiError, match="your files have 80 bytes"):
            await after.files.uploads.begin("t", replace(NEW, n_bytes=71))


async def test_a_file_stands_in_the_prompt_as_the_same_document_would(here: Place):
    mark = Mark(300)
    file = await here.active(b"ab")
    asked = ChatRequest(
        "m",
        (
            Message("system", (TextPart("s"),)),
            Message("user", (FilePart(file.id, "p", mark), DocumentPart("text/plain", b"ab", "q", "a.txt", mark=mark))),
        ),
    )
    read = await here.documents.read(asked, "t")
    text = TextPart(document_text("a.txt", None, "abab"), mark)
    assert read.messages == (asked.messages[0], Message("user", (text, text)))
    untitled = await here.active(b"ab", NewFile("kimi"))
    read = await here.documents.read(ChatRequest("m", (Message("user", (FilePart(untitled.id, "p"),)),)), "t")
    assert read.messages[0].text == document_text(None, None, "abab")


async def test_a_file_in_a_prompt_is_asked_for_every_time_and_read_once(here: Place):
    file = await here.active(b"ab")
    asked = ChatRequest("m", (Message("user", (FilePart(file.id, "contents[0].parts[1]"),)),))
    first = await here.documents.read(asked, "t")
    (here.directory / f"{file.key}.txt").unlink()
    assert await here.documents.read(asked, "t") == first
    for tenant, advance_s in (("u", 0), ("t", 48 * 3600)):
        here.clock.advance(advance_s)
        with pytest.raises(ApiError, match=f"access the File {file.id} or it may not exist") as caught:
            await here.documents.read(asked, tenant)
        assert (caught.value.kind, caught.value.param) == (ErrorKind.UNKNOWN_FILE, "contents[0].parts[1]")


async def test_texts_of_files_count_among_the_documents(here: Place):
    file = await here.active(b"a" * 50)
    documents = Documents(Limits(document_chars_max=150), Reading(LIMITS, here.reader), here.files)
    part = FilePart(file.id, "p")
    await documents.read(ChatRequest("m", (Message("user", (part,)),)), "t")
    with pytest.raises(ApiError, match="200 characters of text, limit 150"):
        await documents.read(ChatRequest("m", (Message("user", (part, part)),)), "t")


async def test_a_place_without_files_knows_none():
    with pytest.raises(ApiError) as caught:
        await Documents().read(ChatRequest("m", (Message("user", (FilePart("f", "p"),)),)))
    assert caught.value.kind is ErrorKind.UNKNOWN_FILE


@pytest.mark.parametrize(
    "said, name, expected",
    [
        ("text/html", "a.pdf", "text/html"),
        ("text/plain; charset=latin-1", "", "text/plain; charset=latin-1"),
        (None, "a.PDF", "application/pdf"),
        ("application/octet-stream", "dir/a.md", "text/markdown"),
        ("Application/Octet-Stream; x=y", "a.csv", "text/csv"),
        (None, "a.log", "text/plain"),
        ("", "", "text/plain"),
    ],
)
def test_the_type_a_client_names_goes_first(said: str | None, name: str, expected: str):
    assert media_type_of(said, name) == expected
