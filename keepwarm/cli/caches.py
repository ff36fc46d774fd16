"""keepwarm caches: list, show and delete the cache objects in a data directory."""

from typing import Annotated

import msgspec
import typer
from msgspec import Struct
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from keepwarm.cache.objects import Objects
from keepwarm.cli.database import with_storage
from keepwarm.cli.failure import fail
from keepwarm.cli.options import AsJson, DatabaseUrl, DataDir, TenantFilter
from keepwarm.cli.show import shown_time
from keepwarm.core.cache_object import CacheObject
from keepwarm.core.clock import SystemClock
from keepwarm.core.request import Message, Tool
from keepwarm.storage import Storage

LIST_EXAMPLE = "keepwarm caches list --tenant research --json"
SHOW_EXAMPLE = "keepwarm caches show cache-essqmysd6h1111dauub1"
DELETE_EXAMPLE = "keepwarm caches delete cache-essqmysd6h1111dauub1"
TEXT_CHARS_MAX = 400  # of a message, in what is shown to people

ObjectId = Annotated[str, typer.Argument(help="The object's id.")]


class Summary(Struct):
    """An object as `list --json` gives it. `status` is the one a client would be told now."""

    id: str
    tenant: str
    dialect: str  # of the API it was made through, which alone shows it
    model: str
    status: str
    n_tokens: int
    created_at: int
    expires_at: int
    name: str
    description: str
    metadata: dict[str, str] | None
    error: str | None


class Whole(Summary):
    """An object as `show --json` gives it."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]


def list_objects(
    tenant: TenantFilter = None, as_json: AsJson = False, data_dir: DataDir = None, database_url: DatabaseUrl = None
) -> None:
    """List cache objects, oldest first."""
    objects = with_storage(data_dir, lambda storage: Objects(storage).everyones(tenant), database_url=database_url)
    now = SystemClock().now()
    if as_json:
        _print_json([_summary(obj, now) for obj in objects])
        return
    table = Table()
    table.add_column("id", no_wrap=True)
    for heading in ("tenant", "dialect", "status", "name", "expires"):
        table.add_column(heading)
    table.add_column("tokens", justify="right")
    for obj in objects:
        status = obj.effective_status(now).value
        row = (obj.id, obj.tenant, obj.dialect, status, obj.name, shown_time(obj.expires_at), f"{obj.n_tokens:,}")
        table.add_row(*map(escape, row))
    Console().print(table if objects else "no cache objects")


def show(
    object_id: ObjectId,
    tenant: TenantFilter = None,
    as_json: AsJson = False,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
) -> None:
    """Show one cache object with its messages."""
    obj = with_storage(data_dir, lambda storage: _find(storage, object_id, tenant), database_url=database_url)
    now = SystemClock().now()
    if as_json:
        _print_json(Whole(**msgspec.structs.asdict(_summary(obj, now)), messages=obj.messages, tools=obj.tools))
        return
    table = Table(show_header=False)
    for name, value in msgspec.structs.asdict(_summary(obj, now)).items():
        if value not in (None, ""):
            table.add_row(name, escape(shown_time(value) if name.endswith("_at") else str(value)))
    for message in obj.messages:
        text = message.text
        cut = f"{text[:TEXT_CHARS_MAX]}… ({len(text):,} characters)" if len(text) > TEXT_CHARS_MAX else text
        table.add_row(message.role, escape(cut))
    for tool in obj.tools:
        table.add_row("tool", escape(f"{tool.name}: {tool.description}"))
    Console().print(table)


def delete(
    object_id: ObjectId, tenant: TenantFilter = None, data_dir: DataDir = None, database_url: DatabaseUrl = None
) -> None:
    """Delete a cache object and its tags; a running server then frees its memory at the next sweep."""

    async def work(storage: Storage) -> bool:
        obj = await _find(storage, object_id, tenant)
        return await Objects(storage).delete(obj.tenant, obj.id)

    with_storage(data_dir, work, database_url=database_url)
    typer.echo(f"deleted {object_id}")


async def _find(storage: Storage, object_id: str, tenant: str | None) -> CacheObject:
    obj = await Objects(storage).find(object_id)
    if obj is None or (tenant is not None and obj.tenant != tenant):
        of = "" if tenant is None else f" of tenant {tenant}"
        fail(f"there is no cache object {object_id}{of}; keepwarm caches list shows them")
    return obj


def _summary(obj: CacheObject, now: float) -> Summary:
    return Summary(
        id=obj.id,
        tenant=obj.tenant,
        dialect=obj.dialect,
        model=obj.model,
        status=obj.effective_status(now).value,
        n_tokens=obj.n_tokens,
        created_at=obj.created_at,
        expires_at=obj.expires_at,
        name=obj.name,
        description=obj.description,
        metadata=None if obj.metadata is None else dict(obj.metadata),
        error=obj.error,
    )


def _print_json(value: object) -> None:
    typer.echo(msgspec.json.format(msgspec.json.encode(value)))
