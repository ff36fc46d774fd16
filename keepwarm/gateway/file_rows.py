"""Uploaded files in the database: queries, and nothing that decides.

Every read a client can cause names the tenant, and the time: a row past its expiry is not there, whether or not a sweep
has run. A state is set by compare-and-set from PROCESSING, so a file that was deleted meanwhile is not brought back.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from msgspec.structs import asdict, replace

from keepwarm.core.file import FileState, StoredFile
from keepwarm.storage import Storage
from keepwarm.tables import files


class FileRows:
    """The table of files. Times are unix seconds."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    async def insert(self, file: StoredFile) -> StoredFile | None:
        """The file with its place in the order; None when the tenant has one of this id already, expired or not."""
        values = {**asdict(file), "state": file.state.value}
        del values["seq"]

        def add(connection: sa.Connection) -> StoredFile | None:
            if connection.execute(sa.select(files.c.seq).where(_owned(file.tenant, file.id))).first() is not None:
                return None
            inserted = connection.execute(sa.insert(files).values(values))
            assert inserted.inserted_primary_key is not None
            return replace(file, seq=inserted.inserted_primary_key[0])

        return await self._storage.run(add)

    async def get(self, tenant: str, file_id: str, now: float, *, dialect: str | None = None) -> StoredFile | None:
        """`dialect` None: of any."""
        wanted = sa.and_(_owned(tenant, file_id), _live(now))
        if dialect is not None:
            wanted = sa.and_(wanted, files.c.dialect == dialect)
        found = await self._many(sa.select(files).where(wanted))
        return found[0] if found else None

    async def page(
        self, tenant: str, dialect: str, now: float, limit: int, older_than: int | None = None
    ) -> list[StoredFile]:
        """Newest first; `older_than` is the `seq` that the page comes behind."""
        query = sa.select(files).where(files.c.tenant == tenant, files.c.dialect == dialect, _live(now))
        if older_than is not None:
            query = query.where(files.c.seq < older_than)
        return await self._many(query.order_by(files.c.seq.desc()).limit(limit))

    async def settle(self, seq: int, state: FileState, now: float, error: str | None = None) -> StoredFile | None:
        """A file that was PROCESSING in its next state; None when it is gone."""
        wanted = sa.and_(files.c.seq == seq, files.c.state == FileState.PROCESSING.value)

        def change(connection: sa.Connection) -> StoredFile | None:
            connection.execute(sa.update(files).where(wanted).values(state=state.value, updated_at=now, error=error))
            row = connection.execute(sa.select(files).where(files.c.seq == seq)).one_or_none()
            return None if row is None else _file(row)

        return await self._storage.run(change)

    async def delete(self, seq: int) -> bool:
        """False when it is gone already."""
        statement = sa.delete(files).where(files.c.seq == seq)
        return await self._storage.run(lambda connection: connection.execute(statement).rowcount == 1)

    async def expired(self, now: float, limit: int) -> list[StoredFile]:
        """The longest expired first."""
        over = sa.select(files).where(files.c.expires_at <= now)
        return await self._many(over.order_by(files.c.expires_at, files.c.seq).limit(limit))

    async def everyones(self) -> list[StoredFile]:
        """All tenants' files, oldest first. For the start of the server, never for a client."""
        return await self._many(sa.select(files).order_by(files.c.seq))

    async def _many(self, query: sa.Select[tuple[object, ...]]) -> list[StoredFile]:
        def read(connection: sa.Connection) -> Sequence[sa.Row[tuple[object, ...]]]:
            return connection.execute(query).all()

        return [_file(row) for row in await self._storage.run(read)]


def _owned(tenant: str, file_id: str) -> sa.ColumnElement[bool]:
    return sa.and_(files.c.tenant == tenant, files.c.id == file_id)


def _live(now: float) -> sa.ColumnElement[bool]:
    return sa.or_(files.c.expires_at.is_(None), files.c.expires_at > now)


def _file(row: sa.Row[tuple[object, ...]]) -> StoredFile:
    return StoredFile(
        id=row.id,
        tenant=row.tenant,
        dialect=row.dialect,
        key=row.key,
        name=row.name,
        media_type=row.media_type,
        n_bytes=row.n_bytes,
        sha256=row.sha256,
        created_at=row.created_at,
        updated_at=row.updated_at,
        expires_at=row.expires_at,
        state=FileState(row.state),
        error=row.error,
        seq=row.seq,
    )
