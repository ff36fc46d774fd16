"""Books in the database: reads what acts concern, and writes what they changed. Within one transaction of `Storage`.

Nothing is kept between transactions, so another process on the same database finds, and leaves, everything as it is.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import sqlalchemy as sa
from msgspec import Struct
from msgspec.structs import asdict

from keepwarm.billing.act import Act, Creation, Hold, Release, Settlement
from keepwarm.billing.books import Account, AccountKey, Attempts, Books, Contents, OpenHold, SpentKey, Voucher, in_order
from keepwarm.billing.budget import Budget, Period, Scope, period_start, scopes_of
from keepwarm.billing.row import Row
from keepwarm.tables import accounts, budgets, holds, ledger_rows, repeats, spending, vouchers

IDS = 500  # in one IN (…): SQLite takes 32,766 parameters a statement


class _Query(NamedTuple):
    """The same rows for one id and for several: a turn alone needs one, and a list of parameters costs half again."""

    one: sa.Select[Any]
    several: sa.Select[Any]


def _by(column: sa.Column[Any], query: sa.Select[Any]) -> _Query:
    several = column.in_(sa.bindparam("ids", expanding=True))
    return _Query(query.where(column == sa.bindparam("ids")), query.where(several))


_known = _by(ledger_rows.c.id, sa.select(ledger_rows.c.id))
_holds = _by(holds.c.turn_id, sa.select(holds))
_over = sa.select(holds).where(holds.c.expires_at <= sa.bindparam("now")).order_by(holds.c.expires_at)
_accounts = _by(  # a row for each voucher that has something left, or one without; what has a voucher has an account
    accounts.c.organisation,
    sa.select(accounts, vouchers.c.id, vouchers.c.left_nano, vouchers.c.created_at, vouchers.c.expires_at).outerjoin(
        vouchers,
        sa.and_(
            vouchers.c.organisation == accounts.c.organisation,
            vouchers.c.currency == accounts.c.currency,
            vouchers.c.left_nano > 0,
        ),
    ),
)
_budgets = _by(
    budgets.c.organisation,
    sa.select(budgets, spending.c.spent_nano).outerjoin(
        spending,
        sa.and_(
            spending.c.scope == budgets.c.scope,
            spending.c.currency == budgets.c.currency,
            spending.c.period == budgets.c.period,
            spending.c.period_start
            == sa.case({period.value: sa.bindparam(period.value) for period in Period}, value=budgets.c.period),
        ),
    ),
)
_held = _by(
    holds.c.organisation,
    sa.select(
        holds.c.organisation,
        holds.c.project,
        holds.c.key_id,
        holds.c.currency,
        sa.func.sum(holds.c.amount_nano).label("amount_nano"),
    ).group_by(holds.c.organisation, holds.c.project, holds.c.key_id, holds.c.currency),
)
_repeats = _by(
    repeats.c.organisation,
    sa.select(repeats).where(repeats.c.key_digest.in_(sa.bindparam("digests", expanding=True))),
)

_add_rows, _add_accounts, _add_vouchers = sa.insert(ledger_rows), sa.insert(accounts), sa.insert(vouchers)
_add_holds, _add_spent, _add_repeats = sa.insert(holds), sa.insert(spending), sa.insert(repeats)
_set_account = (
    sa.update(accounts)
    .where(accounts.c.organisation == sa.bindparam("org"), accounts.c.currency == sa.bindparam("of"))
    .values({name: sa.bindparam(name) for name in Account.__struct_fields__})
)
_set_voucher = sa.update(vouchers).where(vouchers.c.id == sa.bindparam("of")).values(left_nano=sa.bindparam("left"))
_set_spent = (
    sa.update(spending)
    .where(
        spending.c.scope == sa.bindparam("org"),
        spending.c.currency == sa.bindparam("of"),
        spending.c.period == sa.bindparam("in_period"),
        spending.c.period_start == sa.bindparam("start"),
    )
    .values(spent_nano=sa.bindparam("spent"))
)
_set_repeat = (
    sa.update(repeats)
    .where(repeats.c.organisation == sa.bindparam("org"), repeats.c.key_digest == sa.bindparam("of"))
    .values({name: sa.bindparam(name) for name in Attempts.__struct_fields__})
)
_close_hold = sa.delete(holds).where(holds.c.turn_id == sa.bindparam("of"))


class Concern(Struct):
    """What must be read before acts can be done."""

    row_ids: set[str]
    turn_ids: set[str]
    organisations: set[str]
    digests: set[bytes]
    is_held_asked: bool = False  # whether something is decided by what open turns hold


def concern_of(acts: Iterable[Act]) -> Concern:
    """What these acts need."""
    found = Concern(set(), set(), set(), set())
    for act in acts:
        match act:
            case Hold():
                found.row_ids.add(f"{act.turn_id}/hold")
                found.is_held_asked = True
            case Settlement():
                found.row_ids.add(f"{act.turn_id}/settle")
                found.turn_ids.add(act.turn_id)
            case Creation():
                found.row_ids.add(f"{act.id}/creation")
                found.turn_ids.add(act.id)
            case Release():
                found.turn_ids.add(act.turn_id)
        if act.payer is not None:
            found.organisations.add(act.payer.organisation)
        if not isinstance(act, Creation) and act.repeat is not None:
            found.digests.add(act.repeat.key_digest)
    return found


def open_books(connection: sa.Connection, concern: Concern, now: float, hold_s: float) -> Books:
    """The books of what is concerned."""
    orgs = set(concern.organisations)
    attempts = _read_repeats(connection, orgs, concern.digests)
    turn_ids = concern.turn_ids | {one.turn_id for one in attempts.values()}
    open_holds = [_hold(row) for row in _read(connection, _holds, turn_ids)]
    return _opened(connection, concern, open_holds, attempts, now, hold_s)


def open_overdue(connection: sa.Connection, now: float, hold_s: float) -> Books:
    """The books of every hold and voucher whose time is over."""
    open_holds = [_hold(row) for row in connection.execute(_over, {"now": now})]
    lapsed = sa.select(vouchers.c.organisation).where(vouchers.c.expires_at <= now, vouchers.c.left_nano > 0)
    concern = Concern(set(), set(), set(connection.execute(lapsed).scalars()), set())
    return _opened(connection, concern, open_holds, {}, now, hold_s)


def write_books(connection: sa.Connection, books: Books) -> None:
    """Add the rows and bring the sums up to what they say."""
    if books.rows:
        connection.execute(_add_rows, [row_values(row) for row in books.rows])
    before, after = books.before, books.at
    changed, new = _changes(before.accounts, after.accounts)
    _many(connection, _set_account, [{"org": org, "of": of, **asdict(one)} for (org, of), one in changed])
    _many(
        connection,
        _add_accounts,
        [{"organisation": org, "currency": of, **asdict(one)} for (org, of), one in new],
    )
    _write_vouchers(connection, before, after)
    _many(connection, _close_hold, [{"of": turn_id} for turn_id in before.holds if turn_id not in after.holds])
    _many(connection, _add_holds, [asdict(one) for key, one in after.holds.items() if key not in before.holds])
    _write_spent(connection, before, after)
    tried, first = _changes(before.repeats, after.repeats)
    _many(connection, _set_repeat, [{"org": org, "of": digest, **asdict(one)} for (org, digest), one in tried])
    added = [{"organisation": org, "key_digest": digest, **asdict(one)} for (org, digest), one in first]
    _many(connection, _add_repeats, added)


def row_values(row: Row) -> dict[str, Any]:
    """A row as columns of `tables.ledger_rows`, all of them but `seq`."""
    values: dict[str, Any] = dict(_ABSENT)
    for name in _PLAIN:
        values[name] = getattr(row, name)
    values["kind"] = row.kind.value
    if row.priced is not None:
        values["sheet"], values["sheet_model"] = row.priced.sheet, row.priced.sheet_model
    charge = row.charge
    if row.use is not None:
        usage, charge = row.use.usage, row.use.charge
        values["n_fresh"], values["n_read"], values["n_write"] = usage.fresh, usage.cache_read, usage.cache_write
        values["n_write_long"], values["n_output"] = usage.cache_write_long, usage.output
        values["n_object"], values["uncached_nano"] = row.use.n_object, row.use.uncached_nano
    else:
        values["n_object"], values["n_units"] = row.object_tokens, row.storage_s
    if charge is not None:
        for column, name in _CHARGED:
            values[column] = getattr(charge, name)
    return values


_PLAIN = (
    *("id", "at", "organisation", "project", "key_id", "turn_id", "object_id", "dialect", "model", "status"),
    *("currency", "cash_nano", "voucher_nano", "held_nano", "voucher_id", "repeated_nano", "note"),
)
_CLASSES = ("fresh", "read", "write", "output", "call", "creation", "storage")
_CHARGED = tuple((f"{name}_nano", name) for name in _CLASSES)
_ABSENT = {column.name: None for column in ledger_rows.c if column.name != "seq"}


def _opened(
    connection: sa.Connection,
    concern: Concern,
    open_holds: list[OpenHold],
    attempts: dict[tuple[str, bytes], Attempts],
    now: float,
    hold_s: float,
) -> Books:
    orgs = concern.organisations | {hold.organisation for hold in open_holds}
    own_accounts, own_vouchers = _read_accounts(connection, orgs)
    own_budgets, spent = _read_budgets(connection, orgs, now)
    contents = Contents(
        accounts=own_accounts,
        vouchers=own_vouchers,
        holds={hold.turn_id: hold for hold in open_holds},
        budgets=own_budgets,
        spent=spent,
        held=_read_held(connection, set(own_budgets)) if concern.is_held_asked else None,
        repeats=attempts,
        known={row.id for row in _read(connection, _known, concern.row_ids)},
    )
    return Books(contents, now, hold_s)


def _read_accounts(
    connection: sa.Connection, organisations: Iterable[str]
) -> tuple[dict[AccountKey, Account], dict[AccountKey, tuple[Voucher, ...]]]:
    """The accounts of organisations, and the vouchers of those that have any left."""
    found: dict[AccountKey, Account] = {}
    left: defaultdict[AccountKey, list[Voucher]] = defaultdict(list)
    for row in _read(connection, _accounts, organisations):
        key = (row.organisation, row.currency)
        found[key] = Account(row.cash_nano, row.voucher_nano, row.held_nano)
        if row.id is not None:
            left[key].append(Voucher(row.id, row.left_nano, row.created_at, row.expires_at))
    return found, {key: in_order(several) for key, several in left.items()}


def _read_budgets(
    connection: sa.Connection, organisations: Iterable[str], now: float
) -> tuple[dict[str, tuple[Budget, ...]], dict[SpentKey, int]]:
    """The budgets of organisations that have any, and what has been spent of each in its current period."""
    starts = {period: period_start(period, now) for period in Period}
    found: defaultdict[str, list[Budget]] = defaultdict(list)
    spent: dict[SpentKey, int] = {}
    parameters = {period.value: start for period, start in starts.items()}
    for row in _read(connection, _budgets, organisations, parameters):
        period = Period(row.period)
        scope = scope_from(row.scope, row.organisation)
        found[row.organisation].append(Budget(scope, row.currency, period, row.soft_nano, row.hard_nano))
        if row.spent_nano is not None:
            spent[row.scope, row.currency, period, starts[period]] = row.spent_nano
    return {key: tuple(several) for key, several in found.items()}, spent


def scope_from(text: str, organisation: str) -> Scope:
    """What `Scope.text` gave."""
    kind, _, name = text.partition(":")
    if kind == "key":
        return Scope(organisation, key_id=int(name))
    return Scope(organisation) if kind == "org" else Scope(organisation, name.partition("/")[2])


def _read_held(connection: sa.Connection, organisations: set[str]) -> dict[tuple[str, str], int]:
    found: defaultdict[tuple[str, str], int] = defaultdict(int)
    for row in _read(connection, _held, organisations):
        for scope in scopes_of(row.organisation, row.project, row.key_id):
            found[scope, row.currency] += row.amount_nano
    return dict(found)


def _read_repeats(
    connection: sa.Connection, organisations: set[str], digests: set[bytes]
) -> dict[tuple[str, bytes], Attempts]:  # fmt: skip
    if not digests:
        return {}
    several = list(digests)
    return {
        (row.organisation, row.key_digest): Attempts(
            row.body_digest, row.turn_id, row.n_attempts, row.charged_nano, row.currency, row.at
        )
        for row in _read(connection, _repeats, organisations, {"digests": several})
    }


def _hold(row: sa.Row[Any]) -> OpenHold:
    return OpenHold(
        row.turn_id, row.organisation, row.project, row.key_id, row.currency, row.amount_nano, row.at, row.expires_at
    )


def _read(
    connection: sa.Connection, query: _Query, ids: Iterable[str], more: Mapping[str, Any] | None = None
) -> list[sa.Row[Any]]:
    """The rows of a query for `ids`; no query where there are none."""
    several, more = list(ids), more or {}
    if len(several) == 1:
        return list(connection.execute(query.one, {"ids": several[0], **more}))
    found: list[sa.Row[Any]] = []
    for begin in range(0, len(several), IDS):
        found += connection.execute(query.several, {"ids": several[begin : begin + IDS], **more}).all()
    return found


def _changes(
    before: Mapping[Any, Any], after: Mapping[Any, Any]
) -> tuple[list[tuple[Any, Any]], list[tuple[Any, Any]]]:
    """(key, value) of what changed and of what is new."""
    changed = [(key, value) for key, value in after.items() if key in before and before[key] != value]
    return changed, [(key, value) for key, value in after.items() if key not in before]


def _write_vouchers(connection: sa.Connection, before: Contents, after: Contents) -> None:
    old = {one.id: one.left_nano for several in before.vouchers.values() for one in several}
    now = [(key, one) for key, several in after.vouchers.items() for one in several if old.get(one.id) != one.left_nano]
    _many(connection, _set_voucher, [{"of": one.id, "left": one.left_nano} for _, one in now if one.id in old])
    fresh = [
        {
            "id": one.id,
            "organisation": organisation,
            "currency": currency,
            "granted_nano": one.left_nano,
            "left_nano": one.left_nano,
            "created_at": one.created_at,
            "expires_at": one.expires_at,
        }
        for (organisation, currency), one in now
        if one.id not in old
    ]
    _many(connection, _add_vouchers, fresh)


def _write_spent(connection: sa.Connection, before: Contents, after: Contents) -> None:
    changed, new = _changes(before.spent, after.spent)
    _many(
        connection,
        _set_spent,
        [
            {"org": scope, "of": currency, "in_period": period.value, "start": start, "spent": spent}
            for (scope, currency, period, start), spent in changed
        ],
    )
    rows = [
        {
            "scope": scope,
            "currency": currency,
            "period": period.value,
            "period_start": start,
            "spent_nano": spent,
        }
        for (scope, currency, period, start), spent in new
    ]
    _many(connection, _add_spent, rows)


def _many(connection: sa.Connection, statement: sa.Executable, parameters: list[dict[str, Any]]) -> None:
    if parameters:
        connection.execute(statement, parameters)
