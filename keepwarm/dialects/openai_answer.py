"""Chat answers in OpenAI's shape, streamed and whole, for every dialect that shares it (`AnswerForm`: what differs).

There is one renderer. Each event becomes chunk choices; a streamed answer encodes them at once, a whole one folds the
same chunk choices together. `completion_usage` is the one place where counts become wire members.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from keepwarm.core.errors import ApiError
from keepwarm.core.event import (
    ChoiceFinished,
    Event,
    Failed,
    Finished,
    FinishReason,
    ReasoningDelta,
    Started,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from keepwarm.dialects import ErrorReply, Frame, Identity, Parsed
from keepwarm.dialects.openai_diagnostics import PromptCacheDiagnostics, cache_diagnostics

LOGPROB_MIN = -9999.0  # OpenAI's number for "very unlikely"; JSON has no minus infinity
THINK, THINK_END = "<think>", "</think>"

DONE = Frame(b"[DONE]")
CHAT_ID_PREFIX = "chatcmpl-"


class PromptTokensDetails(Struct):
    """Parts of `prompt_tokens`: restored from the cache, and evaluated and written to it because it was asked for."""

    cached_tokens: int
    cache_write_tokens: int


class CompletionUsage(Struct):
    """The engine's counts in tokens; `prompt_tokens` includes the cached ones.

    The flat `cached_tokens` is Kimi's, `total_characters` MiniMax's, which is always 0.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    cached_tokens: int | UnsetType = UNSET
    total_characters: int | UnsetType = UNSET


class TopLogprob(Struct):
    """One of the most likely tokens at a place."""

    token: str
    bytes: tuple[int, ...]
    logprob: float


class TokenLogprobItem(Struct):
    """A token of the answer; `bytes` is exact, `token` has U+FFFD where a character is torn between tokens."""

    token: str
    bytes: tuple[int, ...]
    logprob: float
    top_logprobs: tuple[TopLogprob, ...]


class ChoiceLogprobs(Struct):
    """Log-probabilities of a choice, or of a chunk of it, token by token."""

    content: tuple[TokenLogprobItem, ...]


class FunctionDelta(Struct):
    """A piece of a call; `name` comes once, in the first piece."""

    arguments: str
    name: str | UnsetType = UNSET


class ToolCallChunk(Struct):
    """A piece of tool call number `index`; `id` and `type` come once, in the first piece."""

    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET


class ReasoningDetail(Struct):
    """A piece of what the model thought, as MiniMax tells it when it is to be apart from the answer."""

    text: str
    type: str = "reasoning.text"
    id: str = "reasoning-text-1"
    format: str = "MiniMax-response-v1"
    index: int = 0


class ChunkDelta(Struct):
    """What a chunk adds to its choice's message. In a stream `reasoning_details` holds only what is new."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning_details: tuple[ReasoningDetail, ...] | UnsetType = UNSET
    tool_calls: tuple[ToolCallChunk, ...] | UnsetType = UNSET


class ChunkChoice(Struct):
    """One choice's part of a chunk. Kimi puts the choice's usage here, in the chunk that finishes it."""

    index: int
    delta: ChunkDelta
    finish_reason: FinishReason | None = None
    logprobs: ChoiceLogprobs | UnsetType = UNSET
    usage: CompletionUsage | UnsetType = UNSET


class ChatCompletionChunk(Struct):
    """One server-sent event of a streamed answer."""

    id: str
    object: str
    created: int
    model: str
    choices: tuple[ChunkChoice, ...]
    usage: CompletionUsage | UnsetType | None = UNSET
    prompt_cache_diagnostics: PromptCacheDiagnostics | UnsetType = UNSET


class AnswerFunction(Struct):
    """The function that was called; `arguments` is JSON text as the model wrote it."""

    name: str
    arguments: str


class AnswerToolCall(Struct):
    """A call the model made; `index` is Kimi's."""

    id: str
    type: str
    function: AnswerFunction
    index: int | UnsetType = UNSET


class AnswerMessage(Struct):
    """The message of a choice; `content` is null only beside tool calls."""

    role: str
    content: str | None
    refusal: str | None = None
    reasoning_content: str | UnsetType = UNSET
    reasoning_details: tuple[ReasoningDetail, ...] | UnsetType = UNSET
    tool_calls: tuple[AnswerToolCall, ...] | UnsetType = UNSET


class ChatChoice(Struct):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Struct):
    """The body of an answer that is not streamed."""

    id: str
    object: str
    created: int
    model: str
    choices: tuple[ChatChoice, ...]
    usage: CompletionUsage
    prompt_cache_diagnostics: PromptCacheDiagnostics | UnsetType = UNSET


ReasoningForm = Literal["reasoning_content", "reasoning_details", "tags"]


class AnswerForm(Struct, frozen=True):
    """What differs between the dialects that share these answers.

    `kimi_usage`: the flat `cached_tokens`, and each choice's usage in the chunk that finishes it. `call_index`: whole
    tool calls carry their `index`. `call_id` makes the id of a call from its first delta. `reasoning`: what the model
    thinks is in a member of that name, or in `content` between tags. `total_characters`: usage has that member.
    """

    render_error: Callable[[ApiError], ErrorReply]
    call_id: Callable[[Parsed, Identity, ToolCallDelta], str]
    call_index: bool = False
    kimi_usage: bool = False
    total_characters: bool = False
    reasoning: ReasoningForm = "reasoning_content"


def digest_call_id(_parsed: Parsed, identity: Identity, call: ToolCallDelta) -> str:
    """An `AnswerForm.call_id`."""
    return f"call_{identity.call_digest(call)}"


def completion_usage(usage: Usage, form: AnswerForm, n_output: int | None = None) -> CompletionUsage:
    """`usage` for the wire; `n_output` replaces the output count where one choice reports its own."""
    output = usage.output if n_output is None else n_output
    return CompletionUsage(
        prompt_tokens=usage.prompt,
        completion_tokens=output,
        total_tokens=usage.prompt + output,
        prompt_tokens_details=PromptTokensDetails(usage.cache_read, usage.cache_write),
        cached_tokens=usage.cache_read if form.kimi_usage else UNSET,
        total_characters=0 if form.total_characters else UNSET,
    )


class ChatRenderer:
    """Renders one turn: frames as events come when it is streamed, one body at the end when it is not.

    The role chunk of a choice goes out with its first delta, so a turn that fails before producing anything can still
    be answered with an HTTP status. After `Failed` the stream ends without [DONE]: it was not done.
    """

    def __init__(self, parsed: Parsed, identity: Identity, form: AnswerForm, encoder: msgspec.json.Encoder) -> None:
        self._parsed = parsed
        self._identity = identity
        self._form = form
        self._encoder = encoder
        self._model = parsed.request.model
        self._wants_logprobs = parsed.request.top_logprobs is not None
        self._usage_member: UnsetType | None = None if parsed.include_usage else UNSET
        self._begun: set[int] = set()
        self._thinking: set[int] = set()  # choices with an open <think> in their content
        self._held: list[ChoiceFinished] = []
        self._collected: dict[int, _Collected] = {}
        self._usage: Usage | None = None
        self._failed: Failed | None = None
        self._diagnostics: PromptCacheDiagnostics | UnsetType = UNSET  # told only when asked for
        if parsed.request.compare_with is not None:
            self._diagnostics = cache_diagnostics(None)

    def feed(self, event: Event) -> list[Frame]:
        match event:
            case TextDelta():
                choice = ChunkChoice(event.choice, ChunkDelta(content=event.text))
                if self._wants_logprobs and event.logprobs:
                    choice.logprobs = ChoiceLogprobs(tuple(_logprob_item(token) for token in event.logprobs))
                return self._choices([*self._end_of_thought(event.choice), choice])
            case ReasoningDelta():
                return self._choices([ChunkChoice(event.choice, self._thought(event))])
            case ToolCallDelta():
                calls = ChunkChoice(event.choice, ChunkDelta(tool_calls=(self._call_chunk(event),)))
                return self._choices([*self._end_of_thought(event.choice), calls])
            case ChoiceFinished():
                return self._choice_finished(event)
            case Finished():
                return self._finished(event)
            case Failed():
                return self._fail(event)
            case Started():
                if self._diagnostics is not UNSET:
                    self._diagnostics = cache_diagnostics(event.lookup)
                return []

    def whole(self) -> bytes:
        """The JSON body of everything fed so far. Raises the turn's ApiError when it ended with `Failed`."""
        if self._failed is not None:
            raise _api_error(self._failed)
        assert self._usage is not None, "whole() before the terminal event"
        choices = (
            self._collected[index].choice(index, self._wants_logprobs, self._form) for index in sorted(self._collected)
        )
        return self._encoder.encode(
            ChatCompletion(
                id=self._identity.turn_id,
                object="chat.completion",
                created=self._identity.created,
                model=self._model,
                choices=tuple(choices),
                usage=completion_usage(self._usage, self._form),
                prompt_cache_diagnostics=self._diagnostics,
            )
        )

    def _choices(self, choices: Sequence[ChunkChoice]) -> list[Frame]:
        """Streamed: a frame for each, the role first. Whole: folds them into what was collected."""
        if not self._parsed.stream:
            for choice in choices:
                self._collected.setdefault(choice.index, _Collected()).add(choice)
            return []
        frames = []
        for choice in choices:
            if choice.index not in self._begun:
                self._begun.add(choice.index)
                frames.append(self._chunk(ChunkChoice(choice.index, ChunkDelta(role="assistant", content=""))))
            frames.append(self._chunk(choice))
        return frames

    def _chunk(self, *choices: ChunkChoice, usage: CompletionUsage | UnsetType = UNSET) -> Frame:
        """Diagnostics go with the usage where that has a chunk of its own, else with what finishes a choice."""
        finishes = any(choice.finish_reason is not None for choice in choices)
        is_last = usage is not UNSET if self._parsed.include_usage else finishes
        chunk = ChatCompletionChunk(
            id=self._identity.turn_id,
            object="chat.completion.chunk",
            created=self._identity.created,
            model=self._model,
            choices=choices,
            usage=self._usage_member if usage is UNSET else usage,
            prompt_cache_diagnostics=self._diagnostics if is_last else UNSET,
        )
        return Frame(self._encoder.encode(chunk))

    def _thought(self, event: ReasoningDelta) -> ChunkDelta:
        match self._form.reasoning:
            case "reasoning_content":
                return ChunkDelta(reasoning_content=event.text)
            case "reasoning_details":
                return ChunkDelta(reasoning_details=(ReasoningDetail(event.text),))
            case "tags":
                opened = "" if event.choice in self._thinking else THINK
                self._thinking.add(event.choice)
                return ChunkDelta(content=opened + event.text)

    def _end_of_thought(self, choice: int) -> list[ChunkChoice]:
        """What closes the tag around a choice's reasoning, if one is open."""
        if choice not in self._thinking:
            return []
        self._thinking.remove(choice)
        return [ChunkChoice(choice, ChunkDelta(content=THINK_END))]

    def _call_chunk(self, event: ToolCallDelta) -> ToolCallChunk:
        if event.name is None:
            return ToolCallChunk(event.index, FunctionDelta(event.arguments))
        call_id = self._form.call_id(self._parsed, self._identity, event)
        return ToolCallChunk(event.index, FunctionDelta(event.arguments, event.name), call_id, "function")

    def _choice_finished(self, event: ChoiceFinished) -> list[Frame]:
        if self._form.kimi_usage:
            self._held.append(event)  # its chunk carries usage, which comes with `Finished`
            return []
        return self._choices(
            [*self._end_of_thought(event.choice), ChunkChoice(event.choice, ChunkDelta(), event.reason)]
        )

    def _finished(self, event: Finished) -> list[Frame]:
        self._usage = event.usage
        frames = self._choices(
            [
                ChunkChoice(
                    held.choice,
                    ChunkDelta(),
                    held.reason,
                    usage=completion_usage(event.usage, self._form, held.n_output),
                )
                for held in self._held
            ]
        )
        if not self._parsed.stream:
            return []
        if self._parsed.include_usage:
            frames.append(self._chunk(usage=completion_usage(event.usage, self._form)))
        frames.append(DONE)
        return frames

    def _fail(self, event: Failed) -> list[Frame]:
        self._failed = event
        return [Frame(self._form.render_error(_api_error(event)).body)] if self._parsed.stream else []


class _CollectedCall:
    """A tool call, piece by piece."""

    def __init__(self) -> None:
        self.id = ""
        self.name = ""
        self.arguments: list[str] = []

    def add(self, chunk: ToolCallChunk) -> None:
        if chunk.id is not UNSET:
            self.id = chunk.id
        if chunk.function.name is not UNSET:
            self.name = chunk.function.name
        self.arguments.append(chunk.function.arguments)


class _Collected:
    """One choice of a whole answer, folded from its chunk choices."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._details: list[str] = []
        self._logprobs: list[TokenLogprobItem] = []
        self._calls: dict[int, _CollectedCall] = {}
        self._finish_reason: FinishReason | None = None

    def add(self, choice: ChunkChoice) -> None:
        delta = choice.delta
        if delta.content is not UNSET:
            self._text.append(delta.content)
        if delta.reasoning_content is not UNSET:
            self._reasoning.append(delta.reasoning_content)
        if delta.reasoning_details is not UNSET:
            self._details.extend(detail.text for detail in delta.reasoning_details)
        if delta.tool_calls is not UNSET:
            for chunk in delta.tool_calls:
                self._calls.setdefault(chunk.index, _CollectedCall()).add(chunk)
        if choice.logprobs is not UNSET:
            self._logprobs.extend(choice.logprobs.content)
        if choice.finish_reason is not None:
            self._finish_reason = choice.finish_reason

    def choice(self, index: int, wants_logprobs: bool, form: AnswerForm) -> ChatChoice:
        assert self._finish_reason is not None, f"choice {index} never finished"
        calls = tuple(
            AnswerToolCall(
                call.id,
                "function",
                AnswerFunction(call.name, "".join(call.arguments)),
                number if form.call_index else UNSET,
            )
            for number, call in sorted(self._calls.items())
        )
        text = "".join(self._text)
        message = AnswerMessage(
            role="assistant",
            content=None if calls and not text else text,
            reasoning_content="".join(self._reasoning) if self._reasoning else UNSET,
            reasoning_details=(ReasoningDetail("".join(self._details)),) if self._details else UNSET,
            tool_calls=calls or UNSET,
        )
        logprobs = ChoiceLogprobs(tuple(self._logprobs)) if wants_logprobs else None
        return ChatChoice(index, message, logprobs, self._finish_reason)


def _logprob_item(token: TokenLogprob) -> TokenLogprobItem:
    top = tuple(
        TopLogprob(piece.decode(errors="replace"), tuple(piece), max(logprob, LOGPROB_MIN))
        for piece, logprob in token.top
    )
    text = token.token.decode(errors="replace")
    return TokenLogprobItem(text, tuple(token.token), max(token.logprob, LOGPROB_MIN), top)


def _api_error(event: Failed) -> ApiError:
    return ApiError(event.kind, event.message, retry_after_s=event.retry_after_s)
