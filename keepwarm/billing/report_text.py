"""A usage report for programs: JSON and CSV. Amounts are decimals as text, exact to the nano, and null without prices."""

import csv
import io
from datetime import date

import msgspec
from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import asdict

from keepwarm.billing.report import By, UsageLine, UsageReport
from keepwarm.billing.sheet import decimal_text

Told = str | UnsetType | None  # left out where lines are not told apart by it


class UsageItem(Struct, frozen=True, kw_only=True):
    """One line. The first members are there when they were asked for; amounts are in `currency`."""

    day: Told = UNSET
    organisation: Told = UNSET
    project: Told = UNSET
    key: int | UnsetType | None = UNSET
    key_name: Told = UNSET
    model: Told = UNSET
    dialect: Told = UNSET
    sheet: Told = UNSET
    currency: str | None
    n_calls: int
    n_fresh: int
    n_read: int
    n_write: int
    n_write_long: int
    n_output: int
    n_object_read: int
    n_objects: int
    n_object_tokens: int
    storage_token_s: int
    fresh: str | None
    read: str | None
    write: str | None
    output: str | None
    call: str | None
    creation: str | None
    storage: str | None
    cost: str | None
    repeated: str | None
    charged: str | None
    uncached: str | None
    saved: str | None
    from_vouchers: str | None
    from_cash: str | None


class UsageReply(Struct, frozen=True):
    """`data` by what was asked for; `totals` one a currency; `has_unpriced`: some use had no prices and is in no amount."""

    data: tuple[UsageItem, ...]
    totals: tuple[UsageItem, ...]
    has_unpriced: bool


def usage_reply(report: UsageReport) -> UsageReply:
    """A report as it is told."""
    return UsageReply(
        tuple(_item(line, report) for line in report.lines),
        tuple(_item(line, report) for line in report.totals),
        report.has_unpriced,
    )


def usage_csv(report: UsageReport) -> str:
    """Lines alone, for sheets that add up by themselves; an absent value is an empty cell."""
    text = io.StringIO()
    by = [name for part in report.query.by for name in ((part.value, "key_name") if part is By.KEY else (part.value,))]
    names = by + [name for name in UsageItem.__struct_fields__ if name not in _TOLD_APART]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for line in report.lines:
        item = msgspec.to_builtins(_item(line, report))
        writer.writerow([_cell(item[name]) for name in names])
    return text.getvalue()


_TOLD_APART = {part.value for part in By} | {"key_name"}


def _item(line: UsageLine, report: UsageReport) -> UsageItem:
    of = {by.value: value.isoformat() if isinstance(value, date) else value for by, value in line.of.items()}
    if By.KEY in line.of:
        key = line.of[By.KEY]
        of["key_name"] = report.key_names.get(key) if isinstance(key, int) else None
    money = line.money
    amounts = {} if money is None else {name: getattr(money, name) for name in _AMOUNTS}
    told = {name: decimal_text(amounts[name]) if name in amounts else None for name in _AMOUNTS}
    return msgspec.convert({**of, "currency": line.currency, **asdict(line.use), **told}, UsageItem)


_AMOUNTS = (
    *("fresh", "read", "write", "output", "call", "creation", "storage"),
    *("cost", "repeated", "charged", "uncached", "saved", "from_vouchers", "from_cash"),
)


def _cell(value: object) -> object:
    """Spreadsheets run a text that begins like a formula; names are others' choice."""
    if isinstance(value, str) and value[:1] in ("=", "+", "@", "\t", "\r"):
        return "'" + value
    return "" if value is None else value
