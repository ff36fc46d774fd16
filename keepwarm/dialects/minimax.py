"""MiniMax's OpenAI-style chat endpoint: OpenAI's with a few rules of its own. Its Anthropic one is anthropic.py's.

Decided here: a temperature of 0 is refused, one answer a request, penalties and biases are dropped, what the model thinks
is in `content` between <think> tags or, with `reasoning_split`, in `reasoning_details`. MiniMax asks clients to send answers
back whole, so what it thought is read out of either form again: all dialects then say the same of the same conversation.

In a stream `reasoning_details` holds what is new, as the service sends it; MiniMax's own example takes each for the whole.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from msgspec import Meta, Struct
from msgspec.structs import replace

from keepwarm.core.request import Message, TextPart
from keepwarm.dialects import Identity, Parsed, WireBounds
from keepwarm.dialects.body import JsonBody
from keepwarm.dialects.openai import OpenAIChat
from keepwarm.dialects.openai_answer import (
    THINK,
    THINK_END,
    AnswerForm,
    ChatRenderer,
    digest_call_id,
)
from keepwarm.dialects.openai_request import (
    ChatCompletionRequest,
    ChatMessage,
    neutral_messages,
    neutral_request,
    parsed_chat,
    require_messages,
)

CHOICES_MAX = 1  # MiniMax's


class MiniMaxReasoning(Struct):
    """A piece of what the model thought, as an earlier answer had it."""

    text: str | None = None


class MiniMaxMessage(ChatMessage):
    """One message. An assistant's may carry what it thought: `reasoning_details`, or <think>…</think> before its text."""

    reasoning_details: tuple[MiniMaxReasoning, ...] | None = None


class MiniMaxChatCompletionRequest(ChatCompletionRequest):
    """The body of POST /chat/completions in MiniMax's dialect. Penalties and biases are ignored, whatever they are.

    `reasoning_split`: what the model thinks comes in `reasoning_details`, not in the content.
    """

    messages: tuple[MiniMaxMessage, ...]
    temperature: Annotated[float, Meta(gt=0, le=1)] | None = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    logit_bias: Any = None
    reasoning_split: bool | None = None


class MiniMaxParsed(Parsed, frozen=True):
    """A parsed request of this dialect. `split`: reasoning is told apart from the content."""

    split: bool = False


class MiniMaxChat(OpenAIChat):
    """`ChatDialect` for MiniMax's POST /chat/completions; errors, models list and what goes with them are OpenAI's."""

    name = "minimax"

    def __init__(self, bounds: WireBounds) -> None:
        super().__init__(replace(bounds, choices_max=min(bounds.choices_max, CHOICES_MAX)))
        self._minimax_body = JsonBody(MiniMaxChatCompletionRequest)
        self._tags = AnswerForm(self.render_error, digest_call_id, total_characters=True, reasoning="tags")
        self._details = replace(self._tags, reasoning="reasoning_details")

    def parse_chat(self, headers: Mapping[str, str], body: bytes) -> MiniMaxParsed:  # noqa: ARG002 (the protocol's)
        """Raises ApiError(INVALID_REQUEST) with the path of the offending field. No header has a meaning here."""
        wire = self._minimax_body.decode(body)
        require_messages(wire.messages, self._rules.bounds)
        wire = replace(wire, presence_penalty=None, frequency_penalty=None, logit_bias=None)
        parsed = parsed_chat(wire, neutral_request(wire, minimax_messages(wire.messages), self._rules))
        return MiniMaxParsed(parsed.request, parsed.stream, parsed.include_usage, split=bool(wire.reasoning_split))

    def renderer(self, parsed: Parsed, identity: Identity) -> ChatRenderer:
        is_split = isinstance(parsed, MiniMaxParsed) and parsed.split
        return ChatRenderer(parsed, identity, self._details if is_split else self._tags, self._encoder)


def minimax_messages(messages: Sequence[MiniMaxMessage]) -> tuple[Message, ...]:
    """`messages` in neutral form, what was thought before an answer apart from it. Raises ApiError(INVALID_REQUEST)."""
    return tuple(
        _with_reasoning(neutral, wire) if neutral.role == "assistant" else neutral
        for neutral, wire in zip(neutral_messages(messages), messages, strict=True)
    )


def _with_reasoning(message: Message, wire: MiniMaxMessage) -> Message:
    if wire.reasoning_details:
        reasoning = "".join(detail.text or "" for detail in wire.reasoning_details)
        return replace(message, reasoning=reasoning or None)
    first = message.parts[0] if message.parts else None
    if not isinstance(first, TextPart) or not first.text.startswith(THINK):
        return message
    reasoning, closed, text = first.text.removeprefix(THINK).partition(THINK_END)
    if not closed:  # cut off while thinking, or a text that only begins so
        return message
    return replace(message, parts=(replace(first, text=text), *message.parts[1:]), reasoning=reasoning or None)
