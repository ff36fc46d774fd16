"""The ledger's rows as they are, for looking at."""

from functools import partial

import sqlalchemy as sa
from msgspec import Struct

from keepwarm.billing.written import Written
from keepwarm.storage import Storage
from keepwarm.tables import ledger_rows


class RowQuery(Struct, frozen=True):
    """Which; the newest `limit` of them."""

    organisation: str | None
    turn_id: str | None
    limit: int


async def rows(storage: Storage, query: RowQuery) -> list[Written]:
    """The oldest first."""
    return await storage.run(partial(_read, query))


def _read(query: RowQuery, connection: sa.Connection) -> list[Written]:
    select = sa.select(ledger_rows)
    if query.organisation is not None:
        select = select.where(ledger_rows.c.organisation == query.organisation)
    if query.turn_id is not None:
        select = select.where(ledger_rows.c.turn_id == query.turn_id)
    found = connection.execute(select.order_by(ledger_rows.c.seq.desc()).limit(query.limit)).all()
    return [Written(*row) for row in reversed(found)]
