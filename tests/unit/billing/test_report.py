import asyncio
import csv
import io
import random
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from keepwarm.billing.report import By, Money, UsageQuery, UsageReport, month_days, usage
from keepwarm.billing.report_text import usage_csv, usage_reply
from keepwarm.billing.rows import RowQuery, rows
from keepwarm.billing.sheet import decimal_text
from keepwarm.billing.written import Written
from keepwarm.storage import Storage, database_path
from keepwarm.tables import api_keys, ledger_rows
from tests import used
from tests.world import FakeClock

CLASSES = ("fresh", "read", "write", "output", "call", "creation", "storage")
MIDNIGHT = 1_699_920_000.0
QUERIES = [
    UsageQuery(),
    *(UsageQuery(by=(by,)) for by in By),
    UsageQuery(by=(By.DAY, By.KEY, By.MODEL)),
    UsageQuery(by=tuple(By)),
    UsageQuery(by=(By.DAY,), first_day=date(2023, 11, 14), last_day=date(2023, 11, 14)),
    UsageQuery(by=(By.PROJECT,), organisation="acme", first_day=date(2023, 11, 15)),
    UsageQuery(project="web", key_id=2, model="m1", dialect="kimi"),
]


def random_row(draw: random.Random, n: int) -> dict[str, Any]:
    """Of any kind, at any second of four days, some a moment from midnight; every column that is added up has a value."""
    kind = draw.choice(["settle", "settle", "creation", "storage", "hold", "grant", "adjust"])
    currency = draw.choice(["CNY", "USD", None])
    is_use = kind in ("settle", "creation", "storage")
    at = MIDNIGHT + draw.choice([0.0, -(2.0**-22), 86_400.0, 86_399.999, draw.uniform(-86_400, 3 * 86_400)])
    row: dict[str, Any] = {column.name: None for column in ledger_rows.c if column.name != "seq"}
    row |= {
        "id": f"r{n}", "kind": kind, "at": at, "organisation": draw.choice(["acme", "umbra"]),
        "project": draw.choice(["web", "bot", None]), "key_id": draw.choice([1, 2, 3, None]),
        "dialect": draw.choice(["kimi", "openai"]), "model": draw.choice(["m1", "m2"]), "currency": currency,
        "sheet": None if currency is None else "s@1", "cash_nano": draw.randrange(-(10**12), 10**12),
        "voucher_nano": -draw.randrange(10**12), "held_nano": 0,
    }  # fmt: skip
    if kind == "settle":
        row |= {name: draw.randrange(10**6) for name in ("n_fresh", "n_read", "n_write", "n_write_long", "n_output")}
    if is_use:
        row["n_object"] = draw.randrange(10**6)
    if kind == "storage":
        row["n_units"] = draw.randrange(10**5)
    if is_use and currency is not None:
        row |= {f"{name}_nano": draw.randrange(10**12) for name in CLASSES}
        row |= {"repeated_nano": -draw.randrange(10**9), "uncached_nano": draw.randrange(10**13)}
    return row


@pytest.fixture
def storage(any_database: Path | str) -> Iterator[Storage]:
    opened = Storage.open(any_database, busy_s=1.0)
    draw = random.Random(6)
    found = [random_row(draw, n) for n in range(1_500)]
    opened.run_sync(lambda connection: connection.execute(sa.insert(ledger_rows), found))
    key = {"name": "ci", "organisation": "acme", "digest": b"d", "last4": "abcd", "created_at": 0}
    opened.run_sync(lambda connection: connection.execute(sa.insert(api_keys), [key]))
    yield opened
    opened.close()


def report(storage: Storage, query: UsageQuery) -> UsageReport:
    return asyncio.run(usage(storage, query, part=400))


def day_of(row: Written) -> date:
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=row.at // 1)).date()


def is_asked(row: Written, query: UsageQuery) -> bool:
    return (
        row.kind in ("settle", "creation", "storage")
        and (query.first_day is None or day_of(row) >= query.first_day)
        and (query.last_day is None or day_of(row) <= query.last_day)
        and all(
            getattr(query, name) in (None, getattr(row, name))
            for name in ("organisation", "project", "key_id", "model", "dialect")
        )
    )


def summed(several: list[Written]) -> dict[str, int]:
    """Every number of a line, one row after the other."""
    found: defaultdict[str, int] = defaultdict(int)
    for row in several:
        found["n_calls"] += row.kind == "settle"
        found["n_objects"] += row.kind == "creation"
        found["n_object_tokens"] += (row.n_object or 0) if row.kind == "creation" else 0
        found["n_object_read"] += (row.n_object or 0) if row.kind == "settle" else 0
        found["storage_token_s"] += (row.n_object or 0) * (row.n_units or 0) if row.kind == "storage" else 0
        for name in ("n_fresh", "n_read", "n_write", "n_write_long", "n_output"):
            found[name] += getattr(row, name) or 0
        for name in (*CLASSES, "repeated", "uncached"):
            found[name] += getattr(row, f"{name}_nano") or 0
        found["from_vouchers"] -= row.voucher_nano
        found["from_cash"] -= row.cash_nano
    found["cost"] = sum(found[name] for name in CLASSES)
    found["charged"] = found["cost"] + found["repeated"]
    found["saved"] = found["uncached"] - found["cost"]
    return dict(found)


@pytest.mark.parametrize("query", QUERIES, ids=repr)
def test_every_number_is_the_sum_over_its_rows(storage: Storage, query: UsageQuery) -> None:
    told = report(storage, query)
    groups: defaultdict[tuple[object, ...], list[Written]] = defaultdict(list)
    columns = {By.KEY: "key_id"}
    for row in asyncio.run(rows(storage, RowQuery(None, None, 10_000))):
        if is_asked(row, query):
            of = [day_of(row) if by is By.DAY else getattr(row, columns.get(by, by.value)) for by in query.by]
            groups[(*of, row.currency)].append(row)
    assert {(*line.of.values(), line.currency) for line in told.lines} == set(groups)
    assert len(told.lines) == len(groups)
    reply = usage_reply(told)
    for line, item in zip(told.lines, reply.data, strict=True):
        expected = summed(groups[(*line.of.values(), line.currency)])
        counts = {
            name: number for name, number in expected.items() if name.startswith("n_") or name == "storage_token_s"
        }
        assert msgspec.structs.asdict(line.use) == counts
        amounts = {name: number for name, number in expected.items() if name not in counts}
        if line.currency is None:
            assert line.money is None
            assert all(getattr(item, name) is None for name in amounts)
        else:
            assert line.money is not None
            assert {name: getattr(line.money, name) for name in amounts} == amounts
            assert {name: getattr(item, name) for name in amounts} == {k: decimal_text(v) for k, v in amounts.items()}
    by_currency: defaultdict[object, list[Written]] = defaultdict(list)
    for key, several in groups.items():
        by_currency[key[-1]] += several
    for total in told.totals:
        expected = summed(by_currency[total.currency])
        assert total.use.n_fresh == expected["n_fresh"]
        assert (total.money is None) == (total.currency is None)
        assert total.money is None or total.money.charged == expected["charged"]
    assert told.has_unpriced == (None in by_currency)


async def test_others_write_between_two_parts_and_are_not_in_the_report(storage: Storage) -> None:
    before = await usage(storage, UsageQuery())
    asked = asyncio.create_task(usage(storage, UsageQuery(), part=1))
    n_written = 0
    while not asked.done():
        row = random_row(random.Random(n_written), 10_000 + n_written)
        await storage.run(lambda connection, row=row: connection.execute(sa.insert(ledger_rows), [row]))
        n_written += 1
    assert n_written > 100
    assert asked.result() == before != await usage(storage, UsageQuery())


def test_lines_are_in_order_of_day_with_no_value_last(storage: Storage) -> None:
    lines = report(storage, UsageQuery(by=(By.DAY, By.PROJECT))).lines
    days = [str(line.of[By.DAY]) for line in lines]
    assert days == sorted(days)
    first = [line.of[By.PROJECT] for line in lines if str(line.of[By.DAY]) == days[0]]
    assert first == sorted(first, key=lambda name: (name is None, str(name)))


def test_csv_has_the_lines_of_the_json_and_key_names(storage: Storage) -> None:
    told = report(storage, UsageQuery(by=(By.KEY,)))
    read = list(csv.DictReader(io.StringIO(usage_csv(told))))
    items = msgspec.to_builtins(usage_reply(told).data)
    assert read == [{name: "" if value is None else str(value) for name, value in item.items()} for item in items]
    assert {row["key_name"] for row in read if row["key"] == "1"} == {"ci"}
    assert {row["key_name"] for row in read if row["key"] == "2"} == {""}


def test_a_name_that_looks_like_a_formula_is_text_in_csv(storage: Storage) -> None:
    rename = sa.update(ledger_rows).values(project="=1+1")
    storage.run_sync(lambda connection: connection.execute(rename))
    assert "\n'=1+1," in usage_csv(report(storage, UsageQuery(by=(By.PROJECT,))))


def test_an_empty_ledger_has_no_lines_and_no_totals(tmp_path: Path) -> None:
    opened = Storage.open(database_path(tmp_path), busy_s=1.0)
    told = report(opened, UsageQuery(by=(By.DAY,)))
    opened.close()
    assert (told.lines, told.totals, told.has_unpriced) == ((), (), False)


def test_what_was_charged_is_what_left_vouchers_and_cash(tmp_path: Path) -> None:
    opened = used.make(tmp_path, FakeClock())
    told = report(opened, UsageQuery(by=(By.MODEL,)))
    opened.close()
    for line in told.totals:
        assert line.money is None or line.money.charged == line.money.from_vouchers + line.money.from_cash
    money = {line.currency: line.money for line in told.totals}["CNY"]
    assert money is not None
    # t2: 100,000 tokens of an object, the making and 4 begun minutes of it: kept for 230 s.
    assert (money.call, money.creation, money.storage) == (20_000_000, 2_400_000_000, 4_000_000_000)
    assert money.repeated == -108_012_000  # t6: 9,001 tokens at 12 per million


def test_saved_is_below_0_where_caching_cost_more() -> None:
    assert Money(write=125, uncached=100).saved == -25


@pytest.mark.parametrize(
    "month, last", [("2026-11", date(2026, 11, 30)), ("2024-02", date(2024, 2, 29)), ("2026-12", date(2026, 12, 31))]
)
def test_a_month_has_all_its_days(month: str, last: date) -> None:
    assert month_days(month) == (last.replace(day=1), last)


def test_amounts_are_exact() -> None:
    assert Decimal(decimal_text(123_456_789_012_345_678_901)) * 10**9 == 123_456_789_012_345_678_901
