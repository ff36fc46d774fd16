"""Anthropic's `diagnostics`: why the cache was missed, compared with the turn that the client named.

Its union asks whose doing a miss was. What the client changed has a word and the tokens lost; a prefix that is the same and
was not read all the same (expired, evicted, slower than computing …) is no reason in it, so the member is null, as for a
hit; "unavailable" is everything that says nothing of what the client sent. Our own words are in the X-Keepwarm-Cache header.
"""

from collections.abc import Mapping

from msgspec import UNSET, Struct, UnsetType

from keepwarm.core.cache_lookup import CacheLookup, MissCause

NOT_FOUND = "previous_message_not_found"
UNAVAILABLE = "unavailable"

CHANGED: Mapping[MissCause, str] = {
    MissCause.MODEL_CHANGED: "model_changed",
    MissCause.TOOLS_CHANGED: "tools_changed",
    MissCause.SYSTEM_CHANGED: "system_changed",
    MissCause.MESSAGES_CHANGED: "messages_changed",
}
REASONS: Mapping[MissCause, str | None] = {
    **CHANGED,
    MissCause.TEMPLATE_CHANGED: UNAVAILABLE,  # the server's doing: the client sent the same
    MissCause.BELOW_MINIMUM: UNAVAILABLE,
    MissCause.FIRST_SEEN: UNAVAILABLE,
    MissCause.EXPIRED: None,
    MissCause.EVICTED: None,
    MissCause.DELETED: None,
    MissCause.STILL_BEING_WRITTEN: None,
    MissCause.SLOWER_THAN_RECOMPUTING: None,
}


class CacheMissReason(Struct):
    """Why; `cache_missed_input_tokens` where the client changed something."""

    type: str
    cache_missed_input_tokens: int | UnsetType = UNSET


class Diagnostics(Struct):
    """What the comparison found. (Anthropic's inner null means that it is still pending; ours never is.)"""

    cache_miss_reason: CacheMissReason


def diagnostics(lookup: CacheLookup | None, compare_with: str | None) -> Diagnostics | None:
    """For a client that asked; None where nothing of what it sent was the reason, or nothing was to be compared with.

    `compare_with` is the turn it named, None: it only asks to be compared with later.
    """
    if compare_with is None:
        return None
    if lookup is None:
        return Diagnostics(CacheMissReason(UNAVAILABLE))
    if not lookup.compare_found:
        return Diagnostics(CacheMissReason(NOT_FOUND))
    reason = None if lookup.cause is None else REASONS[lookup.cause]
    if reason is None:
        return None
    return Diagnostics(CacheMissReason(reason, lookup.n_missed if lookup.cause in CHANGED else UNSET))
