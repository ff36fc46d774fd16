"""All commands in one tree, and the one place where usage errors become one line."""

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from keepwarm import __version__
from keepwarm.cli import bench, budgets, caches, keys, ledger, orgs, prices, projects, usage
from keepwarm.cli.demo import EXAMPLE as DEMO_EXAMPLE
from keepwarm.cli.demo import demo
from keepwarm.cli.plan import EXAMPLE as PLAN_EXAMPLE
from keepwarm.cli.plan import plan
from keepwarm.cli.replay import EXAMPLE as REPLAY_EXAMPLE
from keepwarm.cli.replay import replay
from keepwarm.cli.serve import EXAMPLE as SERVE_EXAMPLE
from keepwarm.cli.serve import serve
from keepwarm.cli.store import EXAMPLE as STORE_EXAMPLE
from keepwarm.cli.store import store
from keepwarm.cli.verify import EXAMPLE as VERIFY_EXAMPLE
from keepwarm.cli.verify import verify

SUMMARY = "An LLM API server whose main feature is context caching."


def build() -> typer.Typer:
    """The command tree."""
    root = _group(SUMMARY)
    root.callback(help=SUMMARY, epilog=_epilog(DEMO_EXAMPLE))(_common)
    _add(root, "serve", serve, SERVE_EXAMPLE)
    _add(root, "demo", demo, DEMO_EXAMPLE)
    _add(root, "store", store, STORE_EXAMPLE)
    _add(root, "verify", verify, VERIFY_EXAMPLE)
    _add(root, "replay", replay, REPLAY_EXAMPLE)
    _add(root, "plan", plan, PLAN_EXAMPLE)
    _add(root, "usage", usage.usage, usage.USAGE_EXAMPLE)
    _add(root, "invoice", usage.invoice, usage.INVOICE_EXAMPLE)
    bench_group = _group("Measure this machine.")
    _add(bench_group, "ttft", bench.ttft, bench.TTFT_EXAMPLE)
    _add(bench_group, "gateway", bench.gateway, bench.GATEWAY_EXAMPLE)
    _add(bench_group, "store", bench.store, bench.STORE_EXAMPLE)
    _add(bench_group, "agent", bench.agent, bench.AGENT_EXAMPLE)
    _add(bench_group, "ledger", bench.ledger, bench.LEDGER_EXAMPLE)
    root.add_typer(bench_group, name="bench", epilog=_epilog(bench.TTFT_EXAMPLE))
    org_group = _group("Make, list and change organisations.")
    _add(org_group, "create", orgs.create, orgs.CREATE_EXAMPLE)
    _add(org_group, "list", orgs.list_organisations, orgs.LIST_EXAMPLE)
    _add(org_group, "show", orgs.show, orgs.SHOW_EXAMPLE)
    _add(org_group, "set", orgs.change, orgs.SET_EXAMPLE)
    _add(org_group, "disable", orgs.disable, orgs.DISABLE_EXAMPLE)
    _add(org_group, "enable", orgs.enable, orgs.ENABLE_EXAMPLE)
    root.add_typer(org_group, name="orgs", epilog=_epilog(orgs.CREATE_EXAMPLE))
    project_group = _group("Make, list and archive an organisation's projects.")
    _add(project_group, "create", projects.create, projects.CREATE_EXAMPLE)
    _add(project_group, "list", projects.list_projects, projects.LIST_EXAMPLE)
    _add(project_group, "archive", projects.archive, projects.ARCHIVE_EXAMPLE)
    root.add_typer(project_group, name="projects", epilog=_epilog(projects.CREATE_EXAMPLE))
    key_group = _group("Make, list, change and revoke API keys.")
    _add(key_group, "create", keys.create, keys.CREATE_EXAMPLE)
    _add(key_group, "list", keys.list_keys, keys.LIST_EXAMPLE)
    _add(key_group, "set", keys.change, keys.SET_EXAMPLE)
    _add(key_group, "revoke", keys.revoke, keys.REVOKE_EXAMPLE)
    root.add_typer(key_group, name="keys", epilog=_epilog(keys.CREATE_EXAMPLE))
    cache_group = _group("List, show and delete cache objects.")
    _add(cache_group, "list", caches.list_objects, caches.LIST_EXAMPLE)
    _add(cache_group, "show", caches.show, caches.SHOW_EXAMPLE)
    _add(cache_group, "delete", caches.delete, caches.DELETE_EXAMPLE)
    root.add_typer(cache_group, name="caches", epilog=_epilog(caches.LIST_EXAMPLE))
    price_group = _group("List, show and check price sheets.")
    _add(price_group, "list", prices.list_sheets, prices.LIST_EXAMPLE)
    _add(price_group, "show", prices.show, prices.SHOW_EXAMPLE)
    _add(price_group, "check", prices.check, prices.CHECK_EXAMPLE)
    root.add_typer(price_group, name="prices", epilog=_epilog(prices.SHOW_EXAMPLE))
    ledger_group = _group("Count the ledger anew, show it, bring credit in.")
    _add(ledger_group, "verify", ledger.verify, ledger.VERIFY_EXAMPLE)
    _add(ledger_group, "balance", ledger.balance, ledger.BALANCE_EXAMPLE)
    _add(ledger_group, "grant", ledger.grant, ledger.GRANT_EXAMPLE)
    _add(ledger_group, "voucher", ledger.voucher, ledger.VOUCHER_EXAMPLE)
    _add(ledger_group, "adjust", ledger.adjust, ledger.ADJUST_EXAMPLE)
    _add(ledger_group, "rows", ledger.rows, ledger.ROWS_EXAMPLE)
    root.add_typer(ledger_group, name="ledger", epilog=_epilog(ledger.VERIFY_EXAMPLE))
    budget_group = _group("Set, list and remove budgets.")
    _add(budget_group, "set", budgets.set_budget, budgets.SET_EXAMPLE)
    _add(budget_group, "list", budgets.list_budgets, budgets.LIST_EXAMPLE)
    _add(budget_group, "remove", budgets.remove_budget, budgets.REMOVE_EXAMPLE)
    root.add_typer(budget_group, name="budgets", epilog=_epilog(budgets.SET_EXAMPLE))
    return root


def run(args: list[str]) -> int:
    """Run the command that `args` (without the program's name) ask for; returns the exit status."""
    try:
        status = build()(args or ["--help"], prog_name="keepwarm", standalone_mode=False)
    except typer.TyperException as error:
        command = getattr(getattr(error, "ctx", None), "command_path", "keepwarm")
        sys.stderr.write(f"keepwarm: {error.format_message().rstrip('.')}; see {command} --help\n")
        return error.exit_code
    except typer.Abort:
        return 1
    return status if isinstance(status, int) else 0


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version),
]


def _common(_version: Version = False) -> None:
    """Options ahead of the command."""


def _group(summary: str) -> typer.Typer:
    return typer.Typer(help=summary, rich_markup_mode="rich", add_completion=False, pretty_exceptions_enable=False)


def _add(group: typer.Typer, name: str, command: Callable[..., None], example: str) -> None:
    group.command(name, epilog=_epilog(example))(command)


def _epilog(example: str) -> str:
    return f"[bold]Example[/bold]: {example}"
