"""What tests of the ledger share: acts with round numbers, a ledger at work, and the sums added up anew from all rows."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import sqlalchemy as sa

from keepwarm.billing.act import Hold, Repeat, Settlement
from keepwarm.billing.ledger import Ledger
from keepwarm.billing.price import Charge
from keepwarm.billing.row import Payer, Priced, TurnUse
from keepwarm.core.clock import Clock
from keepwarm.core.event import Usage
from keepwarm.storage import Storage
from keepwarm.tables import accounts, holds, ledger_rows, vouchers
from tests.world import CountingIds

PRICED = Priced("sheet@1", "m", "CNY")
PAYER = Payer("acme", "web", 7)
HOLD_S = 100.0


def use_of(cost: int) -> TurnUse:
    """Use that costs so much, in two classes."""
    return TurnUse(Usage(3, 4, 0, 5), 0, Charge(fresh=cost // 2, output=cost - cost // 2), 2 * cost)


def hold_of(
    turn_id: str, amount: int, *, payer: Payer = PAYER, is_prepaid: bool = False, repeat: Repeat | None = None
) -> Hold:
    return Hold(turn_id, payer, "openai", "m", PRICED, amount, is_prepaid, repeat)


def settlement_of(turn_id: str, cost: int, *, payer: Payer = PAYER, repeat: Repeat | None = None) -> Settlement:
    return Settlement(turn_id, payer, "openai", "m", "finished", PRICED, use_of(cost), repeat)


@asynccontextmanager
async def at_work(storage: Storage, clock: Clock) -> AsyncIterator[Ledger]:
    """A ledger whose worker runs as long as the context lasts."""
    ledger = Ledger(storage, clock, CountingIds(), hold_s=HOLD_S)
    async with asyncio.TaskGroup() as tasks:
        worker = tasks.create_task(ledger.work())
        try:
            yield ledger
        finally:
            worker.cancel()


def rows(storage: Storage) -> list[sa.Row]:
    """The whole ledger, oldest first."""
    return storage.run_sync(
        lambda connection: list(connection.execute(sa.select(ledger_rows).order_by(ledger_rows.c.seq)))
    )


def check_sums(storage: Storage) -> None:
    """Every sum that is kept is what the rows, added up one by one, come to; and each hold is closed once at most."""
    cash, voucher, held = defaultdict(int), defaultdict(int), defaultdict(int)
    open_holds: dict[str, int] = {}
    ids: set[str] = set()
    for row in rows(storage):
        assert row.id not in ids
        ids.add(row.id)
        key = (row.organisation, row.currency)
        cash[key] += row.cash_nano
        voucher[key] += row.voucher_nano
        held[key] += row.held_nano
        if row.kind == "hold":
            assert row.turn_id not in open_holds
            open_holds[row.turn_id] = row.held_nano
        elif row.held_nano:
            assert open_holds.pop(row.turn_id) == -row.held_nano
        elif row.kind in ("settle", "release", "expire", "creation"):  # of a hold of nothing
            assert open_holds.pop(row.turn_id, 0) == 0
    keys = {key for key in cash if key[1] is not None}
    found_accounts, found_holds, found_vouchers = storage.run_sync(
        lambda connection: [list(connection.execute(sa.select(table))) for table in (accounts, holds, vouchers)]
    )
    assert {(one.organisation, one.currency): tuple(one[2:]) for one in found_accounts} == {
        key: (cash[key], voucher[key], held[key]) for key in keys
    }
    assert {one.turn_id: one.amount_nano for one in found_holds} == open_holds
    left = defaultdict(int)
    for one in found_vouchers:
        assert 0 <= one.left_nano <= one.granted_nano
        left[one.organisation, one.currency] += one.left_nano
    assert {key: left[key] for key in keys} == {key: voucher[key] for key in keys}
