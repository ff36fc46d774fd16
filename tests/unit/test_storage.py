import asyncio
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config as AlembicConfig
from alembic.migration import MigrationContext

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.request import Mark, Message, TextPart, ToolCall
from keepwarm.storage import MIGRATIONS, Storage, StorageError, database_path
from keepwarm.tables import METADATA, api_keys, cache_objects, cache_tags

WRITER = Path(__file__).parent / "storage_writer.py"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return database_path(tmp_path / "data")


@pytest.fixture
def storage(any_database: Path | str) -> Iterator[Storage]:
    storage = Storage.open(any_database, busy_s=0.05)
    yield storage
    storage.close()


def add_key(connection: sa.Connection, name: str) -> None:
    values = {"name": name, "organisation": "t", "digest": name.encode(), "last4": "abcd", "created_at": 1}
    connection.execute(sa.insert(api_keys).values(values))


def key_names(connection: sa.Connection) -> set[str]:
    return set(connection.execute(sa.select(api_keys.c.name)).scalars())


def test_opens_durable_checked_and_private(path: Path) -> None:
    storage = Storage.open(path, busy_s=1.5)
    pragmas = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
    values = storage.run_sync(lambda connection: [connection.exec_driver_sql(f"PRAGMA {p}").scalar() for p in pragmas])
    assert values == ["wal", 2, 1, 1500]
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert modes == {"keepwarm.db": 0o600, "keepwarm.db-wal": 0o600, "keepwarm.db-shm": 0o600}
    storage.close()


async def test_a_commit_waits_for_the_disk_unless_it_need_not(path: Path) -> None:
    def level(connection: sa.Connection) -> int:
        return int(connection.exec_driver_sql("PRAGMA synchronous").scalar_one())

    storage = await asyncio.to_thread(Storage.open, path, 1.5)
    full, normal = 2, 1  # of SQLite: the log is synced with each commit, or only before it is read back into the file
    assert [await storage.run(level, on_disk=on_disk) for on_disk in (True, False, True)] == [full, normal, full]
    await asyncio.to_thread(storage.close)


def test_closes_a_file_left_open_to_others_and_leaves_a_given_directory_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    path = database_path(tmp_path)
    path.touch(mode=0o644)
    Storage.open(path, busy_s=1.0).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_migrations_make_the_tables_the_code_uses(storage: Storage) -> None:
    def differences(connection: sa.Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection), METADATA))

    assert storage.run_sync(differences) == []


def test_migrations_make_the_indexes_and_counters_the_code_names(path: Path) -> None:
    """What the comparison above does not see on SQLite: the text of partial indexes, and tables that are there twice."""
    Storage.open(path, busy_s=1.0).close()
    fresh = sa.create_engine("sqlite://")
    METADATA.create_all(fresh)
    made, declared = (
        {
            row[0]: " ".join(row[1].split())
            for row in connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name")
            if row[0] != "alembic_version"
        }
        for connection in (sqlite3.connect(path), fresh.raw_connection().driver_connection)
        if connection is not None
    )
    assert made.keys() == declared.keys()
    assert {name: sql for name, sql in made.items() if name.endswith("_ix")} == {
        name: sql for name, sql in declared.items() if name.endswith("_ix")
    }


def test_opening_again_keeps_the_rows(any_database: Path | str) -> None:
    storage = Storage.open(any_database, busy_s=1.0)
    storage.run_sync(lambda connection: add_key(connection, "one"))
    storage.close()
    storage.close()
    storage = Storage.open(any_database, busy_s=1.0)
    assert storage.run_sync(key_names) == {"one"}
    storage.close()


def test_marks_in_stored_messages_become_objects(path: Path) -> None:
    """A database as the first release left it; marks were true or false then."""
    old = (
        b'[{"role":"system","parts":[{"type":"text","text":"a \\u00e9","mark":true},{"type":"text","text":"b","mark":false}]},'
        b'{"role":"user","parts":[{"type":"text","text":"c"}],"tool_calls":[{"id":"1","name":"f","arguments":"{}"}]}]'
    )
    _at_revision(path, "r0001")
    columns = {"generation": 1, "created_at": 1, "expires_at": 2_000_000_000, "n_tokens": 5, "tools": b"[]"}
    texts = {"tenant": "t", "model": "m", "status": "ready", "name": "", "description": ""}
    rows = [
        {**texts, **columns, "id": "cache-1", "messages": old},
        {**texts, **columns, "id": "cache-2", "messages": b"[]"},
    ]
    with sqlite3.connect(path) as connection:
        names = ", ".join(rows[0])
        marks = ", ".join(f":{name}" for name in rows[0])
        connection.executemany(f"INSERT INTO cache_objects ({names}) VALUES ({marks})", rows)
    connection.close()
    storage = Storage.open(path, busy_s=1.0)
    kept = storage.run_sync(lambda connection: connection.execute(sa.select(cache_objects.c.messages)).scalars().all())
    storage.close()
    assert msgspec.json.decode(kept[0], type=tuple[Message, ...]) == (
        Message("system", (TextPart("a é", mark=Mark(None)), TextPart("b"))),
        Message("user", (TextPart("c"),), tool_calls=(ToolCall("1", "f", "{}"),)),
    )
    assert kept[1] == b"[]"


def test_objects_that_were_there_before_are_kimis(path: Path) -> None:
    _at_revision(path, "r0002")
    with sqlite3.connect(path) as connection:
        connection.execute(
            "INSERT INTO cache_objects (id, tenant, model, status, generation, created_at, expires_at, n_tokens, name,"
            " description, tools, messages) VALUES ('c', 't', 'm', 'ready', 1, 1, 9, 5, 'n', '', '[]', '[]')"
        )
        connection.execute("INSERT INTO cache_tags (tenant, tag, object_id, created_at) VALUES ('t', 'x', 'c', 1)")
    connection.close()
    storage = Storage.open(path, busy_s=1.0)
    columns = cache_objects.c
    found = sa.select(columns.id, columns.dialect, columns.tool_choice, columns.early_ns, columns.updated_at)
    assert storage.run_sync(lambda connection: connection.execute(found).all()) == [("c", "kimi", None, 0, None)]
    assert storage.run_sync(lambda connection: connection.execute(sa.select(cache_tags.c.tag)).scalars().all()) == ["x"]
    storage.close()


def test_migrating_is_all_or_nothing(path: Path) -> None:
    """A message that cannot be read: the old database stays as it was, and the server says so and does not start."""
    _at_revision(path, "r0001")
    with sqlite3.connect(path) as connection:
        connection.execute(
            "INSERT INTO cache_objects (id, tenant, model, status, generation, created_at, expires_at, n_tokens, name,"
            " description, tools, messages) VALUES ('c', 't', 'm', 'ready', 1, 1, 1, 1, '', '', '[]', '[{\"parts\":')"
        )
    connection.close()
    with pytest.raises(StorageError, match=r"cannot use database .*cache_objects .*'c'"):
        Storage.open(path, busy_s=1.0)
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("r0001",)]
        assert connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'breakpoints'").fetchall() == [(0,)]
    connection.close()


def _at_revision(path: Path, revision: str) -> None:
    """Make an empty database as that release made it."""
    path.parent.mkdir()
    engine = sa.create_engine(sa.URL.create("sqlite", database=str(path)))
    with engine.begin() as connection:
        config = AlembicConfig()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()


def test_a_file_that_is_no_database_is_one_line(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database, but long enough to have a header of one hundred bytes" * 3)
    with pytest.raises(StorageError, match=r"keepwarm\.db: file is not a database; .*--data-dir$"):
        Storage.open(path, busy_s=1.0)


def test_a_database_of_a_newer_version_is_refused(any_database: Path | str) -> None:
    storage = Storage.open(any_database, busy_s=1.0)
    storage.run_sync(lambda connection: connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'r9999'"))
    storage.close()
    with pytest.raises(StorageError, match="r9999"):
        Storage.open(any_database, busy_s=1.0)


def test_an_unusable_directory_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="choose another with --data-dir"):
        Storage.open(tmp_path / "file" / "keepwarm.db", busy_s=1.0)


async def test_a_raising_transaction_leaves_nothing(storage: Storage) -> None:

    def fail(connection: sa.Connection) -> None:
        add_key(connection, "half")
        raise ApiError(ErrorKind.INVALID_REQUEST, "no")

    with pytest.raises(ApiError):
        await storage.run(fail)
    assert await storage.run(key_names) == set()


async def test_transactions_run_one_at_a_time_in_order_off_the_event_loop(storage: Storage) -> None:
    threads: list[int] = []
    order: list[int] = []

    def note(connection: sa.Connection, n: int) -> None:
        threads.append(threading.get_ident())
        order.append(n)

    async with asyncio.TaskGroup() as group:
        for n in range(600):  # more than are handed to the thread at once
            group.create_task(storage.run(lambda connection, n=n: note(connection, n)))
    assert order == list(range(600))
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()


async def test_a_cancelled_caller_leaves_the_storage_usable(storage: Storage) -> None:
    entered, leave = threading.Event(), threading.Event()

    def slow(connection: sa.Connection) -> None:
        entered.set()
        leave.wait()
        add_key(connection, "whole")

    async with asyncio.TaskGroup() as group:
        task = group.create_task(storage.run(slow))
        await asyncio.to_thread(entered.wait)
        task.cancel()
        leave.set()
    assert await storage.run(key_names) == {"whole"}


async def test_a_database_locked_by_another_process_is_an_overload(any_database: Path | str, storage: Storage) -> None:
    other = await asyncio.to_thread(Storage.open, any_database, 5.0)
    entered, leave = threading.Event(), threading.Event()

    def hold(connection: sa.Connection) -> None:
        entered.set()
        leave.wait()

    async with asyncio.TaskGroup() as group:
        holding = group.create_task(other.run(hold))
        await asyncio.to_thread(entered.wait)
        try:
            with pytest.raises(ApiError, match="locked by another process") as caught:
                await storage.run(key_names)
        finally:
            leave.set()
        assert (caught.value.kind, caught.value.retry_after_s) == (ErrorKind.OVERLOADED, 1)
        await holding
    assert await storage.run(key_names) == set()
    await asyncio.to_thread(other.close)


async def test_a_read_waits_for_no_other_process_and_sees_only_what_is_committed(
    any_database: Path | str, storage: Storage
) -> None:
    await storage.run(lambda connection: add_key(connection, "before"))
    other = await asyncio.to_thread(Storage.open, any_database, 5.0)
    entered, leave = threading.Event(), threading.Event()

    def hold(connection: sa.Connection) -> None:
        add_key(connection, "after")
        entered.set()
        leave.wait()

    async with asyncio.TaskGroup() as group:
        holding = group.create_task(other.run(hold))
        await asyncio.to_thread(entered.wait)
        try:
            assert await storage.read(key_names) == {"before"}
        finally:
            leave.set()
        await holding
    assert await storage.read(key_names) == {"before", "after"}
    await asyncio.to_thread(other.close)


async def test_all_of_a_read_sees_the_same_moment_and_keeps_nobody_from_writing(
    any_database: Path | str, storage: Storage
) -> None:
    other = await asyncio.to_thread(Storage.open, any_database, 0.05)

    def twice(connection: sa.Connection) -> tuple[set[str], set[str]]:
        first = key_names(connection)
        other.run_sync(lambda writing: add_key(writing, "meanwhile"))
        return first, key_names(connection)

    assert await storage.read(twice) == (set(), set())
    assert await storage.read(key_names) == {"meanwhile"}
    await asyncio.to_thread(other.close)


async def test_nothing_that_a_read_writes_is_kept(storage: Storage) -> None:
    with suppress(sa.exc.DBAPIError):  # PostgreSQL refuses it
        await storage.read(lambda connection: add_key(connection, "one"))
    assert await storage.read(key_names) == set()


async def test_after_a_failed_statement_a_nested_transaction_goes_on(storage: Storage) -> None:
    def twice(connection: sa.Connection) -> None:
        add_key(connection, "one")
        with pytest.raises(sa.exc.IntegrityError), connection.begin_nested():
            add_key(connection, "one")
        add_key(connection, "two")

    await storage.run(twice)
    assert await storage.run(key_names) == {"one", "two"}


async def test_what_was_written_is_not_in_an_errors_text(storage: Storage) -> None:
    await storage.run(lambda connection: add_key(connection, "secret"))
    with pytest.raises(sa.exc.IntegrityError) as caught:
        await storage.run(lambda connection: add_key(connection, "secret"))
    assert "[SQL parameters hidden" in str(caught.value)


async def test_big_numbers_and_their_sums_are_ints(storage: Storage) -> None:
    """A time beyond 2038 in an old table; sums beyond 64 bits are nobody's."""
    late = 2**40
    columns = {"organisation": "t", "last4": "abcd", "created_at": late}
    rows = [{**columns, "name": name, "digest": name.encode()} for name in "ab"]
    await storage.run(lambda connection: connection.execute(sa.insert(api_keys), rows))
    read = sa.select(sa.func.sum(api_keys.c.created_at), sa.func.max(api_keys.c.created_at))
    total, latest = await storage.run(lambda connection: connection.execute(read).one())
    assert (total, latest) == (2 * late, late)
    assert type(total) is int


def test_processes_starting_on_a_new_database_all_open(any_database: Path | str) -> None:
    starts = [subprocess.Popen([sys.executable, str(WRITER), str(any_database), f"{n}", "0"]) for n in range(6)]
    assert [start.wait(timeout=60) for start in starts] == [0] * 6


def test_two_processes_writing_at_once_neither_lose_nor_double_a_row(any_database: Path | str) -> None:
    writers = [
        subprocess.Popen([sys.executable, str(WRITER), str(any_database), f"{n}", "200"], stdout=subprocess.DEVNULL)
        for n in range(2)
    ]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    storage = Storage.open(any_database, busy_s=5.0)
    names = storage.run_sync(lambda connection: connection.execute(sa.select(api_keys.c.name)).scalars().all())
    storage.close()
    assert sorted(names) == sorted(f"{n}-{row}" for n in range(2) for row in range(200))


async def test_what_a_transaction_read_is_still_so_when_it_writes(any_database: Path | str) -> None:
    """Two storages count and add one each, 50 times at once: read and write are one step, so nothing is counted twice."""
    storages = [await asyncio.to_thread(Storage.open, any_database, 20.0) for _ in range(2)]

    def count_up(connection: sa.Connection) -> None:
        n = connection.execute(sa.select(sa.func.count()).select_from(api_keys)).scalar_one()
        add_key(connection, f"{n}")

    async with asyncio.TaskGroup() as group:
        for n in range(100):
            group.create_task(storages[n % 2].run(count_up))
    assert await storages[0].run(key_names) == {f"{n}" for n in range(100)}
    for storage in storages:
        await asyncio.to_thread(storage.close)


@pytest.mark.parametrize("n_rows", [1, 7, 40])
def test_acknowledged_rows_survive_kill_9(any_database: Path | str, n_rows: int) -> None:
    acknowledged: set[str] = set()
    for round_ in range(2):  # the second writer finds what the first one's death left behind
        with subprocess.Popen(
            [sys.executable, str(WRITER), str(any_database), str(round_)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            for _ in range(n_rows):
                acknowledged.add(writer.stdout.readline().strip())
            os.kill(writer.pid, signal.SIGKILL)  # somewhere inside a later insert
            acknowledged |= {line.strip() for line in writer.stdout if line.endswith("\n")}
        assert writer.returncode == -signal.SIGKILL
    assert len(acknowledged) >= 2 * n_rows
    storage = Storage.open(any_database, busy_s=5.0)
    assert acknowledged <= storage.run_sync(key_names)
    if isinstance(any_database, Path):
        check = storage.run_sync(lambda connection: connection.exec_driver_sql("PRAGMA integrity_check").scalar())
        assert check == "ok"
    storage.close()
