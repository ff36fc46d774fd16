import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from keepwarm.billing.price_book import NoSuchPricesError
from keepwarm.billing.recount import Fault, Prices
from keepwarm.billing.row import Priced
from keepwarm.billing.sheet import ModelPrices
from keepwarm.billing.verify import verify
from keepwarm.storage import Storage
from tests import used
from tests.world import FakeClock

Told = Callable[[int, int], None]


def faults(
    storage: Storage, part: int = 5_000, prices: Prices = used.BOOK.prices, told: Told = lambda _n, _of: None
) -> list[Fault]:
    async def run() -> list[Fault]:
        return [one async for one in verify(storage, prices, told, part)]

    return asyncio.run(run())


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Storage]:
    storage = used.make(tmp_path, FakeClock())
    yield storage
    storage.close()


def change(storage: Storage, sql: str) -> None:
    """One cell, by hand."""

    def run(connection: sa.Connection) -> None:
        assert connection.exec_driver_sql(sql).rowcount == 1, sql

    storage.run_sync(run)


@pytest.mark.parametrize("part", [1, 2, 7, 5_000])
def test_a_ledger_that_the_services_wrote_has_no_fault(ledger: Storage, part: int) -> None:
    assert faults(ledger, part) == []


def test_progress_counts_all_rows(ledger: Storage) -> None:
    told: list[tuple[int, int]] = []
    assert faults(ledger, 7, told=lambda n, of: told.append((n, of))) == []
    n_rows = ledger.run_sync(lambda it: it.exec_driver_sql("SELECT count(*) FROM ledger_rows").scalar_one())
    assert [n for n, _ in told] == [*range(7, n_rows, 7), n_rows]
    assert {of for _, of in told} == {n_rows}


FIRST_STORAGE = "seq = (SELECT min(seq) FROM ledger_rows WHERE kind = 'storage')"
MONEY = ("fresh", "read", "write", "output", "call", "creation", "storage", "repeated", "uncached")
COUNTS = ("n_fresh", "n_read", "n_write", "n_write_long", "n_output", "n_object")


@pytest.mark.parametrize(
    "change_sql",
    [
        *(f"UPDATE ledger_rows SET {name}_nano = {name}_nano + 1 WHERE id = 't2/settle'" for name in MONEY[:7]),
        *(f"UPDATE ledger_rows SET {name}_nano = {name}_nano + 1 WHERE id = 't7/settle'" for name in MONEY[7:]),
        *(f"UPDATE ledger_rows SET {name} = {name} + 1000 WHERE id = 't3/settle'" for name in COUNTS[:5]),
        "UPDATE ledger_rows SET n_object = n_object - 1000000 WHERE id = 't2/settle'",
        "UPDATE ledger_rows SET n_object = 0 WHERE id = 't2/settle'",
        "UPDATE ledger_rows SET n_write_long = 901 WHERE id = 't3/settle'",
        "UPDATE ledger_rows SET n_output = NULL WHERE id = 't5/settle'",
        "UPDATE ledger_rows SET n_output = -1 WHERE id = 't5/settle'",
        "UPDATE ledger_rows SET fresh_nano = 0 WHERE id = 't5/settle'",
        "UPDATE ledger_rows SET fresh_nano = NULL WHERE id = 't1/settle'",
        *(f"UPDATE ledger_rows SET {name}_nano = {name}_nano + 1 WHERE id = 't1/settle'" for name in ("cash", "voucher", "held")),
        "UPDATE ledger_rows SET cash_nano = cash_nano + 1, voucher_nano = voucher_nano - 1 WHERE id = 't1/settle'",
        *(f"UPDATE ledger_rows SET {name}_nano = 1 WHERE id = 't9/expire'" for name in ("cash", "voucher", "held")),
        *(f"UPDATE ledger_rows SET {name}_nano = 1 WHERE id = 't8/release'" for name in ("cash", "voucher", "held")),
        "UPDATE ledger_rows SET held_nano = held_nano + 1 WHERE id = 't1/hold'",
        "UPDATE ledger_rows SET held_nano = -1 WHERE id = 't11/hold'",
        "UPDATE ledger_rows SET n_object = n_object + 1 WHERE id = 'made/creation'",
        "UPDATE ledger_rows SET creation_nano = creation_nano + 1, cash_nano = cash_nano - 1 WHERE id = 'made/creation'",
        f"UPDATE ledger_rows SET n_units = n_units + 1 WHERE {FIRST_STORAGE}",
        f"UPDATE ledger_rows SET storage_nano = storage_nano + 1, cash_nano = cash_nano - 1 WHERE {FIRST_STORAGE}",
        "UPDATE ledger_rows SET kind = 'gift' WHERE id = 't1/settle'",
        "UPDATE ledger_rows SET kind = 'release' WHERE id = 't9/expire'",
        "UPDATE ledger_rows SET organisation = 'umbra' WHERE id = 't1/settle'",
        "UPDATE ledger_rows SET project = 'bot' WHERE id = 't1/settle'",
        "UPDATE ledger_rows SET key_id = 8 WHERE id = 't1/settle'",
        "UPDATE ledger_rows SET turn_id = 't2' WHERE id = 't1/settle'",
        "UPDATE ledger_rows SET currency = 'USD' WHERE id = 't1/settle'",
        "UPDATE ledger_rows SET sheet = 'kimi@2024-07-01', sheet_model = 'moonshot-v1-8k' WHERE id = 't3/settle'",
        "UPDATE ledger_rows SET sheet_model = 'moonshot-v1-32k' WHERE id = 't1/settle'",
        "UPDATE ledger_rows SET sheet = NULL WHERE id = 't1/settle'",
        "UPDATE ledger_rows SET at = at - 86400 WHERE id = 't10/settle'",
        "UPDATE ledger_rows SET cash_nano = cash_nano + 1 WHERE kind = 'adjust'",
        "UPDATE ledger_rows SET voucher_nano = voucher_nano + 1 WHERE kind = 'adjust'",
        "UPDATE ledger_rows SET cash_nano = cash_nano + 1 WHERE kind = 'grant' AND voucher_id IS NULL",
        "UPDATE ledger_rows SET voucher_nano = voucher_nano + 1 WHERE kind = 'lapse'",
        "UPDATE ledger_rows SET voucher_nano = 299999999 WHERE kind = 'grant' AND voucher_nano = 300000000",
        "DELETE FROM ledger_rows WHERE id = 't1/settle'",
        "DELETE FROM ledger_rows WHERE id = 't1/hold'",
        "DELETE FROM ledger_rows WHERE id = 't8/release'",
        "DELETE FROM ledger_rows WHERE id = 't11/hold'",
        *(f"UPDATE accounts SET {name}_nano = {name}_nano + 1 WHERE organisation = 'acme' AND currency = 'CNY'" for name in ("cash", "voucher", "held")),
        "DELETE FROM accounts WHERE organisation = 'umbra' AND currency = 'USD'",
        "UPDATE accounts SET currency = 'EUR' WHERE organisation = 'umbra' AND currency = 'USD'",
        "UPDATE vouchers SET left_nano = left_nano + 1 WHERE granted_nano = 100000000",
        "UPDATE vouchers SET granted_nano = granted_nano + 1 WHERE granted_nano = 100000000",
        "DELETE FROM vouchers WHERE granted_nano = 100000000",
        "UPDATE holds SET amount_nano = amount_nano + 1",
        "UPDATE holds SET organisation = 'acme'",
        "DELETE FROM holds",
        "UPDATE spending SET spent_nano = spent_nano + 1 WHERE scope = 'key:7'",
        "DELETE FROM spending WHERE scope = 'key:7'",
        "DELETE FROM budgets WHERE scope = 'key:7'",
        "UPDATE storage_meters SET charged_nano = charged_nano + 1 WHERE object_id = 'cache-1'",
        "UPDATE storage_meters SET charged_until = charged_until + 61 WHERE object_id = 'cache-1'",
        "UPDATE storage_meters SET n_tokens = n_tokens + 1000 WHERE object_id = 'cache-1'",
        "UPDATE storage_meters SET ends_at = ends_at + 61 WHERE object_id = 'cache-1'",
        "UPDATE storage_meters SET ends_at = ends_at - 61 WHERE object_id = 'cache-2'",
        "UPDATE storage_meters SET object_id = 'cache-9' WHERE object_id = 'cache-2'",
        "UPDATE cache_objects SET expires_at = expires_at + 61 WHERE status = 'ready'",
        "DELETE FROM storage_meters WHERE object_id = 'cache-1'",
        "DELETE FROM storage_meters WHERE object_id = 'cache-2'",
    ],
)  # fmt: skip
def test_a_cell_changed_by_hand_is_found(ledger: Storage, change_sql: str) -> None:
    change(ledger, change_sql)
    assert faults(ledger) != []


def test_a_fault_tells_the_row_and_both_numbers(ledger: Storage) -> None:
    change(ledger, "UPDATE ledger_rows SET output_nano = output_nano + 1 WHERE id = 't1/settle'")
    found = faults(ledger)
    assert found[0].where == "t1/settle"
    assert "output_nano is 8400001, by its sheet kimi@2024-07-01 it is 8400000" in [one.message for one in found]


def test_a_sheet_that_is_gone_is_told(ledger: Storage) -> None:
    def none(priced: Priced) -> ModelPrices:
        raise NoSuchPricesError(f"there are no prices {priced.sheet}")

    assert Fault("t1/settle", "there are no prices kimi@2024-07-01") in faults(ledger, prices=none)


def test_on_postgresql_too(postgresql_url: str) -> None:
    storage = used.make(postgresql_url, FakeClock())
    assert faults(storage, 7) == []
    change(storage, "UPDATE ledger_rows SET read_nano = read_nano + 1 WHERE id = 't1/settle'")
    assert {fault.where for fault in faults(storage, 7)} == {"t1/settle"}
    storage.close()


def test_cash_taken_while_a_voucher_had_more_is_found_though_all_sums_agree(ledger: Storage) -> None:
    mine = "organisation = 'acme' AND currency = 'CNY'"
    for sql in (
        "UPDATE ledger_rows SET cash_nano = cash_nano - 9, voucher_nano = voucher_nano + 9 WHERE id = 't1/settle'",
        f"UPDATE accounts SET cash_nano = cash_nano - 9, voucher_nano = voucher_nano + 9 WHERE {mine}",
        "UPDATE vouchers SET left_nano = left_nano + 9 WHERE granted_nano = 300000000",
    ):
        change(ledger, sql)
    assert any(one.where == "t1/settle" and "from vouchers, not" in one.message for one in faults(ledger))
