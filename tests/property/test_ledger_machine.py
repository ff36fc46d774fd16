"""The ledger on SQLite against a twin that keeps a list of what was done and adds all of it up for every question.

Small amounts, two organisations with two projects each, one budget of each kind and period, vouchers that end soon, and
a process that is killed now and then: the next ledger has nothing but the file.
"""

import asyncio
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import hypothesis.strategies as st
import sqlalchemy as sa
from hypothesis import settings
from hypothesis.stateful import Bundle, MultipleResults, RuleBasedStateMachine, initialize, invariant, multiple, rule

from keepwarm.billing.act import Repeat
from keepwarm.billing.books import ATTEMPTS_MAX, REPEAT_S
from keepwarm.billing.budget import Budget, Period, Scope
from keepwarm.billing.ledger import Balance, Ledger
from keepwarm.billing.row import Payer
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.storage import Storage, database_path
from keepwarm.tables import vouchers
from tests.ledgers import HOLD_S, check_sums, hold_of, settlement_of
from tests.world import CountingIds, FakeClock

T = TypeVar("T")

DAY_S = 86_400
PAYERS = [Payer(org, project, key) for org in ("a", "b") for project, key in (("x", 1), ("y", 2))]
BUDGETS = [
    Budget(Scope("a"), "CNY", Period.TOTAL, hard_nano=120),
    Budget(Scope("a", "x"), "CNY", Period.DAY, soft_nano=10, hard_nano=50),
    Budget(Scope("b", key_id=2), "CNY", Period.MONTH, hard_nano=70),
]
amounts = st.integers(0, 40)
pauses = st.sampled_from([0.0, 0.0, 60.0])  # vouchers end within a rule, before anything but use has looked at them
payers = st.sampled_from(PAYERS)
organisations = st.sampled_from(["a", "b"])
repeats = st.sampled_from([None, None, None, (1, 1), (1, 1), (1, 2), (2, 1)]).map(
    lambda pair: None if pair is None else Repeat(bytes([pair[0]]), bytes([pair[1]]))
)


@dataclass
class Turn:
    id: str
    payer: Payer
    repeat: Repeat | None
    began_at: float
    held: int
    is_open: bool = True
    is_settled: bool = False
    charged: int = 0
    charged_at: float = 0.0
    touched_at: float = 0.0  # of its key: begun or settled


@dataclass
class Coin:
    """A voucher."""

    id: str
    organisation: str
    left: int
    number: int
    expires_at: float | None


class Twin:
    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.coins: list[Coin] = []
        self.cash: list[tuple[str, int]] = []
        self.budgets: dict[tuple[str, Period], Budget] = {}

    def lapse(self, now: float) -> None:
        for coin in self.coins:
            if coin.expires_at is not None and coin.expires_at <= now:
                coin.left = 0

    def balance(self, organisation: str) -> tuple[int, int, int]:
        return (
            sum(amount for org, amount in self.cash if org == organisation),
            sum(coin.left for coin in self.coins if coin.organisation == organisation),
            sum(turn.held for turn in self.turns if turn.is_open and turn.payer.organisation == organisation),
        )

    def is_known(self, organisation: str) -> bool:
        """Whether a row names it."""
        return (
            any(org == organisation for org, _ in self.cash)
            or any(coin.organisation == organisation for coin in self.coins)
            or any(turn.payer.organisation == organisation for turn in self.turns)
        )

    def counts(self, budget: Budget, payer: Payer) -> bool:
        scope = budget.scope
        return (
            scope.organisation == payer.organisation
            and scope.project in (None, payer.project)
            and scope.key_id in (None, payer.key_id)
        )

    def spent_and_held(self, budget: Budget, now: float) -> tuple[int, int]:
        mine = [turn for turn in self.turns if self.counts(budget, turn.payer)]
        spent = sum(turn.charged for turn in mine if self.same_period(budget.period, turn.charged_at, now))
        return spent, sum(turn.held for turn in mine if turn.is_open)

    def same_period(self, period: Period, one: float, other: float) -> bool:
        # The machine's clock never leaves its month.
        return period is not Period.DAY or one // DAY_S == other // DAY_S

    def attempts(self, payer: Payer, repeat: Repeat, now: float) -> list[Turn]:
        """Those still remembered: a chain without a gap of a day, up to now."""
        mine = [
            turn
            for turn in self.turns
            if turn.repeat
            and (turn.payer.organisation, turn.repeat.key_digest) == (payer.organisation, repeat.key_digest)
        ]
        marks = sorted({t.touched_at for t in mine} | {t.began_at for t in mine})
        start = now
        for mark in reversed(marks):
            if mark + REPEAT_S <= start:
                break
            start = mark
        return [turn for turn in mine if max(turn.touched_at, turn.began_at) >= start] if mine else []

    def pay(self, organisation: str, amount: int) -> None:
        coins = [coin for coin in self.coins if coin.organisation == organisation]
        for coin in sorted(coins, key=lambda one: (one.expires_at or float("inf"), one.number)):
            part = min(amount, coin.left)
            coin.left -= part
            amount -= part
        self.cash.append((organisation, -amount))


async def together(calls: list[Coroutine[Any, Any, Any]]) -> list[Any]:
    return await asyncio.gather(*calls, return_exceptions=True)


@cache
def new_database() -> bytes:
    """The file of an empty database: making the tables takes longer than an example."""
    with tempfile.TemporaryDirectory() as directory:
        path = database_path(directory)
        Storage.open(path, busy_s=5.0).close()
        return path.read_bytes()


class Keeping(RuleBasedStateMachine):
    turns = Bundle("turns")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.directory = tempfile.TemporaryDirectory()
        self.path = database_path(self.directory.name)
        self.path.write_bytes(new_database())
        self.clock = FakeClock()
        self.clock.now_s = 1_699_920_000.0 + DAY_S - 150  # 14 November 2023, shortly before midnight
        self.ids = CountingIds()
        self.twin = Twin()
        self.n = 0
        self.start()

    def start(self) -> None:
        self.storage = Storage.open(self.path, busy_s=5.0)
        self.ledger = Ledger(self.storage, self.clock, self.ids, hold_s=HOLD_S)
        self.worker = self.runner.get_loop().create_task(self.ledger.work())

    def teardown(self) -> None:
        self.stop()
        self.runner.close()
        self.directory.cleanup()

    def stop(self) -> None:
        self.worker.cancel()
        self.run(asyncio.wait([self.worker]))
        self.storage.close()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(coroutine)

    @initialize()
    def first_budget(self) -> None:
        self.set_budget(BUDGETS[0])

    @rule(budget=st.sampled_from(BUDGETS), is_wanted=st.sampled_from([True, True, False]))
    def set_budget(self, budget: Budget, is_wanted: bool = True) -> None:
        key = (budget.scope.text, budget.period)
        if is_wanted:
            self.run(self.ledger.set_budget(budget))
            self.twin.budgets[key] = budget
        else:
            removed = self.run(self.ledger.remove_budget(budget))
            assert removed == (self.twin.budgets.pop(key, None) is not None)

    @rule(organisation=organisations, amount=st.integers(-20, 60))
    def cash(self, organisation: str, amount: int) -> None:
        if amount > 0:
            self.run(self.ledger.grant(organisation, "CNY", amount))
        else:
            self.run(self.ledger.adjust(organisation, "CNY", amount, "note"))
        self.twin.cash.append((organisation, amount))

    @rule(organisation=organisations, amounts=st.lists(st.integers(1, 30), min_size=1, max_size=3), data=st.data())
    def vouchers(self, organisation: str, amounts: list[int], data: st.DataObject) -> None:
        for amount in amounts:
            lives_s = data.draw(st.sampled_from([None, 50, 90, 400]))
            expires_at = None if lives_s is None else self.clock.now() + lives_s
            voucher_id = self.run(self.ledger.grant_voucher(organisation, "CNY", amount, expires_at))
            self.twin.coins.append(Coin(voucher_id, organisation, amount, len(self.twin.coins), expires_at))

    @rule(
        target=turns,
        wanted=st.lists(st.tuples(payers, amounts, st.booleans(), repeats), min_size=1, max_size=5),
        after_s=pauses,
    )
    def hold(self, wanted: list[tuple[Payer, int, bool, Repeat | None]], after_s: float) -> MultipleResults[Turn]:
        """All at once, so that they are one group."""
        self.clock.advance(after_s)
        now = self.clock.now()
        self.twin.lapse(now)
        acts, expected, begun = [], [], []
        for payer, amount, is_prepaid, repeat in wanted:
            self.n += 1
            acts.append(hold_of(f"t{self.n}", amount, payer=payer, is_prepaid=is_prepaid, repeat=repeat))
            refusal, held = self.expected(payer, amount, is_prepaid, repeat, now)
            expected.append(refusal)
            if refusal is None:
                begun.append(Turn(f"t{self.n}", payer, repeat, now, held, touched_at=now))
                self.twin.turns.append(begun[-1])
                cash, coins, all_held = self.twin.balance(payer.organisation)
                assert not is_prepaid or cash + coins - all_held >= 0
        found = self.run(together([self.ledger.hold(act) for act in acts]))
        assert [one.kind if isinstance(one, ApiError) else None for one in found] == expected
        return multiple(*begun)

    def expected(
        self, payer: Payer, amount: int, is_prepaid: bool, repeat: Repeat | None, now: float
    ) -> tuple[ErrorKind | None, int]:
        if repeat is not None:
            before = self.twin.attempts(payer, repeat, now)
            if before:
                if before[0].repeat.body_digest != repeat.body_digest:
                    return ErrorKind.INVALID_REQUEST, 0
                last = before[-1]
                if last.is_open and last.began_at + HOLD_S > now:
                    return ErrorKind.OVERLOADED, 0
                if len(before) >= ATTEMPTS_MAX:
                    return ErrorKind.INVALID_REQUEST, 0
            amount = max(0, amount - sum(turn.charged for turn in before))
        cash, coins, held = self.twin.balance(payer.organisation)
        if is_prepaid and amount > cash + coins - held:
            return ErrorKind.QUOTA_EXCEEDED, 0
        for budget in self.twin.budgets.values():
            if self.twin.counts(budget, payer):
                spent, holds = self.twin.spent_and_held(budget, now)
                if spent + holds + amount > budget.hard_nano:
                    return ErrorKind.QUOTA_EXCEEDED, 0
        return None, amount

    @rule(over=st.lists(st.tuples(turns, amounts), min_size=1, max_size=4), after_s=pauses)
    def settle(self, over: list[tuple[Turn, int]], after_s: float) -> None:
        """All at once, some of them twice."""
        self.clock.advance(after_s)
        now = self.clock.now()
        self.twin.lapse(now)
        acts = [settlement_of(turn.id, cost, payer=turn.payer, repeat=turn.repeat) for turn, cost in over]
        assert self.run(together([self.ledger.settle(act) for act in acts])) == [None] * len(acts)
        for turn, cost in over:
            if turn.is_settled:
                continue
            paid = 0
            if turn.repeat is not None:
                paid = min(cost, sum(one.charged for one in self.twin.attempts(turn.payer, turn.repeat, now)))
                turn.touched_at = now
            turn.is_open, turn.is_settled = False, True
            turn.charged, turn.charged_at = cost - paid, now
            self.twin.pay(turn.payer.organisation, cost - paid)

    @rule(turn=turns, times=st.integers(1, 2))
    def release(self, turn: Turn, times: int) -> None:
        assert self.run(together([self.ledger.release(turn.id) for _ in range(times)])) == [None] * times
        turn.is_open = False

    @rule(seconds=st.sampled_from([1.0, 49.0, HOLD_S, 3600.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def tick(self) -> None:
        now = self.clock.now()
        over = [turn for turn in self.twin.turns if turn.is_open and turn.began_at + HOLD_S <= now]
        assert self.run(self.ledger.expire_holds()) == len(over)
        for turn in over:
            turn.is_open = False
        self.run(self.ledger.tick())

    @rule()
    def killed(self) -> None:
        """What was acknowledged is on the disk, and nothing else is known to the next process."""
        self.stop()
        self.start()

    @invariant()
    def every_sum_is_that_of_its_rows(self) -> None:
        check_sums(self.storage)

    @invariant()
    def what_is_left_of_each_voucher_is_the_twins(self) -> None:
        self.twin.lapse(self.clock.now())
        self.run(self.ledger.lapse_vouchers())
        query = sa.select(vouchers.c.id, vouchers.c.left_nano)
        found = self.storage.run_sync(lambda connection: {row.id: row.left_nano for row in connection.execute(query)})
        assert found == {coin.id: coin.left for coin in self.twin.coins}

    @invariant()
    def balances_are_the_twins(self) -> None:
        self.twin.lapse(self.clock.now())
        for organisation in ("a", "b"):
            found = self.run(self.ledger.balance(organisation))
            expected = [Balance("CNY", *self.twin.balance(organisation))] if self.twin.is_known(organisation) else []
            assert found == expected

    @invariant()
    def budgets_are_the_twins(self) -> None:
        now = self.clock.now()
        found = [state for org in ("a", "b") for state in self.run(self.ledger.budgets(org))]
        assert {(one.budget.scope.text, one.budget.period): (one.spent_nano, one.held_nano) for one in found} == {
            key: self.twin.spent_and_held(budget, now) for key, budget in self.twin.budgets.items()
        }


Keeping.TestCase.settings = settings(max_examples=30, stateful_step_count=40)
test_keeping = Keeping.TestCase
