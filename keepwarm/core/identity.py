"""Organisations, projects and API keys, as they are asked for and told; which names and keys are possible.

An organisation is billed and limited; its projects have keys and budgets of their own. Times are in unix seconds.
"""

import re
from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.principal import Principal, Role
from keepwarm.core.rate_limit import LimitOverrides

DEFAULT_ORGANISATION = "default"
DEFAULT_PROJECT = "default"
PROJECT_SCOPE = "project"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}")
MODELS_MAX = 100  # names in a key's list
MODEL_CHARS_MAX = 200
PROJECTS_MAX = 100  # of an organisation, archived ones too: each may be a namespace with quotas of its own
LIVE_KEYS_MAX = 1000  # of an organisation
KEY_ID_MAX = 2**31 - 1  # the column has 32 bits
EXPIRES_AT_MAX = 253_402_300_799  # the end of the year 9999, the last that can be written as a date

CacheScope = Literal["organisation", "project"]


class Organisation(Struct, frozen=True):
    """Who is billed and limited. `tier` null: the configured default. Times in unix seconds."""

    id: str
    tier: str | None
    limits: LimitOverrides
    is_prepaid: bool
    cache_scope: CacheScope
    created_at: int
    disabled_at: int | None


class NewOrganisation(Struct, frozen=True, forbid_unknown_fields=True):
    """One to be made. With `cache_scope` "project" no project sees what another one has cached."""

    id: str
    tier: str | None = None
    limits: LimitOverrides = LimitOverrides()
    is_prepaid: bool = False
    cache_scope: CacheScope = "organisation"


class OrganisationChange(Struct, frozen=True, forbid_unknown_fields=True):
    """What is absent stays. `limits` replaces all single limits; `tier` null goes back to the configured default."""

    tier: str | UnsetType | None = UNSET
    limits: LimitOverrides | UnsetType = UNSET
    is_prepaid: bool | UnsetType = UNSET
    cache_scope: CacheScope | UnsetType = UNSET
    is_disabled: bool | UnsetType = UNSET


class Project(Struct, frozen=True):
    """A part of an organisation that has its own keys and budgets. Times in unix seconds."""

    organisation: str
    name: str
    created_at: int
    archived_at: int | None


class KeyInfo(Struct, frozen=True):
    """What is known of a key; `last4` are its last characters, for people to tell keys apart. Times in unix seconds."""

    id: int
    name: str
    organisation: str
    project: str
    role: Role
    last4: str
    created_at: int
    expires_at: int | None
    revoked_at: int | None
    models: tuple[str, ...] | None


class NewKey(Struct, frozen=True, forbid_unknown_fields=True):
    """One to be made. `models` are the names it may use, as requests give them; null: all."""

    name: str
    project: str = DEFAULT_PROJECT
    role: Role = Role.MEMBER
    expires_at: int | None = None
    models: tuple[str, ...] | None = None


class KeyChange(Struct, frozen=True, forbid_unknown_fields=True):
    """What is absent stays. `expires_at` null: never; `models` null: all."""

    name: str | UnsetType = UNSET
    expires_at: int | UnsetType | None = UNSET
    models: tuple[str, ...] | UnsetType | None = UNSET


def tenant_of(organisation: str, project: str, cache_scope: CacheScope) -> str:
    """The namespace of what is cached. Names have no slash in them, so no organisation is mistaken for a project."""
    return f"{organisation}/{project}" if cache_scope == PROJECT_SCOPE else organisation


def organisation_of(tenant: str) -> str:
    """Whose namespace it is: `tenant_of` the other way round, whatever the cache scope."""
    return tenant.partition("/")[0]


def require_name(what: str, text: str, param: str) -> None:
    """Raises ApiError(INVALID_REQUEST) unless `text` can be the name of a `what`."""
    if not NAME.fullmatch(text):
        message = (
            f"{what} {text[:100]!r} cannot be used as a name: take 1 to 64 letters, digits and _ . @ -, "
            "first a letter or digit"
        )
        raise ApiError(ErrorKind.INVALID_REQUEST, message, param=param)


def key_id_of(text: str) -> int | None:
    """A key's id; None for what is none."""
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(KEY_ID_MAX))):
        return None
    return int(text) if int(text) <= KEY_ID_MAX else None


def check_granted(new: NewKey, by: Principal | None) -> None:
    """A key makes none that may do more, or longer. `by` None is the command line, which may make any.

    Raises ApiError(PERMISSION_DENIED).
    """
    if by is None:
        return
    if new.role is Role.OPERATOR and not by.is_operator:
        message = "a key with the role operator is made by an operator's key, or with keepwarm keys create"
        raise ApiError(ErrorKind.PERMISSION_DENIED, message, param="role")
    if by.models is not None and not set(new.models or ("",)) <= set(by.models):
        message = f"this key may use {', '.join(by.models)} only, so a key it makes needs models, and of these"
        raise ApiError(ErrorKind.PERMISSION_DENIED, message, param="models")
    if by.expires_at is not None and (new.expires_at is None or new.expires_at > by.expires_at):
        message = f"this key ends at {by.expires_at}, so a key it makes needs an expires_at that is not later"
        raise ApiError(ErrorKind.PERMISSION_DENIED, message, param="expires_at")


def check_new_key(new: NewKey, now: float) -> None:
    """Raises ApiError(INVALID_REQUEST) for a name, expiry or list of models that no key can have."""
    require_name("key", new.name, "name")
    if new.expires_at is not None and new.expires_at <= now:
        message = f"expires_at {new.expires_at} is not after now, {now:.0f}"
        raise ApiError(ErrorKind.INVALID_REQUEST, message, param="expires_at")
    if new.expires_at is not None and new.expires_at > EXPIRES_AT_MAX:
        message = f"expires_at is after {EXPIRES_AT_MAX}, the end of the year 9999; it is in seconds, null for never"
        raise ApiError(ErrorKind.INVALID_REQUEST, message, param="expires_at")
    if new.models is None:
        return
    if not 1 <= len(new.models) <= MODELS_MAX:
        message = f"models has {len(new.models)} names: 1 to {MODELS_MAX} are possible, and null for all models"
        raise ApiError(ErrorKind.INVALID_REQUEST, message, param="models")
    for number, model in enumerate(new.models):
        if not 1 <= len(model) <= MODEL_CHARS_MAX:
            message = f"models[{number}] has {len(model)} characters, 1 to {MODEL_CHARS_MAX} are possible"
            raise ApiError(ErrorKind.INVALID_REQUEST, message, param=f"models[{number}]")
