"""A dialect turns one vendor's wire format into neutral requests (`parse`) and neutral events back into frames (`render`).

Dialects are pure: bytes in, values out, values in, bytes out. They know nothing of money, limits, engines or HTTP
servers. The non-streamed body is the stream, collected by the same renderer.
"""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Protocol

from msgspec import Struct

from keepwarm.core.errors import ApiError
from keepwarm.core.event import Event, ToolCallDelta
from keepwarm.core.rate_limit import LimitState
from keepwarm.core.request import ChatRequest

CALL_ID_BYTES = 12  # 24 hex digits, the length of OpenAI's and Anthropic's ids of calls


class WireBounds(Struct, frozen=True):
    """The bounds a parser checks, under the names they have in the configuration's `Limits`.

    Made with `msgspec.convert(limits, WireBounds, from_attributes=True)`.
    """

    messages_max: int
    tools_max: int
    choices_max: int
    stop_strings_max: int
    stop_bytes_max: int
    top_logprobs_max: int
    schema_bytes_max: int
    name_chars_max: int
    description_chars_max: int
    metadata_pairs_max: int
    metadata_key_chars_max: int
    metadata_value_chars_max: int
    tag_chars_max: int
    tags_per_object_max: int
    list_page_max: int
    schema_depth_max: int = 64  # levels of a tool's or an answer's schema: templates and grammars are built recursively


class Frame(Struct, frozen=True):
    """One server-sent event: `event: name` (when there is a name) and `data: data`.

    `is_raw`: no event, `data` goes out as it is. Elements of a stream that is a JSON array, and white space, are raw.
    """

    data: bytes
    name: str | None = None
    is_raw: bool = False


class ErrorReply(Struct, frozen=True):
    """An error as an HTTP answer; the same body goes into a stream that has already begun."""

    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


class CacheReport(Struct, frozen=True):
    """The cache object a turn used, for the response headers. Times in unix seconds."""

    object_id: str
    expires_at: int
    now: int
    n_tokens_saved: int


class Identity(Struct, frozen=True):
    """What the gateway fixed for an answer before rendering it: ids and times are made there, not in dialects."""

    turn_id: str
    created: int

    def call_digest(self, call: ToolCallDelta) -> str:
        """What an id of a tool call is made from. Derived from the turn, so that rendering it again gives the same id."""
        place = f"{self.turn_id}/{call.choice}/{call.index}".encode()
        return blake2b(place, digest_size=CALL_ID_BYTES).hexdigest()


class Parsed(Struct, frozen=True):
    """A parsed request and what only the renderer needs to know."""

    request: ChatRequest
    stream: bool
    include_usage: bool = False
    max_tokens_cut: bool = False  # an answer longer than the window leaves room for is cut, not refused

    @property
    def is_array(self) -> bool:
        """Whether the stream is one JSON array, of raw frames, and no event stream: nothing may go ahead of the first one."""
        return False


class Renderer(Protocol):
    """Renders one turn. `feed` is called with each event in order; `whole` after the terminal event of a collected turn."""

    def feed(self, event: Event) -> list[Frame]:
        """Frames for this event (maybe none). `Finished` gives the closing frames, `Failed` the error frame."""
        ...

    def whole(self) -> bytes:
        """The non-streamed JSON body of everything fed so far."""
        ...


class ChatDialect(Protocol):
    """One vendor's chat endpoint.

    `id_prefix` begins the ids of its turns. `keepalive` is sent in a stream's silence, None: a comment line. A stream of a
    dialect with a raw one has no comments at all, its clients cannot read them.
    """

    name: str
    id_prefix: str
    keepalive: Frame | None

    def parse_chat(self, headers: Mapping[str, str], body: bytes) -> Parsed:
        """Raises ApiError(INVALID_REQUEST) with the path of the offending field. Header names are lower-case."""
        ...

    def renderer(self, parsed: Parsed, identity: Identity) -> Renderer: ...

    def reply_headers(self, report: CacheReport) -> tuple[tuple[str, str], ...]:
        """Extra response headers for a turn that used a cache object."""
        ...

    def limit_headers(self, state: LimitState) -> tuple[tuple[str, str], ...]:
        """Response headers that say what is left of the caller's limits; none where there are none."""
        ...

    def render_error(self, error: ApiError, request_id: str | None = None) -> ErrorReply:
        """`request_id` goes into the body where the vendor's has it."""
        ...
