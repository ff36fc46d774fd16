"""keepwarm ledger: count it anew, show it, and bring credit in."""

import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from keepwarm.billing.amount import checked_currency, nano_of
from keepwarm.billing.ledger import Ledger
from keepwarm.billing.price_book import PriceBook, all_sheets
from keepwarm.billing.rows import RowQuery
from keepwarm.billing.rows import rows as ledger_rows
from keepwarm.billing.sheet import decimal_text
from keepwarm.billing.sheet_file import SheetError
from keepwarm.billing.verify import verify as verified
from keepwarm.cli.database import with_storage
from keepwarm.cli.failure import fail
from keepwarm.cli.options import AsJson, ConfigFile, DatabaseUrl, DataDir, configured
from keepwarm.cli.orgs import print_json
from keepwarm.core.clock import RandomIds, SystemClock
from keepwarm.core.errors import ApiError
from keepwarm.gateway.identities import Identities
from keepwarm.storage import Storage

VERIFY_EXAMPLE = "keepwarm ledger verify --config keepwarm.toml"
BALANCE_EXAMPLE = "keepwarm ledger balance research"
GRANT_EXAMPLE = "keepwarm ledger grant research 100 USD"
VOUCHER_EXAMPLE = "keepwarm ledger voucher research 25 USD --days 90"
ADJUST_EXAMPLE = "keepwarm ledger adjust research 12.50 USD --note refund"
ROWS_EXAMPLE = "keepwarm ledger rows --org research --limit 50"

FAULTS_SHOWN = 1000
T = TypeVar("T")

Org = Annotated[str, typer.Argument(metavar="ORG", help="The organisation.")]
Amount = Annotated[str, typer.Argument(metavar="AMOUNT", help='A decimal such as "12.50".')]
Currency = Annotated[str, typer.Argument(metavar="CURRENCY", help="Such as USD.")]
Note = Annotated[str | None, typer.Option("--note", metavar="TEXT", help="Kept with the row.")]


def verify(config: ConfigFile = None, data_dir: DataDir = None, database_url: DatabaseUrl = None) -> None:
    """Recompute every sum from the rows and every row from its use and prices. Exit status 1 when anything differs."""
    settings = configured(config, None, data_dir, database_url=database_url)
    try:
        book = PriceBook(all_sheets(settings.billing.sheets_dir), {}, SystemClock().now())
    except SheetError as error:
        fail(str(error))
    n_faults, n_counted = with_storage(
        Path(settings.data_dir), lambda storage: _verified(storage, book), database_url=settings.database_url
    )
    if n_faults:
        fail(f"faults: {n_faults:,}; rows counted: {n_counted:,}")
    typer.echo(f"{n_counted:,} rows: everything adds up")


def balance(org: Org, as_json: AsJson = False, data_dir: DataDir = None, database_url: DatabaseUrl = None) -> None:
    """Show what an organisation has, by currency."""
    found = with_ledger(data_dir, database_url, org, lambda ledger: ledger.balance(org))
    names = ("available_nano", "cash_nano", "voucher_nano", "held_nano")
    told = [
        {"currency": one.currency, **{name.removesuffix("_nano"): decimal_text(getattr(one, name)) for name in names}}
        for one in found
    ]
    if as_json:
        print_json(told)
        return
    table = Table("currency")
    for name in names:
        table.add_column(name.removesuffix("_nano"), justify="right")
    for one in told:
        table.add_row(*one.values())
    Console().print(table)


def grant(
    org: Org, amount: Amount, currency: Currency, note: Note = None,
    data_dir: DataDir = None, database_url: DatabaseUrl = None,
) -> None:  # fmt: skip
    """Bring cash in."""
    nano, code = money_or_fail(amount, currency)
    with_ledger(data_dir, database_url, org, lambda ledger: ledger.grant(org, code, nano, note))
    typer.echo(f"granted {decimal_text(nano)} {code} to {org}")


def voucher(
    org: Org, amount: Amount, currency: Currency, note: Note = None,
    days: Annotated[int | None, typer.Option("--days", min=1, help="It ends so many days from now.")] = None,
    data_dir: DataDir = None, database_url: DatabaseUrl = None,
) -> None:  # fmt: skip
    """Bring a voucher in: it is used before cash, and what is left of it lapses when it ends."""
    nano, code = money_or_fail(amount, currency)
    ends_at = None if days is None else SystemClock().now() + timedelta(days=days).total_seconds()
    voucher_id = with_ledger(
        data_dir, database_url, org, lambda ledger: ledger.grant_voucher(org, code, nano, ends_at, note)
    )
    typer.echo(voucher_id)


def adjust(
    org: Org, amount: Amount, currency: Currency,
    note: Annotated[str, typer.Option("--note", metavar="TEXT", help="Why; kept with the row.")],
    data_dir: DataDir = None, database_url: DatabaseUrl = None,
) -> None:  # fmt: skip
    """Correct an organisation's cash, up or down; write -- before an amount below 0."""
    nano, code = money_or_fail(amount, currency)
    with_ledger(data_dir, database_url, org, lambda ledger: ledger.adjust(org, code, nano, note))
    typer.echo(f"adjusted {org} by {decimal_text(nano)} {code}")


def rows(
    org: Annotated[str | None, typer.Option("--org", metavar="ORG", help="Only this organisation's.")] = None,
    turn: Annotated[str | None, typer.Option("--turn", metavar="ID", help="Only this turn's.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=10_000, help="At most so many.")] = 100,
    as_json: AsJson = False, data_dir: DataDir = None, database_url: DatabaseUrl = None,
) -> None:  # fmt: skip
    """Show the newest rows, the oldest of them first."""
    query = RowQuery(org, turn, limit)
    found = with_storage(data_dir, lambda storage: ledger_rows(storage, query), database_url=database_url)
    if as_json:
        print_json(found)
        return
    table = Table("at", "id", "organisation", "model", "currency")
    for heading in ("cash", "vouchers", "held"):
        table.add_column(heading, justify="right")
    for row in found:
        at = datetime.fromtimestamp(row.at, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        texts = (at, row.id, row.organisation, row.model or "", row.currency or "")
        table.add_row(*map(escape, texts), *map(decimal_text, (row.cash_nano, row.voucher_nano, row.held_nano)))
    Console().print(table)


def with_ledger(data_dir: Path | None, database_url: str | None, org: str, work: Callable[[Ledger], Awaitable[T]]) -> T:
    """What `work` returns; ends the command when there is no such organisation, or the ledger refuses."""

    async def run(storage: Storage) -> T:
        await identities(storage).organisation(org)
        return await work(Ledger(storage, SystemClock(), RandomIds(), hold_s=0.0))  # nothing is held here

    return with_storage(data_dir, run, database_url=database_url)


def identities(storage: Storage) -> Identities:
    """To look names up."""
    return Identities(storage, SystemClock(), RandomIds(), tiers={}, default_tier=None)


def money_or_fail(amount: str, currency: str, param: str = "amount") -> tuple[int, str]:
    """Nano and the currency; ends the command when one of them cannot be read."""
    try:
        return nano_of(amount, param), checked_currency(currency)
    except ApiError as error:
        fail(error.message)


async def _verified(storage: Storage, book: PriceBook) -> tuple[int, int]:
    """How many faults there are in how many rows; prints the first of them."""
    n_faults = 0
    n_counted = 0
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("rows", total=None)

        def told(n_rows: int, n_all: int) -> None:
            nonlocal n_counted
            n_counted = n_rows
            progress.update(task, completed=n_rows, total=n_all)

        async for fault in verified(storage, book.prices, told):
            n_faults += 1
            if n_faults <= FAULTS_SHOWN:
                typer.echo(f"{fault.where}: {fault.message}")
    if n_faults > FAULTS_SHOWN:
        typer.echo(f"and {n_faults - FAULTS_SHOWN:,} more")
    return n_faults, n_counted
