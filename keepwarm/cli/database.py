"""Commands that work on the database, whether or not a server is using it too."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from keepwarm.cli.failure import fail
from keepwarm.config import Limits, default_data_dir, default_database_url
from keepwarm.core.errors import ApiError
from keepwarm.storage import Storage, StorageError, database

T = TypeVar("T")


def with_storage(
    data_dir: Path | None,
    work: Callable[[Storage], Awaitable[T]],
    *,
    database_url: str | None = None,
    create: bool = False,
) -> T:
    """What `work` returns on the open database; ends the command when it cannot be used.

    A PostgreSQL database that is named, by option or environment, goes before the data directory's file; "" names none.
    Without `create` the database must be there: what was mistyped is told, not made.
    """
    url = default_database_url() if database_url is None else database_url
    where = database(url, data_dir or default_data_dir())
    if not create and isinstance(where, Path) and not where.is_file():
        fail(f"there is no database in {where.parent}; give the server's --data-dir, or start a server there first")
    try:
        storage = Storage.open(where, Limits().db_busy_s_max, create=create)
    except StorageError as error:
        fail(str(error))

    async def run() -> T:
        return await work(storage)

    try:
        return asyncio.run(run())
    except ApiError as error:
        fail(error.message)
    finally:
        storage.close()
