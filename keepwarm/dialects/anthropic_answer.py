"""Answers in Anthropic's shape, streamed and whole.

There is one renderer. Each event becomes the stream events of Anthropic's order

    message_start  (content_block_start  content_block_delta*  content_block_stop)*  message_delta  message_stop

which a streamed answer encodes at once and a whole one folds. A block ends where the kind of delta changes; empty deltas
open none. After `Failed` the stream ends with an `error` event. `message_usage` is the one place where counts become wire
members: `input_tokens` is only what follows the last breakpoint, so reads and writes are not in it.
"""

from base64 import b64encode
from collections.abc import Sequence
from hashlib import blake2b
from typing import Literal

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType
from msgspec.structs import replace

from keepwarm.core.errors import ApiError
from keepwarm.core.event import (
    ChoiceFinished,
    Event,
    Failed,
    Finished,
    ReasoningDelta,
    Started,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from keepwarm.dialects import Frame, Identity, Parsed
from keepwarm.dialects.anthropic_diagnostics import Diagnostics, diagnostics
from keepwarm.dialects.anthropic_error import anthropic_error_reply

CALL_ID_PREFIX = "toolu_"
SIGNATURE_BYTES = 48
NO_INPUT = Raw(b"{}")  # of a call that begins; its pieces follow

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class AnthropicParsed(Parsed, frozen=True):
    """`wants_diagnostics`: the reply says why the cache was missed. `hides_thinking`: thoughts are not told."""

    wants_diagnostics: bool = False
    hides_thinking: bool = False


class CacheCreation(Struct):
    """What was written, by how long it stays after its last use."""

    ephemeral_5m_input_tokens: int
    ephemeral_1h_input_tokens: int


class MessageUsage(Struct):
    """The engine's counts in tokens. The prompt is input + creation + read."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    cache_creation: CacheCreation
    output_tokens: int


class TextBlock(Struct, tag="text"):
    """Text of the answer."""

    text: str


class ThinkingBlock(Struct, tag="thinking"):
    """What the model thought; the signature is derived from the turn and is not checked when it comes back."""

    thinking: str
    signature: str


class ToolUseBlock(Struct, tag="tool_use"):
    """A call the model made; `input` is JSON as the model wrote it."""

    id: str
    name: str
    input: Raw


AnswerBlock = TextBlock | ThinkingBlock | ToolUseBlock


class MessageReply(Struct, tag="message"):
    """The body of an answer that is not streamed, and without content and reason what a stream begins with."""

    id: str
    role: str
    model: str
    content: tuple[AnswerBlock, ...]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage
    diagnostics: Diagnostics | UnsetType | None = UNSET


class TokenCountReply(Struct):
    """The body of POST /messages/count_tokens's answer."""

    input_tokens: int


class MessageStart(Struct, tag="message_start"):
    """The first event."""

    message: MessageReply


class ContentBlockStart(Struct, tag="content_block_start"):
    """An empty block begins."""

    index: int
    content_block: AnswerBlock


class TextPiece(Struct, tag="text_delta"):
    """More of a text block."""

    text: str


class InputPiece(Struct, tag="input_json_delta"):
    """More of a call's input; the pieces together are its JSON."""

    partial_json: str


class ThinkingPiece(Struct, tag="thinking_delta"):
    """More of a thinking block."""

    thinking: str


class SignaturePiece(Struct, tag="signature_delta"):
    """The last of a thinking block."""

    signature: str


Piece = TextPiece | InputPiece | ThinkingPiece | SignaturePiece


class ContentBlockDelta(Struct, tag="content_block_delta"):
    """More of the block that is open."""

    index: int
    delta: Piece


class ContentBlockStop(Struct, tag="content_block_stop"):
    """The block is complete."""

    index: int


class MessageEnd(Struct):
    """Why the answer ended; `stop_sequence` is the string that ended it, if one did."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(Struct, tag="message_delta"):
    """The end, and the turn's whole usage."""

    delta: MessageEnd
    usage: MessageUsage


class MessageStop(Struct, tag="message_stop"):
    """The last event."""


class Ping(Struct, tag="ping"):
    """Sent while there is nothing else to say."""


MessageStreamEvent = (
    MessageStart | ContentBlockStart | ContentBlockDelta | ContentBlockStop | MessageDelta | MessageStop | Ping
)


def message_usage(usage: Usage) -> MessageUsage:
    """`usage` for the wire."""
    return MessageUsage(
        input_tokens=usage.fresh,
        cache_creation_input_tokens=usage.cache_write,
        cache_read_input_tokens=usage.cache_read,
        cache_creation=CacheCreation(usage.cache_write - usage.cache_write_long, usage.cache_write_long),
        output_tokens=usage.output,
    )


def event_frame(event: MessageStreamEvent) -> Frame:
    """The event as it stands in a stream: its name is its type."""
    return Frame(msgspec.json.encode(event), str(event.__struct_config__.tag))


class MessageRenderer:
    """Renders one turn: frames as events come when it is streamed, one body at the end when it is not."""

    def __init__(self, parsed: AnthropicParsed, identity: Identity) -> None:
        self._parsed = parsed
        self._identity = identity
        self._order = _Order(identity, hides_thinking=parsed.hides_thinking)
        self._folded = _Folded()
        self._finished: ChoiceFinished | None = None
        self._failed: ApiError | None = None

    def feed(self, event: Event) -> list[Frame]:
        if isinstance(event, Failed):
            self._failed = ApiError(event.kind, event.message, retry_after_s=event.retry_after_s)
            return (
                [Frame(anthropic_error_reply(self._failed, self._identity.turn_id).body, "error")]
                if self._parsed.stream
                else []
            )
        told = self._told(event)
        if self._parsed.stream:
            return [event_frame(one) for one in told]
        for one in told:
            self._folded.add(one)
        return []

    def whole(self) -> bytes:
        """The JSON body of everything fed so far. Raises the turn's ApiError when it ended with `Failed`."""
        if self._failed is not None:
            raise self._failed
        return msgspec.json.encode(self._folded.message())

    def _told(self, event: Event) -> Sequence[MessageStreamEvent]:
        match event:
            case Started():
                return [MessageStart(self._begun(event))]
            case TextDelta():
                return self._order.text(event.text)
            case ReasoningDelta():
                return self._order.thinking(event.text)
            case ToolCallDelta():
                return self._order.call(event)
            case ChoiceFinished():
                self._finished = event
                return self._order.closed()
            case Finished():
                return [MessageDelta(self._end(), message_usage(event.usage)), MessageStop()]
            case Failed():
                raise AssertionError("told by `feed`")

    def _begun(self, event: Started) -> MessageReply:
        n_fresh = event.n_prompt - event.cache_read
        usage = event.usage or Usage(fresh=n_fresh, cache_read=event.cache_read, cache_write=0, output=0)
        request = self._parsed.request
        return MessageReply(
            id=self._identity.turn_id,
            role="assistant",
            model=request.model,
            content=(),
            stop_reason=None,
            stop_sequence=None,
            usage=message_usage(replace(usage, output=0)),
            diagnostics=diagnostics(event.lookup, request.compare_with) if self._parsed.wants_diagnostics else UNSET,
        )

    def _end(self) -> MessageEnd:
        finished = self._finished
        assert finished is not None, "`Finished` before the choice was"
        max_tokens = self._parsed.request.max_tokens or 0
        if finished.reason == "length" and finished.n_output < max_tokens:
            return MessageEnd("model_context_window_exceeded", None)
        if max_tokens == 0 or finished.reason == "length":
            return MessageEnd("max_tokens", None)
        if finished.reason == "tool_calls":
            return MessageEnd("tool_use", None)
        return MessageEnd("end_turn" if finished.stop is None else "stop_sequence", finished.stop)


class _Order:
    """Opens and closes blocks, one at a time."""

    def __init__(self, identity: Identity, *, hides_thinking: bool) -> None:
        self._identity = identity
        self._hides_thinking = hides_thinking
        self._index = -1  # of the block that was opened last
        self._open: Literal["text", "thinking"] | int | None = None  # an int: that tool call

    def text(self, text: str) -> list[MessageStreamEvent]:
        if not text:
            return []  # it came for its logprobs only
        opened = self._opened("text", TextBlock(""))
        return [*opened, ContentBlockDelta(self._index, TextPiece(text))]

    def thinking(self, text: str) -> list[MessageStreamEvent]:
        if not text:
            return []
        opened = self._opened("thinking", ThinkingBlock("", ""))
        return opened if self._hides_thinking else [*opened, ContentBlockDelta(self._index, ThinkingPiece(text))]

    def call(self, delta: ToolCallDelta) -> list[MessageStreamEvent]:
        opened: list[MessageStreamEvent] = []
        if delta.name is not None:
            call_id = CALL_ID_PREFIX + self._identity.call_digest(delta)
            opened = self._opened(delta.index, ToolUseBlock(call_id, delta.name, NO_INPUT))
        assert self._open == delta.index, f"a piece of call {delta.index} while {self._open!r} is open"
        piece = ContentBlockDelta(self._index, InputPiece(delta.arguments))
        return [*opened, piece] if delta.arguments else opened

    def closed(self) -> list[MessageStreamEvent]:
        """The end of the block that is open, if one is."""
        if self._open is None:
            return []
        ends: list[MessageStreamEvent] = []
        if self._open == "thinking":
            ends.append(ContentBlockDelta(self._index, SignaturePiece(self._signature())))
        self._open = None
        return [*ends, ContentBlockStop(self._index)]

    def _opened(self, kind: Literal["text", "thinking"] | int, block: AnswerBlock) -> list[MessageStreamEvent]:
        if self._open == kind:
            return []
        closed = self.closed()
        self._open = kind
        self._index += 1
        return [*closed, ContentBlockStart(self._index, block)]

    def _signature(self) -> str:
        place = f"{self._identity.turn_id}/thinking/{self._index}".encode()
        return b64encode(blake2b(place, digest_size=SIGNATURE_BYTES).digest()).decode()


class _Folded:
    """A whole answer, folded from its stream events as clients fold them."""

    def __init__(self) -> None:
        self._message: MessageReply | None = None
        self._blocks: list[tuple[AnswerBlock, list[Piece]]] = []
        self._end: MessageDelta | None = None

    def add(self, event: MessageStreamEvent) -> None:
        match event:
            case MessageStart():
                self._message = event.message
            case ContentBlockStart():
                self._blocks.append((event.content_block, []))
            case ContentBlockDelta():
                self._blocks[event.index][1].append(event.delta)
            case MessageDelta():
                self._end = event
            case ContentBlockStop() | MessageStop() | Ping():
                pass

    def message(self) -> MessageReply:
        assert self._message is not None and self._end is not None, "whole() before the terminal event"
        return replace(
            self._message,
            content=tuple(_block(block, pieces) for block, pieces in self._blocks),
            stop_reason=self._end.delta.stop_reason,
            stop_sequence=self._end.delta.stop_sequence,
            usage=self._end.usage,
        )


def _block(block: AnswerBlock, pieces: Sequence[Piece]) -> AnswerBlock:
    match block:
        case TextBlock():
            return TextBlock("".join(piece.text for piece in pieces if isinstance(piece, TextPiece)))
        case ThinkingBlock():
            thinking = "".join(piece.thinking for piece in pieces if isinstance(piece, ThinkingPiece))
            signature = "".join(piece.signature for piece in pieces if isinstance(piece, SignaturePiece))
            return ThinkingBlock(thinking, signature)
        case ToolUseBlock():
            raw = "".join(piece.partial_json for piece in pieces if isinstance(piece, InputPiece))
            return replace(block, input=Raw(raw.encode()) if raw else NO_INPUT)
