"""keepwarm keys: make, list, change and revoke API keys."""

from datetime import UTC, datetime
from typing import Annotated

import typer
from msgspec import UNSET
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from keepwarm.cli.failure import fail
from keepwarm.cli.options import AsJson, DatabaseUrl, DataDir
from keepwarm.cli.orgs import print_json, with_identities
from keepwarm.cli.show import shown_time
from keepwarm.core.identity import DEFAULT_ORGANISATION, DEFAULT_PROJECT, KeyChange, KeyInfo, NewKey
from keepwarm.core.principal import Role

CREATE_EXAMPLE = "keepwarm keys create laptop --org research"
LIST_EXAMPLE = "keepwarm keys list"
SET_EXAMPLE = "keepwarm keys set 7 --org research --model moonshot-v1-8k"
REVOKE_EXAMPLE = "keepwarm keys revoke laptop"

Name = Annotated[str, typer.Argument(help="What the key is called.")]
Owner = Annotated[
    str | None,
    typer.Option(
        "--org", metavar="ORG", help='Its organisation (default: "default", which is made).', show_default=False
    ),
]
Project = Annotated[str, typer.Option("--project", metavar="PROJECT", help="The organisation's project it is for.")]
KeyRole = Annotated[
    Role, typer.Option("--role", help="What it may do: run the server, run its organisation, use models, or look.")
]
ExpiresAt = Annotated[
    datetime | None,
    typer.Option("--expires-at", help="When it ends by itself, in UTC.", show_default=False),
]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", metavar="NAME", help="A model it may use; give it once for each (default: all)."),
]
OnlyOrg = Annotated[str | None, typer.Option("--org", metavar="ORG", help="Only this organisation's.")]


def create(
    name: Name, org: Owner = None, project: Project = DEFAULT_PROJECT, role: KeyRole = Role.MEMBER,
    expires_at: ExpiresAt = None, model: Models = None, data_dir: DataDir = None, database_url: DatabaseUrl = None,
) -> None:  # fmt: skip
    """Make an API key and print it, this once: only a digest is kept."""
    ends = None if expires_at is None else int(expires_at.replace(tzinfo=UTC).timestamp())
    new = NewKey(name, project, role, ends, tuple(model) if model else None)
    key, _ = with_identities(data_dir, database_url, lambda found: found.create_key(org, new, by=None), create=True)
    typer.echo(key)
    typer.echo("Keep it: it is not stored and cannot be shown again.", err=True)


def list_keys(
    org: OnlyOrg = None, as_json: AsJson = False, data_dir: DataDir = None, database_url: DatabaseUrl = None
) -> None:
    """List all keys, revoked ones too."""
    keys = with_identities(data_dir, database_url, lambda found: found.keys(org))
    if as_json:
        print_json(keys)
        return
    table = Table()
    for heading in ("id", "name", "organisation", "project", "role", "models", "key", "created", "ends"):
        table.add_column(heading, no_wrap=heading in {"id", "name", "key"})
    for key in keys:
        table.add_row(*map(escape, _row(key)))
    Console().print(table if keys else "no keys; make one with: keepwarm keys create NAME")


def change(  # noqa: PLR0913 - a command has the options it has
    key_id: Annotated[int, typer.Argument(metavar="ID", help="The key's number, as keepwarm keys list shows it.")],
    org: Annotated[str, typer.Option("--org", metavar="ORG", help="Its organisation.")] = DEFAULT_ORGANISATION,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="What it is called from now on.")] = None,
    expires_at: ExpiresAt = None,
    never: Annotated[bool, typer.Option("--never-expires", help="It does not end by itself.")] = False,
    model: Models = None,
    all_models: Annotated[bool, typer.Option("--all-models", help="It may use all models.")] = False,
    data_dir: DataDir = None, database_url: DatabaseUrl = None,
) -> None:  # fmt: skip
    """Change a key's name, end or models; what is not given stays. Its role, project and text stay for good."""
    if (never and expires_at is not None) or (all_models and model):
        fail("give --expires-at or --never-expires, and --model or --all-models, not both")
    ends = UNSET if expires_at is None else int(expires_at.replace(tzinfo=UTC).timestamp())
    wanted = KeyChange(
        UNSET if name is None else name,
        None if never else ends,
        None if all_models else tuple(model) if model else UNSET,
    )
    if wanted == KeyChange():
        fail("nothing to change; give --name, --expires-at, --never-expires, --model or --all-models")
    with_identities(data_dir, database_url, lambda found: found.change_key(org, key_id, wanted, by=None))
    typer.echo(f"changed {org} key {key_id}")


def revoke(name: Name, org: OnlyOrg = None, data_dir: DataDir = None, database_url: DatabaseUrl = None) -> None:
    """Revoke a key; the next request with it is refused, also by a running server."""
    with_identities(data_dir, database_url, lambda found: found.revoke_named(org, name))
    typer.echo(f"revoked {name}")


def _row(key: KeyInfo) -> tuple[str, ...]:
    if key.revoked_at is not None:
        ends = f"revoked {shown_time(key.revoked_at)}"
    else:
        ends = "" if key.expires_at is None else f"expires {shown_time(key.expires_at)}"
    return (
        str(key.id),
        key.name,
        key.organisation,
        key.project,
        key.role.value,
        "all" if key.models is None else ", ".join(key.models),
        f"sk-kw-…{key.last4}",
        shown_time(key.created_at),
        ends,
    )
