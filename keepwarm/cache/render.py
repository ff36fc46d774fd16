"""Messages and tools to a `Prompt`: the model's own template, its tokens, and the marks where evaluation is cut.

The road of one request: messages → values for the template (tools as text where the template knows none) → sentinels
into client text → template → `encode` → marks. With breakpoints in the request the template runs twice, with and without
them, and where the texts differ (a template that looks at its input's end, say) the breakpoints are dropped: marks never
change what the model reads.

A partial last message is appended behind the generation prompt, so that the answer continues it and the template's
end-of-message does not follow. Tools are rendered whatever `tool_choice` says, so that it never changes the prefix.

Not thread-safe: all calls on one `Templating` come from one thread.
"""

from collections.abc import Iterator, Sequence
from itertools import takewhile

from blake3 import blake3
from msgspec import Struct
from msgspec.structs import replace

from keepwarm.cache.encode import Encoded, Encoder, Sentinels, Shield, choose_sentinels, common_prefix, weave
from keepwarm.cache.template import CHATML, ChatTemplate, Json
from keepwarm.cache.tools import SECTION_VERSION, as_text, detect_format, json_value, tool_values
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.prompt import Breakpoint, Prompt, Tokens, ToolFormat
from keepwarm.core.request import Message, Role, TextPart, Tool, ToolCall, ToolChoice, ToolMode
from keepwarm.engine import SpecialToken, Tokenizer

CONTINUATIONS = (
    "a",
    "Z",
    "7",
    " b",
    "\n",
    "(",
    "<",
    "é",
    "你",
)  # first characters that join differently with text before


class Built(Struct, frozen=True):
    """A rendered request. `tool_format` None: the answer is not read for tool calls.

    `breakpoints` are the client's, ascending; each one's end is among the prompt's marks.
    """

    prompt: Prompt
    tool_format: ToolFormat | None = None
    reasoning: bool = False
    breakpoints: tuple[Breakpoint, ...] = ()


class Templating:
    """Renders requests for one model."""

    def __init__(self, tokenizer: Tokenizer, *, fragment_cache_bytes: int) -> None:
        """Raises ValueError when the model's template is not one."""
        source = tokenizer.chat_template or CHATML
        self._source = source
        self._template = ChatTemplate(source, bos=tokenizer.special_text("bos"), eos=tokenizer.special_text("eos"))
        self._tokenizer = tokenizer
        self._special_texts = {special.token: special.text for special in tokenizer.specials}
        self._encoder = Encoder(tokenizer, fragment_cache_bytes=fragment_cache_bytes)
        self._shield = Shield(_shielded(tokenizer))
        self._format = detect_format(source)
        self._reasoning = "<think>" in source or any(special.text == "<think>" for special in tokenizer.specials)
        self._digest = blake3(f"{SECTION_VERSION}\0{source}".encode()).hexdigest()

    @property
    def digest(self) -> str:
        """Names everything that decides how messages become text, hex."""
        return self._digest

    def decode(self, tokens: Tokens) -> str:
        """The text of some tokens, control tokens included; a character torn at either end is U+FFFD."""
        pieces = (
            self._special_texts.get(token, "").encode() or self._tokenizer.piece(token) for token in tokens.tolist()
        )
        return b"".join(pieces).decode("utf-8", "replace")

    def build(
        self,
        tenant: str,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        tool_choice: ToolChoice,
        *,
        object_tokens: int | None,
        generate: bool = True,
    ) -> Built:
        """The prompt of a request. With `generate` the model is asked to answer; a partial last message is continued.

        `object_tokens` is the length of the cache object the messages begin with: it becomes a mark, and breakpoints
        before it are dropped, since the object was computed without them. Raises ApiError(INVALID_REQUEST).
        """
        encoded = self._encode(tenant, messages, tools, generate=generate)
        marks = encoded.marks
        if object_tokens is not None and 0 < object_tokens <= len(encoded.tokens):
            marks = (object_tokens, *(mark for mark in marks if mark > object_tokens))
        return self._built(Prompt(tenant, encoded.tokens, marks), tools, tool_choice)

    def object_prefix(self, tenant: str, messages: Sequence[Message], tools: Sequence[Tool]) -> Built:
        """The tokens that every conversation beginning with `messages` begins with, with a mark at their end.

        Found by trying: what the messages alone and with several continuations have in common. Continuations that the
        template refuses are left out, and so is a rendering that lacks the system text (Gemma's template holds it back
        until a user speaks). Raises ApiError(INVALID_REQUEST) when nothing can be rendered or nothing is in common.
        """
        bare = [replace(message, parts=(TextPart(message.text),)) for message in messages]
        renderings: list[tuple[str, Encoded]] = []
        refusals: list[ApiError] = []
        for continuation, generate in _continuations(bare):
            try:
                text, sentinels = self._render([*bare, *continuation], tools, generate=generate, marked=False)
            except ApiError as refusal:
                refusals.append(refusal)
            else:
                clean = text.replace(sentinels.shield, "")
                renderings.append((clean, self._encoder.encode(tenant, text, sentinels)))
        if not renderings:
            raise refusals[0]
        system = [message.text.strip() for message in bare if message.role == "system"]
        whole = [encoded.tokens for text, encoded in renderings if all(words in text for words in system)]
        tokens = _shared(whole or [encoded.tokens for _, encoded in renderings])
        if not len(tokens):
            raise ApiError(
                ErrorKind.INVALID_REQUEST,
                "the model's chat template gives these messages no stable prefix",
                param="messages",
            )
        return self._built(Prompt(tenant, tokens, (len(tokens),)), tools, ToolChoice())

    def _built(self, prompt: Prompt, tools: Sequence[Tool], choice: ToolChoice) -> Built:
        read_calls = bool(tools) and choice.mode is not ToolMode.NONE
        tool_format = (self._format or ToolFormat.HERMES) if read_calls else None
        return Built(prompt, tool_format, self._reasoning)

    def _encode(self, tenant: str, messages: Sequence[Message], tools: Sequence[Tool], *, generate: bool) -> Encoded:
        text, sentinels = self._render(messages, tools, generate=generate, marked=False)
        if any(part.mark for message in messages for part in message.texts):
            marked, _ = self._render(messages, tools, generate=generate, marked=True)
            if marked.replace(sentinels.mark, "") == text:
                text = marked
        return self._encoder.encode(tenant, text, sentinels)

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Tool], *, generate: bool, marked: bool
    ) -> tuple[str, Sentinels]:
        """Text with sentinels in it. The same messages and tools get the same sentinels each time."""
        if self._format is None:
            messages, tools = as_text(messages, tools), ()
        partial = messages[-1] if messages and messages[-1].partial else None
        if partial is not None:
            messages, generate = messages[:-1], True
        values = [_message_value(message) for message in messages]
        described = tool_values(tools)
        texts = [*_strings([*values, *described]), partial.text if partial is not None else ""]
        sentinels = choose_sentinels((*texts, self._source))
        shown = [
            self._shown(message, value, sentinels, marked=marked)
            for message, value in zip(messages, values, strict=True)
        ]
        text = self._template.render(
            shown,
            [self._covered(value, sentinels.shield) for value in described] or None,
            generate=generate,
            chars_in=sum(map(len, texts)),
        )
        return text + (self._content(partial, sentinels, marked=marked) if partial is not None else ""), sentinels

    def _shown(
        self, message: Message, value: dict[str, Json], sentinels: Sentinels, *, marked: bool
    ) -> dict[str, Json]:
        """The message as the template sees it: `value` with everything in it covered but the role."""
        shown: dict[str, Json] = {"role": message.role, "content": self._content(message, sentinels, marked=marked)}
        for key, item in value.items():
            if isinstance(item, str):
                shown.setdefault(key, _inserted(item, self._shield.everywhere(item), sentinels.shield))
            else:
                shown[key] = self._covered(item, sentinels.shield)
        return shown

    def _content(self, message: Message, sentinels: Sentinels, *, marked: bool) -> str:
        text = message.text
        insertions = [(position, sentinels.shield) for position in self._shield.everywhere(text)]
        if marked:
            insertions += [(offset, sentinels.mark) for offset in _mark_offsets(message, text)]
        return weave(text, insertions) if insertions else text

    def _covered(self, value: Json, shield: str) -> Json:
        """`value` with the strings in it covered; less so than text, since templates look for keys and words in JSON."""
        match value:
            case str():
                return _inserted(value, self._shield.around(value), shield)
            case list():
                return [self._covered(item, shield) for item in value]
            case dict():
                return {
                    _inserted(key, self._shield.inside(key), shield): self._covered(item, shield)
                    for key, item in value.items()
                }
            case _:
                return value


def _inserted(text: str, positions: Sequence[int], character: str) -> str:
    return weave(text, [(position, character) for position in positions]) if positions else text


def _shielded(tokenizer: Tokenizer) -> list[SpecialToken]:
    """The control tokens that plain text does not give: one that it does (a user-defined token) needs no shield."""
    return [special for special in tokenizer.specials if tokenizer.encode_plain(special.text) != [special.token]]


def _message_value(message: Message) -> dict[str, Json]:
    value: dict[str, Json] = {"role": message.role, "content": message.text}
    if message.name is not None:
        value["name"] = message.name
    if message.tool_calls:
        value["tool_calls"] = [_call_value(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        value["tool_call_id"] = message.tool_call_id
    return value


def _call_value(call: ToolCall) -> Json:
    function: Json = {"name": call.name, "arguments": json_value(call.arguments)}
    return {"id": call.id, "type": "function", "function": function}


def _strings(values: Sequence[Json]) -> Iterator[str]:
    """Every string in `values`, keys included, in no particular order."""
    waiting: list[Json] = list(values)
    while waiting:
        match waiting.pop():
            case str() as text:
                yield text
            case list() as items:
                waiting += items
            case dict() as items:
                yield from items.keys()
                waiting += items.values()
            case _:
                pass


def _mark_offsets(message: Message, text: str) -> list[int]:
    """Where the message's breakpoints lie in its text, not in the white space around it: templates trim that."""
    first, last = len(text) - len(text.lstrip()), len(text.rstrip())
    offsets, at = [], 0
    for part in message.texts:
        at += len(part.text)
        if part.mark:
            offsets.append(min(max(at, first), last))
    return offsets


def _continuations(messages: Sequence[Message]) -> Iterator[tuple[tuple[Message, ...], bool]]:
    """What may follow `messages`: nothing, the generation prompt, a message of each role that can come next."""
    yield (), False
    yield (), True
    roles: list[tuple[Role, str | None]] = [("user", None), ("assistant", None)]
    open_call = _open_call(messages)
    if open_call is not None:
        roles.append(("tool", open_call))
    for role, tool_call_id in roles:
        for text in CONTINUATIONS:
            yield (Message(role, (TextPart(text),), tool_call_id=tool_call_id),), False


def _open_call(messages: Sequence[Message]) -> str | None:
    """The id of a tool call that `messages` leave unanswered at their end, if they do."""
    results = [
        message.tool_call_id for message in takewhile(lambda message: message.role == "tool", reversed(messages))
    ]
    caller = messages[-1 - len(results)] if len(results) < len(messages) else None
    calls = caller.tool_calls if caller is not None else ()
    return next((call.id for call in calls if call.id not in results), None)


def _shared(sequences: Sequence[Tokens]) -> Tokens:
    """The tokens that all sequences begin with, read-only."""
    first = sequences[0]
    shared = first[: min(common_prefix(first, other) for other in sequences)].copy()
    shared.setflags(write=False)
    return shared
