import asyncio
from collections.abc import Iterator
from functools import partial
from math import ceil
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.billing.meter import METERS_MAX, Due, Metered, Meters, Paid, due
from keepwarm.billing.price import storage_nano
from keepwarm.billing.row import Priced
from keepwarm.billing.sheet import ModelPrices, ObjectRates, Rates, StorageRate
from keepwarm.core.cache_object import NS_PER_S
from keepwarm.storage import Storage
from keepwarm.tables import cache_objects, storage_meters
from tests.ledgers import check_sums, rows
from tests.world import FakeClock

T0 = 1_700_000_000.0
FREE = Rates(0, 0, 0, 0, 0)
MINUTES = ModelPrices((FREE,), ObjectRates(storage=StorageRate(10 * 10**9, 60, begun_counts=True)))  # Kimi's, at launch
HOURS = ModelPrices((FREE,), ObjectRates(storage=StorageRate(10**9 + 1, 3600, begun_counts=False)))
PRICED = Priced("sheet@1", "m", "CNY")


def life(
    object_id: str = "cache-1", *, n_tokens: int = 100_000, ends_at: float = T0 + 600, priced: Priced | None = PRICED
) -> Metered:
    return Metered(object_id, "acme", "web", 7, "kimi", "m", priced, n_tokens, T0, ends_at)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def storage(any_database: Path | str) -> Iterator[Storage]:
    storage = Storage.open(any_database, busy_s=5.0)
    storage.run_sync(lambda connection: add_object(connection, "cache-1"))
    yield storage
    check_sums(storage)
    storage.close()


def add_object(
    connection: sa.Connection, object_id: str, *, project: str | None = "web", status: str = "ready"
) -> None:
    values = {"id": object_id, "tenant": "acme/web", "model": "m", "status": status, "generation": 1, "created_at": 1}
    values |= {"expires_at": int(T0) + 600, "n_tokens": 50, "name": "", "description": "", "tools": b"[]"}
    values |= {"messages": b"[]", "project": project, "key_id": 7}
    connection.execute(sa.insert(cache_objects).values(values))


def _live_until(ends_at: float, connection: sa.Connection) -> None:
    end = ceil(ends_at)
    values = {"expires_at": end, "early_ns": round((end - ends_at) * NS_PER_S)}
    connection.execute(sa.update(cache_objects).where(cache_objects.c.id == "cache-1").values(values))


async def lives_until(storage: Storage, ends_at: float) -> None:
    """The object gets that end; its meter is not told."""
    await storage.run(partial(_live_until, ends_at))


def meters(storage: Storage, clock: FakeClock) -> Meters:
    return Meters(storage, clock, lambda priced: MINUTES)


async def charged(storage: Storage) -> list[tuple[int, int]]:
    """(nano, seconds) of each row."""
    return [(-row.cash_nano, row.n_units) for row in await asyncio.to_thread(rows, storage)]


async def still_open(storage: Storage) -> int:
    query = sa.select(sa.func.count()).where(storage_meters.c.is_closed.is_(False))
    return await storage.run(lambda connection: connection.execute(query).scalar_one())


@given(
    steps=st.lists(st.floats(0.0, 5000.0), max_size=12),
    n_tokens=st.integers(0, 10**6),
    prices=st.sampled_from([MINUTES, HOURS]),
    lives_s=st.floats(0.001, 20_000.0),
)
def test_parts_of_a_life_add_up_to_the_whole_of_it(
    steps: list[float], n_tokens: int, prices: ModelPrices, lives_s: float
) -> None:
    metered = life(n_tokens=n_tokens, ends_at=T0 + lives_s)
    paid, seconds, now = Paid(T0, 0), 0, T0
    for step in [*steps, 30_000.0]:
        now += step
        owed = due(metered, paid, prices, now)
        if owed is not None:
            assert owed.storage_nano is not None and owed.storage_nano >= 0
            assert owed.storage_s >= 0
            seconds += owed.storage_s
            paid = Paid(min(now, metered.ends_at), paid.nano + owed.storage_nano)
    whole_s = metered.ends_at - T0
    assert (paid.nano, seconds) == (storage_nano(prices, n_tokens, whole_s), int(whole_s))


def test_a_begun_minute_is_paid_at_once_and_the_rest_of_it_is_free() -> None:
    metered = life()
    assert due(metered, Paid(T0, 0), MINUTES, T0 + 1) == Due(10**9, 1)
    assert due(metered, Paid(T0 + 1, 10**9), MINUTES, T0 + 60) is None
    assert due(metered, Paid(T0 + 1, 10**9), MINUTES, T0 + 61) == Due(10**9, 60)


def test_seconds_without_a_price_are_written_down_when_the_life_is_over() -> None:
    metered = life(priced=None)
    assert due(metered, Paid(T0, 0), None, T0 + 599) is None
    assert due(metered, Paid(T0, 0), None, T0 + 700) == Due(None, 600)
    assert due(metered, Paid(T0 + 600, 0), None, T0 + 700) is None


def test_an_objects_storage_at_kimis_launch_prices_is_ten_yuan_for_ten_minutes() -> None:
    assert due(life(), Paid(T0, 0), MINUTES, T0 + 900) == Due(10 * 10**9, 600)


async def test_ticks_pay_for_a_life_and_close_it(storage: Storage, clock: FakeClock) -> None:
    service = meters(storage, clock)
    await service.open(life())
    for _ in range(12):
        clock.advance(60.0)
        await service.tick()
        await service.tick()
    assert await charged(storage) == [(10**9, 60)] * 10
    [row, *_] = await asyncio.to_thread(rows, storage)
    assert (row.kind, row.object_id, row.n_object, row.sheet, row.storage_nano) == (
        "storage", "cache-1", 100_000, "sheet@1", 10**9,
    )  # fmt: skip
    assert (row.project, row.key_id, row.dialect, row.model, row.turn_id) == ("web", 7, "kimi", "m", None)
    assert await still_open(storage) == 0


async def test_a_life_whose_last_part_is_paid_already_is_closed_without_a_row(
    storage: Storage, clock: FakeClock
) -> None:
    service = meters(storage, clock)
    await lives_until(storage, T0 + 59.5)
    await service.open(life(ends_at=T0 + 600))  # it goes by the object's own end
    clock.advance(59.25)
    assert await service.tick() == 1
    assert await still_open(storage) == 1
    clock.advance(1.0)
    assert await service.tick() == 0
    assert await still_open(storage) == 0


async def test_time_while_nobody_ticked_is_paid_by_the_next_process(storage: Storage, clock: FakeClock) -> None:
    await meters(storage, clock).open(life())
    clock.advance(90.0)
    await meters(storage, clock).tick()
    clock.advance(240.0)
    await meters(storage, clock).tick()
    await meters(storage, clock).tick()
    assert await charged(storage) == [(2 * 10**9, 90), (4 * 10**9, 240)]


async def test_a_deleted_object_pays_up_to_its_deletion_once(storage: Storage, clock: FakeClock) -> None:
    service = meters(storage, clock)
    await service.open(life())
    clock.advance(61.0)
    for _ in range(2):
        await service.close("cache-1", clock.now())
    clock.advance(600.0)
    assert await service.tick() == 0
    assert await charged(storage) == [(2 * 10**9, 61)]
    await service.close("cache-of-nobody", clock.now())


async def test_a_deletion_that_is_told_late_is_charged_by_its_own_time(storage: Storage, clock: FakeClock) -> None:
    service = meters(storage, clock)
    await service.open(life())
    clock.advance(300.0)
    await service.close("cache-1", T0 + 59)
    assert await charged(storage) == [(10**9, 59)]
    assert await still_open(storage) == 0


async def test_a_deletion_that_a_tick_was_faster_than_ends_where_it_is_paid(storage: Storage, clock: FakeClock) -> None:
    service = meters(storage, clock)
    await service.open(life())
    clock.advance(61.0)
    await service.tick()
    await service.close("cache-1", T0 + 59)
    assert await charged(storage) == [(2 * 10**9, 61)]
    kept = sa.select(storage_meters.c.ends_at, storage_meters.c.charged_until, storage_meters.c.is_closed)
    assert await storage.run(lambda connection: tuple(connection.execute(kept).one())) == (T0 + 61, T0 + 61, True)


async def test_an_extended_object_pays_on(storage: Storage, clock: FakeClock) -> None:
    service = meters(storage, clock)
    await service.open(life())
    await lives_until(storage, T0 + 1200)
    assert await service.extend("cache-1", T0)
    clock.advance(2000.0)
    await service.tick()
    assert await charged(storage) == [(20 * 10**9, 1200)]


async def test_a_meter_closed_between_the_objects_extension_and_its_own_runs_on_and_an_old_one_does_not(
    storage: Storage, clock: FakeClock
) -> None:
    service = meters(storage, clock)
    await service.open(life())
    clock.advance(601.0)
    await service.tick()
    await lives_until(storage, T0 + 660)
    assert await service.extend("cache-1", T0 + 599.5)
    clock.now_s = T0 + 660
    await service.tick()
    assert await charged(storage) == [(10 * 10**9, 600), (10**9, 60)]
    await lives_until(storage, T0 + 9000)
    assert not await service.extend("cache-1", T0 + 660)
    assert not await service.extend("cache-of-nobody", T0)
    assert await still_open(storage) == 0


async def test_an_object_has_one_meter_at_a_time_and_a_new_one_for_a_new_life(
    storage: Storage, clock: FakeClock
) -> None:
    service = meters(storage, clock)
    await service.open(life())
    await service.open(life())
    ready_again = Metered("cache-1", "acme", "web", 7, "kimi", "m", PRICED, 100_000, T0 + 30, T0 + 600)
    await service.open(ready_again)  # after a restart of the engine: the same life
    assert await still_open(storage) == 1
    revived = Metered("cache-1", "acme", "web", 7, "kimi", "m", PRICED, 100_000, T0 + 1000, T0 + 1060)
    clock.now_s = T0 + 1000
    await lives_until(storage, T0 + 1060)
    await service.open(revived)
    clock.now_s = T0 + 5000
    await service.tick()
    assert sorted(await charged(storage)) == [(10**9, 60), (10 * 10**9, 600)]
    await service.open(life())  # told once more of the first life
    assert await still_open(storage) == 0


async def test_a_deleted_object_is_neither_opened_nor_extended(storage: Storage, clock: FakeClock) -> None:
    service = meters(storage, clock)
    await service.open(life("cache-deleted"))
    await service.open(life())
    await storage.run(lambda connection: connection.execute(sa.delete(cache_objects)))
    await service.close("cache-1", clock.now() + 1)
    assert not await service.extend("cache-1", clock.now())
    assert await still_open(storage) == 1  # its second is not over
    clock.advance(1.0)
    await service.tick()
    assert await still_open(storage) == 0


async def test_without_its_sheet_a_meter_waits(storage: Storage, clock: FakeClock) -> None:
    await meters(storage, clock).open(life())
    clock.advance(700.0)
    assert await Meters(storage, clock, lambda priced: None).tick() == 0
    assert await still_open(storage) == 1
    assert await meters(storage, clock).tick() == 1
    assert await charged(storage) == [(10 * 10**9, 600)]


async def test_storage_without_prices_is_recorded_without_money(storage: Storage, clock: FakeClock) -> None:
    await meters(storage, clock).open(life(priced=None))
    clock.advance(700.0)
    await meters(storage, clock).tick()
    [row] = await asyncio.to_thread(rows, storage)
    assert (row.currency, row.storage_nano, row.n_object, row.n_units) == (None, None, 100_000, 600)
    assert await still_open(storage) == 0


async def test_more_meters_than_fit_one_transaction_are_all_paid(storage: Storage, clock: FakeClock) -> None:
    values = [
        {
            "id": f"c{n}/0", "object_id": f"c{n}", "organisation": f"o{n % 3}", "dialect": "kimi", "model": "m",
            "sheet": "sheet@1", "sheet_model": "m", "currency": "CNY", "n_tokens": 1000, "began_at": T0,
            "ends_at": T0 + 60, "charged_until": T0, "charged_nano": 0, "is_closed": False,
        }
        for n in range(METERS_MAX + 1)
    ]  # fmt: skip
    await storage.run(lambda connection: connection.execute(sa.insert(storage_meters), values))
    clock.advance(60.0)
    assert await meters(storage, clock).tick() == METERS_MAX + 1
    assert await still_open(storage) == 0


async def test_ready_objects_without_a_meter_are_found(storage: Storage, clock: FakeClock) -> None:
    await storage.run(lambda connection: add_object(connection, "cache-2"))
    await storage.run(lambda connection: add_object(connection, "cache-dev", project=None))
    await storage.run(lambda connection: add_object(connection, "cache-3", status="pending"))
    service = meters(storage, clock)
    await service.open(life())
    assert await service.missing() == [
        Metered("cache-2", "acme", "web", 7, "kimi", "m", None, 50, clock.now(), T0 + 600)
    ]
    clock.advance(600.0)
    assert await service.missing() == []
