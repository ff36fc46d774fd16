"""Insert rows for ever, saying each one's name when it is acknowledged. Run by test_storage.py, which kills it."""

import asyncio
import itertools
import sys
from pathlib import Path

import sqlalchemy as sa

from keepwarm.storage import Storage
from keepwarm.tables import api_keys


async def write(path: Path, prefix: str) -> None:
    storage = Storage.open(path, busy_s=5.0)
    for n in itertools.count():
        name = f"{prefix}-{n}"
        values = {"name": name, "organisation": "t", "digest": name.encode(), "last4": "abcd", "created_at": 1}
        await storage.run(lambda connection, values=values: connection.execute(sa.insert(api_keys).values(values)))
        sys.stdout.write(f"{name}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(write(Path(sys.argv[1]), sys.argv[2]))
