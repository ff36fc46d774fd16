"""What to do about a key's object: decided from its row and the time, nothing else. Pure.

```
 no object ──CREATE──▶ pending ──CHECK──▶ ready ──USE──▶ …
     ▲                    │                 │ little time left: RENEW ──▶ pending
     └── gone, expired, failed; other knowledge ◀──┘
```

Work on the object is done by the one worker that holds the row's claim; a claim ends by itself, so a worker that died
stops nobody for long. Whoever cannot use the object and may not work on it sends the knowledge in full and never waits.
Knowledge that was replaced does not come back at once: while an old and a new version of an application run together,
each would delete the other's object with every question.
"""

from enum import Enum

from msgspec import Struct

CALL_S = 30.0  # one call about an object; creating answers at once with `pending`
CLAIM_S = 150.0  # the most calls one claim makes are four: delete, look, create, delete


class Policy(Struct, frozen=True):
    """How a book behaves. Seconds. `ttl_s`: lifetime of an object, counted from its last use."""

    ttl_s: int = 3600  # Kimi's maximum
    renew_share: float = 0.25  # renewed when less of the lifetime than this is left
    check_s: float = 1.0  # between two looks at an object that is not ready
    retry_s: float = 30.0  # after a refused creation, and after an object that failed
    return_s: float = 300.0  # before replaced knowledge may take its key back

    def __post_init__(self) -> None:
        if self.ttl_s < 1 or not 0 < self.renew_share < 1:
            raise ValueError("ttl_s must be positive and renew_share between 0 and 1")


class Row(Struct, frozen=True):
    """What the book knows of a key's object. Times in unix seconds by the clock of the machine that has the book.

    `next_at` is when the object may be worked on again. `uncertain`: a creation was begun whose outcome nobody wrote down.
    """

    digest: str
    cache_id: str | None = None
    ready: bool = False
    expires_at: float = 0.0
    next_at: float = 0.0
    claim: str | None = None
    claimed_until: float = 0.0
    uncertain: bool = False
    replaced_digest: str | None = None
    replaced_at: float = 0.0


class Step(Enum):
    """What comes next. CREATE, CHECK and RENEW need the claim."""

    USE = "use"
    FULL = "full"
    CREATE = "create"
    CHECK = "check"
    RENEW = "renew"


def decide(row: Row | None, digest: str, now: float, policy: Policy) -> Step:
    """The next step for a request with this knowledge."""
    if row is None:
        return Step.CREATE
    wanted = wanted_step(row, digest, now, policy)
    if wanted in (Step.USE, Step.FULL) or not (row.claim is not None and now < row.claimed_until):
        return wanted
    live = row.digest == digest and row.ready and now < row.expires_at
    return Step.USE if live else Step.FULL


def wanted_step(row: Row, digest: str, now: float, policy: Policy) -> Step:
    """The same, were nobody else at work on the object."""
    if row.digest != digest:
        came_back = row.replaced_digest == digest and now < row.replaced_at + policy.return_s
        return Step.FULL if came_back or now < row.next_at else Step.CREATE
    if row.cache_id is None:
        return Step.FULL if now < row.next_at else Step.CREATE
    if row.expires_at - now < policy.ttl_s * policy.renew_share:
        if now >= row.next_at:
            return Step.RENEW
        return Step.USE if row.ready and now < row.expires_at else Step.FULL
    if row.ready:
        return Step.USE
    return Step.FULL if now < row.next_at else Step.CHECK
