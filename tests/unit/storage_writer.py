"""Insert rows, so many or for ever, saying each one's name when it is acknowledged. Run by test_storage.py, which kills it."""

import asyncio
import itertools
import sys
from pathlib import Path

import sqlalchemy as sa

from keepwarm.storage import Storage
from keepwarm.tables import api_keys


async def write(where: Path | str, prefix: str, n_rows: int | None) -> None:
    storage = Storage.open(where, busy_s=20.0)
    for n in itertools.count() if n_rows is None else range(n_rows):
        name = f"{prefix}-{n}"
        values = {"name": name, "organisation": "t", "digest": name.encode(), "last4": "abcd", "created_at": 1}
        await storage.run(lambda connection, values=values: connection.execute(sa.insert(api_keys).values(values)))
        sys.stdout.write(f"{name}\n")
        sys.stdout.flush()
    storage.close()


if __name__ == "__main__":
    given, prefix, *count = sys.argv[1:]
    asyncio.run(write(given if "://" in given else Path(given), prefix, int(count[0]) if count else None))
