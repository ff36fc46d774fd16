import asyncio
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
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
def storage(path: Path) -> Iterator[Storage]:
    storage = Storage.open(path, busy_s=0.05)
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


def test_closes_a_file_left_open_to_others_and_leaves_a_given_directory_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    path = database_path(tmp_path)
    path.touch(mode=0o644)
    Storage.open(path, busy_s=1.0).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_migrations_make_the_tables_the_code_uses(path: Path) -> None:
    storage = Storage.open(path, busy_s=1.0)

    def differences(connection: sa.Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection), METADATA))

    assert storage.run_sync(differences) == []
    storage.close()
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


def test_opening_again_keeps_the_rows(path: Path) -> None:
    storage = Storage.open(path, busy_s=1.0)
    storage.run_sync(lambda connection: add_key(connection, "one"))
    storage.close()
    storage.close()
    storage = Storage.open(path, busy_s=1.0)
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


def test_a_database_of_a_newer_version_is_refused(path: Path) -> None:
    storage = Storage.open(path, busy_s=1.0)
    storage.run_sync(lambda connection: connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'r9999'"))
    storage.close()
    with pytest.raises(StorageError, match="r9999"):
        Storage.open(path, busy_s=1.0)


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


async def test_a_database_locked_by_another_process_is_an_overload(storage: Storage, path: Path) -> None:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(ApiError) as caught:
        await storage.run(key_names)
    assert (caught.value.kind, caught.value.retry_after_s) == (ErrorKind.OVERLOADED, 1)
    other.execute("COMMIT")
    other.close()
    assert await storage.run(key_names) == set()


def test_two_processes_starting_on_a_new_directory_both_open(path: Path) -> None:
    code = "import sys; from pathlib import Path; from keepwarm.storage import Storage; Storage.open(Path(sys.argv[1]), 20.0).close()"
    starts = [subprocess.Popen([sys.executable, "-c", code, str(path)]) for _ in range(3)]
    assert [start.wait(timeout=60) for start in starts] == [0, 0, 0]


@pytest.mark.parametrize("n_rows", [1, 7, 40])
def test_acknowledged_rows_survive_kill_9(path: Path, n_rows: int) -> None:
    acknowledged: set[str] = set()
    for round_ in range(2):  # the second writer finds what the first one's death left behind
        with subprocess.Popen(
            [sys.executable, str(WRITER), str(path), str(round_)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            for _ in range(n_rows):
                acknowledged.add(writer.stdout.readline().strip())
            os.kill(writer.pid, signal.SIGKILL)  # somewhere inside a later insert
            acknowledged |= {line.strip() for line in writer.stdout if line.endswith("\n")}
        assert writer.returncode == -signal.SIGKILL
    assert len(acknowledged) >= 2 * n_rows
    storage = Storage.open(path, busy_s=5.0)
    assert acknowledged <= storage.run_sync(key_names)
    assert storage.run_sync(lambda connection: connection.exec_driver_sql("PRAGMA integrity_check").scalar()) == "ok"
    storage.close()
