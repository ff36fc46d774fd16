"""What of the storage's promises is PostgreSQL's alone; test_storage.py has what both kinds of database keep."""

import asyncio
import signal
import sys
import threading
from collections.abc import Iterator

import psycopg
import pytest
import sqlalchemy as sa

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.storage import STATEMENT_S_MAX, Storage, StorageError
from keepwarm.tables import api_keys
from tests.servers import PostgreSQL

NOWHERE = "postgresql://keepwarm:secret@127.0.0.1:1/keepwarm?sslpassword=secret"


@pytest.fixture
def storage(postgresql_url: str) -> Iterator[Storage]:
    storage = Storage.open(postgresql_url, busy_s=1.5)
    yield storage
    storage.close()


@pytest.fixture
def restarted(postgresql_server: PostgreSQL) -> Iterator[PostgreSQL]:
    """The server, for a test that stops it: it runs again when the test is over."""
    yield postgresql_server
    postgresql_server.stop()
    postgresql_server.start()


def add_key(connection: sa.Connection, name: str) -> None:
    values = {"name": name, "organisation": "t", "digest": name.encode(), "last4": "abcd", "created_at": 1}
    connection.execute(sa.insert(api_keys).values(values))


def key_names(connection: sa.Connection) -> set[str]:
    return set(connection.execute(sa.select(api_keys.c.name)).scalars())


def shown(storage: Storage, *settings: str) -> list[str]:
    def read(connection: sa.Connection) -> list[str]:
        return [connection.exec_driver_sql(f"SHOW {name}").scalar_one() for name in settings]

    return storage.run_sync(read)


async def refusal(storage: Storage) -> str:
    with pytest.raises(ApiError) as caught:
        await storage.run(key_names)
    assert (caught.value.kind, caught.value.retry_after_s) == (ErrorKind.OVERLOADED, 1)
    return caught.value.message


def test_opens_durable_and_with_bounds_on_every_wait(storage: Storage) -> None:
    settings = ("synchronous_commit", "lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout")
    longest = f"{STATEMENT_S_MAX}s"
    assert shown(storage, *settings) == ["on", "1500ms", longest, longest]


@pytest.mark.parametrize("given, kept", [("off", "on"), ("remote_apply", "remote_apply")])
def test_a_database_that_does_not_wait_for_the_disk_is_made_to(postgresql_url: str, given: str, kept: str) -> None:
    with psycopg.connect(postgresql_url) as connection:  # such settings are gone when the next test begins
        connection.execute(f"ALTER ROLE keepwarm IN DATABASE {connection.info.dbname} SET synchronous_commit = {given}")
    storage = Storage.open(postgresql_url, busy_s=1.0)
    assert shown(storage, "synchronous_commit") == [kept]
    storage.close()


async def test_a_commit_waits_for_the_disk_unless_it_need_not(storage: Storage) -> None:
    def level(connection: sa.Connection) -> str:
        return str(connection.exec_driver_sql("SHOW synchronous_commit").scalar_one())

    assert [await storage.run(level, on_disk=on_disk) for on_disk in (True, False, True)] == ["on", "off", "on"]


def test_isolation_and_writing_do_not_hang_on_the_databases_defaults(postgresql_url: str) -> None:
    """Under repeatable read a transaction would read what was there before it got the lock."""
    with psycopg.connect(postgresql_url) as connection:
        for setting in ("default_transaction_isolation = 'repeatable read'", "default_transaction_read_only = on"):
            connection.execute(f"ALTER ROLE keepwarm IN DATABASE {connection.info.dbname} SET {setting}")
    storage = Storage.open(postgresql_url, busy_s=1.0)
    assert shown(storage, "transaction_isolation", "transaction_read_only") == ["read committed", "off"]
    storage.close()


async def test_a_statement_that_takes_too_long_is_an_overload(storage: Storage) -> None:
    def slow(connection: sa.Connection) -> None:
        connection.exec_driver_sql("SET LOCAL statement_timeout = 10")
        connection.exec_driver_sql("SELECT pg_sleep(30)")

    with pytest.raises(ApiError) as caught:
        await storage.run(slow)
    assert caught.value.kind is ErrorKind.OVERLOADED
    assert await storage.run(key_names) == set()


async def test_a_restart_between_two_calls_is_not_noticed(storage: Storage, restarted: PostgreSQL) -> None:
    await storage.run(lambda connection: add_key(connection, "before"))
    await asyncio.to_thread(restarted.stop)
    await asyncio.to_thread(restarted.start)
    await storage.run(lambda connection: add_key(connection, "after"))
    assert await storage.run(key_names) == {"before", "after"}


async def test_a_call_under_way_in_a_restart_fails_once_and_later_ones_work(
    storage: Storage, restarted: PostgreSQL
) -> None:
    entered, leave = threading.Event(), threading.Event()

    def slow(connection: sa.Connection) -> None:
        add_key(connection, "half")
        entered.set()
        leave.wait()
        add_key(connection, "whole")

    async with asyncio.TaskGroup() as group:
        call = group.create_task(asyncio.wait_for(_told(storage, slow), 60))
        await asyncio.to_thread(entered.wait)
        try:
            await asyncio.to_thread(restarted.stop)
            await asyncio.to_thread(restarted.start)
        finally:
            leave.set()
    told = call.result()
    assert (told.kind, told.retry_after_s) == (ErrorKind.OVERLOADED, 1)
    assert "connection to the database was lost" in told.message
    assert await storage.run(key_names) == set()


async def _told(storage: Storage, fn) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await storage.run(fn)
    return caught.value


async def test_while_the_server_is_down_calls_say_so_and_then_work_again(
    storage: Storage, restarted: PostgreSQL
) -> None:
    await asyncio.to_thread(restarted.stop)
    for _ in range(2):
        assert await refusal(storage) == "the database cannot be reached; retry"
    await asyncio.to_thread(restarted.start)
    assert await storage.run(key_names) == set()


async def test_acknowledged_rows_survive_a_crash_of_the_server(storage: Storage, restarted: PostgreSQL) -> None:
    for n in range(20):
        await storage.run(lambda connection, n=n: add_key(connection, f"{n}"))
    await asyncio.to_thread(restarted.stop, signal.SIGQUIT)
    await asyncio.to_thread(restarted.start)
    assert await storage.run(key_names) == {f"{n}" for n in range(20)}


async def test_text_that_cannot_be_kept_is_the_clients_error(storage: Storage) -> None:
    with pytest.raises(ApiError, match=r"U\+0000") as caught:
        await storage.run(lambda connection: add_key(connection, "a\x00b"))
    assert caught.value.kind is ErrorKind.INVALID_REQUEST
    assert await storage.run(key_names) == set()


def test_a_server_that_does_not_answer_is_one_line_without_the_password() -> None:
    with pytest.raises(StorageError) as caught:
        Storage.open(NOWHERE, busy_s=1.0)
    told = str(caught.value)
    assert told.startswith("cannot use database postgresql://keepwarm@127.0.0.1:1/keepwarm: ")
    assert "Connection refused" in told
    assert "secret" not in told and "\n" not in told


@pytest.mark.parametrize(
    "url",
    [
        "secret",
        "postgresql://keepwarm:secret@host:port/db",
        "mysql://keepwarm:secret@host/db",
        "postgresql+psycopg2://keepwarm:secret@host/db",
        "postgresql://keepwarm:half@secret@host/db",
        "postgresql://keepwarm:half@secret/other@host/db",
    ],
)
def test_a_url_that_is_none_is_told_without_repeating_it(url: str) -> None:
    with pytest.raises(StorageError) as caught:
        Storage.open(url, busy_s=1.0)
    assert str(caught.value).startswith("database_url cannot be used; write postgresql://USER:")
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_an_option_the_driver_does_not_know_is_one_line() -> None:
    with pytest.raises(StorageError, match="cannot use database postgresql://h/db: ") as caught:
        Storage.open("postgresql://h/db?bogus=secret", busy_s=1.0)
    assert "secret" not in str(caught.value)


def test_without_the_driver_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StorageError, match=r"pip install 'keepwarm\[postgres\]'"):
        Storage.open(NOWHERE, busy_s=1.0)


def test_a_database_that_cannot_keep_all_text_is_refused(postgresql_server: PostgreSQL) -> None:
    with psycopg.connect(postgresql_server.url("postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE ascii ENCODING SQL_ASCII TEMPLATE template0")
    with pytest.raises(StorageError, match="its encoding is SQL_ASCII, and must be UTF8"):
        Storage.open(postgresql_server.url("ascii"), busy_s=1.0)
    with psycopg.connect(postgresql_server.url("postgres"), autocommit=True) as connection:
        connection.execute("DROP DATABASE ascii")
