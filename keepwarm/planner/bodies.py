"""Request bodies as the prompts that the server would see: parsed by its dialects, rendered by the model's own template.

Marks of the client's are left out and others set instead, after the tools, the system text and messages, so that every
place where a mark could be is known. Marks never change the tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from keepwarm.cache.marking import Chat, number
from keepwarm.cache.render import Templating
from keepwarm.config import Limits
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.request import ChatRequest, Mark, Message, TextPart, Tool
from keepwarm.dialects import Parsed, WireBounds
from keepwarm.dialects.anthropic import AnthropicMessages
from keepwarm.dialects.openai import OpenAIChat
from keepwarm.engine import Tokenizer
from keepwarm.planner.numbers import PrefixNumbers, block_ends
from keepwarm.planner.traffic import LAST, SYSTEM, TOOLS, Spot

FIRST_MARKED = 10  # messages from the start that are places
LAST_MARKED = 50  # messages from the end: a mark looks back 20 blocks, and templating places 64 marks in all
TENANT = "plan"  # all requests are one organisation's

DialectName = Literal["openai", "anthropic"]


class Rendered(Struct, frozen=True):
    """A body's prompt, as `traffic.Prompt` without the time."""

    n_tokens: int
    blocks: tuple[int, ...]
    spots: tuple[Spot, ...]
    places: dict[str, int]


class _Dialect(Protocol):
    def parse_chat(self, headers: dict[str, str], body: bytes) -> Parsed: ...


class Bodies:
    """Renders bodies for one model. Not thread-safe."""

    def __init__(self, tokenizer: Tokenizer, limits: Limits) -> None:
        """Raises ValueError when the model's template is not one."""
        bounds = msgspec.convert(limits, WireBounds, from_attributes=True)
        self._templating = Templating(tokenizer, fragment_cache_bytes=limits.fragment_cache_bytes)
        self._parse: dict[DialectName, Callable[[bytes], Parsed]] = {
            "openai": _parser(OpenAIChat(bounds)),
            "anthropic": _parser(AnthropicMessages(bounds)),
        }
        self._numbers = PrefixNumbers()

    def rendered(self, dialect: DialectName, body: bytes) -> Rendered:
        """Raises ApiError for a body that the server would refuse, and for one with files in it."""
        request = self._parse[dialect](body).request
        tools, messages, names = _marked(_unmarked(request))
        built = self._templating.build(
            TENANT, messages, tools, request.tool_choice, object_tokens=None, thinking=request.thinking
        )
        positions = {one.end: one.position for one in built.breakpoints}
        ends = block_ends(built.prompt.n_tokens)
        keys = self._numbers.of(built.prompt.tokens, sorted({*ends, *positions}))
        spots = tuple(Spot(keys[end], end, positions[end]) for end in sorted(positions))
        places = {
            place: i for i, spot in enumerate(spots) for place in names.get(spot.position, ())
        }  # fmt: skip
        return Rendered(built.prompt.n_tokens, tuple(keys[end] for end in ends), spots, places)


def _parser(dialect: _Dialect) -> Callable[[bytes], Parsed]:
    return lambda body: dialect.parse_chat({}, body)


def _unmarked(request: ChatRequest) -> ChatRequest:
    def bare(message: Message) -> Message:
        texts = []
        for part in message.parts:
            if not isinstance(part, TextPart):
                raise ApiError(ErrorKind.INVALID_REQUEST, f"{part.param} is a file; files are not read here")
            texts.append(replace(part, mark=None))
        return replace(message, parts=tuple(texts), mark=None)

    return replace(
        request,
        messages=tuple(bare(message) for message in request.messages),
        tools=tuple(replace(tool, mark=None) for tool in request.tools),
    )


def _marked(request: ChatRequest) -> tuple[tuple[Tool, ...], tuple[Message, ...], dict[int, list[str]]]:
    """Tools and messages with marks at places, and the places' names by the position that a mark there has."""
    tools, messages = list(request.tools), list(request.messages)
    if tools:
        tools[-1] = replace(tools[-1], mark=Mark())
    chosen = set(_choice(messages))
    for i in chosen:
        messages[i] = replace(messages[i], mark=Mark())
    n_system = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    _, spots = number(Chat(messages, tools))
    names: dict[int, list[str]] = {}
    for spot in spots:
        own = names.setdefault(spot.position, [])
        if spot.tool is not None:
            own.append(TOOLS)
            continue
        if spot.message < n_system:
            own.append(SYSTEM)
        elif spot.message < n_system + FIRST_MARKED:
            own.append(f"message {spot.message - n_system + 1}")
        if spot.message == len(messages) - 1:
            own.append(LAST)
    return tuple(tools), tuple(messages), names


def _choice(messages: Sequence[Message]) -> Iterator[int]:
    """Which messages to mark: the last of the system's, the first and the latest ones.

    None with calls, since a mark behind those costs several renderings and the results behind it have one; of results in
    a row the last.
    """
    for i, message in enumerate(messages):
        after = messages[i + 1] if i + 1 < len(messages) else None
        is_first, is_latest = i < FIRST_MARKED, i >= len(messages) - LAST_MARKED
        if message.tool_calls or message.partial or not (is_first or is_latest):
            continue
        if message.role in ("system", "tool") and after is not None and after.role == message.role:
            continue
        yield i
