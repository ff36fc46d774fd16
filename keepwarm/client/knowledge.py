"""What is cached, and the three ways of sending it: in full, as a cache message, with cache headers.

All three give the model the same prompt. `Sending` is what an application passes to `chat.completions.create`; in the
message form `tools` must be absent, even empty, since the server puts the object's own in. Pure.
"""

import json
from collections.abc import Mapping, Sequence
from enum import Enum
from hashlib import sha256
from typing import Any

from msgspec import Struct

HEADER_CACHE = "X-Msh-Context-Cache"
HEADER_RESET_TTL = "X-Msh-Context-Cache-Reset-TTL"
HEADER_USED = "Msh-Context-Cache-Id"  # of an answer that read from its object

WireMessage = Mapping[str, object]


class Form(Enum):
    """How a ready object is named. MESSAGE sends the knowledge no more; HEADERS sends it again, to be compared."""

    MESSAGE = "message"
    HEADERS = "headers"


class Knowledge:
    """Messages, and tools if there are any, that many questions share. Build it once: the digest is taken here.

    Messages and tools are JSON as the chat API takes them. Raises TypeError for what is not JSON, ValueError for none.
    """

    def __init__(self, messages: Sequence[WireMessage], tools: Sequence[Mapping[str, object]] = ()) -> None:
        if not messages:
            raise ValueError("knowledge needs at least one message")
        self.messages = tuple(messages)
        self.tools = tuple(tools)
        # Not sorted: another order of a schema's members is another prompt.
        text = json.dumps([self.messages, self.tools], ensure_ascii=False, separators=(",", ":"))
        self._content = sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def digest(self, model: str) -> str:
        """The same for the same knowledge and model, in every process."""
        return sha256(f"{model}\0{self._content}".encode()).hexdigest()


class Sending(Struct, frozen=True):
    """One request's part that depends on the cache. `cache_id` is None when the knowledge is sent in full.

    `expires_at` is what the book believes of the object, `prepared_at` when it said so; unix seconds of this machine.
    """

    key: str
    knowledge: Knowledge
    new: tuple[WireMessage, ...]
    prepared_at: float
    form: Form = Form.MESSAGE
    cache_id: str | None = None
    expires_at: float = 0.0
    reset_ttl_s: int = 0

    @property
    def messages(self) -> list[WireMessage]:
        if self.cache_id is not None and self.form is Form.MESSAGE:
            content = f"cache_id={self.cache_id};reset_ttl={self.reset_ttl_s}"
            return [{"role": "cache", "content": content}, *self.new]
        return [*self.knowledge.messages, *self.new]

    @property
    def extra_headers(self) -> dict[str, str]:
        if self.cache_id is None or self.form is Form.MESSAGE:
            return {}
        return {HEADER_CACHE: self.cache_id, HEADER_RESET_TTL: str(self.reset_ttl_s)}

    @property
    def arguments(self) -> dict[str, Any]:
        """For `chat.completions.create`, beside the model and the options."""
        arguments: dict[str, Any] = {"messages": self.messages}
        if self.knowledge.tools and (self.cache_id is None or self.form is Form.HEADERS):
            arguments["tools"] = list(self.knowledge.tools)
        if self.extra_headers:
            arguments["extra_headers"] = self.extra_headers
        return arguments

    def in_full(self) -> "Sending":
        """The same request without the cache."""
        return Sending(self.key, self.knowledge, self.new, self.prepared_at)
