"""Gemini's cachedContents: bodies and queries of create, list, get, patch and delete.

What was cached is never returned, only what is known of it; its contents, instruction, tools and toolConfig become those of
every request that names it. Only the expiry can be changed: `ttl` or `expireTime`, of which a body has one at most, both to
the nanosecond. There is no clock here: an end that is not in the future is the gateway's to refuse.

A page token tells the place a list has come to by that object's own time and id, so that it stays good when the object is
deleted, and tells nothing of other tenants.
"""

import binascii
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from keepwarm.core.cache_object import CacheObject, NewObject, ObjectUpdate, Walk
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.dialects import WireBounds
from keepwarm.dialects.body import invalid, quoted, require_at_most
from keepwarm.dialects.gemini_content import GeminiTurn, neutral_contents, system_message
from keepwarm.dialects.gemini_json import (
    NS_PER_S,
    ProtoBody,
    camel,
    parse_duration,
    parse_timestamp,
    timestamp_text,
)
from keepwarm.dialects.gemini_schema import GeminiTool, GeminiToolConfig, neutral_tools

NAME_PREFIX = "cachedContents/"
MODEL_PREFIX = "models/"
DEFAULT_TTL_S = 3600
DISPLAY_NAME_CHARS_MAX = 128
PAGE_SIZE_MAX = 1000  # more is asked for in vain, as in Google's
PAGE_SIZE_DEFAULT = 100
ONLY_EXPIRY = "only the expiry of a CachedContent can be changed, by ttl or expire_time"

_PLACE = re.compile(r"(?P<created_at>[0-9]{1,12})\.(?P<id>[a-z0-9]{1,64})", re.ASCII)
_PAGE_SIZE = re.compile(r"[0-9]{1,9}", re.ASCII)


class NewContentRequest(Struct, rename="camel"):
    """The body of POST /cachedContents. Without `ttl` and `expire_time` it is kept for an hour."""

    model: str | None = None
    contents: tuple[GeminiTurn, ...] | None = None
    system_instruction: GeminiTurn | None = None
    tools: tuple[GeminiTool, ...] | None = None
    tool_config: GeminiToolConfig | None = None
    display_name: str | None = None
    ttl: str | None = None
    expire_time: str | None = None


class ContentUpdateRequest(Struct, rename="camel"):
    """The body of PATCH /cachedContents/{id}: one of `ttl` and `expire_time`.

    The members that GET gives may be sent back; those that it never gives are refused.
    """

    ttl: str | None = None
    expire_time: str | None = None
    contents: Any = None
    system_instruction: Any = None
    tools: Any = None
    tool_config: Any = None


class ContentUsage(Struct, rename="camel"):
    """How long a cachedContent is, in tokens of text."""

    total_token_count: int


class ContentReply(Struct, rename="camel"):
    """A cachedContent. Times are RFC 3339."""

    name: Annotated[str, Meta(examples=["cachedContents/ez2yh6u6my9gnjvyigtxvnuf6e5qc79vgd7cc668"])]
    model: str
    create_time: str
    update_time: str
    expire_time: str
    display_name: str
    usage_metadata: ContentUsage


class ContentListReply(Struct, rename="camel"):
    """A page of cachedContents, newest first; a member that would be empty is left out."""

    cached_contents: tuple[ContentReply, ...] | UnsetType = UNSET
    next_page_token: str | UnsetType = UNSET


class GeminiCaching:
    """Parses and renders /cachedContents. All parse functions raise ApiError(INVALID_REQUEST)."""

    def __init__(self, bounds: WireBounds) -> None:
        self._bounds = bounds
        self._create = ProtoBody(NewContentRequest)
        self._update = ProtoBody(ContentUpdateRequest)
        self._encoder = msgspec.json.Encoder()

    def parse_create(self, body: bytes) -> NewObject:
        wire = self._create.decode(body)
        model = (wire.model or "").removeprefix(MODEL_PREFIX)
        if not model:
            raise invalid("model", "is required")
        display_name = wire.display_name or ""
        require_at_most(display_name, DISPLAY_NAME_CHARS_MAX, "displayName", "characters")
        messages = system_message(wire.system_instruction) + neutral_contents(wire.contents or (), self._bounds)
        if not messages:
            raise invalid("contents", "a CachedContent needs contents or a systemInstruction")
        tools, tool_choice = neutral_tools(wire.tools or (), wire.tool_config, self._bounds)
        expires_at, ttl_s, early_ns = _expiration(wire.ttl, wire.expire_time)
        if expires_at is None and ttl_s is None:
            ttl_s = DEFAULT_TTL_S
        return NewObject(
            model=model,
            messages=messages,
            tools=tools,
            tool_choice=tool_choice,
            name=display_name,
            expires_at=expires_at,
            ttl_s=ttl_s,
            early_ns=early_ns,
            dialect="gemini",
        )

    def parse_patch(self, query: Sequence[tuple[str, str]], body: bytes) -> ObjectUpdate:
        """`query` may have an `updateMask`: what it does not name is not changed, whatever the body says."""
        wire = self._update.decode(body)
        mask = _mask(query)
        for name in ("contents", "system_instruction", "tools", "tool_config"):
            if not mask and getattr(wire, name) is not None:
                raise invalid(camel(name), ONLY_EXPIRY)
        ttl = wire.ttl if not mask or "ttl" in mask else None
        expire_time = wire.expire_time if not mask or "expireTime" in mask else None
        expires_at, ttl_s, early_ns = _expiration(ttl, expire_time)
        if expires_at is None and ttl_s is None:
            named = mask[0] if mask else "ttl"
            raise invalid(named, f"is required: {ONLY_EXPIRY}")
        return ObjectUpdate(expires_at=expires_at, ttl_s=ttl_s, early_ns=early_ns)

    def parse_list(self, query: Sequence[tuple[str, str]]) -> Walk:
        scalars = {camel(key): value for key, value in query}
        size, token = scalars.get("pageSize", ""), scalars.get("pageToken", "")
        if size and not _PAGE_SIZE.fullmatch(size):
            raise invalid("pageSize", f"must be a whole number from 0 to {PAGE_SIZE_MAX:,}, not {quoted(size)}")
        limit_max = min(PAGE_SIZE_MAX, self._bounds.list_page_max)
        return Walk(min(int(size or 0) or PAGE_SIZE_DEFAULT, limit_max), _place(token) if token else None)

    def render_object(self, cached: CacheObject) -> bytes:
        return self._encoder.encode(_reply(cached))

    def render_list(self, objects: Sequence[CacheObject], *, has_more: bool) -> bytes:
        """`has_more`: there are others behind these."""
        contents = tuple(_reply(cached) for cached in objects)
        token = _token(objects[-1]) if has_more and objects else UNSET
        return self._encoder.encode(ContentListReply(contents or UNSET, token))

    def render_deleted(self) -> bytes:
        return b"{}"


def _expiration(ttl: str | None, expire_time: str | None) -> tuple[int | None, int | None, int]:
    """(expires_at, ttl_s, early_ns), of which the first two are None where there is neither."""
    if ttl is not None and expire_time is not None:
        raise ApiError(
            ErrorKind.INVALID_REQUEST,
            "oneof field 'expiration' is already set. Cannot set both 'ttl' and 'expire_time'",
            param="ttl",
        )
    if ttl is not None:
        seconds, early_ns = _rounded_up(parse_duration(ttl, "ttl"))
        return None, seconds, early_ns
    if expire_time is not None:
        seconds, early_ns = _rounded_up(parse_timestamp(expire_time, "expireTime"))
        return seconds, None, early_ns
    return None, None, 0


def _rounded_up(n_ns: int) -> tuple[int, int]:
    """Whole seconds, and how many nanoseconds that is too much."""
    seconds = -(-n_ns // NS_PER_S)
    return seconds, seconds * NS_PER_S - n_ns


def _mask(query: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """The members named by `updateMask`, in camelCase; () when there is none, or it names all."""
    text = ",".join(value for key, value in query if camel(key) == "updateMask")
    names = tuple(camel(name.strip()) for name in text.split(",") if name.strip())
    for name in names:
        if name not in ("ttl", "expireTime", "*"):
            raise invalid("updateMask", f"names {quoted(name)}; {ONLY_EXPIRY}")
    return () if "*" in names else names


def _reply(cached: CacheObject) -> ContentReply:
    updated_at = cached.created_at if cached.updated_at is None else cached.updated_at
    return ContentReply(
        name=NAME_PREFIX + cached.id,
        model=MODEL_PREFIX + cached.model,
        create_time=timestamp_text(cached.created_at * NS_PER_S),
        update_time=timestamp_text(updated_at * NS_PER_S),
        expire_time=timestamp_text(cached.expires_at * NS_PER_S - cached.early_ns),
        display_name=cached.name,
        usage_metadata=ContentUsage(cached.n_tokens),
    )


def _token(last: CacheObject) -> str:
    return urlsafe_b64encode(f"{last.created_at}.{last.id}".encode()).decode().rstrip("=")


def _place(token: str) -> tuple[int, str]:
    try:
        text = urlsafe_b64decode(token.encode() + b"=" * (-len(token) % 4)).decode("ascii")
    except (binascii.Error, ValueError):
        text = ""
    found = _PLACE.fullmatch(text)
    if found is None:
        raise invalid("pageToken", f"{quoted(token)} is not a token that a list has given")
    return int(found["created_at"]), found["id"]
