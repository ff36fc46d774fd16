import asyncio
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
import sqlalchemy as sa

from keepwarm.billing.act import Creation, Repeat
from keepwarm.billing.books import REPEAT_S
from keepwarm.billing.budget import Budget, Period, Scope
from keepwarm.billing.ledger import GROUP_MAX, TRIES, Balance, Ledger
from keepwarm.billing.price import Charge
from keepwarm.billing.row import Payer
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.storage import Storage
from keepwarm.tables import accounts, ledger_rows, repeats
from tests.ledgers import HOLD_S, PAYER, PRICED, at_work, check_sums, hold_of, rows, settlement_of
from tests.unit.billing.ledger_writer import CEILING, COST
from tests.world import CountingIds, FakeClock

T = TypeVar("T")

WRITER = Path(__file__).parent / "ledger_writer.py"
ROOT = Path(__file__).parents[3]


@pytest.fixture
def storage(any_database: Path | str) -> Iterator[Storage]:
    storage = Storage.open(any_database, busy_s=5.0)
    yield storage
    check_sums(storage)
    storage.close()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


class Flaky:
    """A database that is busy for the first so many transactions."""

    def __init__(self, storage: Storage, n_busy: int) -> None:
        self.storage = storage
        self.n_busy = n_busy
        self.n_run = 0
        self.on_disk: list[bool] = []

    async def run(self, fn: Callable[[sa.Connection], T], *, on_disk: bool = True) -> T:
        self.n_run += 1
        self.on_disk.append(on_disk)
        if self.n_run <= self.n_busy:
            raise ApiError(ErrorKind.OVERLOADED, "the database is locked by another process; retry", retry_after_s=1)
        return await self.storage.run(fn, on_disk=on_disk)


async def test_a_turn_is_held_and_settled(storage: Storage, clock: FakeClock) -> None:
    async with at_work(storage, clock) as ledger:
        await ledger.grant("acme", "CNY", 1000, "paid")
        await ledger.hold(hold_of("t", 80))
        assert await ledger.balance("acme") == [Balance("CNY", 1000, 0, 80)]
        await ledger.settle(settlement_of("t", 31))
        [balance] = await ledger.balance("acme")
    assert (balance, balance.available_nano) == (Balance("CNY", 969, 0, 0), 969)
    grant, hold, settle = await asyncio.to_thread(rows, storage)
    assert (grant.kind, grant.cash_nano, grant.note, grant.at) == ("grant", 1000, "paid", clock.now())
    assert (hold.id, hold.held_nano, hold.organisation, hold.project, hold.key_id) == ("t/hold", 80, "acme", "web", 7)
    told = {name: value for name, value in settle._mapping.items() if value is not None}
    assert told == {
        "seq": settle.seq, "id": "t/settle", "kind": "settle", "at": clock.now(), "organisation": "acme",
        "project": "web", "key_id": 7, "turn_id": "t", "dialect": "openai", "model": "m", "status": "finished",
        "sheet": "sheet@1", "sheet_model": "m", "currency": "CNY", "cash_nano": -31, "voucher_nano": 0,
        "held_nano": -80, "n_fresh": 3, "n_read": 4, "n_write": 0, "n_write_long": 0, "n_output": 5, "n_object": 0,
        "fresh_nano": 15, "read_nano": 0, "write_nano": 0, "output_nano": 16, "call_nano": 0, "creation_nano": 0,
        "storage_nano": 0, "uncached_nano": 62,
    }  # fmt: skip


async def test_a_repeated_act_finds_its_row_also_after_a_restart(storage: Storage, clock: FakeClock) -> None:
    for _ in range(2):
        async with at_work(storage, clock) as ledger:
            for _ in range(2):
                await ledger.hold(hold_of("t", 80))
                await ledger.settle(settlement_of("t", 31))
                await ledger.release("t")
    assert [row.id for row in await asyncio.to_thread(rows, storage)] == ["t/hold", "t/settle"]


async def test_what_waits_together_is_one_transaction_and_one_refusal_refuses_no_other(
    storage: Storage, clock: FakeClock
) -> None:
    ledger = Ledger(flaky := Flaky(storage, 0), clock, CountingIds(), hold_s=HOLD_S)
    holds = [hold_of(f"t{n}", 10, is_prepaid=n == 3) for n in range(GROUP_MAX + 1)]
    calls = [asyncio.create_task(ledger.hold(act)) for act in holds]
    await asyncio.sleep(0)
    async with asyncio.TaskGroup() as tasks:
        worker = tasks.create_task(ledger.work())
        found = await asyncio.gather(*calls, return_exceptions=True)
        worker.cancel()
    assert [n for n, one in enumerate(found) if one != ()] == [3]
    assert found[3].kind is ErrorKind.QUOTA_EXCEEDED
    assert flaky.n_run == 2


async def test_charges_wait_for_the_disk_and_holds_only_beside_them(storage: Storage, clock: FakeClock) -> None:
    told = Flaky(storage, 0)
    async with at_work(told, clock) as ledger:
        await ledger.hold(hold_of("t", 80))
        await ledger.release("t")
        await asyncio.gather(ledger.hold(hold_of("u", 80)), ledger.settle(settlement_of("v", 31)))
        await ledger.settle(settlement_of("u", 31))
        await ledger.charge_creation(Creation("c", PAYER, "cache-1", "kimi", "m", PRICED, 10, Charge(creation=5)))
        await ledger.grant("acme", "CNY", 1000, "paid")
    assert told.on_disk == [False, False, True, True, True, True]


async def test_an_act_that_cannot_be_written_fails_alone(clock: FakeClock, storage: Storage) -> None:
    async with at_work(storage, clock) as ledger:
        bad = hold_of("bad", 2**70)
        found = await asyncio.gather(
            *(ledger.hold(act) for act in (hold_of("a", 1), bad, hold_of("b", 1))), return_exceptions=True
        )
    assert (found[0], found[2]) == ((), ())
    assert isinstance(found[1], Exception)
    assert {row.id for row in await asyncio.to_thread(rows, storage)} == {"a/hold", "b/hold"}


async def test_use_is_written_though_the_database_is_busy_and_a_hold_is_refused(
    storage: Storage, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keepwarm.billing.ledger.TRY_AGAIN_S", 0.0)
    async with at_work(Flaky(storage, 1), clock) as ledger:
        with pytest.raises(ApiError, match="locked") as caught:
            await ledger.hold(hold_of("t", 80))
        assert caught.value.kind is ErrorKind.OVERLOADED
    async with at_work(Flaky(storage, TRIES - 1), clock) as ledger:
        await ledger.settle(settlement_of("t", 31))
    async with at_work(Flaky(storage, TRIES), clock) as ledger:
        with pytest.raises(ApiError, match="locked"):
            await ledger.settle(settlement_of("u", 31))
    assert [row.id for row in await asyncio.to_thread(rows, storage)] == ["t/settle"]


async def test_a_caller_that_is_cancelled_holds_nothing(storage: Storage, clock: FakeClock) -> None:
    ledger = Ledger(storage, clock, CountingIds(), hold_s=HOLD_S)
    early = asyncio.create_task(ledger.hold(hold_of("early", 80)))
    await asyncio.sleep(0)
    early.cancel()  # before the worker took it
    await asyncio.wait([early])
    async with asyncio.TaskGroup() as tasks:
        worker = tasks.create_task(ledger.work())
        await ledger.release("of nobody")
        late = asyncio.create_task(ledger.hold(hold_of("late", 80)))
        await asyncio.sleep(0)  # it waits
        await asyncio.sleep(0)  # and is being done
        late.cancel()
        await asyncio.wait([late])
        await ledger.release("of nobody")  # behind both
        worker.cancel()
    assert early.cancelled() and late.cancelled()
    assert await ledger.balance("acme") == [Balance("CNY", 0, 0, 0)]


async def test_who_waits_when_the_worker_ends_is_told(storage: Storage, clock: FakeClock) -> None:
    async with at_work(storage, clock) as ledger:
        await ledger.release("of nobody")
    with pytest.raises(ApiError, match="stopping"):
        await ledger.hold(hold_of("t", 80))
    waiting = Ledger(storage, clock, CountingIds(), hold_s=HOLD_S)
    call = asyncio.create_task(waiting.settle(settlement_of("t", 1)))
    worker = asyncio.create_task(waiting.work())
    await asyncio.sleep(0)
    worker.cancel()
    await asyncio.wait([worker, call])
    assert isinstance(call.exception(), ApiError)


async def test_holds_expire_vouchers_lapse_and_keys_are_forgotten_with_time(storage: Storage, clock: FakeClock) -> None:
    async with at_work(storage, clock) as ledger:
        await ledger.grant_voucher("acme", "CNY", 50, clock.now() + HOLD_S)
        await ledger.hold(hold_of("t", 80, repeat=Repeat(b"key", b"body")))
        await ledger.tick()
        assert await ledger.balance("acme") == [Balance("CNY", 0, 50, 80)]
        clock.advance(HOLD_S)
        await ledger.tick()
        assert await ledger.balance("acme") == [Balance("CNY", 0, 0, 0)]
        n_keys = sa.select(sa.func.count()).select_from(repeats)
        assert await storage.run(lambda connection: connection.execute(n_keys).scalar_one()) == 1
        clock.advance(REPEAT_S)
        await ledger.tick()
        assert await storage.run(lambda connection: connection.execute(n_keys).scalar_one()) == 0
    assert [row.kind for row in await asyncio.to_thread(rows, storage)] == ["grant", "hold", "expire", "lapse"]


async def test_a_request_sent_again_is_known_after_a_restart(storage: Storage, clock: FakeClock) -> None:
    again = Repeat(b"key", b"body")
    async with at_work(storage, clock) as ledger:
        await ledger.hold(hold_of("a", 80, repeat=again))
        await ledger.settle(settlement_of("a", 50, repeat=again))
    async with at_work(storage, clock) as ledger:
        with pytest.raises(ApiError, match="another request body"):
            await ledger.hold(hold_of("b", 80, repeat=Repeat(b"key", b"other")))
        await ledger.hold(hold_of("c", 80, repeat=again))
        with pytest.raises(ApiError, match="still running"):
            await ledger.hold(hold_of("d", 80, repeat=again))
        await ledger.settle(settlement_of("c", 60, repeat=again))
        assert await ledger.balance("acme") == [Balance("CNY", -60, 0, 0)]
    assert [row.repeated_nano for row in await asyncio.to_thread(rows, storage) if row.kind == "settle"] == [None, -50]


async def test_amounts_of_credit_are_checked(storage: Storage, clock: FakeClock) -> None:
    async with at_work(storage, clock) as ledger:
        for wrong in (0, -1):
            with pytest.raises(ApiError, match="above 0"):
                await ledger.grant("acme", "CNY", wrong)
            with pytest.raises(ApiError, match="above 0"):
                await ledger.grant_voucher("acme", "CNY", wrong)
        with pytest.raises(ApiError, match="is over"):
            await ledger.grant_voucher("acme", "CNY", 1, clock.now())
        await ledger.adjust("acme", "CNY", -5, "a refund that was too much")
        assert await ledger.balance("acme") == [Balance("CNY", -5, 0, 0)]
        assert await ledger.balance("nobody") == []


async def test_a_budget_set_late_counts_what_was_spent_before(storage: Storage, clock: FakeClock) -> None:
    async with at_work(storage, clock) as ledger:
        await ledger.settle(settlement_of("yesterday", 5))
        clock.advance(86_400.0)
        await ledger.settle(settlement_of("a", 30))
        await ledger.settle(settlement_of("b", 30, payer=Payer("acme", "other", 8)))
        await ledger.charge_creation(Creation("c", PAYER, "cache-1", "kimi", "m", PRICED, 10, Charge(creation=7)))
        await ledger.adjust("acme", "CNY", -1000, "no spending")
        await ledger.hold(hold_of("open", 11))
        day = Budget(Scope("acme", "web"), "CNY", Period.DAY, soft_nano=40, hard_nano=50)
        total = Budget(Scope("acme"), "CNY", Period.TOTAL, hard_nano=10**6)
        for budget in (day, total, Budget(Scope("acme", key_id=8), "CNY", Period.MONTH, hard_nano=99)):
            await ledger.set_budget(budget)
        spent = {state.budget.scope.text: state.spent_nano for state in await ledger.budgets("acme")}
        assert spent == {"project:acme/web": 37, "org:acme": 72, "key:8": 30}
        [told] = await ledger.hold(hold_of("d", 2))
        assert (told.state.budget, told.reached_nano) == (day, 50)
        with pytest.raises(ApiError, match="project 'web'"):
            await ledger.hold(hold_of("e", 1))
        await ledger.set_budget(Budget(Scope("acme", "web"), "CNY", Period.DAY, hard_nano=51))
        assert await ledger.hold(hold_of("e", 1)) == ()
        assert await ledger.remove_budget(day)
        assert not await ledger.remove_budget(day)
        assert await ledger.hold(hold_of("f", 1000)) == ()


@pytest.mark.parametrize("soft, hard", [(None, None), (-1, None), (None, -1), (11, 10)])
async def test_limits_that_make_no_sense_are_refused(
    storage: Storage, clock: FakeClock, soft: int | None, hard: int | None
) -> None:
    async with at_work(storage, clock) as ledger:
        with pytest.raises(ApiError) as caught:
            await ledger.set_budget(Budget(Scope("acme"), "CNY", Period.DAY, soft, hard))
        assert caught.value.kind is ErrorKind.INVALID_REQUEST
        assert await ledger.budgets("acme") == []


@pytest.mark.parametrize("is_prepaid", [False, True])
async def test_two_hundred_turns_at_once_never_overspend(storage: Storage, clock: FakeClock, is_prepaid: bool) -> None:
    ceiling, limit = 10, 505
    async with at_work(storage, clock) as ledger:
        if is_prepaid:
            await ledger.grant("acme", "CNY", limit)
        else:
            await ledger.set_budget(Budget(Scope("acme"), "CNY", Period.TOTAL, hard_nano=limit))
        seen: list[int] = []
        refused: list[ErrorKind] = []

        async def turn(n: int) -> int:
            try:
                await ledger.hold(hold_of(f"t{n}", ceiling, is_prepaid=is_prepaid))
            except ApiError as error:
                refused.append(error.kind)
                return 0
            [balance] = await ledger.balance("acme")
            seen.append(balance.held_nano - balance.cash_nano + (limit if is_prepaid else 0))
            cost = n % (ceiling + 1)
            await ledger.settle(settlement_of(f"t{n}", cost))
            return cost

        costs = await asyncio.gather(*(turn(n) for n in range(200)))
        [balance] = await ledger.balance("acme")
    assert len(seen) >= limit // ceiling  # as many as fit when each takes its ceiling
    assert max(seen) <= limit
    assert set(refused) == {ErrorKind.QUOTA_EXCEEDED}
    assert balance == Balance("CNY", (limit if is_prepaid else 0) - sum(costs), 0, 0)


def test_kill_9_loses_no_acknowledged_row_and_leaves_holds_that_expire_once(
    any_database: Path | str, clock: FakeClock, tmp_path: Path
) -> None:
    with writer(any_database, tmp_path / "said", "killed") as killed:
        wait_for(lambda: len(said(tmp_path / "said")) > 300)
        killed.kill()
    storage = Storage.open(any_database, busy_s=5.0)
    check_sums(storage)
    found = Counter(row.id for row in rows(storage))
    assert said(tmp_path / "said") <= set(found) and max(found.values()) == 1
    n_open = sum(row.held_nano for row in rows(storage)) // CEILING
    clock.now_s = 4e9  # long after

    async def expire() -> tuple[int, int]:
        async with at_work(storage, clock) as ledger:
            return await ledger.expire_holds(), await ledger.expire_holds()

    assert asyncio.run(expire()) == (n_open, 0)
    check_sums(storage)
    storage.close()


def test_two_processes_on_one_database_neither_lose_nor_double_a_row(any_database: Path | str, tmp_path: Path) -> None:
    n_turns = 200
    with writer(any_database, tmp_path / "a", "a") as endless:
        wait_for(lambda: said(tmp_path / "a"))
        with writer(any_database, tmp_path / "b", "b", n_turns) as other:
            assert other.wait(timeout=100) == 0
        n_said = len(said(tmp_path / "a"))
        wait_for(lambda: len(said(tmp_path / "a")) > n_said)
        endless.kill()
    storage = Storage.open(any_database, busy_s=5.0)
    check_sums(storage)
    found = Counter(row.id for row in rows(storage))
    assert max(found.values()) == 1
    of_b = {row_id for row_id in found if row_id.startswith("b-")}
    assert of_b == {f"b-{n}/{kind}" for n in range(n_turns) for kind in ("hold", "settle")} == said(tmp_path / "b")
    assert said(tmp_path / "a") <= set(found) - of_b
    n_settled = sum(row_id.endswith("/settle") for row_id in found)
    [account] = storage.run_sync(lambda connection: connection.execute(sa.select(accounts)).all())
    assert account.cash_nano == -COST * n_settled
    storage.close()


@contextmanager
def writer(where: Path | str, out: Path, *arguments: object) -> "Iterator[subprocess.Popen[bytes]]":
    if isinstance(where, Path):
        where.parent.mkdir(exist_ok=True)
    command = [sys.executable, WRITER, str(where), *map(str, arguments)]
    with out.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, env={"PYTHONPATH": str(ROOT), "PATH": ""})
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def said(out: Path) -> set[str]:
    """Whole lines only."""
    return {line.strip() for line in out.read_text().splitlines(keepends=True) if line.endswith("\n")}


def wait_for(condition: Callable[[], object]) -> None:
    while not condition():  # the test's own timeout ends it
        time.sleep(0.01)


def test_ids_of_rows_are_unique_in_the_database_too(storage: Storage) -> None:
    def twice(connection: sa.Connection) -> None:
        values = {
            "id": "t/settle",
            "kind": "settle",
            "at": 1.0,
            "organisation": "a",
            "cash_nano": 0,
            "voucher_nano": 0,
            "held_nano": 0,
        }
        connection.execute(sa.insert(ledger_rows), [values, values])

    with pytest.raises(sa.exc.IntegrityError):
        storage.run_sync(twice)
