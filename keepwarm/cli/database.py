"""Commands that work on the database of a data directory, whether or not a server is using it too."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from keepwarm.cli.failure import fail
from keepwarm.config import Limits, default_data_dir
from keepwarm.core.errors import ApiError
from keepwarm.storage import Storage, StorageError, database_path

T = TypeVar("T")


def with_storage(data_dir: Path | None, work: Callable[[Storage], Awaitable[T]], *, create: bool = False) -> T:
    """What `work` returns on the open database; ends the command when it cannot be used.

    Without `create` the database must be there: a mistyped directory is told, not made.
    """
    path = database_path(data_dir or default_data_dir())
    if not create and not path.is_file():
        fail(f"there is no database in {path.parent}; give the server's --data-dir, or start a server there first")
    try:
        storage = Storage.open(path, Limits().db_busy_s_max)
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
