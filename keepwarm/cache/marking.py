"""A request's cache breakpoints as blocks of it: which ones there are, how they count, what may stand behind each one.

Blocks are counted in the order tools, system, messages, whatever order the model's template has: a tool is one, a text is
one, a message's calls together are one, and so are the results of tool messages in a row.

A breakpoint in text is found by a character that travels through the template (`Numbered` says which one). One that no
text can carry, behind a tool or behind calls, is found by trying: `variants` are requests that begin alike and go on
differently there, and what all of them begin with is what any other one begins with.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile

from msgspec import Struct
from msgspec.structs import replace

from keepwarm.core.prompt import Breakpoint
from keepwarm.core.request import Mark, Message, Role, TextPart, Tool

MARKS_MAX = 64  # the latest count: each one inside a text costs tokenising all before it once more
_OTHER_TOOL = Tool("x", "", "{}")


class Chat(Struct, frozen=True):
    """What a template is given."""

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()
    generate: bool = False
    thinking: bool | None = None


class Numbered(Mark, frozen=True, kw_only=True):
    """A mark that knows which `Spot` it is, wherever its text is moved."""

    number: int


class Spot(Struct, frozen=True):
    """A marked block: a tool, a message's text up to `part`, or a message with its calls (`part` None)."""

    ttl_s: int | None
    position: int
    tool: int | None = None
    message: int = 0
    part: int | None = None


def number(chat: Chat) -> tuple[Chat, tuple[Spot, ...]]:
    """The same request with its marks numbered, and what each number stands for, in the order of the request."""
    n_marks = sum(1 for mark in _marks(chat) if mark is not None)
    if not n_marks:
        return chat, ()
    found: list[Spot] = []

    def numbered(mark: Mark | None, spot: Spot) -> Mark | None:
        if mark is None:
            return None
        found.append(replace(spot, ttl_s=mark.ttl_s))
        n = len(found) - max(0, n_marks - MARKS_MAX) - 1
        return Numbered(mark.ttl_s, number=n) if n >= 0 else None

    position = len(chat.tools)
    tools = [replace(tool, mark=numbered(tool.mark, Spot(None, k + 1, tool=k))) for k, tool in enumerate(chat.tools)]
    messages: list[Message] = []
    for i, message in enumerate(chat.messages):
        is_result = message.role == "tool"
        position += is_result and not (i and chat.messages[i - 1].role == "tool")
        parts: list[TextPart] = []
        for k, part in enumerate(message.texts):
            position += not is_result
            parts.append(replace(part, mark=numbered(part.mark, Spot(None, position, message=i, part=k))))
        position += bool(message.tool_calls)
        if message.mark is not None and not message.tool_calls:
            end = Spot(None, position, message=i, part=len(parts))
            parts.append(TextPart("", numbered(message.mark, end)))
            messages.append(replace(message, parts=tuple(parts), mark=None))
        else:
            mark = numbered(message.mark, Spot(None, position, message=i))
            messages.append(replace(message, parts=tuple(parts), mark=mark))
    return replace(chat, messages=messages, tools=tools), tuple(found[-MARKS_MAX:])


def mark_offsets(message: Message, text: str) -> Iterator[tuple[int, int]]:
    """Where the marks of a numbered message lie in its text, and their numbers.

    Each one lies behind the last character before it that is not white space: templates trim that. A mark with nothing
    but white space before it has no such place.
    """
    at = 0
    for part in message.texts:
        at += len(part.text)
        if isinstance(part.mark, Numbered):
            offset = len(text[:at].rstrip())
            if offset:
                yield offset, part.mark.number


def variants(chat: Chat, spot: Spot) -> Iterator[Chat]:
    """Requests that are `chat` up to and including the marked block and go on differently behind it."""
    if spot.tool is not None:
        # Some templates show tools behind system text, so that stays; one that shows them behind the conversation has
        # no stable place for them.
        system = takewhile(lambda message: message.role == "system", chat.messages)
        asked = replace(chat, messages=(*system, _says("user", "a")), tools=chat.tools[: spot.tool + 1], generate=False)
        yield asked
        yield replace(asked, tools=(*asked.tools, _OTHER_TOOL))
        return
    message, before = chat.messages[spot.message], chat.messages[: spot.message]
    if spot.part is not None:
        text = "".join(part.text for part in message.texts[: spot.part + 1]).rstrip()
        for more in ("a", "("):
            cut = replace(message, parts=(TextPart(text + more),), tool_calls=(), mark=None)
            yield replace(chat, messages=(*before, cut), generate=False)
        return
    head = (*before, message)
    yield replace(chat, messages=head, generate=True)
    for one in following(head, ("a",), ("user",)):
        yield replace(chat, messages=(*head, one), generate=False)


def following(messages: Sequence[Message], texts: Sequence[str], roles: Sequence[Role]) -> Iterator[Message]:
    """Messages of these roles that may come next, and the result of a tool call when one is due."""
    open_call = _open_call(messages)
    answered: list[tuple[Role, str | None]] = [(role, None) for role in roles]
    if open_call is not None:
        answered.append(("tool", open_call))
    for role, tool_call_id in answered:
        for text in texts:
            yield Message(role, (TextPart(text),), tool_call_id=tool_call_id)


def breakpoints(ends: Iterable[tuple[Spot, int]]) -> tuple[Breakpoint, ...]:
    """What became of the marks, ascending, one at each place: the longer lifetime and the later block count there."""
    at: dict[int, Breakpoint] = {}
    for spot, end in ends:
        known = at.get(end, Breakpoint(end, None, 0))
        ttl_s = spot.ttl_s if known.ttl_s is None else max(known.ttl_s, spot.ttl_s or 0)
        at[end] = Breakpoint(end, ttl_s, max(known.position, spot.position))
    return tuple(at[end] for end in sorted(at) if end > 0)


def common_length(left: str, right: str) -> int:
    """Number of leading characters two texts share. Halving beats a loop: comparing slices is fast."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _marks(chat: Chat) -> Iterator[Mark | None]:
    for tool in chat.tools:
        yield tool.mark
    for message in chat.messages:
        yield from (part.mark for part in message.texts)
        yield message.mark


def _says(role: Role, text: str) -> Message:
    return Message(role, (TextPart(text),))


def _open_call(messages: Sequence[Message]) -> str | None:
    """The id of a tool call that `messages` leave unanswered at their end, if they do."""
    results = [
        message.tool_call_id for message in takewhile(lambda message: message.role == "tool", reversed(messages))
    ]
    caller = messages[-1 - len(results)] if len(results) < len(messages) else None
    calls = caller.tool_calls if caller is not None else ()
    return next((call.id for call in calls if call.id not in results), None)
