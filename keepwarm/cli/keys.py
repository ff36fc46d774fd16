"""keepwarm keys: make, list and revoke API keys."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from keepwarm.cli.database import with_storage
from keepwarm.cli.failure import fail
from keepwarm.cli.options import DataDir
from keepwarm.cli.show import shown_time
from keepwarm.core.clock import RandomIds, SystemClock
from keepwarm.gateway.auth import KeyNameError, Keys
from keepwarm.storage import Storage

CREATE_EXAMPLE = "keepwarm keys create laptop --tenant research"
LIST_EXAMPLE = "keepwarm keys list"
REVOKE_EXAMPLE = "keepwarm keys revoke laptop"

Name = Annotated[str, typer.Argument(help="What the key is called.")]
Tenant = Annotated[
    str | None,
    typer.Option("--tenant", metavar="TENANT", help="Who owns what is cached with this key (default: NAME)."),
]


def create(name: Name, tenant: Tenant = None, data_dir: DataDir = None) -> None:
    """Make an API key and print it, this once: only a digest is kept. Keys of one tenant share their cache."""

    async def work(storage: Storage) -> str:
        return await Keys(storage, RandomIds()).create(name, tenant, SystemClock().now())

    try:
        key = with_storage(data_dir, work, create=True)
    except KeyNameError as error:
        fail(str(error))
    typer.echo(key)
    typer.echo("Keep it: it is not stored and cannot be shown again.", err=True)


def list_keys(data_dir: DataDir = None) -> None:
    """List all keys, revoked ones too."""
    keys = with_storage(data_dir, lambda storage: Keys(storage, RandomIds()).list())
    table = Table("name", "tenant", "key", "created", "revoked")
    for key in keys:
        revoked = "" if key.revoked_at is None else shown_time(key.revoked_at)
        table.add_row(key.name, key.tenant, f"sk-kw-…{key.last4}", shown_time(key.created_at), revoked)
    Console().print(table if keys else "no keys; make one with: keepwarm keys create NAME")


def revoke(name: Name, data_dir: DataDir = None) -> None:
    """Revoke a key; the next request with it is refused, also by a running server."""

    async def work(storage: Storage) -> bool:
        return await Keys(storage, RandomIds()).revoke(name, SystemClock().now())

    if not with_storage(data_dir, work):
        fail(f"there is no live key {name!r}; keepwarm keys list shows them")
    typer.echo(f"revoked {name}")
