from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from keepwarm.core.file import FileState, StoredFile
from keepwarm.gateway.file_rows import FileRows
from keepwarm.storage import Storage

NOW = 1_700_000_000.25


@pytest.fixture
def rows(any_database: Path | str) -> Iterator[FileRows]:
    storage = Storage.open(any_database, busy_s=1.0)
    yield FileRows(storage)
    storage.close()


def a_file(file_id: str, *, tenant: str = "alice", expires_at: float | None = None) -> StoredFile:
    return StoredFile(
        id=file_id,
        tenant=tenant,
        dialect="kimi",
        key=f"{tenant}-{file_id}",
        name="“report”.pdf",
        media_type="application/pdf",
        n_bytes=5_000_000_000,
        sha256=bytes(range(32)),
        created_at=NOW,
        updated_at=NOW,
        expires_at=expires_at,
        state=FileState.PROCESSING,
    )


async def inserted(rows: FileRows, *given: StoredFile) -> list[StoredFile]:
    stored = [await rows.insert(file) for file in given]
    assert None not in stored
    return [file for file in stored if file is not None]


async def test_a_file_comes_back_as_it_was_stored_with_its_place(rows: FileRows) -> None:
    first, second = await inserted(rows, a_file("a", expires_at=NOW + 0.5), a_file("b"))
    assert first == replace(a_file("a", expires_at=NOW + 0.5), seq=first.seq)
    assert first.seq < second.seq
    assert await rows.get("alice", "a", NOW) == first
    assert await rows.get("alice", "a", NOW + 0.5) is None
    assert await rows.get("bob", "a", NOW) is None
    assert await rows.get("alice", "a", NOW, dialect="gemini") is None


async def test_an_id_is_taken_once_by_each_tenant(rows: FileRows) -> None:
    await inserted(rows, a_file("a"), a_file("a", tenant="bob"))
    assert await rows.insert(replace(a_file("a"), key="other")) is None
    assert len(await rows.everyones()) == 2


async def test_pages_are_newest_first(rows: FileRows) -> None:
    files = await inserted(rows, *(a_file(name) for name in "abcde"))
    assert [file.id for file in await rows.page("alice", "kimi", NOW, 2)] == ["e", "d"]
    assert [file.id for file in await rows.page("alice", "kimi", NOW, 9, older_than=files[3].seq)] == ["c", "b", "a"]
    assert await rows.page("bob", "kimi", NOW, 9) == []


async def test_a_state_is_set_once_and_a_deleted_file_stays_deleted(rows: FileRows) -> None:
    (file,) = await inserted(rows, a_file("a"))
    active = await rows.settle(file.seq, FileState.ACTIVE, NOW + 1)
    assert active == replace(file, state=FileState.ACTIVE, updated_at=NOW + 1)
    assert await rows.settle(file.seq, FileState.FAILED, NOW + 2, "no text") == active
    assert [await rows.delete(file.seq) for _ in range(2)] == [True, False]
    assert await rows.settle(file.seq, FileState.ACTIVE, NOW) is None


async def test_the_longest_expired_come_first(rows: FileRows) -> None:
    await inserted(rows, a_file("a", expires_at=NOW - 1), a_file("b", expires_at=NOW - 2), a_file("c"))
    assert [file.id for file in await rows.expired(NOW, 9)] == ["b", "a"]
    assert [file.id for file in await rows.expired(NOW, 1)] == ["b"]
