"""The neutral request: what a client asked for, in no vendor's words. Dialects parse into it; nothing below reads JSON.

Values are frozen. JSON that only passes through (a tool's parameter schema, a call's arguments) stays JSON text, so no
untyped dict travels below the dialects.
"""

from enum import Enum
from typing import Literal

from msgspec import Struct

Role = Literal["system", "user", "assistant", "tool"]


class Mark(Struct, frozen=True):
    """A cache breakpoint: OpenAI's prompt_cache_breakpoint, Anthropic's cache_control.

    `ttl_s` is how long the client expects the prefix to stay known, from its last use; None: it was told nothing
    (OpenAI's), so the breakpoint only says where evaluation is cut.
    """

    ttl_s: int | None = None


class TextPart(Struct, frozen=True, tag="text"):
    """A run of text. `mark` puts a cache breakpoint after it."""

    text: str
    mark: Mark | None = None


class DocumentPart(Struct, frozen=True, tag="document"):
    """A file that came with the request. The gateway puts its text in its place before anything is rendered.

    `param` is where it stood in the body, for errors.
    """

    media_type: str
    data: bytes
    param: str
    title: str | None = None
    context: str | None = None
    mark: Mark | None = None


class FilePart(Struct, frozen=True, tag="file"):
    """A file that the tenant uploaded before. The gateway puts its text in its place, as it does with a `DocumentPart`.

    `param` is where it was named in the body, for errors.
    """

    file_id: str
    param: str
    mark: Mark | None = None


Part = TextPart | DocumentPart | FilePart  # a closed union: media parts join it when a model can read them


class ToolCall(Struct, frozen=True):
    """A call the model made. `arguments` is JSON text exactly as the client sent it or the model wrote it."""

    id: str
    name: str
    arguments: str


class Message(Struct, frozen=True):
    """One message of the conversation. `partial` (last message only): the answer continues this text.

    `mark` is a cache breakpoint after the whole message, its tool calls included. `reasoning` is what the model thought
    before this answer, as the client sent it back; a template that knows no such thing leaves it out. `is_error` (tool
    results): the call failed.
    """

    role: Role
    parts: tuple[Part, ...]
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    partial: bool = False
    mark: Mark | None = None
    reasoning: str | None = None
    is_error: bool = False

    @property
    def texts(self) -> tuple[TextPart, ...]:
        """The parts, once documents are read."""
        texts = tuple(part for part in self.parts if isinstance(part, TextPart))
        assert len(texts) == len(self.parts), "a document was not read"
        return texts

    @property
    def text(self) -> str:
        """All text parts as one string."""
        return "".join(part.text for part in self.texts)


class Tool(Struct, frozen=True):
    """A function the model may call. `parameters` is its JSON Schema as JSON text. `mark`: a breakpoint after it."""

    name: str
    description: str
    parameters: str
    mark: Mark | None = None


class ToolMode(Enum):
    """Whether the model may, must not, or must call a tool."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"
    NAMED = "named"


class ToolChoice(Struct, frozen=True):
    """`name` is set for NAMED only."""

    mode: ToolMode = ToolMode.AUTO
    name: str | None = None


class Sampling(Struct, frozen=True):
    """How the next token is chosen. temperature 0 is greedy; `seed` None draws a fresh one per turn."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()


class AnyText(Struct, frozen=True, tag="text"):
    """No constraint on the answer."""


class AnyJson(Struct, frozen=True, tag="json_object"):
    """The answer is one JSON object."""


class JsonSchema(Struct, frozen=True, tag="json_schema"):
    """The answer is JSON that fits `schema` (JSON Schema as JSON text)."""

    name: str
    schema: str


AnswerFormat = AnyText | AnyJson | JsonSchema


ObjectDialect = Literal["kimi", "gemini"]  # whose API a cache object belongs to; the other one does not see it


class CacheUse(Struct, frozen=True):
    """The cache object a request names (Kimi's header form or `role: "cache"` message; Gemini's cachedContent).

    Exactly one of `object_id` and `tag` is set. `resent` (header form): the cached messages are in the request again and
    a mismatch is no error, the request then runs as an ordinary one. `dialect` is the one the request came in; the id of
    a Gemini object is what follows "cachedContents/".
    """

    object_id: str | None = None
    tag: str | None = None
    resent: bool = False
    reset_ttl_s: int | None = None
    dry_run: bool = False
    dialect: ObjectDialect = "kimi"


class ChatRequest(Struct, frozen=True):
    """One chat request. `model` is the name the client asked for and the one echoed back.

    `max_tokens` None means the configured default, cut to what the window leaves; 0: the prompt is computed and stored,
    nothing is answered. `top_logprobs` None means no logprobs, 0 the chosen token's only. `thinking` None leaves it to
    the model's template; True is refused where the model cannot. `compare_with` names an earlier turn of the tenant
    that the client wants a cache miss explained against.
    """

    model: str
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    sampling: Sampling = Sampling()
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    top_logprobs: int | None = None
    answer_format: AnswerFormat = AnyText()
    cache: CacheUse | None = None
    thinking: bool | None = None
    compare_with: str | None = None
