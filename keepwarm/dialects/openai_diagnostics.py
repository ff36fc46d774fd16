"""OpenAI's prompt_cache_diagnostics: why a prompt was not read from the cache, against an earlier turn that the client names.

Told only to a client that asks (`prompt_cache_options.comparison_response_id`). OpenAI's reasons are a closed list of what
a client can have changed. A miss for another cause (evicted, expired, too short, …) has no word in it and is told as
"unavailable"; the header X-Keepwarm-Cache and GET /admin/turns/{id} know more. Source: the Responses API of openai 3.57.
"""

from collections.abc import Mapping
from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from keepwarm.core.cache_lookup import CacheLookup, MissCause

Reason = Literal["model_changed", "tools_changed", "input_changed"]


class PromptCacheMiss(Struct, tag_field="type", tag="cache_miss"):
    """The turns part somewhere. `comparison_reusable_tokens` is the prefix they share.

    `cache_missed_tokens` are the compared turn's or its breakpoints' that were not read (`CacheLookup.n_missed`).
    """

    reason: Reason
    cache_missed_tokens: int
    comparison_reusable_tokens: int | UnsetType = UNSET


class PromptCacheHit(Struct, tag_field="type", tag="cache_hit"):
    """All was read that this prompt shares with an earlier one."""


class ComparisonResponseNotFound(Struct, tag_field="type", tag="comparison_response_not_found"):
    """No recent turn of this tenant has the id that was given."""


class PromptCacheUnavailable(Struct, tag_field="type", tag="unavailable"):
    """There was no look-up, or what it came to is nothing that changed in the request."""


PromptCacheDiagnostics = PromptCacheMiss | PromptCacheHit | ComparisonResponseNotFound | PromptCacheUnavailable

REASONS: Mapping[MissCause, Reason | None] = {
    MissCause.MODEL_CHANGED: "model_changed",
    MissCause.TEMPLATE_CHANGED: None,  # the server's doing: the client sent the same
    MissCause.TOOLS_CHANGED: "tools_changed",
    MissCause.SYSTEM_CHANGED: "input_changed",  # chat completions have no instructions beside the messages
    MissCause.MESSAGES_CHANGED: "input_changed",
    MissCause.BELOW_MINIMUM: None,
    MissCause.EXPIRED: None,
    MissCause.EVICTED: None,
    MissCause.DELETED: None,
    MissCause.STILL_BEING_WRITTEN: None,
    MissCause.FIRST_SEEN: None,
    MissCause.SLOWER_THAN_RECOMPUTING: None,
}


def cache_diagnostics(lookup: CacheLookup | None) -> PromptCacheDiagnostics:
    """What a look-up came to, in OpenAI's words; None: there was none."""
    if lookup is None:
        return PromptCacheUnavailable()
    if lookup.compare_found is False:
        return ComparisonResponseNotFound()
    if lookup.cause is None:
        return PromptCacheHit()
    reason = REASONS[lookup.cause]
    if reason is None:
        return PromptCacheUnavailable()
    return PromptCacheMiss(reason, lookup.n_missed, UNSET if lookup.place is None else lookup.place.n_shared)
