r"""Answers in Gemini's shape: whole, as server-sent events, and as one JSON array that is sent element by element.

There is one renderer. Each event becomes candidates that hold only what is new; a streamed answer sends them at once, each in
a whole response object, a whole one folds the same candidates together. Why a candidate ended and the usage of the turn come
in the last object, together. The array is open from the start of the turn on and is closed however the turn ends:

    [{…},\r\n{…},\r\n{"error": …}]

A call has no pieces in this API, so it is told when the answer ends or goes on with text. The last object always has a part,
since the old SDK's `text` fails without one. `usage_metadata` is the one place where counts become wire members.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from keepwarm.core.errors import ApiError
from keepwarm.core.event import (
    ChoiceFinished,
    Event,
    Failed,
    Finished,
    ReasoningDelta,
    Started,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from keepwarm.dialects import Frame, Identity, Parsed
from keepwarm.dialects.gemini_content import MODALITIES
from keepwarm.dialects.gemini_error import gemini_error_reply
from keepwarm.dialects.openai_answer import LOGPROB_MIN

NO_ARGS = "{}"

AnswerShape = Literal["whole", "events", "array"]
GeminiFinish = Literal["STOP", "MAX_TOKENS", "MALFORMED_FUNCTION_CALL"]


class GeminiParsed(Parsed, frozen=True):
    """A parsed request of this dialect. `tells_thoughts`: what the model thinks is in the answer."""

    shape: AnswerShape = "whole"
    tells_thoughts: bool = False

    @property
    def is_array(self) -> bool:
        return self.shape == "array"


class CallPart(Struct):
    """A call the model made; `args` is JSON as the model wrote it."""

    id: str
    name: str
    args: Raw


class AnswerPart(Struct, rename="camel"):
    """A piece of the answer: text, what the model thought (`thought`), or a call."""

    text: str | UnsetType = UNSET
    thought: bool | UnsetType = UNSET
    function_call: CallPart | UnsetType = UNSET


class AnswerContent(Struct):
    """What a candidate says."""

    parts: tuple[AnswerPart, ...]
    role: str = "model"


class LogprobCandidate(Struct, rename="camel"):
    """A token and its natural-log probability."""

    token: str
    log_probability: float


class TopCandidates(Struct):
    """The most likely tokens at one place."""

    candidates: tuple[LogprobCandidate, ...]


class LogprobsResult(Struct, rename="camel"):
    """Log-probabilities, token by token."""

    chosen_candidates: tuple[LogprobCandidate, ...]
    top_candidates: tuple[TopCandidates, ...]


class Candidate(Struct, rename="camel"):
    """One answer, or what is new of it. `token_count` and what follows the reason come with it."""

    index: int
    content: AnswerContent
    finish_reason: GeminiFinish | UnsetType = UNSET
    finish_message: str | UnsetType = UNSET
    token_count: int | UnsetType = UNSET
    avg_logprobs: float | UnsetType = UNSET
    logprobs_result: LogprobsResult | UnsetType = UNSET


class ModalityTokenCount(Struct, rename="camel"):
    """Tokens of one modality."""

    modality: str
    token_count: int


class UsageMetadata(Struct, rename="camel"):
    """The engine's counts in tokens; the prompt's include the cached ones, whose members are absent without a hit."""

    prompt_token_count: int
    candidates_token_count: int
    total_token_count: int
    prompt_tokens_details: tuple[ModalityTokenCount, ...]
    cached_content_token_count: int | UnsetType = UNSET
    cache_tokens_details: tuple[ModalityTokenCount, ...] | UnsetType = UNSET


class GenerateContentReply(Struct, rename="camel"):
    """The body of a whole answer, and one element of a streamed one."""

    candidates: tuple[Candidate, ...]
    model_version: str
    response_id: str
    usage_metadata: UsageMetadata | UnsetType = UNSET


class GeminiTokenCountReply(Struct, rename="camel"):
    """The body of POST /models/{model}:countTokens's answer."""

    total_tokens: int
    prompt_tokens_details: tuple[ModalityTokenCount, ...]
    cached_content_token_count: int | UnsetType = UNSET


def usage_metadata(usage: Usage) -> UsageMetadata:
    """`usage` for the wire. What the model thought is not counted apart from what it says."""
    return UsageMetadata(
        prompt_token_count=usage.prompt,
        candidates_token_count=usage.output,
        total_token_count=usage.prompt + usage.output,
        prompt_tokens_details=text_tokens(usage.prompt),
        cached_content_token_count=usage.cache_read or UNSET,
        cache_tokens_details=text_tokens(usage.cache_read) if usage.cache_read else UNSET,
    )


def text_tokens(n: int) -> tuple[ModalityTokenCount, ...]:
    """So many tokens of the one modality there is."""
    return (ModalityTokenCount(MODALITIES, n),)


class GeminiRenderer:
    """Renders one turn: frames as events come when it is streamed, one body at the end when it is not."""

    def __init__(self, parsed: GeminiParsed, identity: Identity) -> None:
        self._parsed = parsed
        self._identity = identity
        self._n_calls_before = sum(len(message.tool_calls) for message in parsed.request.messages)
        self._before = b"[" if parsed.is_array else b""  # what goes ahead of the next element
        self._choices: dict[int, _Choice] = {}
        self._collected: dict[int, list[Candidate]] = {}
        self._usage: Usage | None = None
        self._failed: ApiError | None = None

    def feed(self, event: Event) -> list[Frame]:
        match event:
            case Started():
                return self._opened()
            case TextDelta():
                choice = self._choice(event.choice)
                told = choice.text(event, wants_logprobs=self._parsed.request.top_logprobs is not None)
                return self._told([told] if told is not None else [])
            case ReasoningDelta():
                if not self._parsed.tells_thoughts or not event.text:
                    return []
                return self._told([_candidate(event.choice, [AnswerPart(text=event.text, thought=True)])])
            case ToolCallDelta():
                self._choice(event.choice).call(event)
                return []
            case ChoiceFinished():
                self._choice(event.choice).finished = event
                return []
            case Finished():
                self._usage = event.usage
                ends = [choice.end() for _, choice in sorted(self._choices.items())]
                return [*self._told(ends, usage_metadata(event.usage)), *self._closed()]
            case Failed():
                self._failed = ApiError(event.kind, event.message, retry_after_s=event.retry_after_s)
                if not self._parsed.stream:
                    return []
                return [self._element(gemini_error_reply(self._failed).body), *self._closed()]

    def whole(self) -> bytes:
        """The JSON body of everything fed so far. Raises the turn's ApiError when it ended with `Failed`."""
        if self._failed is not None:
            raise self._failed
        assert self._usage is not None, "whole() before the terminal event"
        candidates = [_folded(pieces) for _, pieces in sorted(self._collected.items())]
        return msgspec.json.encode(self._reply(candidates, usage_metadata(self._usage)))

    def _choice(self, index: int) -> "_Choice":
        if index not in self._choices:
            self._choices[index] = _Choice(index, self._n_calls_before)
        return self._choices[index]

    def _told(self, candidates: Sequence[Candidate], usage: UsageMetadata | UnsetType = UNSET) -> list[Frame]:
        if not self._parsed.stream:
            for candidate in candidates:
                self._collected.setdefault(candidate.index, []).append(candidate)
            return []
        if not candidates:
            return []
        return [self._element(msgspec.json.encode(self._reply(candidates, usage)))]

    def _reply(self, candidates: Sequence[Candidate], usage: UsageMetadata | UnsetType) -> GenerateContentReply:
        return GenerateContentReply(tuple(candidates), self._parsed.request.model, self._identity.turn_id, usage)

    def _opened(self) -> list[Frame]:
        """The array begins at once: the old SDK reads no white space, our keepalive, ahead of it."""
        if not self._before:
            return []
        opened, self._before = self._before, b""
        return [Frame(opened, is_raw=True)]

    def _element(self, body: bytes) -> Frame:
        if not self._parsed.is_array:
            return Frame(body)
        before, self._before = self._before, b",\r\n"
        return Frame(before + body, is_raw=True)

    def _closed(self) -> list[Frame]:
        return [Frame(b"]", is_raw=True)] if self._parsed.is_array else []


class _Choice:
    """What one candidate has not told yet: calls, and how it ended."""

    def __init__(self, index: int, n_calls_before: int) -> None:
        self._index = index
        self._n_calls_before = n_calls_before
        self._calls: dict[int, tuple[str, list[str]]] = {}  # by their number: the name and the pieces of the arguments
        self._malformed: str | None = None  # the name of a call whose arguments are no JSON object
        self._logprobs: list[float] = []
        self.finished: ChoiceFinished | None = None

    def text(self, event: TextDelta, *, wants_logprobs: bool) -> Candidate | None:
        tokens = event.logprobs if wants_logprobs else ()
        if not event.text and not tokens:
            return None
        candidate = _candidate(self._index, [*self._call_parts(), AnswerPart(text=event.text)])
        if tokens:
            candidate.logprobs_result = _logprobs_result(tokens)
            self._logprobs += [max(token.logprob, LOGPROB_MIN) for token in tokens]
        return candidate

    def call(self, delta: ToolCallDelta) -> None:
        if delta.name is not None:
            self._calls[delta.index] = (delta.name, [])
        self._calls[delta.index][1].append(delta.arguments)

    def end(self) -> Candidate:
        assert self.finished is not None, f"choice {self._index} never finished"
        candidate = _candidate(self._index, list(self._call_parts()) or [AnswerPart(text="")])
        candidate.finish_reason = "MAX_TOKENS" if self.finished.reason == "length" else "STOP"
        if self._malformed is not None:
            candidate.finish_reason = "MALFORMED_FUNCTION_CALL"
            candidate.finish_message = f"Malformed function call: the arguments of {self._malformed} are no JSON object"
        candidate.token_count = self.finished.n_output
        if self._logprobs:
            candidate.avg_logprobs = sum(self._logprobs) / len(self._logprobs)
        return candidate

    def _call_parts(self) -> Iterable[AnswerPart]:
        """The calls so far; an id is the one that a history without it is given (gemini_content.py)."""
        calls, self._calls = self._calls, {}
        for number, (name, pieces) in sorted(calls.items()):
            arguments = "".join(pieces) or NO_ARGS
            if _is_object(arguments):
                call = CallPart(f"{name}:{self._n_calls_before + number}", name, Raw(arguments.encode()))
                yield AnswerPart(function_call=call)
            else:
                self._malformed = name


def _candidate(index: int, parts: Sequence[AnswerPart]) -> Candidate:
    return Candidate(index, AnswerContent(tuple(parts)))


def _folded(pieces: Sequence[Candidate]) -> Candidate:
    """One candidate of all its pieces: texts that follow each other are one part, and no part is empty beside others."""
    parts: list[AnswerPart] = []
    for part in (part for piece in pieces for part in piece.content.parts):
        before = parts[-1] if parts else None
        if part.text is UNSET or before is None or before.text is UNSET or before.thought != part.thought:
            parts.append(part)
        else:
            parts[-1] = AnswerPart(text=before.text + part.text, thought=part.thought)
    told = [part for part in parts if part.text != ""]
    folded = msgspec.structs.replace(pieces[-1], content=AnswerContent(tuple(told or parts[:1])))
    results = [piece.logprobs_result for piece in pieces if piece.logprobs_result is not UNSET]
    if results:
        folded.logprobs_result = LogprobsResult(
            tuple(one for result in results for one in result.chosen_candidates),
            tuple(one for result in results for one in result.top_candidates),
        )
    return folded


def _is_object(arguments: str) -> bool:
    try:
        return isinstance(msgspec.json.decode(arguments), dict)
    except (msgspec.DecodeError, RecursionError):
        return False


def _logprobs_result(tokens: Sequence[TokenLogprob]) -> LogprobsResult:
    chosen = tuple(_logprob(token.token, token.logprob) for token in tokens)
    return LogprobsResult(chosen, tuple(TopCandidates(tuple(_logprob(*top) for top in token.top)) for token in tokens))


def _logprob(token: bytes, logprob: float) -> LogprobCandidate:
    return LogprobCandidate(token.decode(errors="replace"), max(logprob, LOGPROB_MIN))
