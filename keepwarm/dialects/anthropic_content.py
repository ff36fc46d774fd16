"""Anthropic's content blocks in neutral messages.

What follows each other in one role is one turn; texts of different messages in it are kept apart by a blank line. Of a user
turn, tool results come first, as messages of the role "tool", and everything else is one user message behind them. Of an
assistant turn, texts, thoughts and calls each keep their order, and the texts come before the calls. A last assistant turn
is what the answer continues. Documents with text of their own become text here, files are left to the gateway, and what a
text model cannot read is refused by name. Thinking is taken as it is: signatures are not checked.
"""

import binascii
import re
from collections.abc import Iterator, Sequence
from itertools import groupby

from msgspec import Struct
from msgspec.structs import replace

from keepwarm.core.document import ATTRIBUTE_ESCAPES, document_text
from keepwarm.core.request import DocumentPart, Mark, Message, Part, Role, TextPart, ToolCall
from keepwarm.dialects import WireBounds
from keepwarm.dialects.anthropic_block import ROLES, BlockSource, Content, ContentBlock, MessageParam, placed
from keepwarm.dialects.anthropic_marks import Marks
from keepwarm.dialects.body import invalid, passed_on, quoted

TURN_GAP = "\n\n"  # between the texts of messages that are one turn
FILE_TYPES = ("application/pdf", "text/plain")

_RESULT_TAG = re.compile(r"<(?=[\\/\s]*search_result)", re.IGNORECASE)


class Turn(Struct, frozen=True):
    """Messages of one role that follow each other: their blocks with their paths, message by message."""

    role: Role
    path: str
    messages: tuple[tuple[tuple[str, ContentBlock], ...], ...]

    @property
    def blocks(self) -> Iterator[tuple[str, ContentBlock]]:
        for blocks in self.messages:
            yield from blocks


def neutral_messages(
    system: Content | None, messages: Sequence[MessageParam], marks: Marks, bounds: WireBounds
) -> tuple[Message, ...]:
    """The whole conversation. Raises ApiError(INVALID_REQUEST)."""
    neutral: list[Message] = []
    instructions = tuple(placed(system, "system"))
    if instructions:
        neutral.append(_system(Turn("system", "system", (instructions,)), marks))
    turns = list(_turns(messages))
    for turn in turns:
        if turn.role == "user":
            neutral += _user(turn, marks)
        elif turn.role == "system":
            neutral.append(_system(turn, marks))
        else:
            neutral.append(_assistant(turn, marks, bounds))
    if turns[-1].role == "assistant":
        neutral[-1] = _continued(turns[-1], neutral[-1])
    return tuple(neutral)


def _turns(messages: Sequence[MessageParam]) -> Iterator[Turn]:
    """Raises ApiError(INVALID_REQUEST) for an unknown role and for a message without content that is no prefill."""
    last = len(messages) - 1
    for role, run in groupby(enumerate(messages), key=lambda numbered: numbered[1].role):
        said = {i: tuple(placed(message.content, f"messages[{i}].content")) for i, message in run}
        first = f"messages[{next(iter(said))}]"
        neutral = _role(role, first)
        for i, blocks in said.items():
            if not blocks and (neutral != "assistant" or i < last):
                raise invalid(f"messages[{i}].content", "must not be empty")
        yield Turn(neutral, f"{first}.content", tuple(said.values()))


def _role(role: str, path: str) -> Role:
    match role:
        case "user" | "assistant" | "system":
            return role
        case _:
            raise invalid(f"{path}.role", f"{quoted(role)} is not one of {', '.join(ROLES)}")


def _system(turn: Turn, marks: Marks) -> Message:
    for path, block in turn.blocks:
        if block.type != "text":
            raise invalid(f"{path}.type", f"{quoted(block.type)} is not possible in a system text, only 'text' is")
    return Message("system", _parts(turn, marks))


def _user(turn: Turn, marks: Marks) -> Iterator[Message]:
    n_results = 0
    for path, block in turn.blocks:
        if block.type == "tool_result":
            n_results += 1
            yield _tool_result(path, block, marks)
    parts = _parts(turn, marks)
    if parts or not n_results:
        yield Message("user", parts)


def _assistant(turn: Turn, marks: Marks, bounds: WireBounds) -> Message:
    calls: list[ToolCall] = []
    thoughts: list[str] = []
    mark: Mark | None = None
    for path, block in turn.blocks:
        if block.type == "tool_use":
            calls.append(_tool_call(path, block, bounds))
            mark = _longer(mark, marks.get(path))
        elif block.type == "thinking":
            thoughts.append(_required(block.thinking, f"{path}.thinking"))
        elif block.type not in ("text", "redacted_thinking"):
            raise invalid(f"{path}.type", f"{quoted(block.type)} is not possible in an assistant message")
    reasoning = "\n".join(thought for thought in thoughts if thought) or None
    return Message("assistant", _parts(turn, marks), tool_calls=tuple(calls), mark=mark, reasoning=reasoning)


def _continued(turn: Turn, message: Message) -> Message:
    """`message` as the beginning of the answer. Raises ApiError(INVALID_REQUEST) where nothing can go on."""
    blocks = list(turn.blocks)
    path, kind = (blocks[-1][0], blocks[-1][1].type) if blocks else (turn.path, "")
    if message.tool_calls:
        raise invalid(path, "the last message is continued, so it can hold no tool_use; send its tool_result behind it")
    if kind in ("thinking", "redacted_thinking"):
        raise invalid(path, "the last block of a message that is continued cannot be thinking")
    if message.text != message.text.rstrip():
        # Anthropic refuses it, too: a model's words begin with their space, so the answer would not be what it is without.
        raise invalid(path, "final assistant content cannot end with trailing whitespace")
    return replace(message, partial=True)


def _parts(turn: Turn, marks: Marks) -> tuple[Part, ...]:
    """What the turn says, tool results, calls and thoughts aside."""
    elsewhere = ("tool_use", "thinking", "redacted_thinking") if turn.role == "assistant" else ("tool_result",)
    parts: list[Part] = []
    for blocks in turn.messages:
        new = [
            _part(path, block, marks, in_answer=turn.role == "assistant")
            for path, block in blocks
            if block.type not in elsewhere
        ]
        if parts and new:
            first = new[0]
            if isinstance(first, TextPart):
                new[0] = replace(first, text=TURN_GAP + first.text)
            else:
                new.insert(0, TextPart(TURN_GAP))
        parts += new
    return tuple(parts)


def _part(path: str, block: ContentBlock, marks: Marks, *, in_answer: bool = False) -> Part:
    mark = marks.get(path)
    match block.type:
        case "text":
            if block.citations and not in_answer:
                raise invalid(f"{path}.citations", "must be empty on text that a client sends")
            return TextPart(_required(block.text, f"{path}.text"), mark)
        case "document":
            return _document(path, block, mark)
        case "search_result":
            return TextPart(_search_result(path, block), mark)
        case "image":
            raise invalid(f"{path}.type", "'image' blocks are not supported, the model reads text only")
        case _:
            raise invalid(f"{path}.type", f"{quoted(block.type)} blocks are not supported here")


def _document(path: str, block: ContentBlock, mark: Mark | None) -> Part:
    _refuse_citations(path, block)
    source = block.source
    if not isinstance(source, BlockSource):
        raise invalid(f"{path}.source", "is required and must be an object")
    match source.type:
        case "text":
            text = _required(source.data, f"{path}.source.data")
            return TextPart(document_text(block.title, block.context, text), mark)
        case "content":
            if source.content is None:
                raise invalid(f"{path}.source.content", "is required")
            text = _texts(source.content, f"{path}.source.content")
            return TextPart(document_text(block.title, block.context, text), mark)
        case "base64":
            return _file(path, block, source, mark)
        case "url":
            raise invalid(
                f"{path}.source.type", "'url' is not supported, this server fetches nothing; send the content"
            )
        case "file":
            raise invalid(
                f"{path}.source.type", "'file' is not supported, this server keeps no files; send the content"
            )
        case _:
            raise invalid(f"{path}.source.type", f"{quoted(source.type)} is not one of text, content, base64")


def _file(path: str, block: ContentBlock, source: BlockSource, mark: Mark | None) -> DocumentPart:
    media_type = _required(source.media_type, f"{path}.source.media_type")
    if media_type not in FILE_TYPES:
        raise invalid(f"{path}.source.media_type", f"{quoted(media_type)} is not one of {', '.join(FILE_TYPES)}")
    text = _required(source.data, f"{path}.source.data")
    try:
        data = binascii.a2b_base64("".join(text.split()), strict_mode=True)
    except ValueError as exc:  # binascii.Error is one, and so is what is not ASCII
        raise invalid(f"{path}.source.data", "is not valid base64") from exc
    return DocumentPart(media_type, data, path, title=block.title, context=block.context, mark=mark)


def _search_result(path: str, block: ContentBlock) -> str:
    """One rendering, so that one result is one prefix; no text can end its own result (as in `document_text`)."""
    _refuse_citations(path, block)
    if not isinstance(block.source, str):
        raise invalid(f"{path}.source", "is required and must be a string")
    title = _required(block.title, f"{path}.title")
    if not isinstance(block.content, tuple):
        raise invalid(f"{path}.content", "is required and must be a list of text blocks")
    text = _RESULT_TAG.sub("<" + chr(92) * 2, _texts(block.content, f"{path}.content"))
    shown = f'source="{block.source.translate(ATTRIBUTE_ESCAPES)}" title="{title.translate(ATTRIBUTE_ESCAPES)}"'
    return f"<search_result {shown}>\n{text}\n</search_result>\n"


def _texts(content: Content, path: str) -> str:
    """Text blocks inside another block, paragraph by paragraph."""
    found = []
    for inner_path, block in placed(content, path):
        if block.type != "text":
            raise invalid(f"{inner_path}.type", f"{quoted(block.type)} is not possible here, only 'text' is")
        if block.cache_control is not None:
            raise invalid(f"{inner_path}.cache_control", "cannot be set here, set it on the block around it")
        found.append(_required(block.text, f"{inner_path}.text"))
    return TURN_GAP.join(found)


def _tool_call(path: str, block: ContentBlock, bounds: WireBounds) -> ToolCall:
    call_id, name = _required(block.id, f"{path}.id"), _required(block.name, f"{path}.name")
    if block.input is None:
        raise invalid(f"{path}.input", "is required")
    return ToolCall(call_id, name, passed_on(block.input, f"{path}.input", bounds))


def _tool_result(path: str, block: ContentBlock, marks: Marks) -> Message:
    if isinstance(block.content, dict):
        raise invalid(f"{path}.content", "must be a string or a list of blocks")
    parts = [_part(inner_path, inner, marks) for inner_path, inner in placed(block.content, f"{path}.content")]
    mark = marks.get(path)
    if parts and mark is not None:
        parts[-1] = replace(parts[-1], mark=_longer(parts[-1].mark, mark))
        mark = None
    return Message(
        "tool",
        tuple(parts),
        tool_call_id=_required(block.tool_use_id, f"{path}.tool_use_id"),
        mark=mark,
        is_error=bool(block.is_error),
    )


def _refuse_citations(path: str, block: ContentBlock) -> None:
    if isinstance(block.citations, dict) and block.citations.get("enabled"):
        raise invalid(f"{path}.citations", "are not supported, the model cannot cite")


def _required(value: str | None, path: str) -> str:
    if value is None:
        raise invalid(path, "is required")
    return value


def _longer(one: Mark | None, other: Mark | None) -> Mark | None:
    if one is None or other is None:
        return one or other
    return one if (one.ttl_s or 0) >= (other.ttl_s or 0) else other
