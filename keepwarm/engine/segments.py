"""Divides an answer's text into text, reasoning and tool calls, in each model family's own notation.

    text ──<think>──> reasoning ──</think>──> text            edge: nothing but white space since the beginning, a call's
    text ──opener──> call ──JSON complete──> after ──> text         or the reasoning's end; decided when more comes
                       └─ not a call: told as text ─> text

| format  | opener           | then                                   | closer         |
|---------|------------------|----------------------------------------|----------------|
| HERMES  | `<tool_call>`    | `{"name": …, "arguments": {…}}`        | `</tool_call>` |
| LLAMA3  | `<|python_tag|>`, or none at an edge | `{"name": …, "parameters": {…}}` | `;` |
| MISTRAL | `[TOOL_CALLS]`   | `[{"name": …, "arguments": {…}}, …]`   |                |

A missing closer is forgiven: a call is complete with its JSON.
"""

from collections.abc import Iterable
from enum import Enum

import msgspec
from msgspec import Raw, Struct

from keepwarm.core.event import Delta, ReasoningDelta, TextDelta, ToolCallDelta
from keepwarm.core.prompt import ToolFormat

THINK, THINK_END = "<think>", "</think>"
_OPENERS = {
    ToolFormat.HERMES: "<tool_call>",
    ToolFormat.LLAMA3: "<|python_tag|>",
    ToolFormat.MISTRAL: "[TOOL_CALLS]",
}
_CLOSERS = {ToolFormat.HERMES: "</tool_call>", ToolFormat.LLAMA3: ";", ToolFormat.MISTRAL: ""}
MARKERS = frozenset((THINK, THINK_END, *_OPENERS.values(), _CLOSERS[ToolFormat.HERMES]))  # told even as control tokens
_SPACE = " \t\r\n"


def begun(text: str, wanted: Iterable[str]) -> int:
    """Length of the longest end of `text` that is the beginning of one of `wanted`, but not all of it."""
    longest = 0
    for word in wanted:
        start = text.find(word[0], max(0, len(text) - len(word) + 1))
        while start >= 0 and len(text) - start > longest:
            if word.startswith(text[start:]):
                longest = len(text) - start
                break
            start = text.find(word[0], start + 1)
    return longest


def joined(deltas: Iterable[Delta]) -> list[Delta]:
    """The same deltas with texts that follow each other made one. None of them carries logprobs yet."""
    merged: list[Delta] = []
    for delta in deltas:
        if merged and isinstance(delta, TextDelta) and isinstance(last := merged[-1], TextDelta):
            merged[-1] = TextDelta(last.text + delta.text)
        else:
            merged.append(delta)
    return merged


class _State(Enum):
    TEXT = "text"
    REASONING = "reasoning"
    CALL = "call"
    AFTER_CALL = "after_call"


class Segments:
    """Reads text in pieces and tells deltas, as early as they are certain."""

    def __init__(self, tool_format: ToolFormat | None, *, reasoning: bool) -> None:
        self.n_calls = 0
        self._format = tool_format
        self._call_opener = _OPENERS[tool_format] if tool_format is not None else None
        self._openers = tuple(opener for opener in (self._call_opener, THINK if reasoning else None) if opener)
        self._state = _State.TEXT
        self._at_edge = bool(self._openers)
        self._held = ""  # not decided yet
        self._opening = ""  # of the call being read: its opener and white space before it, told only if it is no call
        self._span = _JsonSpan("{")
        self._deltas: list[Delta] = []

    @property
    def n_held(self) -> int:
        """Characters held back."""
        return len(self._opening) + len(self._held)

    def feed(self, text: str) -> list[Delta]:
        """The deltas that `text` settles."""
        self._held += text
        while self._held and self._step():
            pass
        deltas, self._deltas = self._deltas, []
        return deltas

    def finish(self) -> list[Delta]:
        """What was held back, at the answer's end. A call cut short is text; what follows a call's JSON is dropped."""
        text, self._held, self._opening = self._opening + self._held, "", ""
        match self._state:
            case _State.REASONING:
                return [ReasoningDelta(text)] if text else []
            case _State.AFTER_CALL:
                return []
            case _State.TEXT if self._at_edge and self.n_calls and not text.strip(_SPACE):
                return []
            case _:
                return [TextDelta(text)] if text else []

    def _step(self) -> bool:
        """Settle some of the held text. False when that takes more of it."""
        match self._state:
            case _State.TEXT:
                return self._at_an_edge() if self._at_edge else self._in_text()
            case _State.REASONING:
                return self._in_reasoning()
            case _State.CALL:
                return self._in_call()
            case _State.AFTER_CALL:
                return self._after_call()

    def _at_an_edge(self) -> bool:
        body = self._held.lstrip(_SPACE)
        if not body or any(len(body) < len(opener) and opener.startswith(body) for opener in self._openers):
            return False
        n_space = len(self._held) - len(body)
        if self._format is ToolFormat.LLAMA3 and body[0] == "{":
            self._open_call(n_space)
        elif self._call_opener is not None and body.startswith(self._call_opener):
            self._open_call(n_space + len(self._call_opener))
        else:
            self._at_edge = False
        return True

    def _in_text(self) -> bool:
        found = [(at, opener) for opener in self._openers if (at := self._held.find(opener)) >= 0]
        if not found:
            self._tell_text(len(self._held) - begun(self._held, self._openers))
            return False
        at, opener = min(found)
        self._tell_text(at)
        if opener == THINK:
            self._held = self._held[len(THINK) :]
            self._state = _State.REASONING
        else:
            self._open_call(len(opener))
        return True

    def _in_reasoning(self) -> bool:
        at = self._held.find(THINK_END)
        n = at if at >= 0 else len(self._held) - begun(self._held, (THINK_END,))
        if n:
            self._deltas.append(ReasoningDelta(self._held[:n]))
        self._held = self._held[n:]
        if at < 0:
            return False
        self._held = self._held[len(THINK_END) :]
        self._state, self._at_edge = _State.TEXT, True
        return True

    def _open_call(self, n_opening: int) -> None:
        self._opening, self._held = self._held[:n_opening], self._held[n_opening:]
        self._state = _State.CALL
        self._span = _JsonSpan("[" if self._format is ToolFormat.MISTRAL else "{")

    def _in_call(self) -> bool:
        n = self._span.read(self._held)
        if n is None:
            return False
        calls = parse_calls(self._format, self._held[:n]) if n else None
        if calls is None:
            self._held = self._opening + self._held
            self._tell_text(len(self._opening) + n)
            self._opening = ""
            self._state, self._at_edge = _State.TEXT, False
            return True
        for name, arguments in calls:
            self._deltas += (ToolCallDelta(self.n_calls, name), ToolCallDelta(self.n_calls, arguments=arguments))
            self.n_calls += 1
        self._opening, self._held = "", self._held[n:]
        self._state, self._at_edge = _State.AFTER_CALL, True
        return True

    def _after_call(self) -> bool:
        closer = _CLOSERS[self._format] if self._format is not None else ""
        body = self._held.lstrip(_SPACE)
        if closer and len(body) < len(closer) and closer.startswith(body):
            return False
        if closer and body.startswith(closer):
            self._held = body[len(closer) :]
        self._state = _State.TEXT
        return True

    def _tell_text(self, n: int) -> None:
        if n:
            self._deltas.append(TextDelta(self._held[:n]))
            self._held = self._held[n:]


class _JsonSpan:
    """Finds where a JSON object or array ends, reading each character once."""

    def __init__(self, first: str) -> None:
        self._first = first
        self._n_read = 0
        self._depth = 0
        self._in_string = self._escaped = False

    def read(self, text: str) -> int | None:
        """Characters up to the value's end in `text` (all of it so far); 0 when it does not begin as it must, None: go on."""
        for at in range(self._n_read, len(text)):
            c = text[at]
            if self._in_string:
                self._read_in_string(c)
            elif self._depth == 0:
                if c == self._first:
                    self._depth = 1
                elif c not in _SPACE:
                    return 0
            elif c == '"':
                self._in_string = True
            elif c in "{[":
                self._depth += 1
            elif c in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return at + 1
        self._n_read = len(text)
        return None

    def _read_in_string(self, c: str) -> None:
        if self._escaped:
            self._escaped = False
        else:
            self._escaped = c == "\\"
            self._in_string = c != '"'


class _WrittenCall(Struct):
    """A call as models write it; `Raw` keeps the arguments' own text."""

    name: str
    arguments: Raw = Raw()
    parameters: Raw = Raw()


def parse_calls(tool_format: ToolFormat | None, text: str) -> list[tuple[str, str]] | None:
    """Names and arguments (JSON text of an object) of the calls in `text`, None when it is not what a call looks like."""
    raw = text.encode()
    try:
        if tool_format is ToolFormat.MISTRAL:
            written = msgspec.json.decode(raw, type=list[_WrittenCall])
        else:
            written = [msgspec.json.decode(raw, type=_WrittenCall)]
        calls = [(call.name, _arguments(call, tool_format)) for call in written]
    except (msgspec.DecodeError, RecursionError):
        return None
    whole = [(name, arguments) for name, arguments in calls if name and arguments is not None]
    return whole if whole and len(whole) == len(calls) else None


def _arguments(call: _WrittenCall, tool_format: ToolFormat | None) -> str | None:
    raw = bytes(call.arguments) or bytes(call.parameters)
    if not raw:
        return None if tool_format is ToolFormat.LLAMA3 else "{}"  # bare JSON with a name only is an answer, not a call
    if raw.startswith(b'"'):  # some models write the arguments as text that holds JSON
        raw = msgspec.json.decode(raw, type=str).encode()
        msgspec.json.decode(raw, type=Raw)
    return raw.decode() if raw.startswith(b"{") else None
