"""The whole ledger read and counted anew (`recount`), without keeping it in memory or the database to itself.

Rows are read in parts, each in a transaction of its own; with the last part, in the same transaction, the sums. So a
server may go on meanwhile: what it adds is read too.
"""

from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import sqlalchemy as sa
from msgspec import Struct

from keepwarm.billing.recount import Fault, Kept, KeptMeter, KeptVoucher, Prices, Recount
from keepwarm.billing.written import Written
from keepwarm.core.cache_object import NS_PER_S, ObjectStatus
from keepwarm.storage import Storage
from keepwarm.tables import accounts, budgets, cache_objects, holds, ledger_rows, spending, storage_meters, vouchers

PART = 5_000  # rows in one transaction: some tens of ms in which turns wait


class Part(Struct, frozen=True):
    """The next rows, when the vouchers they grant expire, and behind the last of all rows the sums."""

    rows: list[Written]
    expires_at: dict[str, float | None]
    kept: Kept | None


async def verify(
    storage: Storage, prices: Prices, progress: Callable[[int, int], None], part: int = PART
) -> AsyncIterator[Fault]:
    """Everything that is wrong, as it is found. `progress` is told how many rows of how many have been counted."""
    n_all, found = await storage.run(_begin)
    recount, after = Recount(prices, found), 0
    while True:
        read = await storage.run(partial(_part, after, part))
        for row in read.rows:
            for fault in recount.add(row, read.expires_at.get(row.voucher_id or "")):
                yield fault
        progress(recount.n_rows, max(n_all, recount.n_rows))
        if read.kept is not None:
            for fault in recount.end(read.kept):
                yield fault
            return
        after = read.rows[-1].seq


def _begin(connection: sa.Connection) -> tuple[int, list[tuple[str, str, str]]]:
    n_rows = connection.execute(sa.select(sa.func.count()).select_from(ledger_rows)).scalar_one()
    return n_rows, _budgets(connection)


def _part(after: int, size: int, connection: sa.Connection) -> Part:
    query = sa.select(ledger_rows).where(ledger_rows.c.seq > after).order_by(ledger_rows.c.seq).limit(size)
    rows = [Written(*row) for row in connection.execute(query)]
    granted = [row.voucher_id for row in rows if row.kind == "grant" and row.voucher_id is not None]
    expires_at: dict[str, float | None] = {}
    for begin in range(0, len(granted), 500):  # parameters of one statement are bounded
        several = sa.select(vouchers.c.id, vouchers.c.expires_at).where(vouchers.c.id.in_(granted[begin : begin + 500]))
        expires_at |= {row.id: row.expires_at for row in connection.execute(several)}
    return Part(rows, expires_at, _kept(connection) if len(rows) < size else None)


def _kept(connection: sa.Connection) -> Kept:
    def all_of(table: sa.Table) -> list[sa.Row[Any]]:
        return list(connection.execute(sa.select(table)))

    meter_columns = [storage_meters.c[name] for name in KeptMeter.__struct_fields__]
    return Kept(
        accounts={
            (row.organisation, row.currency): (row.cash_nano, row.voucher_nano, row.held_nano)
            for row in all_of(accounts)
        },
        vouchers=tuple(
            KeptVoucher(*(getattr(row, name) for name in KeptVoucher.__struct_fields__)) for row in all_of(vouchers)
        ),
        holds={
            row.turn_id: (row.organisation, row.project, row.key_id, row.currency, row.amount_nano)
            for row in all_of(holds)
        },
        budgets=frozenset(_budgets(connection)),
        spending={(row.scope, row.currency, row.period, row.period_start): row.spent_nano for row in all_of(spending)},
        meters=tuple(KeptMeter(*row) for row in connection.execute(sa.select(*meter_columns))),
        ready=dict(_ready(connection)),
    )


def _ready(connection: sa.Connection) -> list[tuple[str, float]]:
    columns = cache_objects.c
    query = sa.select(columns.id, columns.expires_at, columns.early_ns)
    rows = connection.execute(query.where(columns.status == ObjectStatus.READY.value, columns.key_id.is_not(None)))
    return [(row.id, row.expires_at - row.early_ns / NS_PER_S) for row in rows]


def _budgets(connection: sa.Connection) -> list[tuple[str, str, str]]:
    rows = connection.execute(sa.select(budgets.c.scope, budgets.c.currency, budgets.c.period))
    return [(row.scope, row.currency, row.period) for row in rows]
