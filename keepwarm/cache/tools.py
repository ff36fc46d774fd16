r"""Tools for a model: how it writes calls, what it is told when its template knows no tools, a grammar that forces a call.

A template that has a part for tools gets them as it expects. For any other one (SmolLM2's, for example) the tools become
a section of the system message, in the form that Hermes models made common, and the tool messages of a conversation
become text in the same form, because such a template knows no role "tool" either:

    # Tools                                            before the client's own system text, or as a system message put first
    <tools>
    {"type": "function", "function": {…}}              one line for each tool
    </tools>
    <tool_call>\n{"name": …, "arguments": {…}}\n</tool_call>       an assistant's call, after its text
    <tool_response>\n…\n</tool_response>                          results, those in a row together in one user message

The section comes first so that the order is tools, system, messages: other system text keeps the tools' prefix.
Change `SECTION_VERSION` with any of these words: it is part of the template's digest, so stored prefixes do not mix.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import msgspec
from msgspec.structs import replace

from keepwarm.cache.schema import depth, schema_grammar
from keepwarm.cache.template import Json, dumps
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.prompt import ToolFormat
from keepwarm.core.request import Message, TextPart, Tool, ToolCall, ToolChoice, ToolMode

SECTION_VERSION = 2
DEPTH_MAX = 64  # objects and arrays within each other; templates and we walk them recursively
_BEFORE_TOOLS = """\
# Tools

These functions can be called, each described by one line of JSON:
<tools>
"""
_AFTER_TOOLS = """\
</tools>

To call a function, answer with its name and arguments as JSON inside tool_call tags, once for each call:
<tool_call>
{"name": "function name", "arguments": {"parameter": "value"}}
</tool_call>"""
_BEFORE_SYSTEM = "\n\n# Instructions\n\n"
_TAGGED_OTHERWISE = ("<function=", "<arg_key>")  # calls inside <tool_call> that are not JSON
_CALLS = {  # what stands before a call, the name of its arguments, what stands after it
    ToolFormat.HERMES: ("<tool_call>\n", "arguments", "\n</tool_call>"),
    ToolFormat.LLAMA3: ("", "parameters", ""),
    ToolFormat.MISTRAL: ("[TOOL_CALLS][", "arguments", "]"),
}
_ANY_ARGUMENTS = '{"type":"object"}'
_GBNF_WORD = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*|(?P<rule>[A-Za-z][A-Za-z0-9-]*)')


def detect_format(template: str) -> ToolFormat | None:
    """How a model with this chat template writes calls; None when the template has no part for tools that we read."""
    if "<tool_call>" in template and not any(form in template for form in _TAGGED_OTHERWISE):
        return ToolFormat.HERMES
    if "[TOOL_CALLS]" in template:
        return ToolFormat.MISTRAL
    if "<|python_tag|>" in template or '"parameters":' in template:
        return ToolFormat.LLAMA3
    return None


def tool_values(tools: Sequence[Tool]) -> list[Json]:
    """Tools as templates expect them: OpenAI's shape, with the schema as an object."""
    return [
        {
            "type": "function",
            "function": {"name": t.name, "description": t.description, "parameters": json_value(t.parameters)},
        }
        for t in tools
    ]


def json_value(text: str) -> Json:
    """JSON text as a value; text that is no JSON, or nested too deep, stays text: what a model once wrote may be broken."""
    try:
        value: Json = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text
    return value if depth(value, DEPTH_MAX) <= DEPTH_MAX else text


def as_text(messages: Sequence[Message], tools: Sequence[Tool]) -> tuple[Message, ...]:
    """The conversation for a template that knows no tools: section, calls and results are text, marks stay behind theirs.

    Reasoning stays what it is, no text: a template that knows `reasoning_content` shows it, any other leaves it out, as
    models without such a part in their template have not learnt to read it.
    """
    plain = tuple(_results_as_user_text([_calls_as_text(message) for message in messages]))
    if not tools:
        return plain
    section = tuple(_section(tools))
    if plain and plain[0].role == "system":
        return (replace(plain[0], parts=(*section, TextPart(_BEFORE_SYSTEM), *plain[0].parts)), *plain[1:])
    return (Message("system", section), *plain)


def told_failed(message: Message) -> Message:
    """A tool's result that is an error says so in its text: templates have no other place for that."""
    if not message.is_error or message.text.lstrip()[:5].casefold() == "error":
        return message
    return replace(message, parts=(TextPart("Error: "), *message.parts))


def tool_grammar(
    tool_format: ToolFormat,
    tools: Sequence[Tool],
    choice: ToolChoice,
    to_gbnf: Callable[[str], str],
    *,
    schema_bytes_max: int,
) -> str | None:
    """GBNF that allows exactly one call of one of the allowed tools, or None when `choice` forces none.

    Each tool's schema is converted on its own, so that references inside it ("#/$defs/…") keep their meaning. Raises
    ApiError(INVALID_REQUEST) for a choice without such a tool, and for a schema out of bounds or that cannot be converted.
    """
    if choice.mode in (ToolMode.AUTO, ToolMode.NONE):
        return None
    allowed = [
        (i, tool) for i, tool in enumerate(tools) if choice.mode is ToolMode.REQUIRED or tool.name == choice.name
    ]
    if not allowed:
        wanted = f"names {choice.name!r}" if choice.mode is ToolMode.NAMED else "requires a call"
        raise ApiError(
            ErrorKind.INVALID_REQUEST, f"tool_choice {wanted}, not among {len(tools)} tools", param="tool_choice"
        )
    before, arguments_key, after = _CALLS[tool_format]
    rules, calls = [], []
    for i, tool in allowed:
        schema = _ANY_ARGUMENTS if json_value(tool.parameters) == {} else tool.parameters
        param = f"tools[{i}].function.parameters"
        arguments = schema_grammar(schema, to_gbnf, param=param, bytes_max=schema_bytes_max)
        rules.append(_prefixed(arguments, f"tool{i}-"))
        head = f'{{"name": {json.dumps(tool.name)}, "{arguments_key}": '
        calls.append(f"{_literal(head)} tool{i}-root {_literal('}')}")
    root = " ".join(part for part in (before and _literal(before), "call", after and _literal(after)) if part)
    return "\n".join((f"root ::= {root}", f"call ::= {' | '.join(calls)}", *rules))


def either(grammars: Sequence[str]) -> str:
    """GBNF that allows what any of `grammars` allows."""
    roots = " | ".join(f"any{i}-root" for i in range(len(grammars)))
    return "\n".join((f"root ::= {roots}", *(_prefixed(grammar, f"any{i}-") for i, grammar in enumerate(grammars))))


def _prefixed(grammar: str, prefix: str) -> str:
    """`grammar` with every rule renamed, so that it can stand beside others. Literals and classes are left alone."""
    return _GBNF_WORD.sub(lambda word: prefix + word["rule"] if word["rule"] else word.group(), grammar)


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _section(tools: Sequence[Tool]) -> Iterator[TextPart]:
    yield TextPart(_BEFORE_TOOLS)
    for tool, value in zip(tools, tool_values(tools), strict=True):
        yield TextPart(dumps(value), tool.mark)
        yield TextPart("\n")
    yield TextPart(_AFTER_TOOLS)


def _calls_as_text(message: Message) -> Message:
    if not message.tool_calls:
        return message
    calls = "\n".join(_call_as_text(call) for call in message.tool_calls)
    text = TextPart("\n" + calls if message.text else calls, message.mark)
    return replace(message, parts=(*message.parts, text), tool_calls=(), mark=None)


def _call_as_text(call: ToolCall) -> str:
    value: Json = {"name": call.name, "arguments": json_value(call.arguments)}
    return f"<tool_call>\n{dumps(value)}\n</tool_call>"


def _results_as_user_text(messages: Sequence[Message]) -> Iterator[Message]:
    for is_result, run in groupby(messages, key=lambda message: message.role == "tool"):
        if not is_result:
            yield from run
            continue
        parts: list[TextPart] = []
        for result in run:
            parts += (TextPart("\n<tool_response>\n" if parts else "<tool_response>\n"), *result.texts)
            parts.append(TextPart("\n</tool_response>", result.mark))
        yield Message("user", tuple(parts))
