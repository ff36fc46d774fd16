"""keepwarm store: what a running server's prefix store holds, as GET /admin/store tells it.

The server is asked over HTTP, so this works from any machine that reaches it, and says nothing of any tenant. A server
that does not answer, or refuses, is one line and exit status 1; with --watch that ends the watching.
"""

import http.client
import threading
from collections.abc import Iterator
from typing import Annotated
from urllib.parse import urlsplit

import msgspec
import typer
from msgspec import Struct
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from keepwarm.cli.failure import fail
from keepwarm.cli.options import AsJson
from keepwarm.config import default_api_key
from keepwarm.engine import PoolStatus, StoreStatus

EXAMPLE = "keepwarm store --url http://127.0.0.1:8080 --watch"
ANY_KEY = "keepwarm-store"  # what a server with --dev needs; another one refuses it and says so
REQUEST_S_MAX = 10.0
WATCH_S = 2.0
BAR_CELLS = 32
LEASED, RESIDENT, FREE = "█", "▒", "·"

Url = Annotated[str, typer.Option("--url", metavar="URL", help="The running server.")]
Key = Annotated[
    str | None,
    typer.Option("--key", metavar="KEY", help="API key (default: $KEEPWARM_API_KEY, or any for a server with --dev)."),
]
Watch = Annotated[bool, typer.Option("--watch", help="Ask again every two seconds, until interrupted.")]


class Told(Struct, frozen=True):
    """The body of GET /admin/store."""

    state: str
    epoch: int
    detail: str
    store: StoreStatus | None = None


class Refusal(Struct, frozen=True):
    """The part of an error's body that people read."""

    message: str


class Refused(Struct, frozen=True):
    """An error's body."""

    error: Refusal


def store(url: Url = "http://127.0.0.1:8080", key: Key = None, as_json: AsJson = False, watch: Watch = False) -> None:
    """Show what the prefix store of a running server holds."""
    console, pause = Console(), threading.Event()
    while True:
        body = ask(url, key or default_api_key() or ANY_KEY)
        if watch and console.is_terminal and not as_json:
            console.clear()
        if as_json:
            typer.echo(msgspec.json.format(body))
        else:
            show(console, msgspec.json.decode(body, type=Told))
        if not watch:
            return
        pause.wait(WATCH_S)


def ask(url: str, key: str) -> bytes:
    """The body of GET /admin/store, checked to be one. Ends the command when the server does not give it."""
    at = urlsplit(url if "://" in url else f"http://{url}")
    if at.scheme not in ("http", "https") or not at.hostname:
        fail(f"{url} is not the address of a server; give --url http://HOST:PORT")
    connected = http.client.HTTPSConnection if at.scheme == "https" else http.client.HTTPConnection
    try:
        connection = connected(at.hostname, at.port, timeout=REQUEST_S_MAX)
        try:
            path = at.path.rstrip("/") + "/admin/store"
            connection.request("GET", path, headers={"Authorization": f"Bearer {key}"})
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
    except (OSError, ValueError, http.client.HTTPException) as exc:  # ValueError: the port is no number
        reason = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
        fail(f"no server answers at {url}: {reason}; start one with keepwarm serve, or give its --url")
    try:
        if response.status != http.HTTPStatus.OK:
            fail(f"{url}: {msgspec.json.decode(body, type=Refused).error.message} (status {response.status})")
        msgspec.json.decode(body, type=Told)
    except msgspec.MsgspecError:
        fail(f"what answers at {url} with status {response.status} is no keepwarm server with a prefix store")
    return body


def show(console: Console, told: Told) -> None:
    """Print it for people."""
    console.print(f"engine {escape(told.state)}, epoch {told.epoch}: {escape(told.detail)}")
    if told.store is None:
        console.print("no prefix store: caching is off" if told.state == "ready" else "no prefix store at the moment")
        return
    pools = Table()
    pools.add_column("pool")
    pools.add_column(f"{LEASED} leased  {RESIDENT} resident  {FREE} free", no_wrap=True)
    for heading in ("leased", "resident", "free", "total", "blocks"):
        pools.add_column(heading, justify="right")
    for pool in told.store.pools:
        sizes = (pool.bytes_leased, pool.bytes_resident, pool.bytes_free, pool.bytes_total)
        pools.add_row(escape(pool.name), bar(pool), *map(human_bytes, sizes), f"{pool.n_blocks:,}")
    console.print(pools)
    rest = Table(show_header=False)
    for name, value in facts(told.store):
        rest.add_row(name, escape(value))
    console.print(rest)


def facts(status: StoreStatus) -> Iterator[tuple[str, str]]:
    """Everything but the pools, as (name, text). What is not known is left out."""
    n_hits = status.n_hits_host + status.n_hits_disk
    n_asked = n_hits + status.n_misses
    share = f" ({n_hits / n_asked:.0%} hits)" if n_asked else ""
    yield "leases", f"{status.n_leases:,}"
    yield "look-ups", f"{status.n_hits_host:,} host, {status.n_hits_disk:,} disk, {status.n_misses:,} missed{share}"
    yield "evicted", f"{status.n_evicted_host:,} host, {status.n_evicted_disk:,} disk, by {status.policy}"
    yield "written", f"{status.n_written:,}, {status.n_write_faults:,} faults, {status.n_not_admitted:,} not admitted"
    damaged = ", ".join(f"{n:,} {cause}" for cause, n in sorted(status.damaged.items()) if n)
    yield "damaged", damaged or "none"
    yield "recomputed", f"{status.n_tokens_recomputed:,} tokens that would have been slower to read"
    if status.prefill_tokens_per_s is not None:
        yield "prefill", f"{status.prefill_tokens_per_s:,.0f} tokens/s"
    if status.host_bytes_per_s is not None:
        yield "host reads", f"{human_bytes(status.host_bytes_per_s)}/s"
    if status.disk_bytes_per_s is not None:
        yield "disk reads", f"{human_bytes(status.disk_bytes_per_s)}/s"
    if status.scan_s is not None:
        yield "scan at start", f"{status.scan_s:.2f} s"
    if status.memory_pressure is not None:
        yield "memory pressure", f"{status.memory_pressure:.1f} %"


def bar(pool: PoolStatus) -> str:
    """A pool's bytes as `BAR_CELLS` characters; what is not nothing has at least one."""
    cells = {}
    left = BAR_CELLS
    for sign, n_bytes in ((LEASED, pool.bytes_leased), (RESIDENT, pool.bytes_resident)):
        n_cells = round(BAR_CELLS * n_bytes / pool.bytes_total) if pool.bytes_total else 0
        cells[sign] = min(left, max(n_cells, n_bytes > 0))
        left -= cells[sign]
    return "".join(sign * n for sign, n in cells.items()) + FREE * left


def human_bytes(n_bytes: float) -> str:
    """1.5 GiB, 12 B."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:,.0f} B" if unit == "B" else f"{n_bytes:,.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:,.1f} TiB"
