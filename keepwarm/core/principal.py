"""Who a request is done for, as the API key tells it, and what that lets him do."""

from collections.abc import Sequence
from enum import Enum

from msgspec import Struct

from keepwarm.core.errors import ApiError, ErrorKind


class Role(Enum):
    """What a key may do; each may do what the ones after it may."""

    OPERATOR = "operator"  # runs the server: all organisations, prices, credit, the store, the engine
    ADMIN = "admin"  # its own organisation: projects, keys, budgets, usage
    MEMBER = "member"  # turns, cache objects, files
    READ_ONLY = "read-only"  # looks: lists, objects, usage of its own organisation; makes and spends nothing


class Access(Enum):
    """Who may make a call. Each but PUBLIC and READ names the least role that may."""

    PUBLIC = "public"  # no key is looked at
    READ = "read-only"  # any key
    USE = "member"
    ADMIN = "admin"
    OPERATOR = "operator"

    def allows(self, role: Role) -> bool:
        """Whether a key of this role may."""
        return self is Access.PUBLIC or RANKS.index(role) <= RANKS.index(Role(self.value))


RANKS = tuple(Role)  # the mightiest first


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
    expires_at: int | None = None  # of the key, unix seconds; None: never

    @property
    def is_billed(self) -> bool:
        return self.key_id is not None

    @property
    def is_operator(self) -> bool:
        return self.role is Role.OPERATOR


def check_access(principal: Principal, access: Access) -> None:
    """Raises ApiError(PERMISSION_DENIED) when the caller's role does not allow a call of `access`."""
    if not access.allows(principal.role):
        message = (
            f"this call needs a key with the role {access.value} or above; this key's role is {principal.role.value}"
        )
        raise ApiError(ErrorKind.PERMISSION_DENIED, message)


def check_sees(principal: Principal, organisation: str) -> None:
    """Raises ApiError(UNKNOWN_ROUTE) for another's organisation, there or not, unless the caller is an operator."""
    if organisation != principal.organisation and not principal.is_operator:
        message = f"this key's organisation is {principal.organisation!r}, it sees no other"
        raise ApiError(ErrorKind.UNKNOWN_ROUTE, message)


def allowed(principal: Principal, model: str) -> bool:
    """Whether the caller's key may use a model, by the very name the request gives it: an alias has prices of its own."""
    return principal.models is None or model in principal.models


def check_allowed(principal: Principal, model: str) -> None:
    """Raises ApiError(PERMISSION_DENIED), with the names that are allowed."""
    if not allowed(principal, model):
        names = ", ".join(principal.models or ())
        message = f"this key may not use model {model[:100]!r}; it may use: {names}"
        raise ApiError(ErrorKind.PERMISSION_DENIED, message, param="model")


def allowed_names(principal: Principal, names: Sequence[str]) -> tuple[str, ...]:
    """Those of the served `names` that the caller's key may use, in their order."""
    return tuple(name for name in names if allowed(principal, name))
