"""What it means that a request names a cache object: which messages the turn has, and whether the object applies. Pure.

Two forms (docs/api/kimi.md): with `role: "cache"` the object's messages replace that message, so an object that cannot
be used is an error. In the header form the client sends the messages again, so it never is: the request just runs as an
ordinary one.

Gemini's cachedContent is like the role form with its own rules: the same model name, and an object whose time is over
looks like none. A request that uses one has no system instruction, tools or tool choice; the dialect has seen to it.
"""

from datetime import UTC, datetime

from msgspec import Struct
from msgspec.structs import replace

from keepwarm.core.cache_lookup import MissCause
from keepwarm.core.cache_object import CacheObject, ObjectStatus
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.request import CacheUse, ChatRequest

CONTENT_NOT_FOUND = "CachedContent not found (or permission denied)"


class ObjectUse(Struct, frozen=True):
    """The request with the object's messages in it, the object if it applies, and its status at that moment.

    `lost`: the object is not there (DELETED) or lives no more (EXPIRED), and the request runs without it.
    """

    request: ChatRequest
    object: CacheObject | None = None
    status: ObjectStatus | None = None
    lost: MissCause | None = None


def use_object(
    request: ChatRequest, use: CacheUse, found: CacheObject | None, *, same_model: bool, now: float
) -> ObjectUse:
    """Apply `found` to the request.

    Raises ApiError: UNKNOWN_CACHE, EXPIRED_CACHE, INVALID_REQUEST; never in Kimi's header form.
    """
    if use.dialect == "gemini":
        return _use_content(request, found, now)
    if use.resent:
        if found is None:
            return ObjectUse(request, lost=MissCause.DELETED)
        if not same_model or not _begins_with(request, found):
            return ObjectUse(request)
        status = found.effective_status(now)
        if status is ObjectStatus.INACTIVE and use.reset_ttl_s is None:
            return ObjectUse(request, lost=MissCause.EXPIRED)
        return ObjectUse(request, found, status)
    if found is None:
        named = f"tag {use.tag!r}" if use.tag is not None else f"cache {use.object_id!r}"
        raise ApiError(ErrorKind.UNKNOWN_CACHE, f"{named} not found", param="messages[0].content")
    if not same_model:
        message = f"cache {found.id} was created for model {found.model!r}, not for {request.model!r}"
        raise ApiError(ErrorKind.INVALID_REQUEST, message, param="model")
    status = found.effective_status(now)
    if status is ObjectStatus.INACTIVE and use.reset_ttl_s is None:
        at = datetime.fromtimestamp(found.expires_at, UTC).isoformat()
        message = f"cache {found.id} expired at {at}; use reset_ttl to bring it back, or create it again"
        raise ApiError(ErrorKind.EXPIRED_CACHE, message, param="messages[0].content")
    filled = replace(request, messages=found.messages + request.messages, tools=found.tools)
    return ObjectUse(filled, found, status)


def _use_content(request: ChatRequest, found: CacheObject | None, now: float) -> ObjectUse:
    """The messages are the ones clients look for."""
    if found is None or found.is_over(now):
        raise ApiError(ErrorKind.UNKNOWN_CACHE, CONTENT_NOT_FOUND, param="cached_content")
    if found.model != request.model:
        message = (
            f"Model used by GenerateContent request (models/{request.model}) and CachedContent (models/{found.model}) "
            "has to be the same."
        )
        raise ApiError(ErrorKind.INVALID_REQUEST, message, param="model")
    filled = replace(
        request, messages=found.messages + request.messages, tools=found.tools, tool_choice=found.tool_choice
    )
    return ObjectUse(filled, found, found.status)


def _begins_with(request: ChatRequest, found: CacheObject) -> bool:
    """Whether the request's first messages and its tools are the object's, in order and in every field."""
    return request.messages[: len(found.messages)] == found.messages and request.tools == found.tools
