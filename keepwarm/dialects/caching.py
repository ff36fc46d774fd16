"""Kimi's cache resource: the bodies and queries of /caching and /caching/refs/tags, from its 2024-06 document.

No clock is here: an `expired_at` in the past or too far ahead, and too long a `ttl`, are the gateway's to refuse. Where
the document and recorded answers disagree, the constants below say what this server does.
"""

import re
from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from keepwarm.core.cache_object import CacheObject, NewObject, ObjectStatus, ObjectUpdate, Page, Tag
from keepwarm.core.request import Message, TextPart, Tool
from keepwarm.dialects import WireBounds
from keepwarm.dialects.body import JsonBody, invalid, quoted, require_at_most
from keepwarm.dialects.kimi import DEFAULT_TEMPERATURE, FUNCTION_NAME, KimiMessage, kimi_messages
from keepwarm.dialects.openai_answer import AnswerFunction, AnswerToolCall
from keepwarm.dialects.openai_request import FunctionTool, ModelName, RequestRules, neutral_tools, require_messages

OBJECT_TYPE = "context-cache"  # the document's; "context_cache_object" was recorded once, no client checks it
DELETED_OBJECT_TYPE = "context_cache_object.deleted"
TAG_TYPE = "cache_object.tag"
DELETED_TAG_TYPE = "cache_object.tag.deleted"
OBJECT_ERROR_TYPE = "server_error"
UNIX_S_MAX = 2**53

TAG_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9_.-]*", re.ASCII)  # digits: not in the rule's text, but in its examples
_METADATA_KEY = re.compile(r"metadata\[(?P<key>.+)\]", re.DOTALL)
_LIMIT = re.compile(r"[0-9]{1,9}", re.ASCII)
_ORDERS = {"asc": False, "desc": True}

Metadata = dict[str, str] | tuple[dict[str, str], ...]
Seconds = Annotated[int, Meta(ge=-UNIX_S_MAX, le=UNIX_S_MAX)]


class NewCacheRequest(Struct):
    """The body of POST /caching. `metadata` may be one object or a list of objects with one member each.

    `ttl` and `expired_at` exclude each other; 0 or less means absent for `expired_at`, 0 for `ttl`.
    """

    model: ModelName
    messages: tuple[KimiMessage, ...]
    tools: tuple[FunctionTool, ...] | None = None
    name: str | None = None
    description: str | None = None
    metadata: Metadata | None = None
    expired_at: Seconds | None = None
    ttl: Seconds | None = None
    tags: tuple[str, ...] | None = None


class CacheUpdateRequest(Struct):
    """The body of PUT /caching/{id}; what is absent stays as it is."""

    metadata: Metadata | None = None
    expired_at: Seconds | None = None
    ttl: Seconds | None = None


class TagRequest(Struct):
    """The body of POST /caching/refs/tags: binds the tag, or moves it."""

    tag: str
    cache_id: Annotated[str, Meta(min_length=1, max_length=256)]


class EchoedPart(Struct, omit_defaults=True):
    """A text part of a cached message."""

    type: Annotated[str, Meta(extra_json_schema={"enum": ["text"]})]
    text: str
    prompt_cache_breakpoint: dict[str, str] | None = None


class EchoedMessage(Struct):
    """A cached message as it was sent."""

    role: str
    content: str | tuple[EchoedPart, ...] | None
    name: str | UnsetType = UNSET
    tool_calls: tuple[AnswerToolCall, ...] | UnsetType = UNSET
    tool_call_id: str | UnsetType = UNSET


class EchoedFunction(Struct):
    """The function of a cached tool."""

    name: str
    description: str
    parameters: Annotated[Raw, Meta(extra_json_schema={"type": "object"})]


class EchoedTool(Struct):
    """A cached tool as it was sent."""

    type: str
    function: EchoedFunction


class CacheErrorDetail(Struct):
    """Why a cache object could not be computed."""

    type: str
    message: str


class CacheReply(Struct):
    """A cache object. `error` is there only when `status` is "error"."""

    id: str
    status: Annotated[str, Meta(extra_json_schema={"enum": [status.value for status in ObjectStatus]})]
    object: str
    created_at: int
    tokens: int
    expired_at: int
    model: str
    messages: tuple[EchoedMessage, ...]
    tools: tuple[EchoedTool, ...]
    name: str
    description: str
    metadata: dict[str, str] | None
    error: CacheErrorDetail | UnsetType = UNSET


class CacheListReply(Struct):
    """A page of cache objects."""

    object: str
    data: tuple[CacheReply, ...]
    has_more: bool


class CacheDeletedReply(Struct):
    """The answer to DELETE /caching/{id}."""

    deleted: bool
    id: str
    object: str


class TagReply(Struct):
    """A tag. `owned_by` is the tenant."""

    cache_id: str
    created_at: int
    object: str
    owned_by: str
    tag: str


class TagListReply(Struct):
    """A page of tags."""

    object: str
    data: tuple[TagReply, ...]
    has_more: bool


class TagDeletedReply(Struct):
    """The answer to DELETE /caching/refs/tags/{tag}."""

    deleted: bool
    object: str
    tag: str


class KimiCaching:
    """Parses and renders /caching and /caching/refs/tags. All parse functions raise ApiError(INVALID_REQUEST)."""

    def __init__(self, bounds: WireBounds) -> None:
        self._bounds = bounds
        self._rules = RequestRules(bounds, DEFAULT_TEMPERATURE, FUNCTION_NAME)
        self._create = JsonBody(NewCacheRequest)
        self._update = JsonBody(CacheUpdateRequest)
        self._tag = JsonBody(TagRequest)
        self._encoder = msgspec.json.Encoder()

    def parse_create(self, body: bytes) -> NewObject:
        wire = self._create.decode(body)
        bounds = self._bounds
        require_messages(wire.messages, bounds)
        messages = kimi_messages(wire.messages)
        for i, message in enumerate(messages):
            if message.partial:
                raise invalid(f"messages[{i}].partial", "is not allowed in a cache")
        tools = neutral_tools(wire.tools, self._rules)
        require_answered_calls(messages, tools)
        name, description = wire.name or "", wire.description or ""
        require_at_most(name, bounds.name_chars_max, "name", "characters")
        require_at_most(description, bounds.description_chars_max, "description", "characters")
        expires_at, ttl_s = _lifetime(wire.expired_at, wire.ttl)
        return NewObject(
            model=wire.model,
            messages=messages,
            tools=tools,
            name=name,
            description=description,
            metadata=self._metadata(wire.metadata),
            tags=self._tags(wire.tags or ()),
            expires_at=expires_at,
            ttl_s=ttl_s,
        )

    def parse_update(self, body: bytes) -> ObjectUpdate:
        wire = self._update.decode(body)
        expires_at, ttl_s = _lifetime(wire.expired_at, wire.ttl)
        return ObjectUpdate(self._metadata(wire.metadata), expires_at, ttl_s)

    def parse_tag(self, body: bytes) -> tuple[str, str]:
        """(tag, cache id)."""
        wire = self._tag.decode(body)
        self._require_tag(wire.tag, "tag")
        return wire.tag, wire.cache_id

    def parse_list(self, query: Sequence[tuple[str, str]]) -> Page:
        """A list query as decoded (key, value) pairs; of a repeated key the last one counts, but metadata adds up."""
        scalars = dict(query)
        metadata: dict[str, str] = {}
        for key, value in query:
            match = _METADATA_KEY.fullmatch(key)
            if match:
                metadata[match["key"]] = value
        require_at_most(metadata, self._bounds.metadata_pairs_max, "metadata", "pairs")
        order = scalars.get("order", "desc")
        if order not in _ORDERS:
            raise invalid("order", f"{quoted(order)} is not one of asc, desc")
        return Page(
            limit=self._limit(scalars.get("limit", "20")),
            descending=_ORDERS[order],
            after=scalars.get("after") or None,
            before=scalars.get("before") or None,
            metadata=tuple(metadata.items()),
        )

    def render_object(self, cached: CacheObject, now: float) -> bytes:
        """`now` in unix seconds decides whether it is told as inactive."""
        return self._encoder.encode(_reply(cached, now))

    def render_list(self, objects: Sequence[CacheObject], now: float, has_more: bool) -> bytes:
        return self._encoder.encode(CacheListReply("list", tuple(_reply(cached, now) for cached in objects), has_more))

    def render_deleted(self, object_id: str) -> bytes:
        return self._encoder.encode(CacheDeletedReply(True, object_id, DELETED_OBJECT_TYPE))

    def render_tag(self, tag: Tag) -> bytes:
        return self._encoder.encode(_tag_reply(tag))

    def render_tags(self, tags: Sequence[Tag], has_more: bool) -> bytes:
        return self._encoder.encode(TagListReply("list", tuple(_tag_reply(tag) for tag in tags), has_more))

    def render_tag_deleted(self, tag: str) -> bytes:
        """The answer to every delete, also of a tag that was never there."""
        return self._encoder.encode(TagDeletedReply(True, DELETED_TAG_TYPE, tag))

    def _metadata(self, metadata: Metadata | None) -> tuple[tuple[str, str], ...] | None:
        if metadata is None:
            return None
        bounds = self._bounds
        pairs: dict[str, str] = {}
        for part in (metadata,) if isinstance(metadata, dict) else metadata:
            pairs.update(part)
        require_at_most(pairs, bounds.metadata_pairs_max, "metadata", "pairs")
        for key, value in pairs.items():
            if not key:
                raise invalid("metadata", "has an empty key")
            require_at_most(key, bounds.metadata_key_chars_max, "metadata", f"characters in the key {quoted(key)}")
            require_at_most(
                value, bounds.metadata_value_chars_max, "metadata", f"characters in the value of {quoted(key)}"
            )
        return tuple(pairs.items())

    def _tags(self, tags: Sequence[str]) -> tuple[str, ...]:
        require_at_most(tags, self._bounds.tags_per_object_max, "tags", "tags")
        for i, tag in enumerate(tags):
            self._require_tag(tag, f"tags[{i}]")
        return tuple(dict.fromkeys(tags))

    def _require_tag(self, tag: str, path: str) -> None:
        require_at_most(tag, self._bounds.tag_chars_max, path, "characters")
        if not TAG_NAME.fullmatch(tag):
            problem = f"{quoted(tag)} is not a tag: a letter first, then letters, digits, '_', '-' and '.'"
            raise invalid(path, problem)

    def _limit(self, limit: str) -> int:
        limit_max = self._bounds.list_page_max
        if not _LIMIT.fullmatch(limit) or not 1 <= int(limit) <= limit_max:
            raise invalid("limit", f"must be a whole number from 1 to {limit_max:,}, not {quoted(limit)}")
        return int(limit)


def require_answered_calls(messages: Sequence[Message], tools: Sequence[Tool]) -> None:
    """Kimi's rules for tool messages inside a cache.

    A tool message comes after the assistant message whose call it answers, every call is answered, and every function
    called is in `tools`. Raises ApiError(INVALID_REQUEST).
    """
    names = {tool.name for tool in tools}
    waiting: dict[str, str] = {}  # call id → path of the call
    for i, message in enumerate(messages):
        if message.role == "tool":
            call_id = message.tool_call_id or ""
            if waiting.pop(call_id, None) is None:
                problem = f"{quoted(call_id)} answers no open call of an assistant message before it"
                raise invalid(f"messages[{i}].tool_call_id", problem)
        for j, call in enumerate(message.tool_calls):
            path = f"messages[{i}].tool_calls[{j}]"
            if call.name not in names:
                raise invalid(f"{path}.function.name", f"{quoted(call.name)} is not a function in tools")
            if call.id in waiting:
                raise invalid(f"{path}.id", f"{quoted(call.id)} is the id of an earlier call that is still open")
            waiting[call.id] = path
    for call_id, path in waiting.items():
        raise invalid(path, f"the call {quoted(call_id)} is answered by no tool message")


def _lifetime(expired_at: int | None, ttl: int | None) -> tuple[int | None, int | None]:
    """(expires_at, ttl_s). Go clients send the member they do not mean as 0 or -1."""
    expires_at = expired_at if expired_at is not None and expired_at > 0 else None
    if ttl is not None and ttl < 0:
        raise invalid("ttl", f"is {ttl:,} seconds, it must be positive")
    ttl_s = ttl or None
    if expires_at is not None and ttl_s is not None:
        raise invalid("ttl", "expired_at and ttl exclude each other, give one of them")
    return expires_at, ttl_s


def _reply(cached: CacheObject, now: float) -> CacheReply:
    status = cached.effective_status(now)
    error = None
    if status is ObjectStatus.ERROR:
        error = CacheErrorDetail(OBJECT_ERROR_TYPE, cached.error or "the cache could not be computed")
    return CacheReply(
        id=cached.id,
        status=status.value,
        object=OBJECT_TYPE,
        created_at=cached.created_at,
        tokens=cached.n_tokens,
        expired_at=cached.expires_at,
        model=cached.model,
        messages=tuple(_echoed_message(message) for message in cached.messages),
        tools=tuple(
            EchoedTool("function", EchoedFunction(tool.name, tool.description, Raw(tool.parameters)))
            for tool in cached.tools
        ),
        name=cached.name,
        description=cached.description,
        metadata=None if cached.metadata is None else dict(cached.metadata),
        error=UNSET if error is None else error,
    )


def _echoed_message(message: Message) -> EchoedMessage:
    calls = tuple(
        AnswerToolCall(call.id, "function", AnswerFunction(call.name, call.arguments)) for call in message.tool_calls
    )
    return EchoedMessage(
        role=message.role,
        content=_echoed_content(message.texts),
        name=UNSET if message.name is None else message.name,
        tool_calls=calls or UNSET,
        tool_call_id=UNSET if message.tool_call_id is None else message.tool_call_id,
    )


def _echoed_content(parts: Sequence[TextPart]) -> str | tuple[EchoedPart, ...] | None:
    if not parts:
        return None
    if len(parts) == 1 and not parts[0].mark:
        return parts[0].text
    return tuple(EchoedPart("text", part.text, {"mode": "explicit"} if part.mark else None) for part in parts)


def _tag_reply(tag: Tag) -> TagReply:
    return TagReply(tag.object_id, tag.created_at, TAG_TYPE, tag.tenant, tag.tag)
