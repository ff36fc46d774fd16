"""A streamed answer of the Anthropic dialect read back: when its first token came, what was counted, what it said.

A turn's first token is what opens the first content block. How the look-up in the cache ended is in a header of every
answer, whatever the dialect.
"""

import msgspec
from msgspec import Struct

from keepwarm.bench import BenchError
from keepwarm.bench.client import Connection
from keepwarm.bench.sse import read_timings

PATH = "/v1/messages"
CACHE_HEADER = "x-keepwarm-cache"
DATA = b"\ndata: "


class Lookup(Struct, frozen=True):
    """What `X-Keepwarm-Cache` says."""

    outcome: str
    tier: str | None = None
    cause: str | None = None


class MessageUsage(Struct, frozen=True):
    """The prompt's tokens are the sum of all three."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int


class MessageAnswer(Struct, frozen=True):
    """A whole answer. `text` are its pieces of every kind, one after another; `id` names the turn."""

    id: str
    ttft_ms: float
    usage: MessageUsage
    lookup: Lookup
    text: str
    timings: dict[str, float]


class _Message(Struct):
    id: str
    usage: MessageUsage


class _Delta(Struct):
    text: str = ""
    partial_json: str = ""


class MessageEvent(Struct, frozen=True):
    """One event, as far as it is looked at."""

    type: str
    message: _Message | None = None
    delta: _Delta | None = None


async def stream_message(connection: Connection, body: bytes) -> MessageAnswer:
    """Ask and read to the end. Raises BenchError."""
    stream = await connection.stream(PATH, body)
    first_at: float | None = None
    message: _Message | None = None
    timings: dict[str, float] | None = None
    text, last = "", ""
    async for at, raw in stream.events:
        timings = read_timings(raw) or timings
        event = read_event(raw)
        if event is None:
            continue
        last = event.type
        message = event.message or message
        if event.type in ("content_block_start", "message_delta") and first_at is None:
            first_at = at
        if event.type == "content_block_delta" and event.delta is not None:
            text += event.delta.text + event.delta.partial_json
    if last != "message_stop" or message is None or first_at is None or timings is None:
        raise BenchError(f"a stream of the server ended with {last or 'nothing'!r}; see its log")
    lookup = read_lookup(stream.headers.get(CACHE_HEADER, ""))
    return MessageAnswer(message.id, (first_at - stream.sent_at) * 1000, message.usage, lookup, text, timings)


def read_event(raw: bytes) -> MessageEvent | None:
    """An event's data; None for comments. Raises msgspec.DecodeError."""
    _, found, data = raw.partition(DATA)
    return msgspec.json.decode(data, type=MessageEvent) if found else None


def read_lookup(header: str) -> Lookup:
    """The header taken apart; an empty outcome where there was none."""
    outcome, *rest = (part.strip() for part in header.split(";"))
    known = dict(part.partition("=")[::2] for part in rest)
    return Lookup(outcome, known.get("tier"), known.get("cause"))
