"""Budgets: how much an organisation, a project or a key may spend in a day, a month or altogether. Pure.

A hard stop refuses a turn that could pass it: what has been spent in the period, what is held, and the turn's own hold
together may come to the limit and no further. A soft stop is only told. What has been used is charged in any case, so
spending passes a hard stop where nothing was held: storage, and a hold that expired before its turn ended.
"""

from datetime import UTC, datetime
from enum import Enum

from msgspec import Struct

from keepwarm.billing.row import Payer
from keepwarm.billing.sheet import decimal_text


class Period(Enum):
    """What a budget is for; days and months are UTC's."""

    DAY = "day"
    MONTH = "month"
    TOTAL = "total"


class Scope(Struct, frozen=True):
    """Whose budget: an organisation's or, where one of them is given, that of its project or key."""

    organisation: str
    project: str | None = None
    key_id: int | None = None

    @property
    def text(self) -> str:
        """As in `tables.budgets`. Names have neither ":" nor "/"."""
        if self.key_id is not None:
            return f"key:{self.key_id}"
        return f"org:{self.organisation}" if self.project is None else f"project:{self.organisation}/{self.project}"


class Budget(Struct, frozen=True):
    """Limits in nano of `currency`; None: no such stop."""

    scope: Scope
    currency: str
    period: Period
    soft_nano: int | None = None
    hard_nano: int | None = None


class BudgetState(Struct, frozen=True):
    """A budget, what has been spent of it in its current period, and what open turns hold."""

    budget: Budget
    period_start: int  # unix seconds; 0 for TOTAL
    spent_nano: int
    held_nano: int


class Excess(Struct, frozen=True):
    """A soft stop that a turn may pass: `reached_nano` are spending, holds and the turn's own hold."""

    state: BudgetState
    reached_nano: int

    @property
    def message(self) -> str:
        """For a log or a report."""
        state = self.state
        return f"{described(state)} has a soft limit of {_money(state.budget.soft_nano, state)}; {_told(state)}"


def scopes_of(organisation: str, project: str | None, key_id: int | None) -> list[str]:
    """The texts of all scopes that a payer's spending counts for."""
    scopes = [Scope(organisation)]
    if project is not None:
        scopes.append(Scope(organisation, project))
    if key_id is not None:
        scopes.append(Scope(organisation, key_id=key_id))
    return [scope.text for scope in scopes]


def period_start(period: Period, now: float) -> int:
    """Unix seconds at which the period that `now` is in began; 0 for TOTAL."""
    if period is Period.TOTAL:
        return 0
    day = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return int((day if period is Period.DAY else day.replace(day=1)).timestamp())


def refusal(state: BudgetState, amount_nano: int) -> str | None:
    """Why a turn that may cost `amount_nano` is not let in; None: this budget has room for it."""
    hard = state.budget.hard_nano
    if hard is None or state.spent_nano + state.held_nano + amount_nano <= hard:
        return None
    return (
        f"{described(state)} is {_money(hard, state)}: {_told(state)}, and this request may cost up to "
        f"{_money(amount_nano, state)}"
    )


def excess(state: BudgetState, amount_nano: int) -> Excess | None:
    """The soft stop that a turn of at most `amount_nano` may pass, if it has one."""
    soft, reached = state.budget.soft_nano, state.spent_nano + state.held_nano + amount_nano
    return None if soft is None or reached <= soft else Excess(state, reached)


def described(state: BudgetState) -> str:
    """A budget in words, such as: the budget of project 'web' for the day 2026-11-28 (UTC)."""
    scope, period = state.budget.scope, state.budget.period
    if scope.key_id is not None:
        whose = f"key {scope.key_id}"
    else:
        whose = f"organisation {scope.organisation!r}" if scope.project is None else f"project {scope.project!r}"
    if period is Period.TOTAL:
        return f"the budget of {whose}"
    begin = datetime.fromtimestamp(state.period_start, UTC).date().isoformat()
    return f"the budget of {whose} for the {period.value} {begin if period is Period.DAY else begin[:7]} (UTC)"


def balance_refusal(payer: Payer, currency: str, sums: tuple[int, int, int], amount_nano: int) -> str | None:
    """Why a prepaid turn that may cost `amount_nano` is not let in; None: the balance covers it.

    `sums` are cash, vouchers and what is held, in nano.
    """
    cash, voucher, held = sums
    if amount_nano <= cash + voucher - held:
        return None
    return (
        f"the balance of organisation {payer.organisation!r} does not cover this request: it may cost up to "
        f"{decimal_text(amount_nano)} {currency} and {decimal_text(cash + voucher - held)} {currency} is available "
        f"(cash {decimal_text(cash)}, vouchers {decimal_text(voucher)}, held {decimal_text(held)}); add credit"
    )


def _told(state: BudgetState) -> str:
    return f"{_money(state.spent_nano, state)} is spent and {_money(state.held_nano, state)} is held by open requests"


def _money(nano: int | None, state: BudgetState) -> str:
    assert nano is not None
    return f"{decimal_text(nano)} {state.budget.currency}"
