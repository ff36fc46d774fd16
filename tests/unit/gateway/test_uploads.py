"""Uploads: broken anywhere and gone on with, taken over, cancelled, forgotten; what they hold while they are under way."""

import asyncio
import errno
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from keepwarm.config import MIB, Limits
from keepwarm.core.clock import RandomIds
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.file import NewFile
from keepwarm.gateway.file_disk import FileDisk
from keepwarm.gateway.uploads import WRITE_BYTES, Quota, Uploads
from tests.world import FakeClock

pytestmark = pytest.mark.anyio

NEW = NewFile("gemini", "a.txt")
CHUNK = 1000
DATA = bytes(range(256)) * 20


class Broken(Exception):
    """The connection."""


async def pieces(*data: bytes, then: Exception | None = None) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece
    if then is not None:
        raise then


class Place:
    def __init__(self, directory: Path, limits: Limits) -> None:
        self.directory = directory
        self.clock = FakeClock()
        self.quota = Quota(limits)
        self.disk = FileDisk(directory)
        self.uploads = Uploads(limits, self.disk, self.quota, self.clock, RandomIds())

    def written(self, upload_id: str) -> bytes:
        """What is on disk, which is what the digest is of."""
        upload = self.uploads.get(upload_id)
        data = (self.directory / upload.key).read_bytes()[: upload.n_bytes]
        assert upload.digest.value() == sha256(data).digest()
        return data


@asynccontextmanager
async def place(tmp_path: Path, limits: Limits = Limits()) -> AsyncIterator[Place]:
    made = Place(tmp_path / "files", limits)
    await made.disk.open(())
    yield made
    await asyncio.to_thread(made.disk.close)


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Place]:
    async with place(tmp_path) as made:
        yield made


@pytest.mark.parametrize("n_kept", [0, 1, 500, 999, 1000])
async def test_broken_at_every_chunk_border_and_inside_and_resumed(here: Place, n_kept: int):
    upload = await here.uploads.begin("t", replace(NEW, n_bytes=len(DATA)))
    for start in range(0, len(DATA), CHUNK):
        chunk = DATA[start : start + CHUNK]
        with pytest.raises(Broken):
            await here.uploads.append(upload.upload_id, start, pieces(chunk[:n_kept], then=Broken()))
        told = here.uploads.get(upload.upload_id).told()
        assert told.n_bytes == start + len(chunk[:n_kept])
        told = await here.uploads.append(upload.upload_id, told.n_bytes, pieces(chunk[n_kept:]))
    assert told.n_bytes == len(DATA)
    assert here.written(upload.upload_id) == DATA


async def test_a_chunk_sent_again_takes_the_place_of_what_came_of_it(here: Place):
    """A client that heard no answer does not know how much arrived."""
    upload = await here.uploads.begin("t", NEW)
    for start in range(0, len(DATA), CHUNK):
        for n_kept in (300, CHUNK, CHUNK):
            await here.uploads.append(upload.upload_id, start, pieces(DATA[start : start + n_kept]))
    assert here.written(upload.upload_id) == DATA


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3 * WRITE_BYTES), st.lists(st.integers(1, WRITE_BYTES + 7), max_size=4), st.booleans()
        ),
        max_size=8,
    )
)
@settings(max_examples=40)
async def test_whatever_offsets_and_pieces_it_is_a_plain_buffer(tmp_path_factory: pytest.TempPathFactory, requests):
    model = bytearray()
    async with place(tmp_path_factory.mktemp("uploads")) as here:
        upload = await here.uploads.begin("t", NEW)
        for number, (offset, sizes, is_broken) in enumerate(requests):
            data = [bytes([number, i]) * (size // 2 + 1) for i, size in enumerate(sizes)]
            append = here.uploads.append(upload.upload_id, offset, pieces(*data, then=Broken() if is_broken else None))
            if offset > len(model):
                with pytest.raises(ApiError, match=f"{len(model):,} bytes were received"):
                    await append
                continue
            if is_broken:
                with pytest.raises(Broken):
                    await append
            else:
                await append
            model[offset:] = b"".join(data)
            assert await here.disk.run(lambda: here.written(upload.upload_id)) == model


async def test_a_later_request_takes_over_from_one_that_does_not_end(here: Place):
    upload = await here.uploads.begin("t", NEW)
    stuck, more = asyncio.Event(), asyncio.Event()

    async def silent() -> AsyncIterator[bytes]:
        yield DATA[:WRITE_BYTES]
        yield DATA[:10]
        stuck.set()
        await more.wait()
        yield b"late"

    async with asyncio.TaskGroup() as tasks:
        first = tasks.create_task(ending(here.uploads.append(upload.upload_id, 0, silent())))
        await stuck.wait()
        told = await here.uploads.append(upload.upload_id, 0, pieces(DATA[:CHUNK]))
        more.set()
        error = await first
    assert error is not None
    assert error.kind is ErrorKind.CLIENT_CLOSED
    assert told.n_bytes == CHUNK
    assert here.written(upload.upload_id) == DATA[:CHUNK]


async def ending(call) -> ApiError | None:
    try:
        await call
    except ApiError as error:
        return error
    return None


async def test_more_than_announced_is_refused_with_both_numbers(here: Place):
    upload = await here.uploads.begin("t", replace(NEW, n_bytes=3))
    with pytest.raises(ApiError, match="the upload has 4 bytes or more, 3 were announced"):
        await here.uploads.append(upload.upload_id, 0, pieces(b"abcd"))


async def test_a_cancelled_upload_leaves_nothing(here: Place):
    upload = await here.uploads.begin("t", replace(NEW, n_bytes=10))
    await here.uploads.append(upload.upload_id, 0, pieces(b"abc"))
    assert here.quota.held("t") == (1, 10)
    await here.uploads.cancel(upload.upload_id)
    assert here.quota.held("t") == (0, 0)
    assert list(here.directory.iterdir()) == []
    for call in (here.uploads.cancel(upload.upload_id), here.uploads.append(upload.upload_id, 0, pieces())):
        with pytest.raises(ApiError) as caught:
            await call
        assert caught.value.kind is ErrorKind.UNKNOWN_FILE


async def test_after_an_hour_without_a_byte_it_is_forgotten(here: Place):
    idle, busy = [await here.uploads.begin("t", NEW) for _ in range(2)]
    here.clock.advance(3599)
    await here.uploads.append(busy.upload_id, 0, pieces(b"abc"))
    await here.uploads.sweep()
    assert len(here.uploads) == 2
    here.clock.advance(1)
    await here.uploads.sweep()
    with pytest.raises(ApiError, match="no byte for 1 hours"):
        here.uploads.get(idle.upload_id)
    assert here.quota.held("t") == (1, 3)
    assert len(list(here.directory.iterdir())) == 1
    assert here.written(busy.upload_id) == b"abc"


async def test_a_disk_that_is_full_is_an_overload_and_what_was_there_stays(here: Place, monkeypatch):
    upload = await here.uploads.begin("t", NEW)
    await here.uploads.append(upload.upload_id, 0, pieces(b"abc"))

    def full(fd: int, data: bytes, offset: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("keepwarm.gateway.uploads.write_at", full)
        with pytest.raises(ApiError, match="No space left on device") as caught:
            await here.uploads.append(upload.upload_id, 3, pieces(b"def"))
    assert (caught.value.kind, caught.value.retry_after_s) == (ErrorKind.OVERLOADED, 60)
    await here.uploads.append(upload.upload_id, 3, pieces(b"ghi"))
    assert here.written(upload.upload_id) == b"abcghi"


async def test_two_hundred_at_once_hold_little_whatever_their_size(here: Place):
    """Each is a megabyte, all of them two hundred: what is in memory is a few pieces each at the most."""
    n_uploads, n_pieces = 200, 16
    piece = b"x" * WRITE_BYTES
    uploads = [await here.uploads.begin("t", NEW) for _ in range(n_uploads)]

    async def small() -> AsyncIterator[bytes]:
        for _ in range(n_pieces):
            await asyncio.sleep(0)
            yield piece

    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        async with asyncio.TaskGroup() as tasks:
            for upload in uploads:
                tasks.create_task(here.uploads.append(upload.upload_id, 0, small()))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert n_uploads * n_pieces * WRITE_BYTES == 200 * MIB
    assert peak - before < n_uploads * 3 * WRITE_BYTES
    assert here.quota.held("t") == (n_uploads, 200 * MIB)
