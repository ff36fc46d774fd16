"""Volatile lines that agents put near the top of a prompt ruin every prefix behind them; these rewrite them. Pure, visible.

Each normaliser has a name that `model.normalise` lists, and says of each text what it becomes. What was changed is told
with the turn ("billing-header: system"), never silently. Off unless listed; the default lists the one that no model needs.
A breakpoint stays where it was.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from msgspec.structs import replace

from keepwarm.core.request import ChatRequest, Message, Part, Role, TextPart

_BILLING = re.compile(r"^x-anthropic-billing-header:[^\n]*\n?", re.MULTILINE)


def _billing_header(text: str, role: Role) -> str:
    """Coding agents' first system line, with a checksum that differs in every request. It says nothing to a model."""
    return _BILLING.sub("", text) if role == "system" else text


NORMALISERS: Mapping[str, Callable[[str, Role], str]] = MappingProxyType({"billing-header": _billing_header})


def normalise(request: ChatRequest, names: Sequence[str]) -> tuple[ChatRequest, tuple[str, ...]]:
    """The request with volatile texts rewritten, and what was: "name: place" for each message that changed."""
    changed: list[str] = []
    messages = tuple(_rewritten(message, i, names, changed) for i, message in enumerate(request.messages))
    return (replace(request, messages=messages), tuple(changed)) if changed else (request, ())


def _rewritten(message: Message, i: int, names: Sequence[str], changed: list[str]) -> Message:
    parts: tuple[Part, ...] = message.parts
    for name in names:
        rewrite = NORMALISERS[name]
        now = tuple(
            replace(part, text=rewrite(part.text, message.role)) if isinstance(part, TextPart) else part
            for part in parts
        )
        if now != parts:
            changed.append(f"{name}: {'system' if message.role == 'system' else f'messages[{i}]'}")
            parts = now
    return message if parts == message.parts else replace(message, parts=parts)
