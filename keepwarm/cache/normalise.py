"""Volatile lines that agents put near the top of a prompt ruin every prefix behind them; these rewrite them. Pure, visible.

    billing-header    the first line of a system text, when it is `x-anthropic-billing-header: …`: left out
    clock             a time of day behind a label ("Current time: 2026-11-25 14:03") in a system message: left out
    moving-reminder   <system-reminder> blocks of the newest user message: read at the very end of the prompt

Off unless `model.normalise` lists them; the default lists the one that no model needs. What was changed is told with the
turn ("clock: system"), never silently. A text becomes what it would be without the volatile piece and nothing else.

Breakpoints stay where they were. A part that becomes empty leaves its mark to the part before it; where none is left
before it, to the empty message, or to what comes before the message. A system message that becomes empty is left out.
Patterns, and when not to use them: docs/normalisers.md. What each matches is in volatile.py.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from types import MappingProxyType

from msgspec import Struct
from msgspec.structs import replace

from keepwarm.cache.volatile import split_reminders, without_billing_header, without_time_of_day
from keepwarm.core.request import ChatRequest, Mark, Message, Part, TextPart, Tool


class Edit(Struct, frozen=True):
    """What text parts become, by message and place in it, and a text to follow all of them in the last message."""

    texts: Mapping[int, Mapping[int, str]]
    behind: str = ""


def _billing_header(messages: Sequence[Message]) -> Edit:
    return _system_texts(messages, without_billing_header)


def _clock(messages: Sequence[Message]) -> Edit:
    return _system_texts(messages, without_time_of_day)


def _moving_reminder(messages: Sequence[Message]) -> Edit:
    """An agent that moves its reminder has it in the newest user message now and in none of the older ones.

    Where it moves next nobody can know from one request, so it goes where it can spoil nothing: behind everything. What
    is before it is then the same in the next request, wherever the reminder is. Older messages are left as they are.
    An answer that is being continued must stay last, so then nothing is moved.
    """
    newest = max((i for i, message in enumerate(messages) if message.role == "user"), default=None)
    if newest is None or messages[-1].role not in ("user", "tool"):
        return Edit({})
    texts: dict[int, str] = {}
    found: list[str] = []
    for j, part in enumerate(messages[newest].parts):
        if isinstance(part, TextPart):
            rest, reminders = split_reminders(part.text)
            if reminders:
                texts[j] = rest
                found += reminders
    return Edit({newest: texts}, "\n".join(found)) if texts else Edit({})


NORMALISERS: Mapping[str, Callable[[Sequence[Message]], Edit]] = MappingProxyType(
    {"billing-header": _billing_header, "clock": _clock, "moving-reminder": _moving_reminder}
)


def normalise(request: ChatRequest, names: Sequence[str], *, n_fixed: int = 0) -> tuple[ChatRequest, tuple[str, ...]]:
    """The request with volatile texts rewritten, and what was: "name: place" for each message that one was found in.

    The first `n_fixed` messages are a cache object's: its state was computed from them as they are, so they stay.
    """
    changed: list[str] = []
    for name in names:
        edit = NORMALISERS[name](request.messages)
        texts = {i: texts for i, texts in edit.texts.items() if i >= n_fixed}
        edited = _edited(request, replace(edit, texts=texts)) if texts else request
        if edited != request:
            n_system = sum(1 for _ in takewhile(lambda message: message.role == "system", request.messages))
            places = ("system" if i < n_system else f"messages[{i - n_system}]" for i in texts)
            changed += dict.fromkeys(f"{name}: {place}" for place in places)
            request = edited
    return request, tuple(changed)


def _system_texts(messages: Sequence[Message], rewrite: Callable[[str], str]) -> Edit:
    """An edit of the texts of system messages that `rewrite` changes."""
    edits: dict[int, dict[int, str]] = {}
    for i, message in enumerate(messages):
        if message.role == "system":
            for j, part in enumerate(message.parts):
                if isinstance(part, TextPart) and (text := rewrite(part.text)) != part.text:
                    edits.setdefault(i, {})[j] = text
    return Edit(edits)


def _edited(request: ChatRequest, edit: Edit) -> ChatRequest:
    """`request` with the edit made. No part that it does not name is touched, but for a mark that has to go somewhere."""
    messages: list[Message] = []
    tools = request.tools
    for i, message in enumerate(request.messages):
        texts = edit.texts.get(i)
        kept, mark = (message, None) if texts is None else _with_texts(message, texts)
        if mark is not None:
            if messages:
                messages[-1] = _marked_at_end(messages[-1], mark)
            elif tools:  # before the first message come the tools; before those nothing that could be kept
                tools = (*tools[:-1], _marked_tool(tools[-1], mark))
        if kept is not None:
            messages.append(kept)
    if edit.behind:
        messages[-1] = _with_text_behind(messages[-1], edit.behind)
    return replace(request, messages=tuple(messages), tools=tools)


def _with_texts(message: Message, texts: Mapping[int, str]) -> tuple[Message | None, Mark | None]:
    """The message with these texts, None when nothing is left of it, and a mark that belongs before it."""
    parts: list[Part] = []
    before: Mark | None = None
    for j, part in enumerate(message.parts):
        text = texts.get(j)
        if text is None or not isinstance(part, TextPart):
            parts.append(part)
        elif text:
            parts.append(replace(part, text=text))
        elif parts:
            parts[-1] = replace(parts[-1], mark=_longer(parts[-1].mark, part.mark))
        else:
            before = _longer(before, part.mark)
    if parts:
        return replace(message, parts=tuple(parts)), before
    if message.role == "system":
        return None, _longer(before, message.mark)
    return replace(message, parts=(), mark=_longer(message.mark, before)), None


def _with_text_behind(message: Message, text: str) -> Message:
    """The message with a part more: on a line of its own, behind the message's breakpoints."""
    if message.mark is not None and message.parts:
        message = replace(message, parts=_last_marked(message.parts, message.mark), mark=None)
    last = message.parts[-1] if message.parts else None
    own_line = last is None or (isinstance(last, TextPart) and last.text.endswith("\n"))
    return replace(message, parts=(*message.parts, TextPart(text if own_line else f"\n{text}")))


def _marked_at_end(message: Message, mark: Mark) -> Message:
    if message.tool_calls or not message.parts:
        return replace(message, mark=_longer(message.mark, mark))
    return replace(message, parts=_last_marked(message.parts, mark))


def _last_marked(parts: tuple[Part, ...], mark: Mark) -> tuple[Part, ...]:
    return (*parts[:-1], replace(parts[-1], mark=_longer(parts[-1].mark, mark)))


def _marked_tool(tool: Tool, mark: Mark) -> Tool:
    return replace(tool, mark=_longer(tool.mark, mark))


def _longer(one: Mark | None, other: Mark | None) -> Mark | None:
    """Of two marks at one place, the one whose prefix is to live longer."""
    if one is None or other is None:
        return one or other
    return max(one, other, key=lambda mark: mark.ttl_s or 0)
