"""keepwarm usage and keepwarm invoice: what was used and what it cost."""

from collections.abc import Iterable
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from keepwarm.billing.invoice import invoice as invoice_page
from keepwarm.billing.invoice import invoice_query
from keepwarm.billing.report import By, Money, UsageLine, UsageQuery, UsageReport
from keepwarm.billing.report import usage as usage_report
from keepwarm.billing.report_text import usage_csv, usage_reply
from keepwarm.billing.sheet import decimal_text
from keepwarm.cli.database import with_storage
from keepwarm.cli.failure import fail
from keepwarm.cli.options import DatabaseUrl, DataDir
from keepwarm.core.clock import SystemClock
from keepwarm.core.errors import ApiError

USAGE_EXAMPLE = "keepwarm usage --by day,model --from 2026-11-01 --org research"
INVOICE_EXAMPLE = "keepwarm invoice research 2026-11 --out research.html"
PARTS = ", ".join(by.value for by in By)
COUNTS = ("calls", "fresh", "read", "write", "output", "token-h")
AMOUNTS = ("cost", "charged", "uncached", "saved")
NAME_CHARS_MIN = 10  # a day's: what a column of names has at the least, whatever the terminal
WIDTH_MAX = 10_000  # of a table that is measured


class Format(Enum):
    """How a report is printed."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"


Parts = Annotated[str, typer.Option("--by", metavar="PART,…", help=f"What lines are told apart by: {PARTS}.")]
FirstDay = Annotated[
    datetime | None,
    typer.Option("--from", formats=["%Y-%m-%d"], metavar="DAY", help="First day, in UTC.", show_default=False),
]
LastDay = Annotated[
    datetime | None,
    typer.Option("--to", formats=["%Y-%m-%d"], metavar="DAY", help="Last day, in UTC.", show_default=False),
]
OrgFilter = Annotated[str | None, typer.Option("--org", metavar="ORG", help="Only this organisation's.")]
ProjectFilter = Annotated[str | None, typer.Option("--project", metavar="PROJECT", help="Only this project's.")]
KeyFilter = Annotated[int | None, typer.Option("--key", metavar="ID", help="Only this key's.")]
ModelFilter = Annotated[str | None, typer.Option("--model", metavar="NAME", help="Only this model's.")]
DialectFilter = Annotated[str | None, typer.Option("--dialect", metavar="NAME", help="Only this dialect's.")]
As = Annotated[Format, typer.Option("--format", help="How it is printed.")]
OutFile = Annotated[Path, typer.Option("--out", metavar="FILE.html", help="Where the page is written.")]


def usage(  # noqa: PLR0913 - a command has the options it has
    by: Parts = "model", first: FirstDay = None, last: LastDay = None, org: OrgFilter = None,
    project: ProjectFilter = None, key: KeyFilter = None, model: ModelFilter = None, dialect: DialectFilter = None,
    output: As = Format.TABLE, data_dir: DataDir = None, database_url: DatabaseUrl = None,
) -> None:  # fmt: skip
    """Show what was used and what it cost, beside what the same use would have cost without caching."""
    query = UsageQuery(
        by=_parts(by),
        first_day=None if first is None else first.date(),
        last_day=None if last is None else last.date(),
        organisation=org,
        project=project,
        key_id=key,
        model=model,
        dialect=dialect,
    )
    report = with_storage(data_dir, lambda storage: usage_report(storage, query), database_url=database_url)
    if output is Format.CSV:
        typer.echo(usage_csv(report), nl=False)
    elif output is Format.JSON:
        typer.echo(msgspec.json.format(msgspec.json.encode(usage_reply(report))).decode())
    else:
        _print(report)


def invoice(
    org: Annotated[str, typer.Argument(metavar="ORG", help="Whose.")],
    month: Annotated[str, typer.Argument(metavar="MONTH", help="Such as 2026-11; in UTC.")],
    out: OutFile, data_dir: DataDir = None, database_url: DatabaseUrl = None,
) -> None:  # fmt: skip
    """Write a month of an organisation as an HTML page that needs nothing else."""
    try:
        query = invoice_query(org, month)
    except ApiError as error:
        fail(error.message)
    report = with_storage(data_dir, lambda storage: usage_report(storage, query), database_url=database_url)
    try:
        out.write_text(invoice_page(report, SystemClock().now()), encoding="utf-8")
    except OSError as error:
        fail(f"cannot write {out}: {error.strerror}")
    typer.echo(f"wrote {out}")


def _parts(text: str) -> tuple[By, ...]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = {by.value: by for by in By}
    wrong = [name for name in names if name not in known]
    if wrong:
        fail(f"--by: {wrong[0]!r} is none of {PARTS}")
    return tuple(dict.fromkeys(known[name] for name in names))


def _print(report: UsageReport) -> None:
    """Two tables, since both side by side are wider than most terminals."""
    named = [*((list(_names(line, report)), line) for line in report.lines), *_totals(report)]
    parts = [by.value for by in report.query.by]
    _print_table("tokens", parts, COUNTS, [(names, _counts(line), line.currency) for names, line in named])
    typer.echo()
    paid = [(names, _amounts(line.money), line.currency) for names, line in named if line.money is not None]
    _print_table("money", parts, AMOUNTS, paid)
    if report.has_unpriced:
        Console().print("Lines without a currency are use of models that had no prices: it is in no amount.")


def _totals(report: UsageReport) -> list[tuple[list[str], UsageLine]]:
    """Where they say more than the lines do."""
    if len(report.lines) <= len(report.totals):
        return []
    label = ["total", *[""] * (len(report.query.by) - 1)] if report.query.by else []
    return [(label, line) for line in report.totals]


def _print_table(
    title: str, parts: list[str], headings: tuple[str, ...], rows: list[tuple[list[str], list[str], str | None]]
) -> None:
    """As wide as the terminal, or wider where numbers need it: names are folded, numbers are whole."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for part in parts:
        table.add_column(part, overflow="fold", max_width=NAME_CHARS_MIN)
    table.add_column("currency", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for names, numbers, currency in rows:
        table.add_row(*map(escape, (*names, currency or "", *numbers)))
    console = Console()
    least = Measurement.get(console, console.options.update(max_width=WIDTH_MAX), table).maximum
    for column in table.columns[: len(parts)]:
        column.max_width = None
    Console(width=max(console.width, least)).print(table)


def _names(line: UsageLine, report: UsageReport) -> Iterable[str]:
    for by, value in line.of.items():
        name = report.key_names.get(value) if by is By.KEY and isinstance(value, int) else None
        yield "" if value is None else str(value) if name is None else f"{value} {name}"


def _counts(line: UsageLine) -> list[str]:
    use = line.use
    counts = (use.n_calls, use.n_fresh, use.n_read, use.n_write, use.n_output)
    return [*(f"{count:,}" for count in counts), f"{use.storage_token_s / 3600:,.3f}" if use.storage_token_s else "0"]


def _amounts(money: Money) -> list[str]:
    return [decimal_text(amount) for amount in (money.cost, money.charged, money.uncached, money.saved)]
