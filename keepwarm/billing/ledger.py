"""The ledger: holds, charges and credit in the database, many calls in one transaction.

Turns hand their acts to one worker (`work`), which does all that wait together: one transaction, and one wait for the
disk, for a group. A call returns when its act is on the disk; a hold and a release do not wait for that, only outlive the
process: a power cut that undoes them has ended their turn too. All that acts depend on is read in the transaction they are
done in, and `Storage` lets only one be open at a time, of all processes on the database: so no two acts of any process
decide by the same balance. What the operator does (credit, budgets) is a transaction of its own and needs no worker.

Every act is done once: its row's id is made of the turn's, so one that is sent again, after a restart or when nobody knows
whether it was written, finds its row and does nothing.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import NoReturn, TypeVar

import sqlalchemy as sa
from msgspec import Struct

from keepwarm.billing.act import Act, Creation, Hold, Release, Repeat, Settlement
from keepwarm.billing.book_rows import Concern, concern_of, open_books, open_overdue, write_books
from keepwarm.billing.books import REPEAT_S, Books, Voucher
from keepwarm.billing.budget import Budget, BudgetState, Excess, period_start
from keepwarm.billing.row import Payer, Row, RowKind
from keepwarm.core.clock import Clock, Ids
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.storage import Storage, count
from keepwarm.tables import budgets, ledger_rows, repeats, spending

T = TypeVar("T")

GROUP_MAX = 256  # acts in one transaction: as long as it lasts the database does nothing else
BUDGETS_MAX = 1000  # of an organisation, its projects and keys: each hold looks at them
TRIES = 5  # to write what was used, when the database is busy or cannot be reached
TRY_AGAIN_S = 1.0
SPENDING_KINDS = (RowKind.SETTLE.value, RowKind.CREATION.value, RowKind.STORAGE.value)

Answer = tuple[Excess, ...] | ApiError


class Balance(Struct, frozen=True):
    """What an organisation has in one currency, in nano."""

    currency: str
    cash_nano: int
    voucher_nano: int
    held_nano: int

    @property
    def available_nano(self) -> int:
        return self.cash_nano + self.voucher_nano - self.held_nano


class Ledger:
    """One per process. A hold that nobody closes expires after `hold_s`, which is longer than any turn takes."""

    def __init__(self, storage: Storage, clock: Clock, ids: Ids, *, hold_s: float) -> None:
        self._storage = storage
        self._clock = clock
        self._ids = ids
        self._hold_s = hold_s
        self._waiting: list[tuple[Act, asyncio.Future[tuple[Excess, ...]]]] = []
        self._wake = asyncio.Event()
        self._has_stopped = False

    async def work(self) -> NoReturn:
        """Do the acts that wait, for ever. When this is cancelled, those still waiting are refused."""
        group: list[tuple[Act, asyncio.Future[tuple[Excess, ...]]]] = []
        try:
            while True:
                await self._wake.wait()
                group, self._waiting = self._waiting[:GROUP_MAX], self._waiting[GROUP_MAX:]
                if not self._waiting:
                    self._wake.clear()
                await self._do(group)
        finally:
            self._has_stopped = True
            for _, answer in (*group, *self._waiting):
                _fail(answer, _stopped())

    async def hold(self, act: Hold) -> tuple[Excess, ...]:
        """Set a turn's ceiling aside; gives the soft budgets that it may pass. A caller that is cancelled holds nothing.

        Raises ApiError: QUOTA_EXCEEDED by a prepaid balance or a hard budget, with the numbers; for a request sent again
        INVALID_REQUEST or OVERLOADED (`Books.hold`); OVERLOADED when the database is busy.
        """
        try:
            return await self._enter(act)
        except asyncio.CancelledError:
            if not self._has_stopped:
                # Behind the hold, if that is still waiting. Nobody waits for it; what it raises is looked at here.
                self._enqueue(Release(act.turn_id, act.payer, act.repeat)).add_done_callback(_seen)
            raise

    async def settle(self, act: Settlement) -> None:
        """Charge what a turn used, and close its hold. Once: a second call does nothing.

        Without an open hold, since there was none or it has expired, the turn is charged all the same. Raises ApiError
        (OVERLOADED) when the database could not be written to for some seconds.
        """
        await self._insist(act)

    async def release(self, turn_id: str, payer: Payer | None = None, repeat: Repeat | None = None) -> None:
        """Give a turn's hold back: nothing was used. Without an open hold nothing happens. Raises as `settle`.

        `payer` and `repeat` are the hold's, if it had a `repeat`.
        """
        await self._insist(Release(turn_id, payer, repeat))

    async def charge_creation(self, act: Creation) -> None:
        """Charge the making of a cache object, once; closes the hold whose `turn_id` is `act.id`. Raises as `settle`."""
        await self._insist(act)

    async def expire_holds(self) -> int:
        """Give back the holds whose time is over; how many. At start, and from time to time."""
        return await self._in_books(_overdue, Books.expire)

    async def lapse_vouchers(self) -> int:
        """End the vouchers whose time is over, if use has not done it yet; how many."""
        return await self._in_books(_overdue, Books.lapse)

    async def forget_repeats(self) -> int:
        """Drop Idempotency-Keys whose time is over; how many."""
        old = sa.delete(repeats).where(repeats.c.at <= self._clock.now() - REPEAT_S)
        return await self._storage.run(lambda connection: connection.execute(old).rowcount)

    async def tick(self) -> None:
        """All that time does: holds, vouchers, Idempotency-Keys."""
        await self.expire_holds()
        await self.lapse_vouchers()
        await self.forget_repeats()

    async def grant(
        self, organisation: str, currency: str, amount_nano: int, note: str | None = None, *, once: str | None = None
    ) -> None:  # fmt: skip
        """Cash comes in. Raises ApiError(INVALID_REQUEST) unless the amount is above 0, or when it is beyond counting.

        `once` names the grant: a second one of that name does nothing.
        """
        _check_positive(amount_nano)
        await self._credit(self._row(RowKind.GRANT, organisation, currency, note, cash_nano=amount_nano, name=once))

    async def grant_voucher(
        self,
        organisation: str,
        currency: str,
        amount_nano: int,
        expires_at: float | None = None,
        note: str | None = None,
        *,
        once: str | None = None,
    ) -> str:
        """A voucher comes in; its id. Raises ApiError(INVALID_REQUEST) when it is over already, or as `grant`.

        `once` as there.
        """
        _check_positive(amount_nano)
        now = self._clock.now()
        if expires_at is not None and expires_at <= now:
            message = f"the voucher would expire at {expires_at:.0f}, which is over: it is {now:.0f}"
            raise ApiError(ErrorKind.INVALID_REQUEST, message)
        voucher_id = self._ids.new("voucher-") if once is None else f"voucher-{once}"
        row = self._row(RowKind.GRANT, organisation, currency, note, voucher_nano=amount_nano, voucher_id=voucher_id)
        voucher = Voucher(voucher_id, amount_nano, row.at, expires_at)  # as old as its row, to the last bit
        await self._credit(row, voucher)
        return voucher.id

    async def adjust(self, organisation: str, currency: str, amount_nano: int, note: str) -> None:
        """Correct the cash by an amount above or below 0. Budgets do not count it."""
        await self._credit(self._row(RowKind.ADJUST, organisation, currency, note, cash_nano=amount_nano))

    async def balance(self, organisation: str) -> list[Balance]:
        """By currency, in their order; empty where there has been neither credit nor use with prices."""

        def read(books: Books) -> list[Balance]:
            books.lapse()
            return [
                Balance(currency, account.cash_nano, account.voucher_nano, account.held_nano)
                for (_, currency), account in sorted(books.at.accounts.items())
            ]

        return await self._in_books(partial(_of, organisation), read)

    async def budgets(self, organisation: str) -> list[BudgetState]:
        """All budgets of an organisation, its projects and keys, and how they stand now."""

        def read(books: Books) -> list[BudgetState]:
            return [books.state(one) for one in books.at.budgets.get(organisation, ())]

        return await self._in_books(partial(_of, organisation), read)

    async def set_budget(self, budget: Budget) -> None:
        """Set or change a budget; what was spent before in its current period counts.

        Raises ApiError(INVALID_REQUEST) without a stop, below 0, with a soft one above the hard one, or for one too many.
        """
        _check_budget(budget)
        await self._storage.run(partial(_set_budget, self._clock, budget))

    async def remove_budget(self, budget: Budget) -> bool:
        """Remove the budget of this scope, currency and period; False when there is none."""
        return await self._storage.run(partial(_remove_budget, budget))

    async def _insist(self, act: Act) -> None:
        """Again while the database is busy: what was used is not forgotten over that."""
        for _ in range(TRIES - 1):
            try:
                await self._enter(act)
                return
            except ApiError as error:
                if error.kind is not ErrorKind.OVERLOADED:
                    raise
            await asyncio.sleep(TRY_AGAIN_S)
        await self._enter(act)

    async def _enter(self, act: Act) -> tuple[Excess, ...]:
        if self._has_stopped:
            raise _stopped()
        return await self._enqueue(act)

    def _enqueue(self, act: Act) -> asyncio.Future[tuple[Excess, ...]]:
        answer: asyncio.Future[tuple[Excess, ...]] = asyncio.get_running_loop().create_future()
        self._waiting.append((act, answer))
        self._wake.set()
        return answer

    async def _do(self, group: list[tuple[Act, asyncio.Future[tuple[Excess, ...]]]]) -> None:
        try:
            acts = [act for act, _ in group]
            on_disk = any(isinstance(act, Settlement | Creation) for act in acts)
            answers = await self._storage.run(partial(self._apply, acts), on_disk=on_disk)
        except Exception as exc:  # noqa: BLE001 - it is raised where the act was asked for
            is_busy = isinstance(exc, ApiError) and exc.kind is ErrorKind.OVERLOADED
            if len(group) == 1 or is_busy:
                for _, answer in group:
                    _fail(answer, exc)
                return
            for one in group:  # whichever cannot be done fails alone
                await self._do([one])
            return
        for (_, answer), found in zip(group, answers, strict=True):
            if isinstance(found, ApiError):
                _fail(answer, found)
            elif not answer.done():
                answer.set_result(found)

    def _apply(self, acts: list[Act], connection: sa.Connection) -> list[Answer]:
        """In the database's thread, in one transaction."""
        books = open_books(connection, concern_of(acts), self._clock.now(), self._hold_s)
        answers: list[Answer] = []
        for act in acts:
            try:
                answers.append(books.do(act))
            except ApiError as refused:
                answers.append(refused)
        write_books(connection, books)
        return answers

    async def _credit(self, row: Row, voucher: Voucher | None = None) -> None:
        def credit(books: Books) -> None:
            if row.id not in books.at.known:
                books.credit(row, voucher)

        await self._in_books(partial(_of, row.organisation, row_ids=frozenset({row.id})), credit)

    async def _in_books(
        self, opened: Callable[[sa.Connection, float, float], Books], work: Callable[[Books], T]
    ) -> T:  # fmt: skip
        def run(connection: sa.Connection) -> T:
            books = opened(connection, self._clock.now(), self._hold_s)
            found = work(books)
            write_books(connection, books)
            return found

        return await self._storage.run(run)

    def _row(
        self, kind: RowKind, organisation: str, currency: str, note: str | None, *,
        cash_nano: int = 0, voucher_nano: int = 0, voucher_id: str | None = None, name: str | None = None,
    ) -> Row:  # fmt: skip
        row_id = f"{voucher_id or name or self._ids.new('')}/{kind.value}"
        return Row(
            id=row_id,
            kind=kind,
            at=self._clock.now(),
            organisation=organisation,
            currency=currency,
            cash_nano=cash_nano,
            voucher_nano=voucher_nano,
            voucher_id=voucher_id,
            note=note,
        )


def _overdue(connection: sa.Connection, now: float, hold_s: float) -> Books:
    return open_overdue(connection, now, hold_s)


def _of(
    organisation: str, connection: sa.Connection, now: float, hold_s: float, *, row_ids: frozenset[str] = frozenset()
) -> Books:  # fmt: skip
    concern = Concern(set(row_ids), set(), {organisation}, set(), is_held_asked=True)
    return open_books(connection, concern, now, hold_s)


def _set_budget(clock: Clock, budget: Budget, connection: sa.Connection) -> None:
    now = clock.now()
    key = {"scope": budget.scope.text, "currency": budget.currency, "period": budget.period.value}
    _remove_budget(budget, connection)
    n = count(connection, budgets, budgets.c.organisation == budget.scope.organisation)
    if n >= BUDGETS_MAX:
        message = f"organisation {budget.scope.organisation!r} has {n:,} of at most {BUDGETS_MAX:,} budgets"
        raise ApiError(ErrorKind.INVALID_REQUEST, message)
    connection.execute(
        sa.insert(budgets).values(
            organisation=budget.scope.organisation, soft_nano=budget.soft_nano, hard_nano=budget.hard_nano, **key
        )
    )
    start = period_start(budget.period, now)
    spent = -_charged(connection, budget, start)
    connection.execute(sa.insert(spending).values(period_start=start, spent_nano=spent, **key))


def _charged(connection: sa.Connection, budget: Budget, start: int) -> int:
    """What rows of use since `start` add to the balance of the budget's scope: 0 or less."""
    columns, scope = ledger_rows.c, budget.scope
    query = sa.select(sa.func.coalesce(sa.func.sum(columns.cash_nano + columns.voucher_nano), 0)).where(
        columns.organisation == scope.organisation,
        columns.at >= start,
        columns.currency == budget.currency,
        columns.kind.in_(SPENDING_KINDS),
    )
    if scope.project is not None:
        query = query.where(columns.project == scope.project)
    if scope.key_id is not None:
        query = query.where(columns.key_id == scope.key_id)
    return int(connection.execute(query).scalar_one())


def _remove_budget(budget: Budget, connection: sa.Connection) -> bool:
    scope, currency, period = budget.scope.text, budget.currency, budget.period.value

    def delete(table: sa.Table) -> int:
        columns = table.c
        found = sa.and_(columns.scope == scope, columns.currency == currency, columns.period == period)
        return connection.execute(sa.delete(table).where(found)).rowcount

    delete(spending)
    return delete(budgets) == 1


def _check_positive(amount_nano: int) -> None:
    if amount_nano <= 0:
        raise ApiError(ErrorKind.INVALID_REQUEST, f"an amount must be above 0, not {amount_nano} nano")


def _check_budget(budget: Budget) -> None:
    soft, hard = budget.soft_nano, budget.hard_nano
    if soft is None and hard is None:
        raise ApiError(ErrorKind.INVALID_REQUEST, "a budget needs a soft or a hard limit")
    if (soft is not None and soft < 0) or (hard is not None and hard < 0):
        raise ApiError(ErrorKind.INVALID_REQUEST, f"limits must be 0 or more, not soft {soft} and hard {hard} nano")
    if soft is not None and hard is not None and soft > hard:
        raise ApiError(ErrorKind.INVALID_REQUEST, f"the soft limit, {soft} nano, is above the hard one, {hard} nano")


def _fail(answer: "asyncio.Future[tuple[Excess, ...]]", error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)


def _seen(answer: "asyncio.Future[tuple[Excess, ...]]") -> None:
    """A hold that could not be given back expires."""
    if not answer.cancelled():
        answer.exception()


def _stopped() -> ApiError:
    return ApiError(ErrorKind.ENGINE_DOWN, "the server is stopping; try again", retry_after_s=1)
