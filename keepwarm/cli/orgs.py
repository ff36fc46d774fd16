"""keepwarm orgs: make, list, show, change, disable and enable organisations."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import typer
from msgspec import UNSET
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from keepwarm.cli.database import with_storage
from keepwarm.cli.failure import fail
from keepwarm.cli.options import AsJson, ConfigFile, DatabaseUrl, DataDir, configured
from keepwarm.cli.show import shown_time
from keepwarm.core.clock import RandomIds, SystemClock
from keepwarm.core.errors import ApiError
from keepwarm.core.identity import CacheScope, NewOrganisation, Organisation, OrganisationChange
from keepwarm.core.rate_limit import LimitOverrides, parse_overrides
from keepwarm.gateway.identities import Identities

CREATE_EXAMPLE = "keepwarm orgs create research --tier tier1 --prepaid"
LIST_EXAMPLE = "keepwarm orgs list"
SHOW_EXAMPLE = "keepwarm orgs show research"
SET_EXAMPLE = "keepwarm orgs set research --tier tier2"
DISABLE_EXAMPLE = "keepwarm orgs disable research"
ENABLE_EXAMPLE = "keepwarm orgs enable research"

T = TypeVar("T")

OrgName = Annotated[str, typer.Argument(metavar="ORG", help="What the organisation is called; it never changes.")]
Tier = Annotated[
    str | None, typer.Option("--tier", metavar="TIER", help='Preset of its limits; "" is the configured default.')
]
OwnLimits = Annotated[
    str | None,
    typer.Option(
        "--limits", metavar="JSON", help="Single limits that differ from the tier's; in JSON, null for not limited."
    ),
]
Prepaid = Annotated[
    bool | None,
    typer.Option("--prepaid/--postpaid", help="Whether turns are refused that its balance does not cover."),
]
Scope = Annotated[
    CacheScope | None, typer.Option("--cache-scope", help="Who shares what is cached: all of it, or each project.")
]


def create(
    org: OrgName, tier: Tier = None, limits: OwnLimits = None, prepaid: Prepaid = None, cache_scope: Scope = None,
    config: ConfigFile = None, data_dir: DataDir = None, database_url: DatabaseUrl = None,
) -> None:  # fmt: skip
    """Make an organisation, with a project "default"."""
    new = NewOrganisation(org, tier or None, _limits(limits), bool(prepaid), cache_scope or "organisation")
    with_identities(
        data_dir, database_url, lambda found: found.create_organisation(new), config_file=config, create=True
    )
    typer.echo(f"made {org}")


def list_organisations(as_json: AsJson = False, data_dir: DataDir = None, database_url: DatabaseUrl = None) -> None:
    """List all organisations, disabled ones too."""
    found = with_identities(data_dir, database_url, Identities.organisations)
    if as_json:
        print_json(found)
        return
    table = Table("organisation", "tier", "own limits", "prepaid", "cache of", "created", "disabled")
    for org in found:
        table.add_row(*map(escape, _row(org)))
    Console().print(table if found else "no organisations; make one with: keepwarm orgs create ORG")


def show(org: OrgName, data_dir: DataDir = None, database_url: DatabaseUrl = None) -> None:
    """Show an organisation, its projects and its keys, as JSON."""

    async def work(identities: Identities) -> dict[str, object]:
        return {
            "organisation": await identities.organisation(org),
            "projects": await identities.projects(org),
            "keys": await identities.keys(org),
        }

    print_json(with_identities(data_dir, database_url, work))


def change(
    org: OrgName, tier: Tier = None, limits: OwnLimits = None, prepaid: Prepaid = None, cache_scope: Scope = None,
    config: ConfigFile = None, data_dir: DataDir = None, database_url: DatabaseUrl = None,
) -> None:  # fmt: skip
    """Change an organisation; what is not given stays. A running server goes by it from the next request on."""
    wanted = OrganisationChange(
        tier=UNSET if tier is None else tier or None,
        limits=UNSET if limits is None else _limits(limits),
        is_prepaid=UNSET if prepaid is None else prepaid,
        cache_scope=UNSET if cache_scope is None else cache_scope,
    )
    if wanted == OrganisationChange():
        fail("nothing to change; give --tier, --limits, --prepaid, --postpaid or --cache-scope")
    with_identities(data_dir, database_url, lambda found: found.change_organisation(org, wanted), config_file=config)
    typer.echo(f"changed {org}")


def disable(org: OrgName, data_dir: DataDir = None, database_url: DatabaseUrl = None) -> None:
    """Refuse all keys of an organisation, also in a running server, until it is enabled."""
    wanted = OrganisationChange(is_disabled=True)
    with_identities(data_dir, database_url, lambda found: found.change_organisation(org, wanted))
    typer.echo(f"disabled {org}")


def enable(org: OrgName, data_dir: DataDir = None, database_url: DatabaseUrl = None) -> None:
    """Take the keys of a disabled organisation again."""
    wanted = OrganisationChange(is_disabled=False)
    with_identities(data_dir, database_url, lambda found: found.change_organisation(org, wanted))
    typer.echo(f"enabled {org}")


def with_identities(
    data_dir: Path | None, database_url: str | None, work: Callable[[Identities], Awaitable[T]], *,
    config_file: Path | None = None, create: bool = False,
) -> T:  # fmt: skip
    """What `work` returns; ends the command when it or the database refuses. `config_file` may name tiers."""
    config = configured(config_file, None, data_dir, database_url=database_url)
    rates, clock = config.rates, SystemClock()
    return with_storage(
        Path(config.data_dir),
        lambda storage: work(
            Identities(storage, clock, RandomIds(), tiers=rates.tiers, default_tier=rates.default_tier)
        ),
        database_url=config.database_url,
        create=create,
    )


def print_json(value: object) -> None:
    """For programs."""
    typer.echo(msgspec.json.format(msgspec.json.encode(value)).decode())


def _limits(text: str | None) -> LimitOverrides:
    try:
        return parse_overrides(None if text is None else text.encode())
    except ApiError as error:
        fail(f"--{error.message}")


def _row(org: Organisation) -> tuple[str, ...]:
    limits = msgspec.json.encode(org.limits).decode()
    return (
        org.id,
        "" if org.tier is None else org.tier,
        "" if org.limits == LimitOverrides() else limits,
        "yes" if org.is_prepaid else "",
        org.cache_scope,
        shown_time(org.created_at),
        "" if org.disabled_at is None else shown_time(org.disabled_at),
    )
