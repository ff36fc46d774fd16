"""The books: what holds, charges, credit and time do to accounts, vouchers, budgets and open holds. Pure.

`Books` has what a group of acts concerns, as it is when they are done. A method changes it and adds the rows that say so;
one that refuses has changed nothing but vouchers whose time is over. All sums of an account change by rows alone, so they cannot differ from the rows.

    open hold ── settle ──▶ charged     held −, vouchers −, cash −
       │   ├──── release ─▶ nothing     held −
       │   └──── expire ──▶ nothing     held −
       └ of a cache object: creation    held −, vouchers −, cash −

A turn settled without an open hold, since it never held or its hold expired, is charged just the same: the use happened.
"""

from collections.abc import Iterable
from typing import assert_never

from msgspec import Struct
from msgspec.structs import replace

from keepwarm.billing.act import Act, Creation, Hold, Release, Repeat, Settlement
from keepwarm.billing.budget import (
    Budget,
    BudgetState,
    Excess,
    Period,
    balance_refusal,
    excess,
    period_start,
    refusal,
    scopes_of,
)
from keepwarm.billing.row import Payer, Row, RowKind
from keepwarm.billing.sheet import decimal_text
from keepwarm.core.errors import ApiError, ErrorKind

ATTEMPTS_MAX = 5  # with one Idempotency-Key; clients retry two or three times
REPEAT_S = 24 * 3600.0  # so long after its last attempt a key is remembered
SUM_NANO_MAX = 10**18  # of cash and of vouchers; a column holds nine times that, so use and holds have room
RETRY_AFTER_S = 2  # while the attempt before is still running

AccountKey = tuple[str, str]  # organisation, currency
SpentKey = tuple[str, str, Period, int]  # scope, currency, period and its start
RepeatKey = tuple[str, bytes]  # organisation, digest of the Idempotency-Key


class Account(Struct, frozen=True):
    """The three sums of an organisation and currency, in nano. Available is cash + voucher − held."""

    cash_nano: int = 0
    voucher_nano: int = 0
    held_nano: int = 0


class Voucher(Struct, frozen=True):
    """Credit that is used before cash and may have a last day. `left_nano` of it has not been used."""

    id: str
    left_nano: int
    created_at: float
    expires_at: float | None


class OpenHold(Struct, frozen=True):
    """A hold that nothing has closed yet."""

    turn_id: str
    organisation: str
    project: str
    key_id: int | None
    currency: str
    amount_nano: int
    at: float
    expires_at: float


class Attempts(Struct, frozen=True):
    """What is remembered of an Idempotency-Key: its last attempt's turn, and what all were charged together."""

    body_digest: bytes
    turn_id: str
    n_attempts: int
    charged_nano: int
    currency: str | None
    at: float


class Contents(Struct):
    """What books have before them. `accounts` and `vouchers` must be complete for every organisation concerned, `budgets`
    too; `spent` for every budget, and `held` unless it is None: then no act asks how a budget stands; `holds` and `repeats`
    for every act; `known` row ids that acts may repeat.
    """

    accounts: dict[AccountKey, Account]
    vouchers: dict[AccountKey, tuple[Voucher, ...]]  # in the order of their use
    holds: dict[str, OpenHold]
    budgets: dict[str, tuple[Budget, ...]]  # by organisation
    spent: dict[SpentKey, int]
    held: dict[tuple[str, str], int] | None  # by scope and currency
    repeats: dict[RepeatKey, Attempts]
    known: set[str]

    def copy(self) -> "Contents":
        """Of the containers; what is in them is never changed."""
        return Contents(
            accounts=dict(self.accounts),
            vouchers=dict(self.vouchers),
            holds=dict(self.holds),
            budgets=dict(self.budgets),
            spent=dict(self.spent),
            held=None if self.held is None else dict(self.held),
            repeats=dict(self.repeats),
            known=set(self.known),
        )


class Books:
    """The books at the time `now`; a hold made now expires after `hold_s`."""

    def __init__(self, contents: Contents, now: float, hold_s: float) -> None:
        self.before = contents
        self.at = contents.copy()
        self.rows: list[Row] = []
        self._now = now
        self._hold_s = hold_s

    def do(self, act: Act) -> tuple[Excess, ...]:
        """Raises ApiError as `hold`."""
        match act:
            case Hold():
                return self.hold(act)
            case Settlement():
                self.settle(act)
            case Release():
                self.release(act)
            case Creation():
                self.create(act)
            case _:
                assert_never(act)
        return ()

    def hold(self, act: Hold) -> tuple[Excess, ...]:
        """Set the turn's ceiling aside; gives the soft stops that it may pass.

        Raises ApiError: QUOTA_EXCEEDED when a prepaid balance or a hard budget does not cover it; for a request that was
        sent before, INVALID_REQUEST with another body or once too often, OVERLOADED while the attempt before is running.
        """
        row_id, payer, currency = f"{act.turn_id}/hold", act.payer, act.priced.currency
        if row_id in self.at.known:
            return ()
        attempts = None if act.repeat is None else self._attempt(act, act.repeat)
        amount = max(0, act.amount_nano - _paid(attempts, currency))
        self._lapse(payer.organisation, currency)
        own = self._budgets_of(payer.organisation, payer.project, payer.key_id, currency)
        states = [self.state(budget) for budget in own]
        self._check_room(act, amount, states)
        hold = OpenHold(
            act.turn_id,
            payer.organisation,
            payer.project,
            payer.key_id,
            currency,
            amount,
            self._now,
            self._now + self._hold_s,
        )
        self.at.holds[act.turn_id] = hold
        self._count_held(hold, amount)
        if act.repeat is not None and attempts is not None:
            self.at.repeats[payer.organisation, act.repeat.key_digest] = attempts
        self._add(
            Row(
                id=row_id,
                kind=RowKind.HOLD,
                at=self._now,
                organisation=payer.organisation,
                project=payer.project,
                key_id=payer.key_id,
                turn_id=act.turn_id,
                dialect=act.dialect,
                model=act.model,
                priced=act.priced,
                currency=currency,
                held_nano=amount,
            )
        )
        return tuple(told for state in states if (told := excess(state, amount)) is not None)

    def settle(self, act: Settlement) -> None:
        """Charge what a turn used, and give its hold back if that is still open."""
        row_id, payer, priced = f"{act.turn_id}/settle", act.payer, act.priced
        if row_id in self.at.known:
            return
        currency = None if priced is None else priced.currency
        held = self._closed(act.turn_id, currency)
        cost = 0 if act.use.charge is None else act.use.charge.total
        paid = 0 if act.repeat is None else self._paid_before(act, act.repeat, cost)
        self._charge(
            Row(
                id=row_id,
                kind=RowKind.SETTLE,
                at=self._now,
                organisation=payer.organisation,
                project=payer.project,
                key_id=payer.key_id,
                turn_id=act.turn_id,
                dialect=act.dialect,
                model=act.model,
                status=act.status,
                priced=priced,
                currency=currency,
                held_nano=-held,
                use=act.use,
                repeated_nano=-paid if paid else None,
            ),
            cost - paid,
        )

    def create(self, act: Creation) -> None:
        """Charge the making of a cache object, and give its hold back if it has one."""
        row_id, payer, priced = f"{act.id}/creation", act.payer, act.priced
        if row_id in self.at.known:
            return
        currency = None if priced is None else priced.currency
        held = self._closed(act.id, currency)
        self._charge(
            Row(
                id=row_id,
                kind=RowKind.CREATION,
                at=self._now,
                organisation=payer.organisation,
                project=payer.project,
                key_id=payer.key_id,
                turn_id=act.id,
                object_id=act.object_id,
                dialect=act.dialect,
                model=act.model,
                priced=priced,
                currency=currency,
                held_nano=-held,
                object_tokens=act.n_tokens,
                charge=act.charge,
            ),
            0 if act.charge is None else act.charge.total,
        )

    def store(self, row: Row) -> None:
        """Charge `row.charge`, the keeping of a cache object; the row comes without sums and once only."""
        assert row.id not in self.at.known, f"row {row.id} is there already"
        self._charge(row, 0 if row.charge is None else row.charge.total)

    def release(self, act: Release) -> None:
        """Give a hold back; nothing happens when none is open."""
        hold = self._taken(act.turn_id)
        if hold is None:
            return
        self._add_end(hold, RowKind.RELEASE)
        if act.repeat is not None and act.payer is not None:
            key = (act.payer.organisation, act.repeat.key_digest)
            known = self.at.repeats.get(key)
            if known is not None and known.turn_id == act.turn_id:
                self.at.repeats[key] = replace(known, n_attempts=known.n_attempts - 1)

    def expire(self) -> int:
        """Give all holds back that are before us and whose time is over; how many."""
        over = [hold for hold in self.at.holds.values() if hold.expires_at <= self._now]
        for hold in over:
            self._taken(hold.turn_id)
            self._add_end(hold, RowKind.EXPIRE)
        return len(over)

    def lapse(self) -> int:
        """End all vouchers before us whose time is over; how many."""
        return sum(self._lapse(*key) for key in list(self.at.vouchers))

    def credit(self, row: Row, voucher: Voucher | None = None) -> None:
        """Add a grant or a correction: the row has its sums. For a grant of a voucher `voucher` is that.

        Raises ApiError(INVALID_REQUEST) when the organisation would have more than can be counted.
        """
        assert row.currency is not None and row.id not in self.at.known
        account = self.at.accounts.get((row.organisation, row.currency), Account())
        for had, comes in ((account.cash_nano, row.cash_nano), (account.voucher_nano, row.voucher_nano)):
            if abs(had + comes) > max(SUM_NANO_MAX, abs(had)):  # what use took below it may be paid back in parts
                told = " and ".join(f"{decimal_text(nano)} {row.currency}" for nano in (had, comes))
                message = f"{told} are together beyond what can be counted, {decimal_text(SUM_NANO_MAX)}"
                raise ApiError(ErrorKind.INVALID_REQUEST, message, param="amount")
        if voucher is not None:
            key = (row.organisation, row.currency)
            self.at.vouchers[key] = in_order((*self.at.vouchers.get(key, ()), voucher))
        self._add(row)

    def _check_room(self, act: Hold, amount: int, states: Iterable[BudgetState]) -> None:
        currency = act.priced.currency
        reason = None
        if act.is_prepaid:
            account = self.at.accounts.get((act.payer.organisation, currency), Account())
            sums = (account.cash_nano, account.voucher_nano, account.held_nano)
            reason = balance_refusal(act.payer, currency, sums, amount)
        for state in states:
            reason = reason or refusal(state, amount)
        if reason is not None:
            raise ApiError(ErrorKind.QUOTA_EXCEEDED, reason)

    def _charge(self, row: Row, amount: int) -> None:
        """Take `amount` from vouchers, then from cash, and add the row that says so."""
        assert amount >= 0
        if row.currency is None:
            self._add(row)
            return
        self._lapse(row.organisation, row.currency)
        from_vouchers = self._from_vouchers((row.organisation, row.currency), amount)
        if amount:
            for budget in self._budgets_of(row.organisation, row.project, row.key_id, row.currency):
                key = self._spent_key(budget)
                self.at.spent[key] = self.at.spent.get(key, 0) + amount
        self._add(replace(row, voucher_nano=-from_vouchers, cash_nano=from_vouchers - amount))

    def _from_vouchers(self, key: AccountKey, amount: int) -> int:
        vouchers = self.at.vouchers.get(key)
        if not vouchers or not amount:
            return 0
        left, used = amount, []
        for voucher in vouchers:
            part = min(left, voucher.left_nano)
            left -= part
            used.append(replace(voucher, left_nano=voucher.left_nano - part) if part else voucher)
        self.at.vouchers[key] = tuple(used)
        return amount - left

    def _lapse(self, organisation: str, currency: str) -> int:
        key = (organisation, currency)
        vouchers = self.at.vouchers.get(key, ())
        over = [one for one in vouchers if one.left_nano and one.expires_at is not None and one.expires_at <= self._now]
        if not over:
            return 0
        self.at.vouchers[key] = tuple(replace(one, left_nano=0) if one in over else one for one in vouchers)
        for one in over:
            row = Row(
                id=f"{one.id}/lapse",
                kind=RowKind.LAPSE,
                at=self._now,
                organisation=organisation,
                currency=currency,
                voucher_nano=-one.left_nano,
                voucher_id=one.id,
            )
            self._add(row)
        return len(over)

    def _closed(self, turn_id: str, currency: str | None) -> int:
        """What the turn's hold gives back with a row in `currency`: 0 when none is open.

        Prices may have changed to another currency under a running turn; then its hold is released by a row of its own.
        """
        hold = self._taken(turn_id)
        if hold is None:
            return 0
        if hold.currency != currency:
            self._add_end(hold, RowKind.RELEASE)
            return 0
        return hold.amount_nano

    def _taken(self, turn_id: str) -> OpenHold | None:
        hold = self.at.holds.pop(turn_id, None)
        if hold is not None:
            self._count_held(hold, -hold.amount_nano)
        return hold

    def _count_held(self, hold: OpenHold, amount: int) -> None:
        if self.at.held is None:
            return
        for scope in scopes_of(hold.organisation, hold.project, hold.key_id):
            key = (scope, hold.currency)
            self.at.held[key] = self.at.held.get(key, 0) + amount

    def _add_end(self, hold: OpenHold, kind: RowKind) -> None:
        row = Row(
            id=f"{hold.turn_id}/{kind.value}",
            kind=kind,
            at=self._now,
            organisation=hold.organisation,
            project=hold.project,
            key_id=hold.key_id,
            turn_id=hold.turn_id,
            currency=hold.currency,
            held_nano=-hold.amount_nano,
        )
        self._add(row)

    def _budgets_of(self, organisation: str, project: str | None, key_id: int | None, currency: str) -> list[Budget]:
        budgets = self.at.budgets.get(organisation)
        if not budgets:
            return []
        scopes = scopes_of(organisation, project, key_id)
        return [one for one in budgets if one.currency == currency and one.scope.text in scopes]

    def state(self, budget: Budget) -> BudgetState:
        """How a budget stands now."""
        assert self.at.held is not None, "what is held was not read"
        key = self._spent_key(budget)
        held = self.at.held.get((budget.scope.text, budget.currency), 0)
        return BudgetState(budget, key[-1], self.at.spent.get(key, 0), held)

    def _spent_key(self, budget: Budget) -> SpentKey:
        return (budget.scope.text, budget.currency, budget.period, period_start(budget.period, self._now))

    def _remembered(self, payer: Payer, repeat: Repeat) -> Attempts | None:
        attempts = self.at.repeats.get((payer.organisation, repeat.key_digest))
        return None if attempts is None or attempts.at + REPEAT_S <= self._now else attempts

    def _attempt(self, act: Hold, repeat: Repeat) -> Attempts:
        """The attempts with this turn among them. Raises ApiError as `hold`."""
        known = self._remembered(act.payer, repeat)
        if known is None:
            return Attempts(repeat.body_digest, act.turn_id, 1, 0, None, self._now)
        if known.body_digest != repeat.body_digest:
            message = "this Idempotency-Key was used for another request body; a new request needs a new key"
            raise ApiError(ErrorKind.INVALID_REQUEST, message)
        running = self.at.holds.get(known.turn_id)
        if running is not None and running.expires_at > self._now:
            message = "a request with this Idempotency-Key is still running; try again when it is over"
            raise ApiError(ErrorKind.OVERLOADED, message, retry_after_s=RETRY_AFTER_S)
        if known.n_attempts >= ATTEMPTS_MAX:
            message = (
                f"this Idempotency-Key was used for {known.n_attempts} attempts, limit {ATTEMPTS_MAX}; take a new key"
            )
            raise ApiError(ErrorKind.INVALID_REQUEST, message)
        return replace(known, turn_id=act.turn_id, n_attempts=known.n_attempts + 1, at=self._now)

    def _paid_before(self, act: Settlement, repeat: Repeat, cost: int) -> int:
        """How much of `cost` the attempts before have paid; notes this one."""
        known = self._remembered(act.payer, repeat)
        if known is not None and known.body_digest != repeat.body_digest:
            return 0  # its hold was not asked for: the model has no prices, so nothing was charged either
        if known is None:
            known = Attempts(repeat.body_digest, act.turn_id, 1, 0, None, self._now)
        elif act.priced is None and known.turn_id != act.turn_id:
            known = replace(known, turn_id=act.turn_id, n_attempts=known.n_attempts + 1)
        if act.priced is not None:
            charged = _paid(known, act.priced.currency)
            paid = min(cost, charged)
            known = replace(known, charged_nano=charged + cost - paid, currency=act.priced.currency)
        else:
            paid = 0
        self.at.repeats[act.payer.organisation, repeat.key_digest] = replace(known, at=self._now)
        return paid

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        self.at.known.add(row.id)
        if row.currency is not None:
            key = (row.organisation, row.currency)
            account = self.at.accounts.get(key, Account())
            self.at.accounts[key] = Account(
                account.cash_nano + row.cash_nano,
                account.voucher_nano + row.voucher_nano,
                account.held_nano + row.held_nano,
            )


def in_order(vouchers: Iterable[Voucher]) -> tuple[Voucher, ...]:
    """As they are used: the one that expires first first, those without an end last; else the older first."""
    return tuple(sorted(vouchers, key=_order))


def _order(voucher: Voucher) -> tuple[float, float, str]:
    return (float("inf") if voucher.expires_at is None else voucher.expires_at, voucher.created_at, voucher.id)


def _paid(attempts: Attempts | None, currency: str) -> int:
    return 0 if attempts is None or attempts.currency != currency else attempts.charged_nano
