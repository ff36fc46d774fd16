"""Gemini's contents as types, and their way into neutral messages.

A content is a turn; those that follow each other in one role stay apart, as they do in a cachedContent and what is asked of
it. Of a user turn, function responses come first, as messages of the role "tool", and everything else is one user message
behind them. Of a model turn, texts, thoughts and calls each keep their order, and the texts come before the calls. Thought
signatures are accepted and not checked. Files in the request or uploaded before are left to the gateway; what a text model
cannot read is refused by name, with what it can.

Ids of calls are optional in this API. Those left out are counted on over the conversation as Kimi's are ("get_weather:2"), so
that they stay the same from turn to turn; a response without one answers the first open call of its name.
"""

import binascii
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from keepwarm.core.request import DocumentPart, FilePart, Message, Part, TextPart, ToolCall
from keepwarm.dialects import WireBounds
from keepwarm.dialects.body import invalid, passed_on, quoted, require_at_most

ROLES = ("user", "model", "function")  # "function": what "user" was called around responses before
MODALITIES = "TEXT"  # in the API's words; documents are read as text
MEDIA_KINDS = ("image/", "audio/", "video/")
KINDS = {  # the members of a part of which it has exactly one
    "text": "text",
    "inlineData": "inline_data",
    "fileData": "file_data",
    "functionCall": "function_call",
    "functionResponse": "function_response",
    "executableCode": "executable_code",
    "codeExecutionResult": "code_execution_result",
}

_FILE_URI = re.compile(r"(?:[^?#]*/)?files/(?P<id>[A-Za-z0-9_-]{1,64})", re.ASCII)
_STANDARD_BASE64 = str.maketrans("-_", "+/")


class GeminiBlob(Struct, rename="camel"):
    """A file in the request; `data` is base64, of either alphabet."""

    mime_type: str | None = None
    data: str | None = None
    display_name: str | None = None


class GeminiFileData(Struct, rename="camel"):
    """A file that was uploaded before; `file_uri` is its `uri` or its `name`."""

    file_uri: str | None = None
    mime_type: str | None = None


class GeminiFunctionCall(Struct, rename="camel"):
    """A call the model made."""

    name: str | None = None
    args: dict[str, Any] | None = None
    id: str | None = None


class GeminiFunctionResponse(Struct, rename="camel"):
    """What a call came to. `response` is the function's output, or has it in "output", or what went wrong in "error"."""

    name: str | None = None
    response: dict[str, Any] | None = None
    id: str | None = None
    parts: Any = None


class GeminiPart(Struct, rename="camel"):
    """A piece of a content: exactly one of the members but `thought`, which marks a text as what the model thought."""

    text: str | None = None
    thought: bool | None = None
    inline_data: GeminiBlob | None = None
    file_data: GeminiFileData | None = None
    function_call: GeminiFunctionCall | None = None
    function_response: GeminiFunctionResponse | None = None
    executable_code: Any = None
    code_execution_result: Any = None


class GeminiTurn(Struct, rename="camel"):
    """A content: one turn of the conversation. In a systemInstruction the role does not matter."""

    parts: tuple[GeminiPart, ...] | None = None
    role: Annotated[str, Meta(extra_json_schema={"enum": list(ROLES)})] | None = None


def system_message(instruction: GeminiTurn | None, path: str = "systemInstruction") -> tuple[Message, ...]:
    """The system message, if there are instructions. Raises ApiError(INVALID_REQUEST)."""
    parts: list[Part] = []
    for part_path, part in _parts_of(instruction or GeminiTurn(), path):
        if _kind(part, part_path) != "text":
            raise invalid(part_path, "a system instruction can hold text only")
        parts.append(TextPart(part.text or ""))
    return (Message("system", tuple(parts)),) if parts else ()


def neutral_contents(contents: Sequence[GeminiTurn], bounds: WireBounds, path: str = "contents") -> tuple[Message, ...]:
    """Raises ApiError(INVALID_REQUEST)."""
    require_at_most(contents, bounds.messages_max, path, "contents")
    ids = _CallIds()
    neutral: list[Message] = []
    for i, content in enumerate(contents):
        role = "user" if content.role is None else content.role
        if role not in ROLES:
            raise invalid(f"{path}[{i}].role", f"{quoted(role)} is not valid. Please use a valid role: user, model.")
        placed = list(_parts_of(content, f"{path}[{i}]"))
        if not placed:
            raise invalid(f"{path}[{i}].parts", "contents.parts must not be empty.")
        if role == "model":
            neutral.append(_model(placed, ids, bounds))
        else:
            neutral += _user(placed, ids, bounds)
    return tuple(neutral)


class _CallIds:
    """Ids of calls over a conversation: the client's where it sends them, else counted on."""

    def __init__(self) -> None:
        self._n_calls = 0
        self._known: set[str] = set()
        self._open: list[tuple[str, str]] = []  # name and id of calls without a response so far

    def called(self, name: str, given: str | None) -> str:
        number = self._n_calls
        while not given and f"{name}:{number}" in self._known:  # the client has given it to another call
            number += 1
        call_id = given or f"{name}:{number}"
        self._n_calls += 1
        self._known.add(call_id)
        self._open.append((name, call_id))
        return call_id

    def answered(self, name: str, given: str | None) -> str:
        """The id of the call that a response belongs to. One of an earlier conversation, in a cache, is not known here."""
        found = next((call for call in self._open if (call[1] == given if given else call[0] == name)), None)
        if found is None:
            return given or f"{name}:{self._n_calls}"
        self._open.remove(found)
        return found[1]


def _parts_of(content: GeminiTurn, path: str) -> Iterator[tuple[str, GeminiPart]]:
    for j, part in enumerate(content.parts or ()):
        yield f"{path}.parts[{j}]", part


def _kind(part: GeminiPart, path: str) -> str:
    kinds = [kind for kind, member in KINDS.items() if getattr(part, member) is not None]
    if not kinds:
        raise invalid(f"{path}.data", "required oneof field 'data' must have one initialized field")
    if len(kinds) > 1:
        raise invalid(f"{path}.{kinds[1]}", f"oneof field 'data' is already set, by {kinds[0]}")
    if kinds[0] in ("executableCode", "codeExecutionResult"):
        raise invalid(f"{path}.{kinds[0]}", "is not supported, this server executes no code")
    return kinds[0]


def _model(placed: Sequence[tuple[str, GeminiPart]], ids: _CallIds, bounds: WireBounds) -> Message:
    texts: list[TextPart] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for path, part in placed:
        kind = _kind(part, path)
        if part.function_call is not None:
            calls.append(_call(part.function_call, f"{path}.functionCall", ids, bounds))
        elif part.text is None:
            raise invalid(f"{path}.{kind}", "is not possible in a content of the role 'model'")
        elif part.thought:
            thoughts.append(part.text)
        else:
            texts.append(TextPart(part.text))
    return Message("assistant", tuple(texts), tool_calls=tuple(calls), reasoning="".join(thoughts) or None)


def _user(placed: Sequence[tuple[str, GeminiPart]], ids: _CallIds, bounds: WireBounds) -> list[Message]:
    results: list[Message] = []
    parts: list[Part] = []
    for path, part in placed:
        match _kind(part, path):
            case "functionResponse":
                assert part.function_response is not None
                results.append(_result(part.function_response, f"{path}.functionResponse", ids, bounds))
            case "functionCall":
                raise invalid(f"{path}.functionCall", "is possible in a content of the role 'model' only")
            case _:
                parts.append(_part(part, path))
    return [*results, Message("user", tuple(parts))] if parts else results


def _part(part: GeminiPart, path: str) -> Part:
    if part.inline_data is not None:
        return _document(part.inline_data, f"{path}.inlineData")
    if part.file_data is not None:
        return _file(part.file_data, f"{path}.fileData")
    assert part.text is not None
    return TextPart(part.text)


def _document(blob: GeminiBlob, path: str) -> DocumentPart:
    media_type = _required(blob.mime_type, f"{path}.mimeType")
    _refuse_media(media_type, f"{path}.mimeType")
    if blob.data is None:
        raise invalid(f"{path}.data", "is required")
    text = "".join(blob.data.split()).rstrip("=")
    try:
        padded = text.translate(_STANDARD_BASE64) + "=" * (-len(text) % 4)
        data = binascii.a2b_base64(padded, strict_mode=True)
    except ValueError as exc:  # binascii.Error is one, and so is what is not ASCII
        raise invalid(f"{path}.data", "Base64 decoding failed") from exc
    return DocumentPart(media_type, data, path, title=blob.display_name)


def _file(file: GeminiFileData, path: str) -> FilePart:
    _refuse_media(file.mime_type or "", f"{path}.mimeType")
    uri = _required(file.file_uri, f"{path}.fileUri")
    found = _FILE_URI.fullmatch(uri)
    if found is None:
        problem = f"{quoted(uri)} is not the uri or the name of an uploaded file; this server fetches nothing else"
        raise invalid(f"{path}.fileUri", problem)
    return FilePart(found["id"], f"{path}.fileUri")


def _refuse_media(media_type: str, path: str) -> None:
    if media_type.lower().startswith(MEDIA_KINDS):
        problem = f"{quoted(media_type)} cannot be read: the model's input modalities are {MODALITIES}"
        raise invalid(path, f"{problem} (of files PDF, DOCX, PPTX, XLSX, HTML and text of any kind)")


def _call(call: GeminiFunctionCall, path: str, ids: _CallIds, bounds: WireBounds) -> ToolCall:
    name = _required(call.name, f"{path}.name")
    return ToolCall(ids.called(name, call.id), name, passed_on(call.args or {}, f"{path}.args", bounds))


def _result(found: GeminiFunctionResponse, path: str, ids: _CallIds, bounds: WireBounds) -> Message:
    name = _required(found.name, f"{path}.name")
    if found.parts:
        raise invalid(f"{path}.parts", f"are not supported, the model's input modalities are {MODALITIES}")
    if found.response is None:
        raise invalid(f"{path}.response", "is required")
    whole = passed_on(found.response, f"{path}.response", bounds)
    return Message(
        "tool",
        (TextPart(_said(found.response, whole)),),
        tool_call_id=ids.answered(name, found.id),
        is_error=bool(found.response.get("error")),
    )


def _said(response: dict[str, Any], whole: str) -> str:
    """A lone "output" or "error" is what the function said; a string is told without quotes, as other dialects send it."""
    if len(response) != 1:
        return whole
    ((key, value),) = response.items()
    if key not in ("output", "error"):
        return whole
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _required(value: str | None, path: str) -> str:
    if not value:
        raise invalid(path, "is required")
    return value
