"""The ledger counted anew, row by row: what each row must say, and what all sums must come to. Pure.

`Recount.add` takes the rows in their order and gives what is wrong with each; `Recount.end` compares what they come to with
the sums that are kept. Between rows it keeps what is open: accounts, vouchers, holds, lives of cache objects, spending.

    a turn's classes       from its counts and its price sheet, each; and what it costs uncached
    an object's making     from its length and its price sheet
    storage                for each life as a whole, since a part of it is a difference of two roundings
    vouchers then cash     in the order of their use, for every charge
    holds                  closed once, by what they held
    accounts, vouchers, spending of budgets, meters   the sums of rows

What rows do not have cannot be recomputed: a hold's ceiling, and how much an earlier attempt with the same Idempotency-Key
has paid, of which only the bounds are checked.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from math import floor
from typing import TypeVar

from msgspec import Struct
from msgspec.structs import asdict

from keepwarm.billing.books import Voucher, in_order
from keepwarm.billing.budget import Period, period_start, scopes_of
from keepwarm.billing.price import Charge, creation_nano, storage_nano, turn_charge, uncached_nano
from keepwarm.billing.price_book import NoSuchPricesError
from keepwarm.billing.row import Priced, RowKind
from keepwarm.billing.sheet import ModelPrices
from keepwarm.billing.written import Written
from keepwarm.core.event import Usage

CLASSES = tuple(f"{name}_nano" for name in Charge.__struct_fields__)
OF_TURN = ("n_fresh", "n_read", "n_write", "n_write_long", "n_output", "n_object")
CHARGING = (RowKind.SETTLE, RowKind.CREATION, RowKind.STORAGE)
CLOSING = (RowKind.SETTLE, RowKind.CREATION, RowKind.RELEASE, RowKind.EXPIRE)
NAMED_BY_TURN = (RowKind.HOLD, *CLOSING)

Key = tuple[str, str]  # organisation, currency
SpentKey = tuple[str, str, str, int]  # scope, currency, period and its start
Holding = tuple[str, str | None, int | None, str, int]  # organisation, project, key, currency, amount
Prices = Callable[[Priced], ModelPrices]
K = TypeVar("K")


class Fault(Struct, frozen=True):
    """What is wrong: `where` is a row's id or names a sum."""

    where: str
    message: str


class KeptVoucher(Struct, frozen=True):
    """A row of `vouchers`."""

    id: str
    organisation: str
    currency: str
    granted_nano: int
    left_nano: int
    created_at: float
    expires_at: float | None


class KeptMeter(Struct, frozen=True):
    """What of `storage_meters` is recounted."""

    id: str
    object_id: str
    sheet: str | None
    sheet_model: str | None
    currency: str | None
    n_tokens: int
    began_at: float
    ends_at: float
    charged_until: float
    charged_nano: int
    is_closed: bool


class Kept(Struct, frozen=True):
    """The sums as they are kept, after the last row."""

    accounts: dict[Key, tuple[int, int, int]]  # cash, vouchers, held
    vouchers: tuple[KeptVoucher, ...]
    holds: dict[str, Holding]  # by turn
    budgets: frozenset[tuple[str, str, str]]  # scope, currency, period
    spending: dict[SpentKey, int]
    meters: tuple[KeptMeter, ...]
    ready: dict[str, float]  # cache objects with a payer that are ready, and when their time is over


class Recount:
    """`prices` gives what a row was priced with, or raises NoSuchPricesError; `budgets` are (scope, currency, period)."""

    def __init__(self, prices: Prices, budgets: Iterable[tuple[str, str, str]]) -> None:
        self._prices = prices
        self._budgets = frozenset(budgets)
        self._accounts: defaultdict[Key, list[int]] = defaultdict(lambda: [0, 0, 0])
        self._vouchers: defaultdict[Key, dict[str, Voucher]] = defaultdict(dict)
        self._granted: dict[str, int] = {}
        self._holds: dict[str, Holding] = {}
        self._spent: defaultdict[SpentKey, int] = defaultdict(int)
        self._lives: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])  # nano, seconds
        self.n_rows = 0

    def add(self, row: Written, expires_at: float | None = None) -> list[Fault]:
        """What is wrong with the next row. `expires_at` is that of the voucher which it grants."""
        self.n_rows += 1
        try:
            kind = RowKind(row.kind)
        except ValueError:
            return [Fault(row.id, f"its kind {row.kind!r} is none")]
        said = [*_shape(row, kind), *self._holding(row, kind)]
        if kind in CHARGING:
            said += [*self._priced(row, kind), *self._charged(row)]
        else:
            said += self._credited(row, kind, expires_at)
        if row.currency is not None:
            account = self._accounts[row.organisation, row.currency]
            for n, amount in enumerate((row.cash_nano, row.voucher_nano, row.held_nano)):
                account[n] += amount
        elif row.cash_nano or row.voucher_nano or row.held_nano:
            said.append("it changes sums and has no currency")
        return [Fault(row.id, one) for one in said]

    def end(self, kept: Kept) -> list[Fault]:
        """Where the sums that are kept differ from the rows."""
        return [
            *_differences("account", kept.accounts, {key: tuple(sums) for key, sums in self._accounts.items()}),
            *_differences("open hold", kept.holds, self._holds),
            *self._end_vouchers(kept.vouchers),
            *self._end_spending(kept),
            *(fault for meter in kept.meters for fault in self._end_meter(meter)),
            *(Fault(f"meter {life}", "rows of its storage are there, it is not") for life in self._lost(kept)),
            *_unmetered(kept),
        ]

    def _holding(self, row: Written, kind: RowKind) -> list[str]:
        turn = row.turn_id or ""
        if kind is RowKind.HOLD:
            said = [] if row.held_nano >= 0 else [f"it holds {row.held_nano}"]
            if turn in self._holds:
                said.append("its turn holds already")
            self._holds[turn] = (*_payer(row), row.currency or "", row.held_nano)
            return said
        if kind not in CLOSING:
            return [f"it changes what is held, by {row.held_nano}"] if row.held_nano else []
        held = self._holds.get(turn)
        if held is not None and held[:4] == (*_payer(row), row.currency):
            del self._holds[turn]
            gives = held[-1]
        else:
            gives = 0
            if kind in (RowKind.RELEASE, RowKind.EXPIRE):
                return ["it closes a hold that is not open"]
        return _unless(-row.held_nano == gives, f"it gives back {-row.held_nano} of a hold of {gives}")

    def _credited(self, row: Written, kind: RowKind, expires_at: float | None) -> list[str]:
        cash, voucher = row.cash_nano, row.voucher_nano
        key = (row.organisation, row.currency or "")
        if kind is RowKind.GRANT and row.voucher_id is not None:
            self._granted[row.voucher_id] = voucher
            self._vouchers[key][row.voucher_id] = Voucher(row.voucher_id, voucher, row.at, expires_at)
            return _unless(cash == 0 and voucher > 0, f"a voucher of {voucher} with cash {cash}")
        if kind is RowKind.GRANT:
            return _unless(cash > 0 and voucher == 0, f"a grant of cash {cash} and vouchers {voucher}")
        if kind is RowKind.LAPSE:
            lapsed = self._vouchers[key].pop(row.voucher_id or "", None)
            left = 0 if lapsed is None else lapsed.left_nano
            is_right = cash == 0 and lapsed is not None and voucher == -left
            return _unless(is_right, f"it ends {-voucher} of voucher {row.voucher_id}, which has {left} left")
        if kind is RowKind.ADJUST:
            return _unless(voucher == 0, f"a correction changes vouchers, by {voucher}")
        return _unless(cash == voucher == 0, f"it changes cash by {cash} and vouchers by {voucher}")

    def _charged(self, row: Written) -> list[str]:
        """That the row takes what its classes say, from vouchers first; keeps what is spent and what vouchers have left."""
        classes = [getattr(row, name) or 0 for name in CLASSES]
        total, repeated = sum(classes), row.repeated_nano or 0
        said = _unless(-total <= repeated <= 0, f"repeated {repeated} of {total}")
        amount, taken = total + repeated, -row.cash_nano - row.voucher_nano
        said += _unless(amount == taken, f"its classes come to {amount}, it takes {taken}")
        vouchers = self._vouchers[row.organisation, row.currency or ""]
        wanted = max(0, min(taken, sum(one.left_nano for one in vouchers.values())))
        said += _unless(-row.voucher_nano == wanted, f"it takes {-row.voucher_nano} from vouchers, not {wanted}")
        for one in in_order(vouchers.values()) if row.voucher_nano else ():
            part = min(wanted, one.left_nano)
            wanted -= part
            if part == one.left_nano:
                del vouchers[one.id]
            else:
                vouchers[one.id] = Voucher(one.id, one.left_nano - part, one.created_at, one.expires_at)
        if row.currency is not None and self._budgets and taken:
            for scope in scopes_of(row.organisation, row.project, row.key_id):
                for period in Period:
                    if (scope, row.currency, period.value) in self._budgets:
                        self._spent[scope, row.currency, period.value, period_start(period, row.at)] += taken
        return said

    def _priced(self, row: Written, kind: RowKind) -> list[str]:
        if kind is RowKind.STORAGE:
            life = self._lives[row.id.rpartition("/")[0]]
            life[0] += row.storage_nano or 0
            life[1] += row.n_units or 0
        if row.sheet is None or row.sheet_model is None or row.currency is None:
            has = [name for name in (*CLASSES, "repeated_nano", "uncached_nano") if getattr(row, name) is not None]
            is_absent = not has and row.sheet is row.sheet_model is row.currency
            return _unless(is_absent, f"it has no prices, but {', '.join(has) or 'a part of their name'}")
        absent = [name for name in CLASSES if getattr(row, name) is None]
        if absent:
            return [f"it has prices, but no {', '.join(absent)}"]
        try:
            prices = self._prices(Priced(row.sheet, row.sheet_model, row.currency))
        except NoSuchPricesError as exc:
            return [str(exc)]
        if kind is RowKind.STORAGE:
            charge, uncached = Charge(storage=row.storage_nano or 0), None  # the amount: with its life
        elif kind is RowKind.CREATION:
            charge, uncached = Charge(creation=creation_nano(prices, row.n_object or 0)), None
        else:
            usage, n_object = _usage(row), row.n_object or 0
            if not 0 <= n_object <= usage.cache_read:
                return []  # its shape is wrong, which has been said
            charge, uncached = turn_charge(prices, usage, n_object=n_object), uncached_nano(prices, usage)
        said = [
            f"{name}_nano is {getattr(row, f'{name}_nano')}, by its sheet {row.sheet} it is {amount}"
            for name, amount in asdict(charge).items()
            if getattr(row, f"{name}_nano") != amount
        ]
        return said + _unless(row.uncached_nano == uncached, f"uncached_nano is {row.uncached_nano}, not {uncached}")

    def _end_vouchers(self, kept: tuple[KeptVoucher, ...]) -> list[Fault]:
        left = {id_: one.left_nano for several in self._vouchers.values() for id_, one in several.items()}
        found = [
            *_differences("voucher", {one.id: one.granted_nano for one in kept}, self._granted),
            *_differences(
                "what is left of voucher",
                {one.id: one.left_nano for one in kept},
                {id_: left.get(id_, 0) for id_ in self._granted},
            ),
        ]
        whose = {id_: (*key, one.created_at) for key, several in self._vouchers.items() for id_, one in several.items()}
        for one in kept:
            said = (one.organisation, one.currency, one.created_at)
            if one.id in whose and whose[one.id] != said:
                found.append(Fault(f"voucher {one.id}", f"it is kept as {said}, by its grant it is {whose[one.id]}"))
        return found

    def _end_spending(self, kept: Kept) -> list[Fault]:
        """From the period on in which a budget was set. One that was set or removed during the count is left out."""
        known = self._budgets & kept.budgets
        first: dict[tuple[str, str, str], int] = {}
        for scope, currency, period, start in kept.spending:
            of = (scope, currency, period)
            first[of] = min(start, first.get(of, start))
        strays = [Fault(f"spending {key}", "there is no such budget") for key in first if key not in kept.budgets]
        missing = [Fault(f"budget {key}", "nothing is kept of its spending") for key in known if key not in first]
        should = {
            key: spent for key, spent in self._spent.items() if key[:3] in known and key[3] >= first.get(key[:3], 0)
        }
        found = {key: spent for key, spent in kept.spending.items() if key[:3] in known and (spent or key in should)}
        return [*strays, *missing, *_differences("spending", found, should)]

    def _end_meter(self, meter: KeptMeter) -> list[Fault]:
        nano, seconds = self._lives.get(meter.id, (0, 0))
        lived_s = meter.charged_until - meter.began_at
        said = _unless(meter.charged_nano == nano, f"charged_nano is {meter.charged_nano}, its rows come to {nano}")
        said += _unless(floor(lived_s) == seconds, f"it is paid for {floor(lived_s)} s, its rows are for {seconds}")
        whole_s = meter.ends_at - meter.began_at
        if meter.is_closed:
            said += _unless(seconds == floor(whole_s), f"it is closed, paid for {seconds} s of {floor(whole_s)}")
        if meter.sheet is not None and meter.sheet_model is not None and meter.currency is not None:
            try:
                prices = self._prices(Priced(meter.sheet, meter.sheet_model, meter.currency))
            except NoSuchPricesError as exc:
                said.append(str(exc))
            else:
                owed = storage_nano(prices, meter.n_tokens, lived_s)
                said += _unless(nano == owed, f"its rows come to {nano}, by its sheet {meter.sheet} it is {owed}")
        return [Fault(f"meter {meter.id}", one) for one in said]

    def _lost(self, kept: Kept) -> list[str]:
        there = {meter.id for meter in kept.meters}
        return [life for life in self._lives if life not in there]


def _unmetered(kept: Kept) -> list[Fault]:
    """Objects that are kept for nothing, or longer than their meter says."""
    ends = {(meter.object_id, meter.ends_at) for meter in kept.meters}
    return [
        Fault(f"cache object {object_id}", f"it is kept until {ends_at:.3f}, and no meter of it ends then")
        for object_id, ends_at in kept.ready.items()
        if (object_id, ends_at) not in ends
    ]


def _shape(row: Written, kind: RowKind) -> list[str]:
    """What a row of its kind has, whatever the prices."""
    said = []
    if kind in NAMED_BY_TURN and row.id != f"{row.turn_id}/{kind.value}":
        said.append(f"its turn is {row.turn_id} and its kind {kind.value}, which is not its id")
    counts = {name: getattr(row, name) for name in (*OF_TURN, "n_units")}
    expected = {
        RowKind.SETTLE: OF_TURN,
        RowKind.CREATION: ("n_object",),
        RowKind.STORAGE: ("n_object", "n_units"),
    }.get(kind, ())
    for name, count in counts.items():
        if (count is None) == (name in expected):
            said.append(f"{name} is {count} in a row of kind {kind.value}")
        elif count is not None and count < 0:
            said.append(f"{name} is {count}")
    if kind is RowKind.SETTLE and not said:
        said += _unless((row.n_write_long or 0) <= (row.n_write or 0), f"{row.n_write_long} of {row.n_write} written")
        said += _unless((row.n_object or 0) <= (row.n_read or 0), f"{row.n_object} of {row.n_read} read from an object")
    if kind not in CHARGING:
        money = [name for name in (*CLASSES, "repeated_nano", "uncached_nano") if getattr(row, name) is not None]
        said += _unless(not money, f"{', '.join(money)} in a row of kind {kind.value}")
    return said


def _usage(row: Written) -> Usage:
    return Usage(row.n_fresh or 0, row.n_read or 0, row.n_write or 0, row.n_output or 0, row.n_write_long or 0)


def _payer(row: Written) -> tuple[str, str | None, int | None]:
    return row.organisation, row.project, row.key_id


def _unless(is_right: bool, message: str) -> list[str]:
    return [] if is_right else [message]


def _differences(what: str, kept: Mapping[K, object], counted: Mapping[K, object]) -> list[Fault]:
    return [
        Fault(
            f"{what} {_shown(key)}",
            f"{kept.get(key, 'nothing')} is kept, the rows come to {counted.get(key, 'nothing')}",
        )
        for key in [*kept, *(key for key in counted if key not in kept)]
        if kept.get(key) != counted.get(key)
    ]


def _shown(key: object) -> str:
    return " ".join(map(str, key)) if isinstance(key, tuple) else str(key)
