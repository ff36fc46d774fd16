"""Who a request is done for, as the API key tells it."""

from enum import Enum

from msgspec import Struct


class Role(Enum):
    """What a key may do; each may do what the ones after it may."""

    OPERATOR = "operator"  # runs the server: all organisations, prices, credit, the store, the engine
    ADMIN = "admin"  # its own organisation: projects, keys, budgets, usage
    MEMBER = "member"  # turns, cache objects, files
    READ_ONLY = "read-only"  # looks: lists, objects, usage of its own organisation; makes and spends nothing


class Principal(Struct, frozen=True):
    """The caller. `tenant` is the namespace of what is cached: the organisation, or "ORGANISATION/PROJECT".

    `models`: the names this key may use, None all. With --dev there is no key, so `key_id` is None and nothing is billed.
    """

    tenant: str
    organisation: str
    project: str
    key_id: int | None
    key_name: str
    role: Role
    models: tuple[str, ...] | None = None
    is_prepaid: bool = False  # the organisation's turns need a balance that covers them
    tier: str | None = None  # of the organisation's limits; None: the configured default
    limits: bytes | None = None  # JSON: single limits that differ from the tier's

    @property
    def is_billed(self) -> bool:
        return self.key_id is not None
