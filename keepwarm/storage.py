"""The database, SQLite or PostgreSQL, through SQLAlchemy Core: one worker thread, one transaction at a time.

What is promised, of both: when `run` returns, the transaction is on the disk (SQLite: WAL with synchronous=FULL;
PostgreSQL: synchronous_commit), so a row that was acknowledged survives `kill -9` and a power cut; `run(…, on_disk=False)` is
for what need only survive the first. A call whose awaiter was cancelled has been applied whole or not at all. And no other
transaction that writes to this database, also of another process, runs beside one: what a transaction has read is still so
when it writes. SQLite begins IMMEDIATE for that; on PostgreSQL each transaction first takes one advisory lock, and reads what
was committed before it got it (docs/storage.md).
`read` is for who only looks: it waits for no other process, and sees what was committed at one moment, its first statement's.

Text and order are the database's own, so SQL here goes by what both do. One difference concerns who writes SQL: after a
statement that failed, PostgreSQL takes no other in the same transaction. What is to go on puts such a statement into
`connection.begin_nested()`.

The tables are in tables.py; what their rows mean is in the modules that read them.
"""

import asyncio
import importlib
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

import sqlalchemy as sa
from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.util import CommandError
from msgspec import Struct
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

from keepwarm.core.errors import ApiError, ErrorKind

T = TypeVar("T")

DATABASE_NAME = "keepwarm.db"
MIGRATIONS = Path(__file__).parent / "migrations"
JOBS_MAX = 256  # calls handed to the worker thread; more wait before it. Four times the turns admitted by default
RETRY_AFTER_S = 1
WAL_TRIES = 100  # processes that open a new file at the same moment
STATEMENT_S_MAX = 30  # of one statement on PostgreSQL, and of the pause between two: whoever hangs lets the others in
LOCK = int.from_bytes(b"keepwarm")  # the advisory lock of all transactions; such locks are per database
DRIVER = "postgresql+psycopg"
NO_PARAMETERS = {"no_parameters": True}  # without them PostgreSQL's driver takes more than one statement at once
# What PostgreSQL calls it when a bounded wait is over: lock_not_available, query_canceled; deadlock_detected can only
# come from strangers' transactions, since ours run one at a time.
BUSY_STATES = frozenset({"55P03", "57014", "40P01"})


class StorageError(Exception):
    """The database cannot be opened; the message is one line that says what to do."""


def database_path(data_dir: str | Path) -> Path:
    """The database file of a data directory."""
    return Path(data_dir) / DATABASE_NAME


def database(database_url: str, data_dir: str | Path) -> Path | str:
    """What `Storage.open` is given: the URL of a PostgreSQL database or, where that is "", a data directory's file."""
    return database_url or database_path(data_dir)


class Begins(Struct, frozen=True):
    """The statements that begin a transaction, one round trip each.

    `to_keep` is for one whose commit waits for the disk, `to_write` for one whose commit does not. Both databases write their
    log in order, so a commit that waits takes all before it along.
    """

    to_keep: tuple[str, ...]
    to_write: tuple[str, ...]
    to_read: tuple[str, ...]


_POSTGRESQL_WRITE = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE"
_POSTGRESQL_LOCK = f"SELECT pg_advisory_xact_lock({LOCK})"
SQLITE = Begins(
    ("PRAGMA synchronous=FULL", "BEGIN IMMEDIATE"),  # not to be set within a transaction
    ("PRAGMA synchronous=NORMAL", "BEGIN IMMEDIATE"),
    ("BEGIN DEFERRED",),
)
POSTGRESQL = Begins(
    (f"{_POSTGRESQL_WRITE}; {_POSTGRESQL_LOCK}",),
    (f"{_POSTGRESQL_WRITE}; SET LOCAL synchronous_commit = off; {_POSTGRESQL_LOCK}",),
    ("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",),
)


class Storage:
    """An open database. All statements run on one thread, in the order of the calls."""

    def __init__(self, engine: sa.Engine, begins: Begins, worker: ThreadPoolExecutor) -> None:
        """Use `Storage.open`."""
        self._engine = engine
        self._begins = begins
        self._worker = worker
        self._room = asyncio.Semaphore(JOBS_MAX)

    @classmethod
    def open(cls, where: Path | str, busy_s: float, *, create: bool = True) -> Self:
        """Open a SQLite file, making it and its directory if need be, or the PostgreSQL database of a URL.

        Its tables are brought up to date; without `create`, a database that has none is refused. `busy_s` is how long a transaction waits for another process to finish its
        own, and how long connecting may take. Raises StorageError, whose message never has the URL's password.
        """
        if isinstance(where, Path):
            _make_private(where)
            engine, begins, shown = _sqlite(where, busy_s), SQLITE, f"{where}"
            remedy = "see to it, or choose another --data-dir"
        else:
            engine, begins = _postgresql(where, busy_s), POSTGRESQL
            shown, remedy = _shown(engine.url), "see to it, or choose another database_url"
        storage = cls(engine, begins, ThreadPoolExecutor(max_workers=1, thread_name_prefix="storage"))
        try:
            storage.run_sync(partial(_migrate, create=create))
        except (sa.exc.DBAPIError, CommandError, ApiError) as exc:
            storage.close()
            raise StorageError(f"cannot use database {shown}: {_reason(exc)}; {remedy}") from exc
        return storage

    async def run(self, fn: Callable[[sa.Connection], T], *, on_disk: bool = True) -> T:
        """Run `fn` in one transaction: committed when this returns, rolled back when `fn` raises.

        Without `on_disk` it does not wait for the disk: it is kept when this process is killed, but a power cut (of
        PostgreSQL: its crash) may undo it. Where anything later is still there afterwards, so is this.

        Raises what `fn` raises, and ApiError: OVERLOADED when another process kept the database locked for too long or
        when PostgreSQL cannot be reached; INVALID_REQUEST for text that PostgreSQL cannot keep. When the connection is
        lost during the call, whether the transaction took effect is not known.
        """
        async with self._room:
            return await asyncio.get_running_loop().run_in_executor(self._worker, self._transact, fn, on_disk)

    async def read(self, fn: Callable[[sa.Connection], T]) -> T:
        """Run `fn`, which only looks, on what was committed when its first statement began; others may write meanwhile.

        Nothing that `fn` writes all the same is kept. Raises as `run`.
        """
        async with self._room:
            return await asyncio.get_running_loop().run_in_executor(self._worker, self._look, fn)

    def run_sync(self, fn: Callable[[sa.Connection], T]) -> T:
        """`run` for callers without an event loop, such as the command line."""
        return self._worker.submit(self._transact, fn).result()

    def close(self) -> None:
        """Finish the calls under way and close the database. A second call does nothing."""
        self._worker.shutdown(wait=True)
        self._engine.dispose()

    def _transact(self, fn: Callable[[sa.Connection], T], on_disk: bool = True) -> T:
        with self._begun(self._begins.to_keep if on_disk else self._begins.to_write) as connection:
            result = fn(connection)
            connection.commit()
            return result

    def _look(self, fn: Callable[[sa.Connection], T]) -> T:
        with self._begun(self._begins.to_read) as connection:
            result = fn(connection)
            connection.rollback()
            return result

    @contextmanager
    def _begun(self, statements: tuple[str, ...]) -> Iterator[sa.Connection]:
        """A connection in a transaction. One that was lost since the last call is replaced: nothing was under way."""
        begun = False
        try:
            try:
                opened = self._begin(statements)
            except sa.exc.DBAPIError as exc:
                if not exc.connection_invalidated:
                    raise
                opened = self._begin(statements)
            with opened as connection:
                begun = True
                yield connection
        except sa.exc.DBAPIError as exc:
            error = _told(exc, begun=begun)
            if error is None:
                raise
            raise error from exc

    def _begin(self, statements: tuple[str, ...]) -> sa.Connection:
        connection = self._engine.connect()
        try:
            connection.begin()  # of SQLAlchemy: the driver begins nothing by itself
            for statement in statements:
                connection.exec_driver_sql(statement, execution_options=NO_PARAMETERS)
        except sa.exc.DBAPIError:
            connection.close()
            raise
        return connection


def count(connection: sa.Connection, table: sa.Table, which: sa.ColumnElement[bool]) -> int:
    """How many rows of a table."""
    return int(connection.execute(sa.select(sa.func.count()).select_from(table).where(which)).scalar_one())


def _make_private(path: Path) -> None:
    """Make the directory 0700 and the file 0600 before SQLite does; its -wal and -shm files take the file's mode."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # one that is there keeps its mode
        path.touch(mode=0o600, exist_ok=True)
        path.chmod(0o600)
    except OSError as exc:
        raise StorageError(
            f"cannot write {path}: {exc.strerror}; make the directory writable, or choose another with --data-dir"
        ) from exc


def _sqlite(path: Path, busy_s: float) -> sa.Engine:
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path)),
        # The one connection is opened on the worker thread and closed, after that has ended, by the closer.
        connect_args={"timeout": busy_s, "check_same_thread": False, "isolation_level": None},
        poolclass=sa.StaticPool,
        hide_parameters=True,  # rows hold what clients wrote, and errors are logged
    )
    sa.event.listen(engine, "connect", _to_wal)
    _prepare(engine, ("PRAGMA foreign_keys=ON",))
    return engine


def _to_wal(dbapi: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
    """Make the file's log a WAL, once and for all. Beside another process that does, SQLite refuses at once."""
    cursor = dbapi.cursor()
    try:
        for n_left in reversed(range(WAL_TRIES)):
            try:
                cursor.execute("PRAGMA journal_mode=WAL")
            except sqlite3.OperationalError as exc:
                if exc.sqlite_errorcode != sqlite3.SQLITE_BUSY or not n_left:
                    raise
                cursor.execute("BEGIN IMMEDIATE")  # waits for it, and for as long as any transaction does
                cursor.execute("ROLLBACK")
            else:
                return
    finally:
        cursor.close()


def _postgresql(database_url: str, busy_s: float) -> sa.Engine:
    """Nothing is connected yet. Raises StorageError."""
    try:
        url = sa.make_url(database_url)
    except (sa.exc.ArgumentError, ValueError):  # their messages may repeat the password
        url = None
    # An @ of a password that is not written %40 would make the rest of it a host's or database's name, which is shown.
    if url is None or url.drivername != "postgresql" or "@" in f"{url.host}{url.database}":
        raise StorageError(
            "database_url cannot be used; write postgresql://USER:PASSWORD@HOST:PORT/DATABASE, an @ as %40"
        )
    waits = {"connect_timeout": max(2, int(busy_s)), "client_encoding": "utf8"}  # of libpq, where the URL names none
    died = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 30_000}
    try:
        engine = sa.create_engine(
            url.set(drivername=DRIVER),
            connect_args={name: value for name, value in {**waits, **died}.items() if name not in url.query},
            isolation_level="AUTOCOMMIT",  # of the driver: BEGIN is ours, so that it and the lock are one round trip
            poolclass=sa.QueuePool,
            pool_size=1,
            max_overflow=0,
            hide_parameters=True,
        )
    except ImportError as exc:
        raise StorageError("database_url needs PostgreSQL's client: pip install 'keepwarm[postgres]'") from exc
    _prepare(
        engine,
        (
            f"SET lock_timeout = {max(1, round(busy_s * 1000))}",
            f"SET statement_timeout = '{STATEMENT_S_MAX}s'",
            f"SET idle_in_transaction_session_timeout = '{STATEMENT_S_MAX}s'",
            # Stricter values than "on" wait for replicas: the operator's choice.
            "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'",
        ),
    )
    _read_whole_numbers(engine)
    return engine


def _read_whole_numbers(engine: sa.Engine) -> None:
    """PostgreSQL's sum of bigints is a numeric: an int like SQLite's, never a Decimal. A fraction is an error."""
    loader = importlib.import_module("psycopg.types.numeric").IntLoader  # not at the top: an extra

    def register(dbapi: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
        dbapi.adapters.register_loader("numeric", loader)

    sa.event.listen(engine, "connect", register)


def _prepare(engine: sa.Engine, statements: tuple[str, ...]) -> None:
    """Run these on every new connection."""

    def prepare(dbapi: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
        cursor = dbapi.cursor()
        for statement in statements:
            cursor.execute(statement)
        cursor.close()

    sa.event.listen(engine, "connect", prepare)


def _migrate(connection: sa.Connection, *, create: bool) -> None:
    """Apply what is missing of keepwarm/migrations, all of it or, on an error, none."""
    if not create and not sa.inspect(connection).has_table("alembic_version"):
        raise CommandError("it has no tables of a server; start one on it first")
    if connection.dialect.name == "postgresql":
        encoding = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
        if encoding != "UTF8":
            raise CommandError(f"its encoding is {encoding}, and must be UTF8")
        connection.exec_driver_sql("SET LOCAL statement_timeout = 0")  # a large table takes its time
    config = AlembicConfig()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _told(exc: sa.exc.DBAPIError, *, begun: bool) -> ApiError | None:
    """What a caller is told of a database's error; None: it is our bug, or the disk's. The cause keeps the details."""
    is_of_driver = getattr(exc.orig, "sqlstate", "") is None  # PostgreSQL's driver speaks, not the server
    if _is_busy(exc):
        message = "the database is locked by another process; retry"
    elif exc.connection_invalidated and begun:
        message = "the connection to the database was lost, and it is not known what was written; retry"
    elif exc.connection_invalidated or (is_of_driver and isinstance(exc, sa.exc.OperationalError)):
        message = "the database cannot be reached; retry"
    elif is_of_driver and isinstance(exc, sa.exc.DataError):
        return ApiError(ErrorKind.INVALID_REQUEST, "a name or text has the character U+0000, which cannot be kept")
    else:
        return None
    return ApiError(ErrorKind.OVERLOADED, message, retry_after_s=RETRY_AFTER_S)


def _is_busy(exc: sa.exc.DBAPIError) -> bool:
    return (
        getattr(exc.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY
        or getattr(exc.orig, "sqlstate", None) in BUSY_STATES
    )


def _shown(url: sa.URL) -> str:
    """Where a database is, without password and options, which may hold one too."""
    plain = sa.URL.create("postgresql", url.username, None, url.host, url.port, url.database)
    return plain.render_as_string(hide_password=False)


def _reason(exc: Exception) -> str:
    cause = exc.__cause__ if isinstance(exc, ApiError) else exc
    if isinstance(cause, sa.exc.DBAPIError) and not _is_busy(cause):
        return " ".join(str(cause.orig).split())
    return str(exc)
