import json
from itertools import accumulate

import pytest
from blake3 import blake3
from msgspec.structs import replace

from keepwarm.cache.tools import (
    SECTION_VERSION,
    as_text,
    detect_format,
    either,
    json_value,
    told_failed,
    tool_grammar,
    tool_values,
)
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.prompt import ToolFormat
from keepwarm.core.request import Mark, Message, TextPart, Tool, ToolCall, ToolChoice, ToolMode

WEATHER = Tool("get_weather", "Weather of a city", '{"type": "object",\n "properties": {"city": {"type": "string"}}}')
CLOCK = Tool("now", "", "{}")
REQUIRED = ToolChoice(ToolMode.REQUIRED)


def says(role: str, text: str, **more: object) -> Message:
    return Message(role, (TextPart(text),), **more)


def echo_gbnf(schema: str) -> str:
    """A converter that shows what it was given, with every kind of thing that must not be renamed."""
    return f'item ::= root [a-z\\]] "root \\" item" # root\nroot ::= "{len(schema)}" item'


@pytest.mark.parametrize(
    "template, expected",
    [
        ("…<tool_call>{{ call | tojson }}</tool_call>…", ToolFormat.HERMES),
        ("{{ '[TOOL_CALLS] [' }}", ToolFormat.MISTRAL),
        ("{{ '<|python_tag|>' }}", ToolFormat.LLAMA3),
        ("""{{- '"parameters": ' }}""", ToolFormat.LLAMA3),
        ("{{ message.content }}", None),
        ("<tool_call>\n<function=name>", None),
        ("<tool_call>name<arg_key>", None),
    ],
)
def test_the_format_is_read_off_the_template(template: str, expected: ToolFormat | None) -> None:
    assert detect_format(template) is expected


def test_tools_as_templates_expect_them() -> None:
    assert tool_values([WEATHER]) == [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "description": "Weather of a city",
                "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
            },
        }
    ]


@pytest.mark.parametrize("text", ["no JSON", '{"a":', "[" * 100 + "]" * 100, "[" * 100_000])
def test_what_is_no_json_stays_text(text: str) -> None:
    assert json_value(text) == text


def test_the_section_comes_before_the_clients_system_text() -> None:
    system, user = as_text([says("system", "Be brief."), says("user", "Hi")], [WEATHER, CLOCK])
    assert user == says("user", "Hi")
    assert system.text.startswith("# Tools\n")
    lines = system.text.split("<tools>\n")[1].split("\n</tools>")[0].splitlines()
    assert [json.loads(line)["function"]["name"] for line in lines] == ["get_weather", "now"]
    assert system.text.endswith(
        '<tool_call>\n{"name": "function name", "arguments": {"parameter": "value"}}\n</tool_call>'
        "\n\n# Instructions\n\nBe brief."
    )


def test_other_system_text_keeps_the_tools_prefix() -> None:
    alone, short, long = (
        as_text(messages, [WEATHER, CLOCK])[0].text
        for messages in ([], [says("system", "Be brief.")], [says("system", "Say more. " * 9)])
    )
    assert short.startswith(alone) and long.startswith(alone)


def test_without_a_system_message_the_section_is_one() -> None:
    system, user = as_text([says("user", "Hi")], [WEATHER])
    assert (system.role, user.text) == ("system", "Hi")
    assert system.text.startswith("# Tools\n")


def test_the_section_is_pinned_to_its_version() -> None:
    # The words are in stored prefixes: whoever changes them changes the version, and then this digest.
    digest = blake3(as_text([says("system", "x")], [CLOCK])[0].text.encode()).hexdigest()
    assert (SECTION_VERSION, digest[:12]) == (2, "d01a4848bbf9")


def test_without_tools_nothing_is_added() -> None:
    messages = (says("system", "x"), says("user", "y"))
    assert as_text(messages, []) == messages


def test_breakpoints_survive() -> None:
    marked = Message("system", (TextPart("one", mark=Mark()),))
    tools = [replace(WEATHER, mark=Mark(300)), CLOCK, replace(CLOCK, name="then", mark=Mark(3600))]
    assert marks_of(as_text([marked], tools)[0]) == [
        ('"city": {"type": "string"}}}}}', Mark(300)),
        ('{"name": "then", "description": "", "parameters": {}}}', Mark(3600)),
        ("Instructions\n\none", Mark()),
    ]


def test_a_mark_behind_calls_or_a_result_is_behind_their_text() -> None:
    conversation = [
        says("assistant", "Well.", tool_calls=(ToolCall("1", "now", "{}"),), mark=Mark(300)),
        says("tool", "noon", tool_call_id="1", mark=Mark(3600)),
        says("tool", "late", tool_call_id="1"),
    ]
    called, results = as_text(conversation, [])
    assert marks_of(called) == [("\n</tool_call>", Mark(300))]
    assert called.mark is None
    assert marks_of(results) == [("noon\n</tool_response>", Mark(3600))]


def marks_of(message: Message) -> list[tuple[str, Mark]]:
    """Each mark with the end of the text before it."""
    ends = accumulate(part.text for part in message.texts)
    marked = [(text, part.mark) for text, part in zip(ends, message.texts, strict=True) if part.mark is not None]
    return [(next(end for end in ENDS if text.endswith(end)), mark) for text, mark in marked]


ENDS = (
    '"city": {"type": "string"}}}}}',
    '{"name": "then", "description": "", "parameters": {}}}',
    "Instructions\n\none",
    "noon\n</tool_response>",
    "\n</tool_call>",
)


def test_a_failed_result_says_so_once() -> None:
    def told(text: str, is_error: bool = True) -> str:
        return told_failed(says("tool", text, tool_call_id="1", is_error=is_error)).text

    assert told("no such file") == "Error: no such file"
    assert told("error 404") == "error 404"
    assert told(" ERROR\n") == " ERROR\n"
    assert told("") == "Error: "
    assert told("fine", is_error=False) == "fine"


def test_reasoning_is_no_text() -> None:
    thought = says("assistant", "4", reasoning="2 and 2", tool_calls=(ToolCall("1", "now", "{}"),))
    (shown,) = as_text([thought], [])
    assert "2 and 2" not in shown.text
    assert shown.reasoning == "2 and 2"


def test_calls_and_results_are_text() -> None:
    calls = (ToolCall("1", "get_weather", '{"city":"Paris"}'), ToolCall("2", "now", "broken"))
    conversation = [
        says("user", "Weather?"),
        says("assistant", "Let me see.", tool_calls=calls),
        says("tool", "17 °C", tool_call_id="1"),
        Message("tool", (TextPart("noon", mark=Mark()),), tool_call_id="2"),
        says("assistant", "", tool_calls=calls[:1]),
        says("tool", "18 °C", tool_call_id="1"),
    ]
    asked, called, results, again, result = as_text(conversation, [])
    first = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    second = '<tool_call>\n{"name": "now", "arguments": "broken"}\n</tool_call>'
    assert asked == conversation[0]
    assert called == Message("assistant", (TextPart("Let me see."), TextPart(f"\n{first}\n{second}")))
    assert (results.role, results.text) == (
        "user",
        "<tool_response>\n17 °C\n</tool_response>\n<tool_response>\nnoon\n</tool_response>",
    )
    assert TextPart("noon", mark=Mark()) in results.parts
    assert again == Message("assistant", (TextPart(""), TextPart(first)))
    assert (result.role, result.text) == ("user", "<tool_response>\n18 °C\n</tool_response>")


@pytest.mark.parametrize("mode", [ToolMode.AUTO, ToolMode.NONE])
def test_a_choice_that_forces_nothing_has_no_grammar(mode: ToolMode) -> None:
    assert grammar(ToolFormat.HERMES, ToolChoice(mode)) is None


def grammar(tool_format: ToolFormat, choice: ToolChoice, *tools: Tool) -> str | None:
    return tool_grammar(tool_format, tools or (WEATHER,), choice, echo_gbnf, schema_bytes_max=1000)


@pytest.mark.parametrize(
    "tool_format, root, head",
    [
        (ToolFormat.HERMES, 'root ::= "<tool_call>\\n" call "\\n</tool_call>"', "arguments"),
        (ToolFormat.MISTRAL, 'root ::= "[TOOL_CALLS][" call "]"', "arguments"),
        (ToolFormat.LLAMA3, "root ::= call", "parameters"),
    ],
)
def test_a_required_call_in_each_format(tool_format: ToolFormat, root: str, head: str) -> None:
    lines = (grammar(tool_format, REQUIRED) or "").splitlines()
    assert lines[0] == root
    assert lines[1] == f'call ::= "{{\\"name\\": \\"get_weather\\", \\"{head}\\": " tool0-root "}}"'


def test_rules_of_tools_do_not_mix_and_literals_stay() -> None:
    text = grammar(ToolFormat.HERMES, REQUIRED, WEATHER, CLOCK) or ""
    assert '\ntool0-item ::= tool0-root [a-z\\]] "root \\" item" # root\ntool0-root ::= ' in text
    assert (
        f'tool1-root ::= "{len("{") + len(chr(34) * 2 + "type" + ":" + chr(34) * 2 + "object" + "}")}" tool1-item'
        in text
    )
    assert text.splitlines()[1].count(" | ") == 1


def test_a_named_call_allows_that_tool_only() -> None:
    text = grammar(ToolFormat.HERMES, ToolChoice(ToolMode.NAMED, "now"), WEATHER, CLOCK) or ""
    assert "now" in text
    assert "get_weather" not in text


@pytest.mark.parametrize("choice", [ToolChoice(ToolMode.NAMED, "other"), REQUIRED])
def test_a_choice_without_a_tool_is_refused(choice: ToolChoice) -> None:
    tools = () if choice.mode is ToolMode.REQUIRED else (WEATHER,)
    with pytest.raises(ApiError) as caught:
        tool_grammar(ToolFormat.HERMES, tools, choice, echo_gbnf, schema_bytes_max=1000)
    assert (caught.value.kind, caught.value.param) == (ErrorKind.INVALID_REQUEST, "tool_choice")


def test_a_schema_that_cannot_be_forced_is_refused_with_its_path() -> None:
    bad = Tool("bad", "", '{"$ref": "https://example.org/x"}')
    with pytest.raises(ApiError, match="only references inside") as caught:
        grammar(ToolFormat.HERMES, REQUIRED, WEATHER, bad)
    assert caught.value.param == "tools[1].function.parameters"


def test_either_allows_each() -> None:
    assert either(['root ::= "a"', 'root ::= x\nx ::= "b"']).splitlines() == [
        "root ::= any0-root | any1-root",
        'any0-root ::= "a"',
        "any1-root ::= any1-x",
        'any1-x ::= "b"',
    ]
