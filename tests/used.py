"""A ledger with all kinds of rows, made by the very services: two organisations, two currencies, turns with and without
prices, holds that end in each way, vouchers, budgets, cache objects kept for a while."""

import asyncio
from pathlib import Path

import sqlalchemy as sa

from keepwarm.billing.act import Creation, Hold, Repeat, Settlement
from keepwarm.billing.budget import Budget, Period, Scope
from keepwarm.billing.ledger import Ledger
from keepwarm.billing.meter import Metered, Meters
from keepwarm.billing.price import Charge, creation_nano, turn_charge, uncached_nano
from keepwarm.billing.price_book import PriceBook
from keepwarm.billing.row import Payer, Priced, TurnUse
from keepwarm.billing.sheet_file import drafted, priced_sheets, shipped_drafts
from keepwarm.core.event import Usage
from keepwarm.storage import Storage, database_path
from keepwarm.tables import cache_objects, organisations
from tests.ledgers import HOLD_S, at_work
from tests.world import FakeClock

HOUSE = (
    'name = "house"\nversion = "1"\ncurrency = "USD"\neffective_from = 2023-01-01\nsource = "ours"\n'
    '[models.m]\nterms = "anthropic@2026/standard"\ninput = "3"\noutput = "15"\n'
)
BOOK = PriceBook(priced_sheets((*shipped_drafts(), drafted(HOUSE, "house.toml"))), {}, 0.0)
KIMI = Priced("kimi@2024-07-01", "moonshot-v1-8k", "CNY")
HOUSE_M = Priced("house@1", "m", "USD")
WEB, BOT, OTHER = Payer("acme", "web", 7), Payer("acme", "bot", 8), Payer("umbra", "default", 9)
ONCE = Repeat(b"k" * 32, b"b" * 32)
N_OBJECT = 100_000


def used(priced: Priced | None, usage: Usage, n_object: int = 0) -> TurnUse:
    """Use at a sheet's prices."""
    if priced is None:
        return TurnUse(usage, n_object, None, None)
    prices = BOOK.prices(priced)
    return TurnUse(usage, n_object, turn_charge(prices, usage, n_object=n_object), uncached_nano(prices, usage))


async def turn(ledger: Ledger, turn_id: str, payer: Payer, priced: Priced | None, use: TurnUse, **more: object) -> None:
    """One that ends well."""
    repeat = more.get("repeat")
    assert repeat is None or isinstance(repeat, Repeat)
    if priced is not None:
        await ledger.hold(Hold(turn_id, payer, "kimi", "m", priced, 10**9, is_prepaid=False, repeat=repeat))
    await ledger.settle(Settlement(turn_id, payer, "kimi", "m", "finished", priced, use, repeat))


def make(where: Path | str, clock: FakeClock) -> Storage:
    """The storage, open; `where` is a data directory or the URL of a PostgreSQL database."""
    storage = Storage.open(database_path(where) if isinstance(where, Path) else where, busy_s=1.0)
    storage.run_sync(_seed)
    asyncio.run(_use(storage, clock))
    return storage


async def _use(storage: Storage, clock: FakeClock) -> None:
    meters = Meters(storage, clock, BOOK.prices)
    async with at_work(storage, clock) as ledger:
        for name in ("acme", "umbra"):
            await ledger.set_budget(Budget(Scope(name), "CNY", Period.DAY, soft_nano=1, hard_nano=10**15))
        await ledger.set_budget(Budget(Scope("acme", key_id=7), "CNY", Period.TOTAL, hard_nano=10**15))
        await ledger.grant("acme", "CNY", 50 * 10**9, "first")
        await ledger.grant_voucher("acme", "CNY", 3 * 10**8, clock.now() + 5000.0)
        await ledger.grant_voucher("acme", "CNY", 2 * 10**8, clock.now() + 90_000.0)
        await ledger.grant_voucher("acme", "CNY", 10**8)
        await ledger.grant_voucher("umbra", "USD", 77, clock.now() + 100.0)
        await turn(ledger, "t1", WEB, KIMI, used(KIMI, Usage(5_000, 1_000, 0, 700)))
        await turn(ledger, "t2", BOT, KIMI, used(KIMI, Usage(100, N_OBJECT, 0, 11), N_OBJECT))
        await turn(ledger, "t3", BOT, HOUSE_M, used(HOUSE_M, Usage(10, 2_000, 900, 44, 300)))
        await turn(ledger, "t4", OTHER, KIMI, used(KIMI, Usage(1_234, 0, 0, 5)))
        await turn(ledger, "t5", WEB, None, used(None, Usage(7, 8, 9, 10)))
        await turn(ledger, "t6", WEB, KIMI, used(KIMI, Usage(9_000, 0, 0, 1)), repeat=ONCE)
        await turn(ledger, "t7", WEB, KIMI, used(KIMI, Usage(9_000, 100, 0, 9)), repeat=ONCE)
        await ledger.hold(Hold("t8", WEB, "kimi", "m", KIMI, 500, is_prepaid=False))
        await ledger.release("t8")
        await ledger.hold(Hold("t9", WEB, "kimi", "m", KIMI, 600, is_prepaid=False))
        await ledger.charge_creation(_creation("made", "cache-1"))
        await meters.open(_life("cache-1", clock.now()))
        clock.advance(130.0)
        await meters.tick()
        clock.advance(HOLD_S)
        await ledger.tick()
        await meters.close("cache-1", clock.now())
        clock.advance(86_400.0)
        await ledger.tick()
        await turn(ledger, "t10", WEB, KIMI, used(KIMI, Usage(60_000, 0, 0, 2_000)))
        await ledger.adjust("umbra", "USD", -5, "a correction")
        await ledger.hold(Hold("t11", OTHER, "kimi", "m", KIMI, 700, is_prepaid=False))
        await meters.open(_life("cache-2", clock.now()))  # and goes on


def _creation(id_: str, object_id: str) -> Creation:
    charge = Charge(creation=creation_nano(BOOK.prices(KIMI), N_OBJECT))
    return Creation(id_, WEB, object_id, "kimi", "m", KIMI, N_OBJECT, charge)


def _life(object_id: str, began_at: float) -> Metered:
    return Metered(object_id, "acme", "web", 7, "kimi", "m", KIMI, N_OBJECT, began_at, began_at + 3600.0)


def _seed(connection: sa.Connection) -> None:
    """Cache objects that meters find: one that will be over, one that will be ready."""
    for id_, status in (("cache-1", "inactive"), ("cache-2", "ready")):
        connection.execute(
            sa.insert(cache_objects).values(
                id=id_, tenant="acme", model="m", status=status, generation=1, created_at=0, expires_at=10**10,
                n_tokens=N_OBJECT, name="", description="", tools=b"", messages=b"", project="web", key_id=7,
            )
        )  # fmt: skip
    for name in ("acme", "umbra"):
        connection.execute(
            sa.insert(organisations).values(id=name, is_prepaid=False, cache_scope="organisation", created_at=0)
        )
