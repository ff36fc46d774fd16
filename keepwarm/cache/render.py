"""Messages and tools to a `Prompt`: the model's own template, its tokens, and the marks where evaluation is cut.

The road of one request: marks numbered → messages to values for the template (tools as text where the template knows
none) → sentinels into client text → template → marks' places in the text → `encode`. With breakpoints in the request the
template runs twice, with and without sentinels for them, and what is tokenised is the text without: marks never change
what the model reads. Where the two texts differ (a template that looks at its input's end, say), and for breakpoints that
no text can carry (`marking`), the place is found by trying: where the prompt stops being like other ones that begin alike.

So a breakpoint's end depends on what stands before it and in its block, never on what follows; one that a template gives
no such place has none. Thinking is the template's affair: it gets what the client sent back of it as `reasoning_content`.

A partial last message is appended behind the generation prompt, so that the answer continues it and the template's
end-of-message does not follow. Tools are rendered whatever `tool_choice` says, so that it never changes the prefix.

Not thread-safe: all calls on one `Templating` come from one thread.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property

from blake3 import blake3
from msgspec import Struct
from msgspec.structs import replace

from keepwarm.cache.encode import (
    CONTINUATIONS,
    Encoded,
    Encoder,
    Sentinels,
    Shield,
    choose_sentinels,
    unweave,
    weave,
)
from keepwarm.cache.marking import (
    Chat,
    Spot,
    breakpoints,
    common_length,
    following,
    mark_offsets,
    number,
    variants,
)
from keepwarm.cache.template import CHATML, ChatTemplate, Json
from keepwarm.cache.tools import SECTION_VERSION, as_text, detect_format, json_value, told_failed, tool_values
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.prompt import Breakpoint, Prompt, Tokens, ToolFormat, common_prefix
from keepwarm.core.request import Message, TextPart, Tool, ToolCall, ToolChoice, ToolMode
from keepwarm.engine import SpecialToken, Tokenizer

TRIALS_MAX = 4  # the latest count; as many breakpoints as Anthropic allows, each one up to three renderings


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

    @cached_property
    def tools_first(self) -> bool:
        """Whether tools stand before system text in the prompt, so that other system text keeps their prefix."""
        tool = Tool("name_of_tool", "", "{}")
        first, second = (
            Message("system", (TextPart("first of texts"),)),
            Message("user", (TextPart("second of texts"),)),
        )
        for messages in ((first, second), (second,)):
            chat = Chat(messages, (tool,), generate=True)
            try:
                text = self._render(chat, self._sentinels(chat))
            except ApiError:  # a template that knows no system messages
                continue
            return 0 <= text.find(tool.name) < text.find(messages[0].text)
        return False

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
        thinking: bool | None = None,
    ) -> Built:
        """The prompt of a request. With `generate` the model is asked to answer; a partial last message is continued.

        `object_tokens` is the length of the cache object the messages begin with: it becomes a mark, and breakpoints
        before it are dropped, since the object was computed without them. `thinking` is as in `ChatRequest`. Raises
        ApiError(INVALID_REQUEST).
        """
        chat, spots = number(Chat(messages, tools, generate, thinking))
        encoded = self._encode(tenant, chat, spots)
        found = breakpoints(zip(spots, encoded.ends, strict=True))
        marks = tuple(one.end for one in found)
        if object_tokens is not None and 0 < object_tokens <= len(encoded.tokens):
            found = tuple(one for one in found if one.end > object_tokens)
            marks = (object_tokens, *(one.end for one in found))
        return self._built(Prompt(tenant, encoded.tokens, marks), tools, tool_choice, found)

    def object_prefix(self, tenant: str, messages: Sequence[Message], tools: Sequence[Tool]) -> Built:
        """The tokens that every conversation beginning with `messages` begins with, with a mark at their end.

        Found by trying: what the messages alone and with several continuations have in common. Continuations that the
        template refuses are left out, and so is a rendering that lacks the system text (Gemma's template holds it back
        until a user speaks). Raises ApiError(INVALID_REQUEST) when nothing can be rendered or nothing is in common.
        """
        bare = [replace(message, parts=(TextPart(message.text),)) for message in messages]
        sentinels = self._sentinels(Chat(bare, tools))
        renderings: list[tuple[str, Tokens]] = []
        refusals: list[ApiError] = []
        for chat in _continued(bare, tools):
            try:
                text = self._render(chat, sentinels)
            except ApiError as refusal:
                refusals.append(refusal)
            else:
                clean = text.replace(sentinels.shield, "")
                renderings.append((clean, self._encoder.encode(tenant, text, sentinels.shield).tokens))
        if not renderings:
            raise refusals[0]
        system = [message.text.strip() for message in bare if message.role == "system"]
        whole = [tokens for text, tokens in renderings if all(words in text for words in system)]
        tokens = _shared(whole or [tokens for _, tokens in renderings])
        if not len(tokens):
            raise ApiError(
                ErrorKind.INVALID_REQUEST,
                "the model's chat template gives these messages no stable prefix",
                param="messages",
            )
        return self._built(Prompt(tenant, tokens, (len(tokens),)), tools, ToolChoice())

    def _built(
        self, prompt: Prompt, tools: Sequence[Tool], choice: ToolChoice, found: tuple[Breakpoint, ...] = ()
    ) -> Built:
        read_calls = bool(tools) and choice.mode is not ToolMode.NONE
        tool_format = (self._format or ToolFormat.HERMES) if read_calls else None
        return Built(prompt, tool_format, self._reasoning, found)

    def _encode(self, tenant: str, chat: Chat, spots: Sequence[Spot]) -> Encoded:
        """The tokens of a numbered request, and where each of its marks ends in them: 0 for one that has no place."""
        sentinels = self._sentinels(chat, len(spots))
        text = self._render(chat, sentinels)
        offsets: list[int | None] = []
        if spots:
            clean = text.replace(sentinels.shield, "")
            marked = self._render(chat, sentinels, marked=True).replace(sentinels.shield, "")
            unmarked, offsets = unweave(marked, sentinels.marks)
            if unmarked != clean:
                offsets = [None] * len(spots)
            for n in [n for n, offset in enumerate(offsets) if offset is None][-TRIALS_MAX:]:
                offsets[n] = self._tried(chat, spots[n], text, sentinels)
        return self._encoder.encode(tenant, text, sentinels.shield, [offset or 0 for offset in offsets])

    def _tried(self, chat: Chat, spot: Spot, text: str, sentinels: Sentinels) -> int:
        """Up to where `text` is what every request begins with that has the same blocks up to this one; 0: nowhere."""
        shield = sentinels.shield
        clean = text.replace(shield, "")
        offset, n_rendered = len(clean), 0
        for variant in variants(chat, spot):
            try:
                other = self._render(variant, sentinels)
            except ApiError:  # nothing that a request could be
                continue
            n_common = common_length(clean, other.replace(shield, ""))
            # Two control tokens may begin alike; where one of them begins is where the texts part.
            n_common = min(self._encoder.before_control(one, shield, n_common) for one in (text, other))
            offset, n_rendered = min(offset, n_common), n_rendered + 1
        return offset if n_rendered > 1 else 0  # one alone says nothing of where others differ

    def _sentinels(self, chat: Chat, n_marks: int = 0) -> Sentinels:
        """The same messages and tools get the same ones each time."""
        values = [_message_value(message) for message in chat.messages]
        return choose_sentinels((*_strings([*values, *tool_values(chat.tools)]), self._source), n_marks)

    def _render(self, chat: Chat, sentinels: Sentinels, *, marked: bool = False) -> str:
        """Text with sentinels in it."""
        messages: Sequence[Message] = [told_failed(message) for message in chat.messages]
        tools, generate = chat.tools, chat.generate
        if self._format is None:
            messages, tools = as_text(messages, tools), ()
        partial = messages[-1] if messages and messages[-1].partial else None
        if partial is not None:
            messages, generate = messages[:-1], True
        values = [_message_value(message) for message in messages]
        described = tool_values(tools)
        ending = self._content(partial, sentinels, marked=marked) if partial is not None else ""
        shown = [
            self._shown(message, value, sentinels, marked=marked)
            for message, value in zip(messages, values, strict=True)
        ]
        text = self._template.render(
            shown,
            [self._covered(value, sentinels.shield) for value in described] or None,
            generate=generate,
            thinking=chat.thinking,
            chars_in=len(ending) + sum(map(len, _strings([*values, *described]))),
        )
        return text + ending

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
            insertions += [(offset, sentinels.marks[n]) for offset, n in mark_offsets(message, text)]
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
    if message.reasoning is not None:
        value["reasoning_content"] = message.reasoning
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


def _continued(messages: Sequence[Message], tools: Sequence[Tool]) -> Iterator[Chat]:
    """`messages` alone, with the generation prompt, and with a message of each role that can come next."""
    yield Chat(messages, tools)
    yield Chat(messages, tools, generate=True)
    for message in following(messages, CONTINUATIONS, ("user", "assistant")):
        yield Chat((*messages, message), tools)


def _shared(sequences: Sequence[Tokens]) -> Tokens:
    """The tokens that all sequences begin with, read-only."""
    first = sequences[0]
    shared = first[: min(common_prefix(first, other) for other in sequences)].copy()
    shared.setflags(write=False)
    return shared
