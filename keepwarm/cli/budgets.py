"""keepwarm budgets: how much an organisation, a project or a key may spend."""

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from keepwarm.billing.budget import Budget, Period, Scope
from keepwarm.billing.ledger import Ledger
from keepwarm.billing.sheet import decimal_text
from keepwarm.cli.database import with_storage
from keepwarm.cli.failure import fail
from keepwarm.cli.ledger import identities, money_or_fail, with_ledger
from keepwarm.cli.options import AsJson, DatabaseUrl, DataDir
from keepwarm.cli.orgs import print_json
from keepwarm.core.clock import RandomIds, SystemClock
from keepwarm.storage import Storage

SET_EXAMPLE = "keepwarm budgets set research USD month --hard 500 --soft 400"
LIST_EXAMPLE = "keepwarm budgets list research"
REMOVE_EXAMPLE = "keepwarm budgets remove research USD month"

Org = Annotated[str, typer.Argument(metavar="ORG", help="The organisation.")]
Currency = Annotated[str, typer.Argument(metavar="CURRENCY", help="Such as USD.")]
Of = Annotated[Period, typer.Argument(metavar="PERIOD", help="day or month, both in UTC, or total.")]
Project = Annotated[str | None, typer.Option("--project", metavar="PROJECT", help="Only what this project spends.")]
Key = Annotated[int | None, typer.Option("--key", metavar="ID", help="Only what this key spends.")]
Soft = Annotated[str | None, typer.Option("--soft", metavar="AMOUNT", help="From here on it is told.")]
Hard = Annotated[str | None, typer.Option("--hard", metavar="AMOUNT", help="A turn that could pass this is refused.")]


def set_budget(  # noqa: PLR0913 - a command has the options it has
    org: Org, currency: Currency, period: Of, soft: Soft = None, hard: Hard = None, project: Project = None,
    key: Key = None, data_dir: DataDir = None, database_url: DatabaseUrl = None,
) -> None:  # fmt: skip
    """Set or change a budget; what was spent before in its period counts."""
    soft_nano = None if soft is None else money_or_fail(soft, currency, "soft")[0]
    hard_nano = None if hard is None else money_or_fail(hard, currency, "hard")[0]
    budget = Budget(_scope(org, project, key), currency, period, soft_nano, hard_nano)

    async def work(storage: Storage) -> None:
        found = identities(storage)
        await found.organisation(org)
        if project is not None:
            await found.project(org, project)
        if key is not None:
            await found.key(org, key)
        await Ledger(storage, SystemClock(), RandomIds(), hold_s=0.0).set_budget(budget)

    with_storage(data_dir, work, database_url=database_url)
    typer.echo(f"set {budget.scope.text} {currency} {period.value}")


def list_budgets(
    org: Org, as_json: AsJson = False, data_dir: DataDir = None, database_url: DatabaseUrl = None
) -> None:  # fmt: skip
    """List the budgets of an organisation, its projects and keys, and how they stand."""
    found = with_ledger(data_dir, database_url, org, lambda ledger: ledger.budgets(org))
    told = [
        {
            "scope": state.budget.scope.text,
            "currency": state.budget.currency,
            "period": state.budget.period.value,
            "soft": None if state.budget.soft_nano is None else decimal_text(state.budget.soft_nano),
            "hard": None if state.budget.hard_nano is None else decimal_text(state.budget.hard_nano),
            "spent": decimal_text(state.spent_nano),
            "held": decimal_text(state.held_nano),
        }
        for state in found
    ]
    if as_json:
        print_json(told)
        return
    table = Table("scope", "currency", "period")
    for heading in ("soft", "hard", "spent", "held"):
        table.add_column(heading, justify="right")
    for one in told:
        table.add_row(*(escape(value or "") for value in one.values()))
    Console().print(table)


def remove_budget(
    org: Org, currency: Currency, period: Of, project: Project = None, key: Key = None,
    data_dir: DataDir = None, database_url: DatabaseUrl = None,
) -> None:  # fmt: skip
    """Remove a budget."""
    budget = Budget(_scope(org, project, key), currency, period)
    if not with_ledger(data_dir, database_url, org, lambda ledger: ledger.remove_budget(budget)):
        fail(f"there is no budget {budget.scope.text} {currency} {period.value}; keepwarm budgets list shows them")
    typer.echo(f"removed {budget.scope.text} {currency} {period.value}")


def _scope(org: str, project: str | None, key: int | None) -> Scope:
    if project is not None and key is not None:
        fail("give --project or --key, not both")
    return Scope(org, project, key)
