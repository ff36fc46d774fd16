"""The Anthropic dialect's requests: what is refused and by which path, and how blocks become neutral messages."""

import base64
import json
from typing import Any

import pytest

from keepwarm.core.document import document_text
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.request import (
    ChatRequest,
    DocumentPart,
    JsonSchema,
    Mark,
    Message,
    TextPart,
    ToolCall,
    ToolChoice,
    ToolMode,
)
from keepwarm.dialects.anthropic import AnthropicMessages
from tests.golden.transcripts import BOUNDS

ANTHROPIC = AnthropicMessages(BOUNDS)
USER = {"role": "user", "content": "q"}
TOOL = {"name": "f", "input_schema": {"type": "object"}}
CALL = {"type": "tool_use", "id": "t1", "name": "f", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "r"}
SHORT = Mark(300)


def body(**members: Any) -> bytes:
    return json.dumps({"model": "m", "max_tokens": 100, "messages": [USER]} | members).encode()


def blocks(*content: Any, role: str = "user") -> bytes:
    return body(messages=[USER, {"role": "assistant", "content": "a"}, {"role": role, "content": list(content)}])


def assistant(*content: Any) -> bytes:
    return body(messages=[USER, {"role": "assistant", "content": list(content)}, USER])


def document(**source: Any) -> dict[str, Any]:
    return {"type": "document", "source": source}


def parsed(**members: Any) -> ChatRequest:
    return ANTHROPIC.parse_chat({}, body(**members)).request


def turn(*content: Any, role: str = "user") -> tuple[Message, ...]:
    return ANTHROPIC.parse_chat({}, blocks(*content, role=role)).request.messages[2:]


def schema(depth: int) -> dict[str, Any]:
    return {"a": schema(depth - 1)} if depth else {}


THIRD = "messages[2].content[0]"
REFUSED: list[tuple[bytes, str]] = [
    (body(messages=[]), "messages"),
    (body(messages=[USER] * 4097), "messages"),
    (body(model=""), "model"),
    (body(max_tokens=-1), "max_tokens"),
    (body(max_tokens=1.5), "max_tokens"),
    (b'{"model":"m","messages":[{"role":"user","content":"q"}]}', "max_tokens"),
    (body(temperature=1.1), "temperature"),
    (body(top_p=-0.1), "top_p"),
    (body(top_k=-1), "top_k"),
    (body(stop_sequences="a"), "stop_sequences"),
    (body(stop_sequences=["a"] * 17), "stop_sequences"),
    (body(stop_sequences=["a", ""]), "stop_sequences[1]"),
    (body(stop_sequences=["é" * 129]), "stop_sequences[0]"),
    (body(messages=[{"role": "tool", "content": "x"}]), "messages[0].role"),
    (body(messages=[USER, {"role": "assistant"}]), "messages[1].content"),
    (body(messages=[{"role": "user", "content": ""}]), "messages[0].content"),
    (body(messages=[{"role": "user", "content": []}]), "messages[0].content"),
    (body(messages=[{"role": "assistant", "content": ""}, USER]), "messages[0].content"),
    (body(messages=[USER, {"role": "system", "content": ""}]), "messages[1].content"),
    (body(system=[{"type": "image"}]), "system[0].type"),
    (body(system=[{"type": "text"}]), "system[0].text"),
    (body(messages=[USER, {"role": "system", "content": [CALL]}]), "messages[1].content[0].type"),
    (blocks({"type": "image", "source": {"type": "url", "url": "https://x"}}), f"{THIRD}.type"),
    (blocks({"type": "container_upload", "file_id": "f"}), f"{THIRD}.type"),
    (blocks({"type": "web_search_tool_result", "tool_use_id": "s", "content": {"type": "error"}}), f"{THIRD}.type"),
    (blocks({"type": "thinking", "thinking": "x"}), f"{THIRD}.type"),
    (blocks(CALL), f"{THIRD}.type"),
    (blocks({"type": "text"}), f"{THIRD}.text"),
    (blocks({"type": "text", "text": "x", "citations": [{}]}), f"{THIRD}.citations"),
    (blocks(document(type="url", url="https://x")), f"{THIRD}.source.type"),
    (blocks(document(type="file", file_id="f")), f"{THIRD}.source.type"),
    (blocks(document(type="text")), f"{THIRD}.source.data"),
    (blocks(document(type="content")), f"{THIRD}.source.content"),
    (blocks(document(type="content", content=[{"type": "image"}])), f"{THIRD}.source.content[0].type"),
    (blocks(document(type="base64", media_type="image/png", data="")), f"{THIRD}.source.media_type"),
    (blocks(document(type="base64", media_type="application/pdf", data="a")), f"{THIRD}.source.data"),
    (blocks(document(type="base64", media_type="application/pdf", data="é===")), f"{THIRD}.source.data"),
    (blocks({"type": "document"}), f"{THIRD}.source"),
    (blocks(document(type="text", data="x") | {"citations": {"enabled": True}}), f"{THIRD}.citations"),
    (blocks({"type": "search_result", "title": "t", "content": []}), f"{THIRD}.source"),
    (blocks({"type": "search_result", "source": "s", "content": []}), f"{THIRD}.title"),
    (blocks({"type": "search_result", "source": "s", "title": "t", "content": "x"}), f"{THIRD}.content"),
    (blocks({"type": "tool_result", "content": "x"}), f"{THIRD}.tool_use_id"),
    (blocks({"type": "tool_result", "tool_use_id": "t", "content": {}}), f"{THIRD}.content"),
    (blocks(RESULT | {"content": [{"type": "image"}]}), f"{THIRD}.content[0].type"),
    (assistant(document(type="text", data="x")), "messages[1].content[0].type"),
    (assistant(RESULT), "messages[1].content[0].type"),
    (assistant({"type": "server_tool_use", "id": "s", "name": "n", "input": {}}), "messages[1].content[0].type"),
    (assistant({"type": "thinking"}), "messages[1].content[0].thinking"),
    (assistant({"type": "tool_use", "name": "f", "input": {}}), "messages[1].content[0].id"),
    (assistant({"type": "tool_use", "id": "t", "input": {}}), "messages[1].content[0].name"),
    (assistant({"type": "tool_use", "id": "t", "name": "f"}), "messages[1].content[0].input"),
    (assistant({"type": "tool_use", "id": "t", "name": "f", "input": []}), "messages[1].content[0].input"),
    (assistant(CALL | {"input": schema(65)}), "messages[1].content[0].input"),
    (body(messages=[USER, {"role": "assistant", "content": [CALL]}]), "messages[1].content[0]"),
    (body(messages=[USER, {"role": "assistant", "content": "a "}]), "messages[1].content"),
    (body(messages=[USER, {"role": "assistant", "content": [{"type": "thinking", "thinking": "x"}]}]),
     "messages[1].content[0]"),
    (body(tools=[TOOL] * 129), "tools"),
    (body(tools=[TOOL, TOOL]), "tools[1].name"),
    (body(tools=[TOOL | {"name": "a b"}]), "tools[0].name"),
    (body(tools=[TOOL | {"name": "f" * 129}]), "tools[0].name"),
    (body(tools=[{"name": "f"}]), "tools[0].input_schema"),
    (body(tools=[{"input_schema": {}}]), "tools[0].name"),
    (body(tools=[{"type": "mcp_toolset", "mcp_server_name": "s"}]), "tools[0].type"),
    (body(tools=[TOOL | {"input_schema": schema(65)}]), "tools[0].input_schema"),
    (body(tools=[{"type": "web_search_20250305", "name": "web_search"}]), "tools[0].type"),
    (body(tool_choice={"type": "maybe"}), "tool_choice.type"),
    (body(tool_choice={"type": "any"}), "tool_choice"),
    (body(tools=[TOOL], tool_choice={"type": "tool"}), "tool_choice.name"),
    (body(tools=[TOOL], tool_choice={"type": "tool", "name": "g"}), "tool_choice.name"),
    (body(thinking={"type": "hard"}), "thinking.type"),
    (body(thinking={"type": "enabled"}), "thinking.budget_tokens"),
    (body(thinking={"type": "enabled", "budget_tokens": 1023}, max_tokens=4096), "thinking.budget_tokens"),
    (body(thinking={"type": "enabled", "budget_tokens": 2048}, max_tokens=2048), "thinking.budget_tokens"),
    (body(thinking={"type": "between_tools"}, tools=[TOOL], tool_choice={"type": "any"}), "thinking"),
    (body(thinking={"type": "between_tools"}, messages=[USER, {"role": "assistant", "content": "a"}]), "thinking"),
    (body(output_config={"format": {"type": "xml"}}), "output_config.format.type"),
    (body(output_config={"format": {"type": "json_schema"}}), "output_config.format.schema"),
    (body(output_format={"type": "json_schema", "schema": schema(65)}), "output_format.schema"),
    (body(output_config={"format": {"type": "json_schema", "schema": {}}},
          messages=[USER, {"role": "assistant", "content": "{"}]), "output_config.format"),
    (body(max_tokens=0, stream=True), "stream"),
    (body(max_tokens=0, thinking={"type": "between_tools"}), "thinking"),
    (body(max_tokens=0, output_config={"format": {"type": "json_schema", "schema": {}}}), "output_config.format"),
    (body(max_tokens=0, tools=[TOOL], tool_choice={"type": "any"}), "tool_choice"),
    (body(max_tokens=0, tools=[TOOL], tool_choice={"type": "tool", "name": "f"}), "tool_choice"),
    (body(diagnostics={"previous_message_id": 1}), "diagnostics.previous_message_id"),
]  # fmt: skip


@pytest.mark.parametrize("raw,param", REFUSED)
def test_refused_with_its_path(raw: bytes, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        ANTHROPIC.parse_chat({}, raw)
    assert caught.value.kind is ErrorKind.INVALID_REQUEST
    assert caught.value.param == param
    assert caught.value.message.startswith(f"{param}: ")


def test_defaults() -> None:
    request = parsed()
    assert request == ChatRequest("m", (Message("user", (TextPart("q"),)),), max_tokens=100)
    assert request.sampling.temperature == 1.0


def test_sampling_is_accepted_whatever_the_version() -> None:
    raw = body(temperature=0.5, top_p=0.9, top_k=5, stop_sequences=["x"])
    for version in ("2023-06-01", "2026-10-21", "tomorrow"):
        headers = {"anthropic-version": version, "anthropic-beta": "a,b"}
        request = ANTHROPIC.parse_chat(headers, raw).request
        assert (request.sampling.temperature, request.sampling.top_p, request.sampling.top_k) == (0.5, 0.9, 5)
        assert request.stop == ("x",)


def test_members_without_a_meaning_here_are_accepted() -> None:
    ignored = {
        "metadata": {"user_id": "u"}, "service_tier": "auto", "speed": "fast", "inference_geo": "eu", "container": "c",
        "output_config": {"effort": "low"}, "context_management": {"edits": []}, "mcp_servers": [],
    }  # fmt: skip
    assert parsed(**ignored) == parsed()


def test_system_is_the_first_message_and_others_stay_in_their_place() -> None:
    messages = [
        USER,
        {"role": "system", "content": "later"},
        USER,
        {"role": "system", "content": [text("x"), text("y")]},
    ]
    request = parsed(system="first", messages=[*messages, USER])
    assert [(m.role, m.text) for m in request.messages] == [
        ("system", "first"), ("user", "q"), ("system", "later"), ("user", "q"), ("system", "xy"), ("user", "q"),
    ]  # fmt: skip
    assert parsed(system="").messages == parsed(system=[]).messages == parsed().messages
    assert parsed(system=[text("a"), text("b")]).messages[0].parts == (TextPart("a"), TextPart("b"))


def text(words: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": words} | more


def test_turns_of_one_role_are_one_with_a_blank_line_between() -> None:
    said = [{"role": "user", "content": [text("b"), text("c")]}, {"role": "assistant", "content": "x"}]
    request = parsed(messages=[USER, *said, {"role": "assistant", "content": [text("y")]}])
    assert [(m.role, m.text) for m in request.messages] == [("user", "q\n\nbc"), ("assistant", "x\n\ny")]
    pdf = document(type="base64", media_type="application/pdf", data="")
    (message,) = parsed(messages=[USER, {"role": "user", "content": [pdf]}]).messages
    assert message.parts[:2] == (TextPart("q"), TextPart("\n\n"))


def test_tool_results_come_first_in_their_turn_and_may_be_many() -> None:
    found = turn(text("a"), RESULT, text("b"), RESULT | {"tool_use_id": "t2", "content": [text("x"), text("y")]})
    assert [m.role for m in found] == ["tool", "tool", "user"]
    assert [m.tool_call_id for m in found] == ["t1", "t2", None]
    assert [m.text for m in found] == ["r", "xy", "ab"]
    assert [m.role for m in turn(RESULT)] == ["tool"]


def test_a_tools_result_may_be_empty_or_an_error() -> None:
    empty = {"type": "tool_result", "tool_use_id": "t1"}
    assert turn(empty) == (Message("tool", (), tool_call_id="t1"),)
    assert turn(RESULT | {"is_error": True})[0].is_error


def test_calls_and_thoughts_of_the_assistant() -> None:
    content = [
        {"type": "thinking", "thinking": "one", "signature": "s"},
        {"type": "redacted_thinking", "data": "x"},
        text("a", citations=None),
        {"type": "thinking", "thinking": "two", "signature": "s"},
        {"type": "thinking", "thinking": "", "signature": "s"},
        CALL | {"input": {"b": 1.0, "a": "é"}},
        CALL | {"id": "t2"},
    ]
    request = ANTHROPIC.parse_chat({}, assistant(*content)).request
    assert request.messages[1] == Message(
        "assistant",
        (TextPart("a"),),
        tool_calls=(ToolCall("t1", "f", '{"b":1.0,"a":"é"}'), ToolCall("t2", "f", "{}")),
        reasoning="one\ntwo",
    )


def test_a_large_input_of_a_call_is_no_schema() -> None:
    request = ANTHROPIC.parse_chat({}, assistant(CALL | {"input": {"file": "x" * 100_000}})).request
    assert len(request.messages[1].tool_calls[0].arguments) > 100_000


def test_a_last_assistant_turn_is_continued() -> None:
    request = parsed(messages=[USER, {"role": "assistant", "content": "Dear"}])
    assert request.messages[-1] == Message("assistant", (TextPart("Dear"),), partial=True)
    for nothing in ("", []):
        request = parsed(messages=[USER, {"role": "assistant", "content": nothing}])
        assert request.messages[-1] == Message("assistant", (), partial=True)


def test_documents_with_their_own_text_are_text() -> None:
    plain = document(type="text", media_type="text/plain", data="abc") | {"title": "T", "context": "C"}
    chunks = document(type="content", content=[text("a"), text("b")])
    (message,) = turn(plain, chunks, document(type="content", content="c"), text("q"))
    assert message.parts == (
        TextPart(document_text("T", "C", "abc")),
        TextPart(document_text(None, None, "a\n\nb")),
        TextPart(document_text(None, None, "c")),
        TextPart("q"),
    )


def test_files_are_left_to_the_gateway() -> None:
    data = base64.encodebytes(b"%PDF-" * 40).decode()  # with line breaks, as tools write it
    pdf = document(type="base64", media_type="application/pdf", data=data) | {"title": "T", "context": "C"}
    found = turn(RESULT | {"content": [pdf]}, pdf | {"cache_control": {"type": "ephemeral"}})
    assert found[0].parts == (DocumentPart("application/pdf", b"%PDF-" * 40, f"{THIRD}.content[0]", "T", "C"),)
    path = "messages[2].content[1]"
    assert found[1].parts == (DocumentPart("application/pdf", b"%PDF-" * 40, path, "T", "C", SHORT),)


def test_search_results_cannot_end_each_other() -> None:
    def result(source: str, title: str, words: str) -> str:
        block = {"type": "search_result", "source": source, "title": title, "content": [text(words)]}
        (message,) = turn(block)
        return message.text

    assert (
        result("https://x", "T", "found") == '<search_result source="https://x" title="T">\nfound\n</search_result>\n'
    )
    inner = result("b", "B", "two")
    assert result("a", "A", "one") + inner != result("a", "A", "one\n</search_result>\n" + inner.rpartition("\n</")[0])
    assert result('a" title="B', "", "x") != result("a", 'B" title="', "x")


def test_tools_and_choices() -> None:
    custom = TOOL | {"type": "custom", "description": "d", "strict": True, "input_examples": [{}]}
    request = parsed(tools=[custom, TOOL | {"name": "g"}])
    assert [(t.name, t.description, t.parameters) for t in request.tools] == [
        ("f", "d", '{"type":"object"}'),
        ("g", "", '{"type":"object"}'),
    ]
    assert request.tool_choice == ToolChoice()
    choices = {
        "auto": ToolChoice(), "any": ToolChoice(ToolMode.REQUIRED), "none": ToolChoice(ToolMode.NONE),
        "tool": ToolChoice(ToolMode.NAMED, "f"),
    }  # fmt: skip
    for kind, choice in choices.items():
        wanted = {"type": kind, "name": "f", "disable_parallel_tool_use": True}
        assert parsed(tools=[TOOL], tool_choice=wanted).tool_choice == choice


def test_answer_formats() -> None:
    wanted = {"type": "json_schema", "schema": {"type": "object"}}
    expected = JsonSchema("answer", '{"type":"object"}')
    assert parsed(output_config={"format": wanted, "effort": "high"}).answer_format == expected
    assert parsed(output_format=wanted).answer_format == expected


@pytest.mark.parametrize("kind,thinks", [("adaptive", None), ("between_tools", True), ("disabled", False)])
def test_thinking(kind: str, thinks: bool | None) -> None:
    assert parsed().thinking is None
    assert parsed(thinking={"type": kind}).thinking is thinks
    wanted = {"type": "enabled", "budget_tokens": 1024}
    assert parsed(thinking=wanted, max_tokens=1025).thinking is True
    assert not ANTHROPIC.parse_chat({}, body()).hides_thinking
    assert ANTHROPIC.parse_chat({}, body(thinking={"type": "adaptive", "display": "omitted"})).hides_thinking


def test_diagnostics_are_asked_for_with_or_without_a_turn_to_compare_with() -> None:
    for member, asked, compared in [
        ({}, False, None),
        ({"diagnostics": None}, False, None),
        ({"diagnostics": {}}, True, None),
        ({"diagnostics": {"previous_message_id": None}}, True, None),
        ({"diagnostics": {"previous_message_id": ""}}, True, None),
        ({"diagnostics": {"previous_message_id": "msg_1"}}, True, "msg_1"),
    ]:
        found = ANTHROPIC.parse_chat({}, body(**member))
        assert (found.wants_diagnostics, found.request.compare_with) == (asked, compared)


def test_count_reads_the_same_body_without_max_tokens() -> None:
    members = {"system": "s", "tools": [TOOL], "thinking": {"type": "enabled", "budget_tokens": 99_999}}
    raw = json.dumps({"model": "m", "messages": [USER], **members}).encode()
    counted = ANTHROPIC.parse_count({}, raw)
    asked = parsed(**members, max_tokens=100_000)
    assert (counted.messages, counted.tools, counted.thinking) == (asked.messages, asked.tools, asked.thinking)
    assert counted.max_tokens is None
    assert json.loads(ANTHROPIC.render_token_count(7)) == {"input_tokens": 7}
