"""The OpenAI dialect's decisions that the golden transcripts do not show; both chat dialects where they agree."""

import json
from typing import Any

import msgspec
import pytest
from openai.types import Model
from openai.types.chat import ChatCompletion

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.event import ChoiceFinished, Failed, Finished, Started, TextDelta, Usage
from keepwarm.core.request import ToolMode
from keepwarm.dialects import ChatDialect, ErrorReply, Identity
from keepwarm.dialects.kimi import KIMI_ERRORS, KimiChat
from keepwarm.dialects.openai import OpenAIChat
from keepwarm.dialects.openai_error import OPENAI_ERRORS
from tests.golden.transcripts import BOUNDS

OPENAI = OpenAIChat(BOUNDS)
KIMI = KimiChat(BOUNDS)
USER = {"role": "user", "content": "q"}
TOOL = {"type": "function", "function": {"name": "f"}}

both = pytest.mark.parametrize("dialect", [OPENAI, KIMI], ids=["openai", "kimi"])


def chat(**members: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [USER]} | members).encode()


def message(**members: Any) -> bytes:
    return chat(messages=[USER, members])


def schema(depth: int) -> dict[str, Any]:
    return {"a": schema(depth - 1)} if depth else {}


REFUSED: list[tuple[bytes, str]] = [
    (chat(messages=[]), "messages"),
    (chat(messages=[USER] * 4097), "messages"),
    (chat(model=""), "model"),
    (chat(model="m" * 257), "model"),
    (chat(temperature=2.1), "temperature"),
    (chat(temperature="hot"), "temperature"),
    (chat(top_p=1.1), "top_p"),
    (chat(min_p=-0.1), "min_p"),
    (chat(top_k=-2), "top_k"),
    (chat(presence_penalty=2.5), "presence_penalty"),
    (chat(frequency_penalty=-2.5), "frequency_penalty"),
    (chat(n=0), "n"),
    (chat(n=10**30), "n"),
    (chat(max_tokens=0), "max_tokens"),
    (chat(max_completion_tokens=-1), "max_completion_tokens"),
    (chat(seed=2**63), "seed"),
    (chat(stop=["a"] * 17), "stop"),
    (chat(stop=["a", ""]), "stop[1]"),
    (chat(stop="é" * 129), "stop"),
    (chat(stop=["a", 1]), "stop[1]"),
    (chat(logit_bias={"a": 1}), "logit_bias"),
    (chat(logit_bias={"-1": 1}), "logit_bias"),
    (chat(logit_bias={"1": 101}), "logit_bias"),
    (chat(logit_bias={"٣": 1}), "logit_bias"),
    (chat(top_logprobs=2), "top_logprobs"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    (chat(response_format={"type": "xml"}), "response_format.type"),
    (chat(response_format={"type": "json_schema"}), "response_format.json_schema"),
    (
        chat(response_format={"type": "json_schema", "json_schema": {"schema": schema(64)}}),
        "response_format.json_schema.schema",
    ),
    (chat(tools=[TOOL] * 129), "tools"),
    (chat(tools=[TOOL, TOOL]), "tools[1].function.name"),
    (chat(tools=[{"type": "function", "function": {"name": "a b"}}]), "tools[0].function.name"),
    (chat(tools=[{"type": "function", "function": {"name": "f\n"}}]), "tools[0].function.name"),
    (chat(tools=[{"type": "function", "function": {"name": "f" * 65}}]), "tools[0].function.name"),
    (
        chat(tools=[{"type": "function", "function": {"name": "f", "parameters": []}}]),
        "tools[0].function.parameters",
    ),
    (chat(tool_choice="maybe"), "tool_choice"),
    (chat(tool_choice="required"), "tool_choice"),
    (chat(tools=[TOOL], tool_choice={"type": "function"}), "tool_choice.function"),
    (chat(tools=[TOOL], tool_choice={"type": "allowed_tools"}), "tool_choice.type"),
    (
        chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}),
        "tool_choice.function.name",
    ),
    (chat(function_call="auto"), "function_call"),
    (chat(modalities=["text", "audio"]), "modalities"),
    (message(role="robot", content="x"), "messages[1].role"),
    (message(content="x"), "messages[1].role"),
    (message(role="user"), "messages[1].content"),
    (message(role="assistant"), "messages[1].content"),
    (message(role="tool", content="x"), "messages[1].tool_call_id"),
    (message(role="user", content=["x"]), "messages[1].content[0]"),
    (message(role="user", content=[{"type": "text"}]), "messages[1].content[0].text"),
    (message(role="user", content=[{"type": "input_audio"}]), "messages[1].content[0].type"),
    (message(role="assistant", function_call={"name": "f", "arguments": ""}), "messages[1].function_call"),
    (
        message(role="user", content="x", tool_calls=[{"id": "1", "function": {"name": "f", "arguments": ""}}]),
        "messages[1].tool_calls",
    ),
    (message(role="assistant", tool_calls=[{"id": "1"}]), "messages[1].tool_calls[0].function"),
    (
        message(role="assistant", tool_calls=[{"id": "1", "type": "x", "function": {"name": "f", "arguments": ""}}]),
        "messages[1].tool_calls[0].type",
    ),
]


@both
@pytest.mark.parametrize("body,param", REFUSED)
def test_refused_with_its_path(dialect: ChatDialect, body: bytes, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        dialect.parse_chat({}, body)
    assert caught.value.kind is ErrorKind.INVALID_REQUEST
    assert caught.value.param == param
    assert caught.value.message.startswith(f"{param}")


@both
def test_errors_never_repeat_a_long_text(dialect: ChatDialect) -> None:
    with pytest.raises(ApiError) as caught:
        dialect.parse_chat({}, message(role="x" * 1_000_000, content="x"))
    assert len(caught.value.message) < 300


@both
def test_unknown_members_are_ignored(dialect: ChatDialect) -> None:
    plain = dialect.parse_chat({}, chat())
    assert dialect.parse_chat({}, chat(web_search_options={}, prediction={"type": "content"}, verbosity="low")) == plain


@both
def test_max_completion_tokens_wins(dialect: ChatDialect) -> None:
    assert dialect.parse_chat({}, chat(max_tokens=5, max_completion_tokens=7)).request.max_tokens == 7
    assert dialect.parse_chat({}, chat(max_tokens=5)).request.max_tokens == 5


@both
def test_text_parts_and_a_string_are_the_same_message(dialect: ChatDialect) -> None:
    parts = message(role="user", content=[{"type": "text", "text": "x"}])
    assert dialect.parse_chat({}, parts) == dialect.parse_chat({}, message(role="user", content="x"))


@both
def test_include_usage_needs_stream(dialect: ChatDialect) -> None:
    options = {"include_usage": True}
    assert not dialect.parse_chat({}, chat(stream_options=options)).include_usage
    assert dialect.parse_chat({}, chat(stream_options=options, stream=True)).include_usage


@both
def test_tool_choices(dialect: ChatDialect) -> None:
    modes = {
        choice: dialect.parse_chat({}, chat(tools=[TOOL], tool_choice=choice)).request.tool_choice.mode
        for choice in ("auto", "none", "required")
    }
    assert modes == {"auto": ToolMode.AUTO, "none": ToolMode.NONE, "required": ToolMode.REQUIRED}


@both
def test_a_tool_without_parameters_takes_an_empty_object(dialect: ChatDialect) -> None:
    (tool,) = dialect.parse_chat({}, chat(tools=[TOOL])).request.tools
    assert json.loads(tool.parameters) == {"type": "object", "properties": {}}


def test_function_names_may_begin_with_a_digit_in_openai_only() -> None:
    body = chat(tools=[{"type": "function", "function": {"name": "1password"}}])
    assert OPENAI.parse_chat({}, body).request.tools[0].name == "1password"
    with pytest.raises(ApiError, match="1password"):
        KIMI.parse_chat({}, body)


def test_logprobs_zero_is_the_chosen_token_only() -> None:
    assert OPENAI.parse_chat({}, chat(logprobs=True)).request.top_logprobs == 0
    assert OPENAI.parse_chat({}, chat(logprobs=False)).request.top_logprobs is None
    assert OPENAI.parse_chat({}, chat(top_logprobs=0)).request.top_logprobs is None


def test_openai_knows_no_cache_headers() -> None:
    assert OPENAI.parse_chat({"x-msh-context-cache": "cache-a"}, chat()).request.cache is None


@both
def test_whole_raises_what_the_turn_failed_with(dialect: ChatDialect) -> None:
    renderer = dialect.renderer(dialect.parse_chat({}, chat()), Identity("chatcmpl-1", 1))
    assert renderer.feed(Started(3, 0)) == []
    assert renderer.feed(TextDelta("par")) == []
    assert renderer.feed(Failed(ErrorKind.TIMEOUT, "too slow", retry_after_s=9)) == []
    with pytest.raises(ApiError, match="too slow") as caught:
        renderer.whole()
    assert (caught.value.kind, caught.value.retry_after_s) == (ErrorKind.TIMEOUT, 9)


@both
def test_nothing_is_sent_before_the_first_delta(dialect: ChatDialect) -> None:
    """So a turn that fails while its prompt is evaluated can still be answered with an HTTP status."""
    renderer = dialect.renderer(dialect.parse_chat({}, chat(stream=True)), Identity("chatcmpl-1", 1))
    assert renderer.feed(Started(3, 0)) == []


@both
def test_choices_come_in_order_whatever_order_they_ended_in(dialect: ChatDialect) -> None:
    renderer = dialect.renderer(dialect.parse_chat({}, chat(n=2, temperature=1)), Identity("chatcmpl-1", 1))
    for event in (
        TextDelta("b", 1),
        TextDelta("a", 0),
        ChoiceFinished("stop", 2, 1),
        ChoiceFinished("length", 2, 0),
        Finished(Usage(3, 0, 0, 4)),
    ):
        renderer.feed(event)
    completion = ChatCompletion.model_validate_json(renderer.whole())
    assert [choice.message.content for choice in completion.choices] == ["a", "b"]


@pytest.mark.parametrize("table", [OPENAI_ERRORS, KIMI_ERRORS], ids=["openai", "kimi"])
def test_error_tables_are_total(table: dict[ErrorKind, object]) -> None:
    assert set(table) == set(ErrorKind)


@both
@pytest.mark.parametrize("kind", list(ErrorKind))
def test_every_error_has_one_shape(dialect: ChatDialect, kind: ErrorKind) -> None:
    reply = dialect.render_error(ApiError(kind, "what happened", param="messages[0]"))
    error = json.loads(reply.body)["error"]
    assert 400 <= reply.status <= 599
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["message"], error["param"]) == ("what happened", "messages[0]")
    assert error["type"]
    assert ("retry-after" in dict(reply.headers)) == (reply.status in (429, 503))


@both
def test_error_headers(dialect: ChatDialect) -> None:
    def headers(error: ApiError) -> dict[str, str]:
        return dict(dialect.render_error(error).headers)

    assert headers(ApiError(ErrorKind.UNAUTHENTICATED, "x")) == {"www-authenticate": "Bearer"}
    assert headers(ApiError(ErrorKind.QUOTA_EXCEEDED, "x"))["x-should-retry"] == "false"
    assert headers(ApiError(ErrorKind.OVERLOADED, "x", retry_after_s=7)) == {"retry-after": "7"}
    assert headers(ApiError(ErrorKind.TIMEOUT, "x", retry_after_s=7)) == {"retry-after": "7"}


@both
@pytest.mark.parametrize("kind", list(ErrorKind))
def test_an_error_in_a_stream_is_the_same_body(dialect: ChatDialect, kind: ErrorKind) -> None:
    renderer = dialect.renderer(dialect.parse_chat({}, chat(stream=True)), Identity("chatcmpl-1", 1))
    (frame,) = renderer.feed(Failed(kind, "what happened"))
    reply: ErrorReply = dialect.render_error(ApiError(kind, "what happened"))
    assert frame.data == reply.body


@pytest.mark.parametrize("chat_dialect", [OPENAI, KIMI], ids=["openai", "kimi"])
def test_models(chat_dialect: OpenAIChat | KimiChat) -> None:
    listed = json.loads(chat_dialect.render_models(["a", "moonshot-v1-128k"], 1718680442, 8192))
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["a", "moonshot-v1-128k"]
    assert {model["context_length"] for model in listed["data"]} == {8192}
    for model in listed["data"]:
        Model.model_validate(model)
    assert json.loads(chat_dialect.render_model("a", 1718680442, 8192)) == listed["data"][0]
    assert "context_length" not in json.loads(chat_dialect.render_model("a", 1718680442, None))


def test_parsed_request_is_hashable_and_comparable() -> None:
    body = chat(tools=[TOOL], response_format={"type": "json_object"})
    assert hash(OPENAI.parse_chat({}, body)) == hash(OPENAI.parse_chat({}, body))
    assert msgspec.to_builtins(OPENAI.parse_chat({}, body))["request"]["model"] == "m"
