"""What is asked of the ledger for a turn or a new cache object. Each act is done once, however often it is asked for."""

from msgspec import Struct

from keepwarm.billing.price import Charge
from keepwarm.billing.row import Payer, Priced, TurnUse


class Repeat(Struct, frozen=True):
    """That a request may be one sent again: digests of its Idempotency-Key and of its body."""

    key_digest: bytes
    body_digest: bytes


class Hold(Struct, frozen=True):
    """A turn is about to run and may cost `amount_nano`, its ceiling. For a cache object `turn_id` is the creation's id."""

    turn_id: str
    payer: Payer
    dialect: str
    model: str
    priced: Priced
    amount_nano: int
    is_prepaid: bool
    repeat: Repeat | None = None

    def __post_init__(self) -> None:
        assert self.amount_nano >= 0, f"a turn cannot cost {self.amount_nano}"


class Settlement(Struct, frozen=True):
    """A turn is over, `status` says how; `priced` is None and `use` without money where the model has no prices."""

    turn_id: str
    payer: Payer
    dialect: str
    model: str
    status: str
    priced: Priced | None
    use: TurnUse
    repeat: Repeat | None = None

    def __post_init__(self) -> None:
        assert (self.priced is None) == (self.use.charge is None), "money needs prices, and prices give money"


class Release(Struct, frozen=True):
    """A turn that held came to nothing; with `repeat`, the hold's, it was no attempt at `payer`'s request either."""

    turn_id: str
    payer: Payer | None = None
    repeat: Repeat | None = None

    def __post_init__(self) -> None:
        assert self.repeat is None or self.payer is not None, "keys of requests are an organisation's"


class Creation(Struct, frozen=True):
    """A cache object was made: `n_tokens` long. `id` names the making; a hold of that `turn_id` ends with it."""

    id: str
    payer: Payer
    object_id: str
    dialect: str
    model: str
    priced: Priced | None
    n_tokens: int
    charge: Charge | None

    def __post_init__(self) -> None:
        assert (self.priced is None) == (self.charge is None), "money needs prices, and prices give money"


Act = Hold | Settlement | Release | Creation
