"""Cache objects: named prefixes with a lifetime, and the one table of their statuses.

The status words are Kimi's (its 2024-06 document): pending → ready | error, ready → inactive at expiry, and any update
goes through pending again. docs/api/kimi.md's diagram is generated from `TRANSITIONS` (tests/test_docs.py compares).
Expiry is decided by the clock at look-up (`effective_status`, `is_over`); no sweeper has to have run.

Gemini's cachedContents are the same objects with the same statuses, which its clients never see: a call that makes one
waits until it is ready, and one whose time is over is gone for good.
"""

from enum import Enum

from msgspec import Struct

from keepwarm.core.request import Message, ObjectDialect, Tool, ToolChoice

NS_PER_S = 1_000_000_000


class ObjectStatus(Enum):
    """Stored status; `INACTIVE` means expired."""

    PENDING = "pending"
    READY = "ready"
    ERROR = "error"
    INACTIVE = "inactive"


class Cause(Enum):
    """Why an object changes its status."""

    COMPUTED = "computed"  # the prefix is stored and leased
    FAILED = "failed"  # it cannot be, or could not be again after damage: `error` says why
    EXPIRED = "expired"
    UPDATED = "updated"  # PUT, or reset_ttl on use of one that is not live
    RENEWED = "renewed"  # reset_ttl on use of a live one: only its lifetime changes
    ENGINE_LOST = "engine_lost"  # the engine restarted without its lease: rebuilt from the stored messages


TRANSITIONS: dict[tuple[ObjectStatus, Cause], ObjectStatus] = {
    (ObjectStatus.PENDING, Cause.COMPUTED): ObjectStatus.READY,
    (ObjectStatus.PENDING, Cause.FAILED): ObjectStatus.ERROR,
    (ObjectStatus.PENDING, Cause.EXPIRED): ObjectStatus.INACTIVE,
    (ObjectStatus.PENDING, Cause.UPDATED): ObjectStatus.PENDING,
    (ObjectStatus.PENDING, Cause.RENEWED): ObjectStatus.PENDING,
    (ObjectStatus.PENDING, Cause.ENGINE_LOST): ObjectStatus.PENDING,
    (ObjectStatus.READY, Cause.FAILED): ObjectStatus.ERROR,
    (ObjectStatus.READY, Cause.EXPIRED): ObjectStatus.INACTIVE,
    (ObjectStatus.READY, Cause.UPDATED): ObjectStatus.PENDING,
    (ObjectStatus.READY, Cause.RENEWED): ObjectStatus.READY,
    (ObjectStatus.READY, Cause.ENGINE_LOST): ObjectStatus.PENDING,
    (ObjectStatus.ERROR, Cause.UPDATED): ObjectStatus.PENDING,
    (ObjectStatus.INACTIVE, Cause.UPDATED): ObjectStatus.PENDING,
}


def next_status(status: ObjectStatus, cause: Cause) -> ObjectStatus | None:
    """The status after `cause`, or None when the cause means nothing in this status (a late answer, say)."""
    return TRANSITIONS.get((status, cause))


class CacheObject(Struct, frozen=True):
    """A cache object as stored. Times in unix seconds; `n_tokens` is the length of its stable token prefix.

    `generation` grows with every update, so a computation that was started for an older one is not taken for this one.
    `early_ns`, below a second: it expires that much before `expires_at`, since Gemini's times have nanoseconds.
    `tool_choice` holds in every request that uses the object. `updated_at` None: a client never changed it.
    `project` and `key_id` are who pays; None: nobody does.
    """

    id: str
    tenant: str
    model: str
    status: ObjectStatus
    created_at: int
    expires_at: int
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    n_tokens: int
    name: str = ""
    description: str = ""
    metadata: tuple[tuple[str, str], ...] | None = None
    error: str | None = None
    generation: int = 0
    dialect: ObjectDialect = "kimi"
    tool_choice: ToolChoice = ToolChoice()
    early_ns: int = 0
    updated_at: int | None = None
    project: str | None = None
    key_id: int | None = None

    def is_over(self, now: float) -> bool:
        """Whether its lifetime has ended at `now`, whatever its status."""
        return now >= self.expires_at - self.early_ns / NS_PER_S

    def effective_status(self, now: float) -> ObjectStatus:
        """The status a client is told at `now`: past `expires_at`, pending and ready objects are inactive."""
        if self.is_over(now):
            return next_status(self.status, Cause.EXPIRED) or self.status
        return self.status


class Tag(Struct, frozen=True):
    """A re-bindable name of an object, unique per tenant."""

    tag: str
    tenant: str
    object_id: str
    created_at: int


class Page(Struct, frozen=True):
    """A list query. `after` and `before` are exclusive ids (or tag names) in the order of the list."""

    limit: int = 20
    descending: bool = True
    after: str | None = None
    before: str | None = None
    metadata: tuple[tuple[str, str], ...] = ()


class Walk(Struct, frozen=True):
    """A list query that goes on from a place, newest first: (created_at, id) of the last object seen.

    Unlike `Page` it does not need that object to be there still, so a client may delete what it has seen.
    """

    limit: int
    after: tuple[int, str] | None = None


class NewObject(Struct, frozen=True):
    """A create request. `expires_at` and `ttl_s` are both None for the default lifetime; never both set.

    `early_ns` is as in `CacheObject`, before the end that either of them gives.
    """

    model: str
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    name: str = ""
    description: str = ""
    metadata: tuple[tuple[str, str], ...] | None = None
    tags: tuple[str, ...] = ()
    expires_at: int | None = None
    ttl_s: int | None = None
    early_ns: int = 0
    dialect: ObjectDialect = "kimi"
    tool_choice: ToolChoice = ToolChoice()


class ObjectUpdate(Struct, frozen=True):
    """An update request; None leaves a member as it is. `early_ns` is as in `NewObject`."""

    metadata: tuple[tuple[str, str], ...] | None = None
    expires_at: int | None = None
    ttl_s: int | None = None
    early_ns: int = 0
