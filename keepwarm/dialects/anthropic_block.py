"""Anthropic's messages, content blocks and tools as types, and the paths they have in a body.

One type holds every kind of block, so that an error can say what is wrong with a kind that is not served. A string in the
place of blocks is one text block at the string's own path; an empty one is no block. Paths ("messages[1].content[0]",
"system", "tools[2]") are how errors and cache breakpoints name a place.
"""

from collections.abc import Iterator
from typing import Annotated, Any

from msgspec import Meta, Struct

ROLES = ("user", "assistant", "system")


class CacheControl(Struct):
    """A cache breakpoint after what carries it. `ttl` is how long the prefix lives after its last use, "5m" by default."""

    type: Annotated[str, Meta(extra_json_schema={"enum": ["ephemeral"]})]
    ttl: Annotated[str, Meta(extra_json_schema={"enum": ["5m", "1h"]})] | None = None


class BlockSource(Struct):
    """Where a document's content is: "text" and "base64" in `data`, "content" in blocks of its own."""

    type: str
    media_type: str | None = None
    data: str | None = None
    content: "str | tuple[ContentBlock, ...] | None" = None


class ContentBlock(Struct):
    """A piece of a message or of a tool's result; which members count depends on `type`.

    text: `text`. document: `source` (an object), `title`, `context`. search_result: `source` (a string), `title`, `content`.
    tool_use: `id`, `name`, `input`. tool_result: `tool_use_id`, `content`, `is_error`. thinking: `thinking`.
    redacted_thinking is accepted and left out.
    """

    type: str
    text: str | None = None
    cache_control: CacheControl | None = None
    source: str | BlockSource | None = None
    title: str | None = None
    context: str | None = None
    content: "str | tuple[ContentBlock, ...] | dict[str, Any] | None" = None
    citations: Any = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    is_error: bool | None = None
    thinking: str | None = None


Content = str | tuple[ContentBlock, ...]


class MessageParam(Struct):
    """One message. A last one of the assistant's is continued by the answer."""

    role: Annotated[str, Meta(extra_json_schema={"enum": list(ROLES)})]
    content: Content


class ToolParam(Struct):
    """A tool of the client's. Anthropic's own tools have a dated `type` and not always a name; they are not served."""

    name: str | None = None
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    type: str | None = None
    cache_control: CacheControl | None = None


def placed(content: Content | None, path: str) -> Iterator[tuple[str, ContentBlock]]:
    """The blocks of `content` with their paths."""
    if isinstance(content, str):
        if content:
            yield path, ContentBlock("text", text=content)
        return
    for j, block in enumerate(content or ()):
        yield f"{path}[{j}]", block
