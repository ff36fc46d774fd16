"""Storage of cache objects, metered by time.

    ready ──────── extended ──────────────┬─ deleted: closed at that moment
    open           `ends_at` moves        └─ over: closed at `ends_at`

A meter counts one life of an object. A tick charges each open one up to now, with a row, and notes in the same transaction
how far it is paid: so nothing is left out and nothing is paid twice, whenever a process ends. While the server is down an
object lives on, and the next tick pays for that too. What is due is the price of the whole life so far less what has been
charged, so parts add up to what one charge for the whole life would be.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from math import floor
from typing import Any

import sqlalchemy as sa
from msgspec import Struct
from msgspec.structs import asdict

from keepwarm.billing.book_rows import Concern, open_books, write_books
from keepwarm.billing.price import Charge, storage_nano
from keepwarm.billing.row import Priced, Row, RowKind
from keepwarm.billing.sheet import ModelPrices
from keepwarm.core.cache_object import NS_PER_S, CacheObject
from keepwarm.core.clock import Clock
from keepwarm.core.identity import organisation_of
from keepwarm.storage import Storage
from keepwarm.tables import cache_objects, ledger_rows, storage_meters

GIVEN_BACK = (RowKind.RELEASE.value, RowKind.EXPIRE.value)
WithObject = Callable[[sa.Connection, CacheObject], None]  # within a transaction, with the object as it is then
METERS_MAX = 500  # in one transaction, so that turns need not wait for all


class Metered(Struct, frozen=True):
    """A cache object whose storage is paid: `n_tokens` from `began_at` to `ends_at`, unix seconds."""

    object_id: str
    organisation: str
    project: str | None
    key_id: int | None
    dialect: str
    model: str
    priced: Priced | None
    n_tokens: int
    began_at: float
    ends_at: float

    @property
    def id(self) -> str:
        """Of its meter."""
        return f"{self.object_id}/{self.began_at:.3f}"


class Paid(Struct, frozen=True):
    """How far a meter is paid: up to when, and how much altogether."""

    until: float
    nano: int


class Due(Struct, frozen=True):
    """What is to be paid now: `storage_nano` (None: no prices) for `storage_s` whole seconds more of the object's life."""

    storage_nano: int | None
    storage_s: int


def due(metered: Metered, paid: Paid, prices: ModelPrices | None, now: float) -> Due | None:
    """What has come to be owed by `now`; None where there is nothing to write yet.

    Use without a price, and time that a begun unit has paid for already, is written down when the life is over.
    """
    until = min(now, metered.ends_at)
    began = metered.began_at
    storage_s = max(0, floor(until - began) - floor(paid.until - began))
    if prices is None:
        return Due(None, storage_s) if until >= metered.ends_at and storage_s else None
    owed = max(0, storage_nano(prices, metered.n_tokens, until - began) - paid.nano)
    return Due(owed, storage_s) if owed or (until >= metered.ends_at and storage_s) else None


class Meters:
    """Meters in the database. `prices_of` gives the prices that a meter began with, None while they are not known."""

    def __init__(self, storage: Storage, clock: Clock, prices_of: Callable[[Priced], ModelPrices | None]) -> None:
        self._storage = storage
        self._clock = clock
        self._prices_of = prices_of

    async def open(self, metered: Metered) -> None:
        """Begin to meter an object, now that it is ready. Nothing happens while it is metered, or when it is deleted."""
        await self._storage.run(partial(_open, metered))

    async def extend(self, object_id: str, seen_at: float) -> bool:
        """The object, which lived at `seen_at`, does so until another end; False when it is deleted or not metered.

        Its meter is the one that was running at `seen_at`, also when a tick has closed it since. One that was over by then
        is of an earlier life, and stays closed.
        """
        return await self._storage.run(partial(_extend, object_id, seen_at))

    def moved(self, seen_at: float) -> WithObject:
        """`extend`, for the transaction that gives the object its end: none of the two is there without the other."""

        def move(connection: sa.Connection, obj: CacheObject) -> None:
            _extend(obj.id, seen_at, connection)

        return move

    def failed(self, connection: sa.Connection, obj: CacheObject) -> None:
        """`close`, in the transaction that says that the object failed: it may have been ready before."""
        self._close(obj.id, self._clock.now(), connection)

    async def close(self, object_id: str, at: float) -> None:
        """The object was deleted at `at`: charge its life up to then. Nothing happens when it is not metered."""
        await self._storage.run(partial(self._close, object_id, at))

    async def close_deleted(self) -> int:
        """Close the meters of objects that are no longer there, as of now; how many.

        An object is also deleted by the command line, and by a server that is killed before it can say so.
        """
        n_closed, after = 0, ""
        while gone := await self._storage.run(partial(_deleted, after)):
            for object_id in gone:
                await self.close(object_id, self._clock.now())
            n_closed, after = n_closed + len(gone), gone[-1]
        return n_closed

    async def making(self, object_id: str) -> str | None:
        """Names the making that begins the object's next life; None while it lives.

        The name is the same until that life has begun or what was held for it was given back: then the next attempt has
        another one, so that it can hold anew.
        """
        return await self._storage.run(partial(_making, object_id, self._clock.now()))

    async def missing(self) -> list[Metered]:
        """Objects that are ready and have a payer, but no meter: from now on, and without prices, which are the caller's.

        At start: a process may have ended between an object's becoming ready and `open`.
        """
        return await self._storage.run(lambda connection: _missing(connection, self._clock.now()))

    async def tick(self) -> int:
        """Charge all open meters up to now; how many rows that made. Raises ApiError(OVERLOADED), and goes on next time."""
        n_rows, after = 0, ""
        while True:
            made, last = await self._storage.run(partial(self._tick, after))
            n_rows += made
            if last is None:
                return n_rows
            after = last

    def _tick(self, after: str, connection: sa.Connection) -> tuple[int, str | None]:
        """The next meters by id: how many rows they made, and the last one's id; None when there are no more."""
        columns = storage_meters.c
        query = sa.select(storage_meters).where(columns.is_closed.is_(False), columns.id > after)
        found = connection.execute(query.order_by(columns.id).limit(METERS_MAX)).all()
        n_rows = self._charge(connection, found)
        return n_rows, found[-1].id if len(found) == METERS_MAX else None

    def _close(self, object_id: str, at: float, connection: sa.Connection) -> None:
        columns = storage_meters.c
        mine = sa.and_(columns.object_id == object_id, columns.is_closed.is_(False))
        # Not before what is paid: a tick may have run between the deletion and this call.
        end = sa.case((columns.charged_until > at, columns.charged_until), else_=at)
        connection.execute(sa.update(storage_meters).where(mine, columns.ends_at > at).values(ends_at=end))
        self._charge(connection, connection.execute(sa.select(storage_meters).where(mine)).all())

    def _charge(self, connection: sa.Connection, found: Sequence[sa.Row[Any]]) -> int:
        now = self._clock.now()
        books = open_books(
            connection, Concern(set(), set(), {row.organisation for row in found}, set()), now, hold_s=0.0
        )
        paid_now: list[dict[str, Any]] = []
        for row in found:
            metered, paid = _metered(row), Paid(row.charged_until, row.charged_nano)
            prices = None if metered.priced is None else self._prices_of(metered.priced)
            if metered.priced is not None and prices is None:
                continue  # the sheet has to come back: what is owed then is the same
            owed = due(metered, paid, prices, now)
            until = min(now, metered.ends_at)
            if owed is not None:
                books.store(_row(row.id, metered, owed, until, now))
                paid = Paid(max(paid.until, until), paid.nano + (owed.storage_nano or 0))
            is_over = until >= metered.ends_at
            if owed is not None or is_over:
                paid_now.append({"of": row.id, "until": paid.until, "nano": paid.nano, "over": is_over})
        if paid_now:
            connection.execute(_set_paid, paid_now)
        write_books(connection, books)
        return len(books.rows)


_set_paid = (
    sa.update(storage_meters)
    .where(storage_meters.c.id == sa.bindparam("of"))
    .values(charged_until=sa.bindparam("until"), charged_nano=sa.bindparam("nano"), is_closed=sa.bindparam("over"))
)


def _row(meter_id: str, metered: Metered, owed: Due, until: float, now: float) -> Row:
    return Row(
        id=f"{meter_id}/{until:.6f}",
        kind=RowKind.STORAGE,
        at=now,
        organisation=metered.organisation,
        project=metered.project,
        key_id=metered.key_id,
        object_id=metered.object_id,
        dialect=metered.dialect,
        model=metered.model,
        priced=metered.priced,
        currency=None if metered.priced is None else metered.priced.currency,
        object_tokens=metered.n_tokens,
        storage_s=owed.storage_s,
        charge=None if owed.storage_nano is None else Charge(storage=owed.storage_nano),
    )


def _open(metered: Metered, connection: sa.Connection) -> None:
    columns = storage_meters.c
    # One that is open but over is an earlier life, which the next tick closes.
    is_metered = sa.and_(
        columns.object_id == metered.object_id, columns.is_closed.is_(False), columns.ends_at > metered.began_at
    )
    is_there = sa.select(columns.id).where(sa.or_(columns.id == metered.id, is_metered))
    ends_at = _end_of(connection, metered.object_id)
    if connection.execute(is_there).first() is not None or ends_at is None:
        return
    values = asdict(metered) | {"ends_at": ends_at}  # it may have been moved since the caller looked
    priced = values.pop("priced")
    values |= {"id": metered.id, "charged_until": metered.began_at, "charged_nano": 0, "is_closed": False}
    if priced is not None:
        values |= asdict(priced)
    connection.execute(sa.insert(storage_meters).values(values))


def _extend(object_id: str, seen_at: float, connection: sa.Connection) -> bool:
    columns = storage_meters.c
    mine = sa.select(columns.id, columns.ends_at).where(columns.object_id == object_id)
    last = connection.execute(mine.order_by(columns.began_at.desc()).limit(1)).one_or_none()
    ends_at = _end_of(connection, object_id)
    if last is None or last.ends_at <= seen_at or ends_at is None:
        return False
    connection.execute(sa.update(storage_meters).where(columns.id == last.id).values(ends_at=ends_at, is_closed=False))
    return True


def _deleted(after: str, connection: sa.Connection) -> list[str]:
    """The next ones by id; some stay open, while their sheet is not there."""
    columns = storage_meters.c
    is_there = sa.exists().where(cache_objects.c.id == columns.object_id)
    query = sa.select(columns.object_id).where(columns.is_closed.is_(False), columns.object_id > after, ~is_there)
    return list(connection.scalars(query.distinct().order_by(columns.object_id).limit(METERS_MAX)))


def _making(object_id: str, now: float, connection: sa.Connection) -> str | None:
    columns = storage_meters.c
    found = connection.execute(
        sa.select(columns.is_closed, columns.ends_at).where(columns.object_id == object_id)
    ).all()
    if any(not row.is_closed and row.ends_at > now for row in found):
        return None
    life = f"{object_id}/{len(found)}"
    n_tried = 1  # those that came to nothing are the first ones; halving, since a client may try as often as it likes
    while _is_given_back(_attempt(life, n_tried - 1), connection):
        n_tried *= 2
    return _attempt(
        life, bisect_left(range(n_tried), True, key=lambda n: not _is_given_back(_attempt(life, n), connection))
    )


def _attempt(life: str, n_before: int) -> str:
    return f"{life}.{n_before}" if n_before else life


def _is_given_back(making: str, connection: sa.Connection) -> bool:
    """Whether a making held and came to nothing."""
    found = set(connection.scalars(sa.select(ledger_rows.c.kind).where(ledger_rows.c.turn_id == making)))
    return RowKind.CREATION.value not in found and not found.isdisjoint(GIVEN_BACK)


def _end_of(connection: sa.Connection, object_id: str) -> float | None:
    """When the object's time is over, unix seconds; None when it is deleted.

    Calls for one object may arrive in another order than they were made.
    """
    query = sa.select(cache_objects.c.expires_at, cache_objects.c.early_ns).where(cache_objects.c.id == object_id)
    found = connection.execute(query).one_or_none()
    return None if found is None else found.expires_at - found.early_ns / NS_PER_S


def _missing(connection: sa.Connection, now: float) -> list[Metered]:
    columns, meters = cache_objects.c, storage_meters.c
    is_metered = sa.exists().where(meters.object_id == columns.id, meters.is_closed.is_(False))
    query = sa.select(
        *(columns.id, columns.tenant, columns.project, columns.key_id, columns.dialect, columns.model),
        *(columns.n_tokens, columns.expires_at),
    ).where(columns.status == "ready", columns.expires_at > now, columns.project.is_not(None), ~is_metered)
    return [
        Metered(
            object_id=row.id,
            organisation=organisation_of(row.tenant),
            project=row.project,
            key_id=row.key_id,
            dialect=row.dialect,
            model=row.model,
            priced=None,
            n_tokens=row.n_tokens,
            began_at=now,
            ends_at=row.expires_at,
        )
        for row in connection.execute(query)
    ]


def _metered(row: sa.Row[Any]) -> Metered:
    priced = None if row.sheet is None else Priced(row.sheet, row.sheet_model, row.currency)
    return Metered(
        row.object_id,
        row.organisation,
        row.project,
        row.key_id,
        row.dialect,
        row.model,
        priced,
        row.n_tokens,
        row.began_at,
        row.ends_at,
    )
