"""The database: SQLite through SQLAlchemy Core, one worker thread, one transaction per call.

What is promised: when `run` returns, the transaction is on the disk (WAL with synchronous=FULL), so a row that was
acknowledged survives `kill -9` and a power cut. A call whose awaiter was cancelled has been applied whole or not at all.
Every transaction begins IMMEDIATE: a read followed by a write can then never fail half-way because another process
(`keepwarm keys`, `keepwarm caches`) wrote in between. The file is readable by its owner only.

The tables are in tables.py; what their rows mean is in the modules that read them.
"""

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self, TypeVar

import sqlalchemy as sa
from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.util import CommandError
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

from keepwarm.core.errors import ApiError, ErrorKind

T = TypeVar("T")

DATABASE_NAME = "keepwarm.db"
MIGRATIONS = Path(__file__).parent / "migrations"
JOBS_MAX = 256  # calls handed to the worker thread; more wait before it. Four times the turns admitted by default
RETRY_AFTER_S = 1


class StorageError(Exception):
    """The database cannot be opened; the message is one line that says what to do."""


def database_path(data_dir: str | Path) -> Path:
    """The database file of a data directory."""
    return Path(data_dir) / DATABASE_NAME


class Storage:
    """An open database. All statements run on one thread, in the order of the calls."""

    def __init__(self, engine: sa.Engine, worker: ThreadPoolExecutor) -> None:
        """Use `Storage.open`."""
        self._engine = engine
        self._worker = worker
        self._room = asyncio.Semaphore(JOBS_MAX)

    @classmethod
    def open(cls, path: Path, busy_s: float) -> Self:
        """Open the database file `path`, making it and its directory if need be, and bring its tables up to date.

        `busy_s` is how long a transaction waits for another process to finish its own. Raises StorageError.
        """
        _make_private(path)
        engine = _engine(path, busy_s)
        worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="storage")
        storage = cls(engine, worker)
        try:
            storage.run_sync(_migrate)
        except (sa.exc.DatabaseError, CommandError, ApiError) as exc:
            storage.close()
            raise StorageError(
                f"cannot use database {path}: {_reason(exc)}; see to it, or choose another --data-dir"
            ) from exc
        return storage

    async def run(self, fn: Callable[[sa.Connection], T]) -> T:
        """Run `fn` in one transaction: committed when this returns, rolled back when `fn` raises.

        Raises what `fn` raises, and ApiError(OVERLOADED) when another process kept the database locked for too long.
        """
        async with self._room:
            return await asyncio.get_running_loop().run_in_executor(self._worker, self._transact, fn)

    def run_sync(self, fn: Callable[[sa.Connection], T]) -> T:
        """`run` for callers without an event loop, such as the command line."""
        return self._worker.submit(self._transact, fn).result()

    def close(self) -> None:
        """Finish the calls under way and close the file. A second call does nothing."""
        self._worker.shutdown(wait=True)
        self._engine.dispose()

    def _transact(self, fn: Callable[[sa.Connection], T]) -> T:
        try:
            with self._engine.begin() as connection:
                return fn(connection)
        except sa.exc.OperationalError as exc:
            if getattr(exc.orig, "sqlite_errorcode", None) != sqlite3.SQLITE_BUSY:
                raise
            raise ApiError(
                ErrorKind.OVERLOADED, "the database is locked by another process; retry", retry_after_s=RETRY_AFTER_S
            ) from exc


def _make_private(path: Path) -> None:
    """Make the directory 0700 and the file 0600 before SQLite does; its -wal and -shm files take the file's mode."""
    try:
        if not path.parent.exists():
            path.parent.mkdir(mode=0o700, parents=True)
        path.touch(mode=0o600, exist_ok=True)
        path.chmod(0o600)
    except OSError as exc:
        raise StorageError(
            f"cannot write {path}: {exc.strerror}; make the directory writable, or choose another with --data-dir"
        ) from exc


def _engine(path: Path, busy_s: float) -> sa.Engine:
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path)),
        # The one connection is opened on the worker thread and closed, after that has ended, by the closer.
        connect_args={"timeout": busy_s, "check_same_thread": False, "isolation_level": None},
        poolclass=sa.StaticPool,
    )

    def configure(dbapi: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
        cursor = dbapi.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    sa.event.listen(engine, "connect", configure)
    sa.event.listen(engine, "begin", begin)
    return engine


def _migrate(connection: sa.Connection) -> None:
    """Apply what is missing of keepwarm/migrations, all of it or, on an error, none."""
    config = AlembicConfig()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _reason(exc: Exception) -> str:
    if isinstance(exc, sa.exc.DatabaseError):
        return str(exc.orig)
    return str(exc)
