"""keepwarm usage and keepwarm invoice: what was used and what it cost."""

from collections.abc import Iterable
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from keepwarm.billing.invoice import invoice as invoice_page
from keepwarm.billing.invoice import invoice_query
from keepwarm.billing.report import By, UsageLine, UsageQuery, UsageReport
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
    console = Console()
    table = Table(show_footer=False)
    for by in report.query.by:
        table.add_column(by.value)
    table.add_column("currency")
    for heading in (
        "calls",
        "fresh",
        "read",
        "write",
        "output",
        "storage h·Mtok",
        "cost",
        "charged",
        "uncached",
        "saved",
    ):
        table.add_column(heading, justify="right")
    for line in report.lines:
        table.add_row(*map(escape, (*_names(line, report), *_numbers(line))))
    if len(report.lines) > len(report.totals):
        table.add_section()
        for line in report.totals:
            label = ["total", *[""] * (len(report.query.by) - 1)] if report.query.by else []
            table.add_row(*map(escape, (*label, *_numbers(line))))
    console.print(table)
    if report.has_unpriced:
        console.print("Lines without a currency are use of models that had no prices: it is in no amount above.")


def _names(line: UsageLine, report: UsageReport) -> Iterable[str]:
    for by, value in line.of.items():
        name = report.key_names.get(value) if by is By.KEY and isinstance(value, int) else None
        yield "" if value is None else str(value) if name is None else f"{value} {name}"


def _numbers(line: UsageLine) -> list[str]:
    use, money = line.use, line.money
    counts = (use.n_calls, use.n_fresh, use.n_read, use.n_write, use.n_output)
    amounts = () if money is None else (money.cost, money.charged, money.uncached, money.saved)
    return [
        line.currency or "",
        *(f"{count:,}" for count in counts),
        f"{use.storage_token_s / 3.6e9:,.6f}",
        *(map(decimal_text, amounts) if amounts else [""] * 4),
    ]
