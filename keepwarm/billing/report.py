"""What was used in a period and what it cost, by day, organisation, project, key, model, dialect or price sheet.

Only rows of use count: settled turns, cache objects made, storage. A line is of one currency, and currencies are never
added. Use of a model without prices has no currency and no money, which is not 0: it stands in lines of its own.

Rows are read in parts, so that turns wait for a part at the longest. They are only ever added, in the order of their numbers,
so all up to the last one of the beginning are the ledger at that moment.
"""

from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from enum import Enum
from functools import partial
from typing import Any, TypeVar

import sqlalchemy as sa
from msgspec import Struct
from msgspec.structs import astuple, fields

from keepwarm.billing.row import RowKind
from keepwarm.storage import Storage
from keepwarm.tables import BIG, api_keys, ledger_rows

DAY_S = 86_400
PART = 10_000  # rows in one transaction: some 15 ms in which turns wait
USE_KINDS = (RowKind.SETTLE.value, RowKind.CREATION.value, RowKind.STORAGE.value)

_Sums = TypeVar("_Sums", "Use", "Money")


class By(Enum):
    """What lines can be told apart by; a day is UTC's."""

    DAY = "day"
    ORGANISATION = "organisation"
    PROJECT = "project"
    KEY = "key"
    MODEL = "model"
    DIALECT = "dialect"
    SHEET = "sheet"


class UsageQuery(Struct, frozen=True):
    """Which rows, and what their lines are told apart by. Both days belong to the period; None: no bound, no filter."""

    by: tuple[By, ...] = ()
    first_day: date | None = None
    last_day: date | None = None
    organisation: str | None = None
    project: str | None = None
    key_id: int | None = None
    model: str | None = None
    dialect: str | None = None


class Use(Struct, frozen=True):
    """Counts. Tokens of prompts are disjoint: fresh, read and write; `n_write_long` is part of `n_write`."""

    n_calls: int = 0  # settled turns
    n_fresh: int = 0
    n_read: int = 0
    n_write: int = 0
    n_write_long: int = 0
    n_output: int = 0
    n_object_read: int = 0  # of n_read, read from a cache object
    n_objects: int = 0  # made
    n_object_tokens: int = 0  # of those made
    storage_token_s: int = 0  # tokens times seconds kept


class Money(Struct, frozen=True):
    """Amounts in nano. `cost` is the sum of the classes; what was charged is that and `repeated`, which is 0 or less."""

    fresh: int = 0
    read: int = 0
    write: int = 0
    output: int = 0
    call: int = 0
    creation: int = 0
    storage: int = 0
    repeated: int = 0
    uncached: int = 0  # the same use without caching
    from_vouchers: int = 0
    from_cash: int = 0

    @property
    def cost(self) -> int:
        return self.fresh + self.read + self.write + self.output + self.call + self.creation + self.storage

    @property
    def charged(self) -> int:
        return self.cost + self.repeated

    @property
    def saved(self) -> int:
        """By caching, whoever paid; below 0 where it cost more than it brought."""
        return self.uncached - self.cost


class UsageLine(Struct, frozen=True):
    """`of` has a value for each part of the query's `by`: a date, an int for a key, else a text; None where a row has none.

    `money` is None exactly where `currency` is: there were no prices.
    """

    of: dict[By, date | int | str | None]
    currency: str | None
    use: Use
    money: Money | None


class UsageReport(Struct, frozen=True):
    """Lines in order of what they are told apart by; `totals` are lines of all, one a currency. Names by key's id."""

    query: UsageQuery
    lines: tuple[UsageLine, ...]
    totals: tuple[UsageLine, ...]
    key_names: dict[int, str]

    @property
    def has_unpriced(self) -> bool:
        """Whether some use had no prices, so that no total of money is of all use."""
        return any(line.currency is None for line in self.totals)


def totals(lines: Iterable[UsageLine]) -> tuple[UsageLine, ...]:
    """One line for each currency, in their order, use without prices last."""
    found: dict[str | None, UsageLine] = {}
    for line in lines:
        so_far = found.get(line.currency)
        if so_far is None:
            found[line.currency] = UsageLine({}, line.currency, line.use, line.money)
        else:
            found[line.currency] = _joined(so_far, line, {})
    return tuple(found[currency] for currency in sorted(found, key=lambda one: (one is None, one or "")))


async def usage(storage: Storage, query: UsageQuery, part: int = PART) -> UsageReport:
    """The report of a query, from all rows that are in the ledger now."""
    last = await storage.read(_last)
    found: dict[tuple[Any, ...], UsageLine] = {}
    for begin in range(0, last, part):
        for line in await storage.read(partial(_part, query, begin, min(begin + part, last))):
            key = (*line.of.values(), line.currency)
            found[key] = line if key not in found else _joined(found[key], line, line.of)
    lines = sorted(found.values(), key=_order)
    ids = {value for line in lines if isinstance(value := line.of.get(By.KEY), int)}
    return UsageReport(query, tuple(lines), totals(lines), await storage.read(partial(_key_names, ids)) if ids else {})


def month_days(month: str) -> tuple[date, date]:
    """First and last day of "2026-11". Raises ValueError."""
    first = datetime.strptime(month, "%Y-%m").replace(tzinfo=UTC).date()
    return first, (first.replace(day=28) + timedelta(days=4)).replace(day=1) - timedelta(days=1)


def begin_of(day: date) -> int:
    """Unix seconds at which a day begins, in UTC."""
    return (day - date(1970, 1, 1)).days * DAY_S


def _added(one: _Sums, other: _Sums) -> _Sums:
    return type(one)(*(a + b for a, b in zip(astuple(one), astuple(other), strict=True)))


def _joined(one: UsageLine, other: UsageLine, of: dict[By, date | int | str | None]) -> UsageLine:
    """Both together, of one currency."""
    money = None if one.money is None or other.money is None else _added(one.money, other.money)
    return UsageLine(of, one.currency, _added(one.use, other.use), money)


def _last(connection: sa.Connection) -> int:
    return int(connection.execute(sa.select(sa.func.coalesce(sa.func.max(ledger_rows.c.seq), 0))).scalar_one())


def _part(query: UsageQuery, after: int, last: int, connection: sa.Connection) -> list[UsageLine]:
    """Of the rows with a number above `after` and up to `last`."""
    columns = [_COLUMNS[by].label(by.value) for by in query.by]
    currency, seq = ledger_rows.c.currency, ledger_rows.c.seq
    select = sa.select(*columns, currency, *_USE.values(), *_MONEY.values())
    rows = connection.execute(
        select.where(seq > after, seq <= last, *_conditions(query)).group_by(*columns, currency)
    ).all()
    return [_line(query.by, tuple(row)) for row in rows]


def _conditions(query: UsageQuery) -> list[sa.ColumnElement[bool]]:
    columns = ledger_rows.c
    found: list[sa.ColumnElement[bool]] = [columns.kind.in_(USE_KINDS)]
    if query.first_day is not None:
        found.append(columns.at >= begin_of(query.first_day))
    if query.last_day is not None:
        found.append(columns.at < begin_of(query.last_day) + DAY_S)
    for name in ("organisation", "project", "key_id", "model", "dialect"):
        wanted = getattr(query, name)
        if wanted is not None:
            found.append(columns[name] == wanted)
    return found


def _line(by: tuple[By, ...], row: tuple[Any, ...]) -> UsageLine:
    of = dict(zip(by, row[: len(by)], strict=True))
    if By.DAY in of:
        of[By.DAY] = date(1970, 1, 1) + timedelta(days=of[By.DAY])
    currency, *sums = row[len(by) :]
    use = Use(*map(int, sums[: len(_USE)]))
    return UsageLine(of, currency, use, None if currency is None else Money(*map(int, sums[len(_USE) :])))


def _order(line: UsageLine) -> tuple[tuple[bool, Any], ...]:
    """By value, None last."""
    values = (*line.of.values(), line.currency)
    return tuple((value is None, "" if value is None else value) for value in values)


def _key_names(ids: set[int], connection: sa.Connection) -> dict[int, str]:
    """Ids are few: one a key that was used."""
    found = connection.execute(sa.select(api_keys.c.seq, api_keys.c.name))
    return {row.seq: row.name for row in found if row.seq in ids}


def _sum_where(kind: RowKind, value: Any) -> sa.ColumnElement[int]:  # noqa: ANN401 - an int or SQL for one
    return sa.func.coalesce(sa.func.sum(sa.case((ledger_rows.c.kind == kind.value, value), else_=0)), 0)


def _sum(value: sa.ColumnElement[int]) -> sa.ColumnElement[int]:
    return sa.func.coalesce(sa.func.sum(value), 0)


_OF = ledger_rows.c
_COLUMNS: dict[By, sa.ColumnElement[Any]] = {
    # Whole seconds first: a float of days rounds a moment before midnight up.
    By.DAY: sa.cast(sa.func.floor(_OF.at), BIG) // DAY_S,
    By.ORGANISATION: _OF.organisation,
    By.PROJECT: _OF.project,
    By.KEY: _OF.key_id,
    By.MODEL: _OF.model,
    By.DIALECT: _OF.dialect,
    By.SHEET: _OF.sheet,
}
_USE = {
    "n_calls": _sum_where(RowKind.SETTLE, 1),
    "n_fresh": _sum(_OF.n_fresh),
    "n_read": _sum(_OF.n_read),
    "n_write": _sum(_OF.n_write),
    "n_write_long": _sum(_OF.n_write_long),
    "n_output": _sum(_OF.n_output),
    "n_object_read": _sum_where(RowKind.SETTLE, _OF.n_object),
    "n_objects": _sum_where(RowKind.CREATION, 1),
    "n_object_tokens": _sum_where(RowKind.CREATION, _OF.n_object),
    "storage_token_s": _sum_where(RowKind.STORAGE, _OF.n_object * _OF.n_units),
}
_MONEY = {
    **{name: _sum(_OF[f"{name}_nano"]) for name in ("fresh", "read", "write", "output", "call", "creation", "storage")},
    "repeated": _sum(_OF.repeated_nano),
    "uncached": _sum(_OF.uncached_nano),
    "from_vouchers": -_sum(_OF.voucher_nano),
    "from_cash": -_sum(_OF.cash_nano),
}
assert tuple(_USE) == tuple(field.name for field in fields(Use))
assert tuple(_MONEY) == tuple(field.name for field in fields(Money))
