"""The book's file: SQLite in WAL mode, a row for each server and application key, shared by threads and processes.

A book has one connection for all its threads, and another one after a fork: SQLite's cannot be taken along. A decision that
leads to work on an object is taken inside the transaction that claims the row: of any number of workers one gets the claim.
What is written survives a killed worker; a row lost to a power cut costs one creation.

The file holds keys, digests and cache ids, never knowledge or an API key.
"""

import os
import sqlite3
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock

import msgspec
from msgspec import Struct

from keepwarm.client.decision import CLAIM_S, Policy, Row, Step, decide

BUSY_S = 5.0  # for another worker's transaction; they take a millisecond
WAL_TRIES = 200  # the switch to WAL does not wait for others as a transaction does
WAL_WAIT_S = 0.02
SCHEMA = """
CREATE TABLE IF NOT EXISTS objects (
  server TEXT NOT NULL, key TEXT NOT NULL, digest TEXT NOT NULL, cache_id TEXT, ready INTEGER NOT NULL DEFAULT 0,
  expires_at REAL NOT NULL DEFAULT 0, next_at REAL NOT NULL DEFAULT 0, claim TEXT, claimed_until REAL NOT NULL DEFAULT 0,
  uncertain INTEGER NOT NULL DEFAULT 0, replaced_digest TEXT, replaced_at REAL NOT NULL DEFAULT 0,
  PRIMARY KEY (server, key)
) STRICT, WITHOUT ROWID
"""
READ = """
SELECT digest, cache_id, ready, expires_at, next_at, claim, claimed_until, uncertain, replaced_digest, replaced_at
FROM objects WHERE server = :server AND key = :key
"""
CLAIM = """
INSERT INTO objects (server, key, digest, claim, claimed_until, uncertain)
VALUES (:server, :key, :digest, :claim, :claimed_until, :creates)
ON CONFLICT DO UPDATE SET claim = :claim, claimed_until = :claimed_until, uncertain = max(uncertain, :creates)
"""
RECORD = """
UPDATE objects SET digest = :digest, cache_id = :cache_id, ready = :ready, expires_at = :expires_at, next_at = :next_at,
  uncertain = :uncertain, replaced_digest = :replaced_digest, replaced_at = :replaced_at, claim = NULL, claimed_until = 0
WHERE server = :server AND key = :key AND claim = :claim
"""
RELEASE = "UPDATE objects SET claim = NULL, claimed_until = 0 WHERE server = :server AND key = :key AND claim = :claim"
DOUBT = """
UPDATE objects SET ready = 0, next_at = :next_at WHERE server = :server AND key = :key AND cache_id = :cache_id
"""
EXTEND = """
UPDATE objects SET expires_at = max(expires_at, :expires_at)
WHERE server = :server AND key = :key AND cache_id = :cache_id
"""


class Held(Struct, frozen=True):
    """A process's connection. The lock belongs to it: one taken along by a fork might never be opened again."""

    pid: int
    connection: sqlite3.Connection
    lock: Lock
    closes: weakref.finalize  # type: ignore[type-arg]  # msgspec wants the plain class


class Rows:
    """The rows of one server's objects. Every method but the constructor is one transaction. Raises sqlite3.Error."""

    def __init__(self, path: Path, server: str) -> None:
        self._path, self._server = path, server
        self._inherited: list[Held] = []
        self._held = self._open()
        use_wal(self._held.connection)
        self._held.connection.execute(SCHEMA)

    def read(self, key: str) -> Row | None:
        with self._connected() as connection:
            return self._read(connection, key)

    def claim(self, key: str, digest: str, claim: str, now: float, policy: Policy) -> tuple[Row | None, Step]:
        """Decide, and where the step is work on the object take the row. The row is told as it was before."""
        with self._writing() as connection:
            row = self._read(connection, key)
            step = decide(row, digest, now, policy)
            if step not in (Step.USE, Step.FULL):
                values = {"digest": digest, "claim": claim, "claimed_until": now + CLAIM_S}
                creates = int(step is Step.CREATE)
                connection.execute(CLAIM, {"server": self._server, "key": key, "creates": creates, **values})
            return row, step

    def record(self, key: str, claim: str, row: Row) -> bool:
        """Write what became of the object and give the claim back. False: it had ended, nothing was written."""
        return self._update(RECORD, key, {**msgspec.structs.asdict(row), "claim": claim})

    def release(self, key: str, claim: str) -> None:
        self._update(RELEASE, key, {"claim": claim})

    def doubt(self, key: str, cache_id: str, next_at: float) -> None:
        """The object was not found, or not used: it is looked at before it is used again, at `next_at`."""
        self._update(DOUBT, key, {"cache_id": cache_id, "next_at": next_at})

    def extend(self, key: str, cache_id: str, expires_at: float) -> None:
        self._update(EXTEND, key, {"cache_id": cache_id, "expires_at": expires_at})

    def _open(self) -> Held:
        connection = sqlite3.connect(self._path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        closes = weakref.finalize(self, connection.close)
        connection.execute("PRAGMA synchronous = NORMAL")
        return Held(os.getpid(), connection, Lock(), closes)

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        held = self._held
        if held.pid != os.getpid():
            held.closes.detach()
            self._inherited.append(held)  # it is the parent's: neither used nor closed
            held = self._held = self._open()
        with held.lock:
            yield held.connection

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that has the write lock from its beginning."""
        with self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def _read(self, connection: sqlite3.Connection, key: str) -> Row | None:
        found = connection.execute(READ, {"server": self._server, "key": key}).fetchone()
        return None if found is None else msgspec.convert(found_values(found), Row)

    def _update(self, statement: str, key: str, values: dict[str, object]) -> bool:
        with self._writing() as connection:
            return connection.execute(statement, {"server": self._server, "key": key, **values}).rowcount == 1


def found_values(found: tuple[object, ...]) -> dict[str, object]:
    """A selected row by the names of `Row`; SQLite has no booleans."""
    values = dict(zip(Row.__struct_fields__, found, strict=True))
    return values | {"ready": bool(values["ready"]), "uncertain": bool(values["uncertain"])}


def use_wal(connection: sqlite3.Connection) -> None:
    """Many workers may start at once on a new file; one of them switches, the others see it done."""
    pause = Event()
    for attempt in range(1, WAL_TRIES + 1):
        try:
            if connection.execute("PRAGMA journal_mode = WAL").fetchone() == ("wal",):
                return
        except sqlite3.OperationalError:
            if attempt == WAL_TRIES:
                raise
        pause.wait(WAL_WAIT_S)
    raise sqlite3.OperationalError("the book's file system does not allow SQLite's WAL mode")
