"""`keepwarm bench ledger`: how many turns a second the ledger holds and settles, on SQLite and in one process.

A prepaid organisation with a voucher and a budget, so that all a hold may have to look at is there. Every hold and every
settlement is on the disk before its caller goes on; in the end the rows are counted in the file.
"""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import sqlalchemy as sa
from rich.console import Console

from keepwarm.bench import BenchError
from keepwarm.bench.ledger_report import Round, Samples, flat_medians, ratios
from keepwarm.bench.machine import these_versions, this_machine
from keepwarm.bench.report import Report, publish, shown, timestamp
from keepwarm.billing.act import Hold, Settlement
from keepwarm.billing.budget import Budget, Period, Scope
from keepwarm.billing.ledger import Ledger
from keepwarm.billing.price import Charge
from keepwarm.billing.row import Payer, Priced, TurnUse
from keepwarm.core.clock import Clock, RandomIds, SystemClock
from keepwarm.core.event import Usage
from keepwarm.storage import Storage, StorageError, database_path
from keepwarm.tables import ledger_rows

N_CALLERS = 200
N_ROUNDS = 5
ONE_SHARE = 20  # a single caller does so much fewer turns
N_WRITES = 50
BLOCK_BYTES = 4096
BUSY_S = 5.0
HOLD_S = 600.0
CREDIT_NANO = 10**15
PAYER = Payer("bench", "default", 1)
PRICED = Priced("bench@1", "model", "USD")
USE = TurnUse(
    Usage(fresh=500, cache_read=4500, cache_write=0, output=100), 0, Charge(fresh=1500, read=1350, output=1500), 16_500
)
CEILING_NANO = 20_000


class Caller:
    """Turns, one after another, with ids that nobody else has."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._numbers = count(1)

    async def turn(self) -> None:
        turn_id = f"turn-{next(self._numbers):020}"
        await self._ledger.hold(Hold(turn_id, PAYER, "openai", "model", PRICED, CEILING_NANO, is_prepaid=True))
        await self._ledger.settle(Settlement(turn_id, PAYER, "openai", "model", "finished", PRICED, USE))


def run_and_show(n_turns: int, console: Console, *, data_dir: Path | None, out: Path | None) -> None:
    """Measure, write the report to `out` or a file of a default name, print it. Raises BenchError."""
    publish(run(n_turns, console, data_dir), console, out)


def run(n_turns: int, console: Console, data_dir: Path | None) -> Report[Samples]:
    """Measure on the disk of `data_dir` (None: of temporary files). Raises BenchError."""
    clock = SystemClock()
    created_at = clock.now()
    try:
        with tempfile.TemporaryDirectory(prefix="keepwarm-bench-", dir=data_dir) as scratch:
            write_ms = _disk(Path(scratch) / "block", clock)
            storage = Storage.open(database_path(scratch), BUSY_S)
            with console.status("measuring"):
                samples = asyncio.run(_measure(n_turns, console, clock, storage, write_ms))
            n_rows = storage.run_sync(_count)
            storage.close()
    except (OSError, StorageError) as exc:
        raise BenchError(f"cannot measure there: {exc}; choose another --data-dir") from exc
    n_settled = N_CALLERS + sum(one.n_turns for one in (*samples.many, *samples.one))
    if n_rows != n_settled:
        raise BenchError(f"{n_settled} turns were settled and {n_rows} rows are in the file")
    return Report(
        kind="ledger",
        created_at=timestamp(created_at),
        machine=this_machine(),
        versions=these_versions(),
        model=None,
        settings={"turns": n_turns, "callers": N_CALLERS, "rounds": N_ROUNDS},
        ratios=ratios(samples, N_CALLERS),
        medians=flat_medians(samples),
        samples=samples,
    )


async def _measure(
    n_turns: int, console: Console, clock: Clock, storage: Storage, write_ms: list[float]
) -> Samples:  # fmt: skip
    async with _at_work(storage, clock) as ledger:
        await ledger.grant(PAYER.organisation, PRICED.currency, CREDIT_NANO)
        await ledger.grant_voucher(PAYER.organisation, PRICED.currency, CREDIT_NANO)
        await ledger.set_budget(Budget(Scope(PAYER.organisation), PRICED.currency, Period.MONTH, None, CREDIT_NANO))
        caller = Caller(ledger)
        await _round(caller, N_CALLERS, N_CALLERS, clock)  # the first ones pay for what is loaded late
        samples = Samples([], [], write_ms)
        for rounds, n_callers, n in (
            (samples.many, N_CALLERS, n_turns),
            (samples.one, 1, max(1, n_turns // ONE_SHARE)),
        ):
            for _ in range(N_ROUNDS):
                rounds.append(await _round(caller, n_callers, n, clock))
            rates = ", ".join(shown(one.turns_per_s) for one in rounds)
            console.print(f"{n_callers} at once: {rates} turns/s", highlight=False)
    return samples


async def _round(caller: Caller, n_callers: int, n_turns: int, clock: Clock) -> Round:
    left = iter(range(n_turns))

    async def work() -> None:
        for _ in left:
            await caller.turn()

    begin = clock.monotonic()
    await asyncio.gather(*(work() for _ in range(n_callers)))
    return Round(n_turns, round(clock.monotonic() - begin, 6))


@asynccontextmanager
async def _at_work(storage: Storage, clock: Clock) -> AsyncIterator[Ledger]:
    ledger = Ledger(storage, clock, RandomIds(), hold_s=HOLD_S)
    async with asyncio.TaskGroup() as tasks:
        worker = tasks.create_task(ledger.work())
        yield ledger
        worker.cancel()


def _disk(path: Path, clock: Clock) -> list[float]:
    """Milliseconds to have a block on the disk, again and again."""
    found = []
    with path.open("wb", buffering=0) as file:
        for _ in range(N_WRITES):
            begin = clock.monotonic()
            file.write(bytes(BLOCK_BYTES))
            os.fsync(file.fileno())
            found.append(round((clock.monotonic() - begin) * 1000, 3))
    return found


def _count(connection: sa.Connection) -> int:
    query = sa.select(sa.func.count()).where(ledger_rows.c.kind == "settle")
    return connection.execute(query).scalar_one()
