"""Entries by tenant, over time, over a restart, and with a database that is slow or cannot be written."""

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from keepwarm.cache.breakpoints import Chosen, Entry
from keepwarm.cache.render import Built
from keepwarm.core.prompt import Breakpoint, Prompt
from keepwarm.gateway.breakpoints import ENTRIES_DROPPED, RENEWAL_S, Breakpoints
from keepwarm.gateway.runtime import Runtime
from keepwarm.storage import Storage, database_path
from keepwarm.tables import breakpoints
from tests.world import CountingIds, FakeClock, capturing_log, until

pytestmark = pytest.mark.anyio


@dataclass
class Server:
    """Breakpoints with what they need; leaving the context is the end of the process."""

    subject: Breakpoints
    storage: Storage
    clock: FakeClock
    logged: list[Any]

    def ask(self, tenant: str, *marks: tuple[int, int | None], first: int = 0, n_tokens: int = 4000) -> Chosen | None:
        """A request with breakpoints at (end, ttl_s), as the turn does it."""
        tokens = np.arange(first, first + n_tokens, dtype=np.int32)
        marked = tuple(Breakpoint(end, ttl_s, n) for n, (end, ttl_s) in enumerate(marks, 1))
        chosen = self.subject.choose(tenant, Built(Prompt(tenant, tokens), breakpoints=marked))
        if chosen is not None:
            self.subject.keep(tenant, chosen)
        return chosen

    def read(self, tenant: str, *marks: tuple[int, int | None], first: int = 0) -> int:
        chosen = self.ask(tenant, *marks, first=first)
        assert chosen is not None
        return chosen.read_end

    async def rows(self) -> list[tuple[str, int, float]]:
        """What the database has once all writes under way are done."""
        columns = breakpoints.c.tenant, breakpoints.c.n_tokens, breakpoints.c.expires_at
        for _ in range(3):
            found = await self.storage.run(lambda connection: connection.execute(sa.select(*columns)).all())
        return sorted(tuple(row) for row in found)


@asynccontextmanager
async def server(where: Path | str, clock: FakeClock, *, root: bytes = b"root", **bounds: int) -> AsyncIterator[Server]:
    """`where` is a data directory, or the URL of a database."""
    log, logged = capturing_log()
    database = database_path(where) if isinstance(where, Path) else where
    storage = await asyncio.to_thread(Storage.open, database, 0.05)
    try:
        async with asyncio.TaskGroup() as tasks:
            runtime = Runtime(clock, CountingIds(), log, tasks)
            subject = Breakpoints(storage, runtime, root=root, tokens_min=512, **bounds)
            await subject.load()
            yield Server(subject, storage, clock, logged)
    finally:
        await asyncio.to_thread(storage.close)


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    return tmp_path if request.param == "sqlite" else str(request.getfixturevalue("postgresql_url"))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


async def test_a_second_request_reads_what_the_first_one_marked(tmp_path: Path, clock: FakeClock) -> None:
    async with server(tmp_path, clock) as here:
        assert here.read("a", (1000, 300)) == 0
        assert here.read("a", (1000, 300)) == 1000  # at once, also beside the first: it waits for it


async def test_another_tenant_reads_nothing(tmp_path: Path, clock: FakeClock) -> None:
    async with server(tmp_path, clock) as here:
        here.ask("a", (1000, 300))
        assert here.read("b", (1000, 300)) == 0
    async with server(tmp_path, clock) as again:
        assert again.read("c", (1000, 300)) == 0
        assert again.read("a", (1000, 300)) == 1000


async def test_without_a_lifetime_there_are_no_rules(tmp_path: Path, clock: FakeClock) -> None:
    async with server(tmp_path, clock) as here:
        assert here.ask("a", (1000, None)) is None
        assert here.ask("a") is None


async def test_each_use_renews(tmp_path: Path, clock: FakeClock) -> None:
    async with server(tmp_path, clock) as here:
        here.ask("a", (1000, 300))
        for _ in range(5):
            clock.advance(299)
            assert here.read("a", (1000, 300), (2000, 300)) >= 1000
        clock.advance(300)
        expired = here.ask("a", (1000, 300))
        assert expired is not None
        assert (expired.read_end, expired.n_expired) == (0, 1000)


async def test_entries_survive_a_restart_and_expire_over_it(where: Path | str, clock: FakeClock) -> None:
    async with server(where, clock) as here:
        here.ask("a", (1000, 3600), (2000, 300))
    clock.advance(600)
    async with server(where, clock) as again:
        chosen = again.ask("a", (2000, 300))
        assert chosen is not None
        assert (chosen.read_end, chosen.n_expired) == (1000, 2000)
    async with server(where, clock, root=b"another model") as other:
        assert other.read("a", (2000, 300)) == 0


async def test_what_expired_long_ago_is_deleted_at_start(where: Path | str, clock: FakeClock) -> None:
    async with server(where, clock) as here:
        here.ask("a", (1000, 300))
    clock.advance(300 + 3599)
    async with server(where, clock) as again:
        assert len(await again.rows()) == 1
    clock.advance(1)
    async with server(where, clock) as again:
        assert await again.rows() == []


async def test_a_renewal_by_a_moment_is_not_written(tmp_path: Path, clock: FakeClock) -> None:
    async with server(tmp_path, clock) as here:
        began = clock.now()
        here.ask("a", (1000, 300))
        assert await here.rows() == [("a", 1000, began + 300)]
        for _ in range(3):  # each by less, but together they are more
            clock.advance(RENEWAL_S / 2 - 1)
            here.ask("a", (1000, 300))
        assert await here.rows() == [("a", 1000, began + 300 + 3 * (RENEWAL_S / 2 - 1))]
        clock.advance(1)
        here.ask("a", (1000, 300))
        assert await here.rows() == [("a", 1000, began + 300 + 3 * (RENEWAL_S / 2 - 1))]
        here.ask("a", (1000, 3600))
        assert await here.rows() == [("a", 1000, clock.now() + 3600)]


async def test_those_that_expire_first_make_room_in_both_places(where: Path | str, clock: FakeClock) -> None:
    n_max = ENTRIES_DROPPED + 100
    async with server(where, clock, entries_max=n_max) as here:
        here.ask("other", (1000, 300))
        for n in range(n_max + 1):
            here.ask("a", (1000, 300), first=n * 10_000, n_tokens=1000)
            clock.advance(0.001)
        rows = [row for row in await here.rows() if row[0] == "a"]
        assert len(rows) == n_max + 1 - ENTRIES_DROPPED
        assert here.read("a", (1000, 300)) == 0
        assert here.read("a", (1000, 300), first=n_max * 10_000) == 1000
        assert here.read("other", (1000, 300)) == 1000


async def test_writes_under_way_are_one_however_many_turns_there_are(tmp_path: Path, clock: FakeClock) -> None:
    async with server(tmp_path, clock) as here:
        entered, leave = threading.Event(), threading.Event()

        def slow(_connection: sa.Connection) -> None:
            entered.set()
            leave.wait()

        blocked = asyncio.get_running_loop().create_task(here.storage.run(slow))
        await asyncio.to_thread(entered.wait)
        before = len(asyncio.all_tasks())
        for n in range(50):
            here.ask("a", (1000, 300), first=n * 10_000)
            await asyncio.sleep(0)
        n_writing = len(asyncio.all_tasks()) - before
        leave.set()
        await blocked
        assert n_writing == 1
        assert len(await here.rows()) == 50


async def test_a_locked_database_costs_a_warning_and_the_next_turn_writes_both(
    tmp_path: Path, clock: FakeClock
) -> None:
    async with server(tmp_path, clock) as here:
        other = sqlite3.connect(database_path(tmp_path), isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        here.ask("a", (1000, 300))
        await until(lambda: bool(here.logged))
        assert [line["event"] for line in here.logged] == ["breakpoints not written"]
        assert here.read("a", (1000, 300)) == 1000
        other.execute("COMMIT")
        other.close()
        here.ask("a", (1000, 300), (2000, 300))
        assert [row[1] for row in await here.rows()] == [1000, 2000]


async def test_a_database_that_cannot_be_written_does_not_end_the_server(tmp_path: Path, clock: FakeClock) -> None:
    async with server(tmp_path, clock) as here:
        await here.storage.run(lambda connection: connection.exec_driver_sql("DROP TABLE breakpoints"))
        here.ask("a", (1000, 300))
        await until(lambda: bool(here.logged))
        assert here.logged[0]["error"] == "OperationalError"
        assert here.read("a", (1000, 300)) == 1000


async def test_nothing_of_a_prompt_is_in_the_database(tmp_path: Path, clock: FakeClock) -> None:
    async with server(tmp_path, clock) as here:
        chosen = here.ask("a", (1000, 300))
        assert chosen is not None
        (entry,) = chosen.kept
        assert isinstance(entry, Entry)
        assert len(entry.digest) == 32
