"""What a turn's look-up in the cache came to, and why not to more: one outcome, one cause of a closed list."""

from enum import Enum
from typing import Literal

from msgspec import Struct

Outcome = Literal["hit", "partial", "miss"]


class MissCause(Enum):
    """Why a prompt was not read from the cache any further. Every dialect words these its own way."""

    MODEL_CHANGED = "model_changed"
    TEMPLATE_CHANGED = "template_changed"
    TOOLS_CHANGED = "tools_changed"
    SYSTEM_CHANGED = "system_changed"
    MESSAGES_CHANGED = "messages_changed"
    BELOW_MINIMUM = "below_minimum"  # the prompt, or the marked prefix, is too short to be cached
    EXPIRED = "expired"
    EVICTED = "evicted"
    DELETED = "deleted"
    STILL_BEING_WRITTEN = "still_being_written"
    FIRST_SEEN = "first_seen"  # no recent prompt of this tenant begins like it
    SLOWER_THAN_RECOMPUTING = "slower_than_recomputing"


class Place(Struct, frozen=True):
    """Where a prompt stopped being a known one. `block` is "tools[3]", "system" or "messages[7]".

    `n_shared` tokens come before it. The texts are a few tokens around the place, of the tenant's own prompts: what both
    have before it, what this prompt goes on with and what the known one did.
    """

    n_shared: int
    block: str
    before: str = ""
    here: str = ""
    there: str = ""


class CacheLookup(Struct, frozen=True):
    """What was read of a prompt, and why not more.

    "hit": all that this prompt could share with what the tenant had stored or marked; "partial": less; "miss": nothing.
    `n_missed` are the tokens that would have been read as well but for the cause: those of a prefix that expired, was
    evicted and so on; where something changed, those that the earlier prompt has, up to this one's end. `compared_with` is
    the turn it was compared with; `place` is where they differ. `compare_found` is whether the turn that the client named
    is known; None: it named none.
    """

    outcome: Outcome
    n_read: int
    tier: str | None = None
    cause: MissCause | None = None
    n_missed: int = 0
    compared_with: str | None = None
    place: Place | None = None
    compare_found: bool | None = None
