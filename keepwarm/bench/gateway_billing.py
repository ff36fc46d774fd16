"""A part of `bench gateway`: what keys, limits and ledger add to a turn.

Two servers with the scripted engine get the same short turns, one after another: one with --dev, where none of the three is
on, and one with a key of an organisation that has all limits, prices and a hard budget. Blocks of turns go to the one and to
the other in turn, so that whatever else the machine does hits both. At the end the rows are counted in both databases.
"""

import asyncio
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import sqlalchemy as sa
import uvloop
from rich.console import Console

from keepwarm.bench import BenchError
from keepwarm.bench.client import CHAT_PATH, TIMINGS_HEADER, Connection
from keepwarm.bench.gateway_report import Billed, Side, Turns
from keepwarm.bench.service import MODEL, Service, running_server
from keepwarm.billing.budget import Budget, Period, Scope
from keepwarm.billing.ledger import Ledger
from keepwarm.core.clock import Clock, RandomIds
from keepwarm.core.identity import NewKey, NewOrganisation
from keepwarm.core.rate_limit import LimitOverrides
from keepwarm.gateway.identities import Identities
from keepwarm.launch import HOST, LOG_NAME, LaunchError, ServerProcess
from keepwarm.storage import Storage, database_path
from keepwarm.tables import ledger_rows

N_BLOCKS = 20  # on each server
N_FIRST = 20  # turns that are not counted: they pay for what is loaded late
ORGANISATION = "bench"
PRICED = f'[billing.models]\n"{MODEL}" = "kimi@2024-07-01/{MODEL}"\n'
CURRENCY = "CNY"  # of that sheet
NEVER_REACHED = 10**9
LIMITS = LimitOverrides(NEVER_REACHED, NEVER_REACHED, NEVER_REACHED, NEVER_REACHED)
HARD_NANO = 10**15
BUSY_S = 5.0

Body = Callable[[int], bytes]


def measure(n_turns: int, body: Body, data_dir: Path, config: str, console: Console, clock: Clock) -> Billed:
    """At least `n_turns` on each side; `body` gives the request of a number. Raises BenchError."""
    config_file = data_dir / "billing.toml"
    config_file.write_text(config + PRICED, encoding="utf-8")
    places = {"off": data_dir / "off", "on": data_dir / "on"}
    key = asyncio.run(_prepared(places["on"], clock))
    with (
        running_server(places["off"], config_file, console, clock) as off,
        _server_with_keys(places["on"], config_file, console, clock) as on,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        services = (Service(off.port, "bench", clock), Service(on.port, key, clock))
        billed = runner.run(_blocks(services, max(1, n_turns // N_BLOCKS), body))
    n_on = N_FIRST + len(billed.on.all_ms)
    for side, n_expected in (("off", 0), ("on", n_on)):
        n_settled = _n_settled(places[side])
        if n_settled != n_expected:
            raise BenchError(f"{n_expected} turns should be in the ledger of {side!r}, and {n_settled} are")
    return billed


async def _blocks(services: tuple[Service, Service], n_between: int, body: Body) -> Billed:
    billed, numbers = Billed(Turns(), Turns()), count(1)
    async with services[0].connect() as [off], services[1].connect() as [on]:
        for connection in (off, on):
            for _ in range(N_FIRST):
                await _turn(connection, body(next(numbers)))
        sides: list[tuple[Side, Connection]] = [("off", off), ("on", on)]
        for _ in range(N_BLOCKS):
            for side, connection in sides:
                replies = [await _turn(connection, body(next(numbers))) for _ in range(n_between)]
                billed.of(side).add(replies)
            sides.reverse()  # neither is always the first
    return billed


async def _turn(connection: Connection, body: bytes) -> tuple[float, dict[str, float]]:
    reply = await connection.call_ok("POST", CHAT_PATH, body, {TIMINGS_HEADER: "1"})
    return reply.ms, reply.timings


async def _prepared(data_dir: Path, clock: Clock) -> str:
    """The key of an organisation that has all a turn may have to look at."""
    storage, ids = Storage.open(database_path(data_dir), BUSY_S), RandomIds()
    try:
        identities = Identities(storage, clock, ids, tiers={}, default_tier=None)
        await identities.create_organisation(NewOrganisation(ORGANISATION, limits=LIMITS))
        key, _ = await identities.create_key(ORGANISATION, NewKey("bench"), by=None)
        budget = Budget(Scope(ORGANISATION), CURRENCY, Period.MONTH, hard_nano=HARD_NANO)
        await Ledger(storage, clock, ids, hold_s=0.0).set_budget(budget)
    finally:
        storage.close()
    return key


@contextmanager
def _server_with_keys(data_dir: Path, config_file: Path, console: Console, clock: Clock) -> Iterator[ServerProcess]:
    """A ready server without --dev over that directory. Raises BenchError, with its last words printed."""
    with socket.create_server((HOST, 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "keepwarm", "serve", "--host", HOST, "--port", str(port), "--database-url", ""]
    log = data_dir / LOG_NAME
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--data-dir", str(data_dir), "--config", str(config_file)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is ours, and ends the server in order
        )
    server = ServerProcess(process, port, log, clock)
    try:
        server.wait_ready(lambda _detail: None)
        yield server
    except (LaunchError, BenchError, OSError) as error:
        console.print(server.log_tail(), style="dim", markup=False, highlight=False)
        raise BenchError(str(error)) from error
    finally:
        server.stop()


def _n_settled(data_dir: Path) -> int:
    query = sa.select(sa.func.count()).where(ledger_rows.c.kind == "settle")
    storage = Storage.open(database_path(data_dir), BUSY_S, create=False)
    try:
        return storage.run_sync(lambda connection: connection.execute(query).scalar_one())
    finally:
        storage.close()
