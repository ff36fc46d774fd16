"""What the ledger keeps of money and use. A row is never changed.

Three sums belong to an organisation and currency: cash, vouchers and what is held. Available is cash + vouchers − held.
Every row says what it adds to each, so at any time each sum is the sum of the rows.

    grant     cash or a voucher comes in                    cash or voucher +
    lapse     a voucher's time is over                      voucher −
    hold      a turn may cost this much                     held +
    settle    the turn is over and cost this much           held −, voucher − first, then cash −
    release   the turn never began to use anything          held −
    expire    nobody closed the hold in its time            held −
    creation  a cache object was made                       held − where it was held, voucher −, cash −
    storage   a cache object was kept                       voucher −, cash −
    adjust    the operator corrects something               cash ±
"""

from enum import Enum

from msgspec import Struct

from keepwarm.billing.price import Charge
from keepwarm.core.event import Usage


class RowKind(Enum):
    """As above."""

    GRANT = "grant"
    LAPSE = "lapse"
    HOLD = "hold"
    SETTLE = "settle"
    RELEASE = "release"
    EXPIRE = "expire"
    CREATION = "creation"
    STORAGE = "storage"
    ADJUST = "adjust"


class Payer(Struct, frozen=True):
    """Who pays: an organisation, through a project and a key."""

    organisation: str
    project: str
    key_id: int | None


class Priced(Struct, frozen=True):
    """Which prices a row was made with."""

    sheet: str  # PriceSheet.id
    sheet_model: str
    currency: str


class TurnUse(Struct, frozen=True):
    """What a turn came to. `charge` and `uncached_nano` are None where the model has no prices."""

    usage: Usage
    n_object: int
    charge: Charge | None
    uncached_nano: int | None


class Row(Struct, frozen=True):
    """One row of the ledger, as in `tables.ledger_rows`; amounts in nano of `currency`."""

    id: str
    kind: RowKind
    at: float
    organisation: str
    project: str | None = None
    key_id: int | None = None
    turn_id: str | None = None
    object_id: str | None = None
    dialect: str | None = None
    model: str | None = None
    status: str | None = None
    priced: Priced | None = None
    currency: str | None = None
    cash_nano: int = 0
    voucher_nano: int = 0
    held_nano: int = 0
    voucher_id: str | None = None
    use: TurnUse | None = None
    repeated_nano: int | None = None
    object_tokens: int | None = None  # of creation and storage
    storage_s: int | None = None
    charge: Charge | None = None  # of creation and storage
    note: str | None = None
