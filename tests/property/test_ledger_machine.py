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
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from keepwarm.billing.act import Repeat
from keepwarm.billing.books import ATTEMPTS_MAX, REPEAT_S
from keepwarm.billing.budget import Budget, Period, Scope
from keepwarm.billing.ledger import Balance, Ledger
from keepwarm.billing.row import Payer
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.storage import Storage, database_path
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
payers = st.sampled_from(PAYERS)
repeats = st.sampled_from([None, None, (1, 1), (1, 2), (2, 1)]).map(
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
        self.last_touch: dict[tuple[str, bytes], float] = {}
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

    def refused(self, coroutine: Coroutine[Any, Any, Any]) -> ErrorKind | None:
        try:
            self.run(coroutine)
        except ApiError as error:
            return error.kind
        return None

    @initialize()
    def budget_of_each_kind(self) -> None:
        self.set_budget(BUDGETS[0])

    @rule(budget=st.sampled_from(BUDGETS))
    def set_budget(self, budget: Budget) -> None:
        self.run(self.ledger.set_budget(budget))
        self.twin.budgets[budget.scope.text, budget.period] = budget

    @rule(budget=st.sampled_from(BUDGETS))
    def remove_budget(self, budget: Budget) -> None:
        removed = self.run(self.ledger.remove_budget(budget))
        assert removed == (self.twin.budgets.pop((budget.scope.text, budget.period), None) is not None)

    @rule(organisation=st.sampled_from(["a", "b"]), amount=st.integers(1, 60))
    def grant(self, organisation: str, amount: int) -> None:
        self.run(self.ledger.grant(organisation, "CNY", amount))
        self.twin.cash.append((organisation, amount))

    @rule(organisation=st.sampled_from(["a", "b"]), amount=st.integers(-20, 20))
    def adjust(self, organisation: str, amount: int) -> None:
        self.run(self.ledger.adjust(organisation, "CNY", amount, "note"))
        self.twin.cash.append((organisation, amount))

    @rule(
        organisation=st.sampled_from(["a", "b"]),
        amount=st.integers(1, 40),
        lives_s=st.sampled_from([None, 50, 90, 90, 400]),
    )
    def voucher(self, organisation: str, amount: int, lives_s: int | None) -> None:
        expires_at = None if lives_s is None else self.clock.now() + lives_s
        self.run(self.ledger.grant_voucher(organisation, "CNY", amount, expires_at))
        self.twin.coins.append(Coin(organisation, amount, len(self.twin.coins), expires_at))

    @rule(target=turns, payer=payers, amount=amounts, is_prepaid=st.booleans(), repeat=repeats)
    def hold(self, payer: Payer, amount: int, is_prepaid: bool, repeat: Repeat | None) -> Turn:
        now = self.clock.now()
        self.n += 1
        act = hold_of(f"t{self.n}", amount, payer=payer, is_prepaid=is_prepaid, repeat=repeat)
        self.twin.lapse(now)
        expected, held = self.expected(payer, amount, is_prepaid, repeat, now)
        found = self.refused(self.ledger.hold(act))
        assert found is expected
        turn = Turn(act.turn_id, payer, repeat, now, held, touched_at=now)
        if found is not None:
            turn.is_open, turn.repeat = False, None
            turn.held = 0
            turn.is_settled = True  # nothing more comes of it
            return turn
        if is_prepaid:
            cash, coins, before = self.twin.balance(payer.organisation)
            assert cash + coins - before - held >= 0
        self.twin.turns.append(turn)
        return turn

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

    @rule(turn=turns, cost=amounts, times=st.integers(1, 2))
    def settle(self, turn: Turn, cost: int, times: int) -> None:
        if turn not in self.twin.turns:
            return
        now = self.clock.now()
        for _ in range(times):
            self.run(self.ledger.settle(settlement_of(turn.id, cost, payer=turn.payer, repeat=turn.repeat)))
        if turn.is_settled:
            return
        self.twin.lapse(now)
        paid = 0
        if turn.repeat is not None:
            paid = min(cost, sum(one.charged for one in self.twin.attempts(turn.payer, turn.repeat, now)))
            turn.touched_at = now
        turn.is_open, turn.is_settled = False, True
        turn.charged, turn.charged_at = cost - paid, now
        self.twin.pay(turn.payer.organisation, cost - paid)

    @rule(turn=turns, times=st.integers(1, 2))
    def release(self, turn: Turn, times: int) -> None:
        for _ in range(times):
            self.run(self.ledger.release(turn.id))
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


Keeping.TestCase.settings = settings(max_examples=50, stateful_step_count=40)
test_keeping = Keeping.TestCase
