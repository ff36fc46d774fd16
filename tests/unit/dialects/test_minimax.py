"""MiniMax's rules where they differ from OpenAI's; what is the same is in test_openai.py and the golden transcripts."""

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.event import (
    ChoiceFinished,
    Event,
    Failed,
    Finished,
    ReasoningDelta,
    Started,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from keepwarm.core.principal import Access
from keepwarm.core.request import Mark
from keepwarm.dialects import Identity, Parsed
from keepwarm.dialects.minimax import MiniMaxChat, MiniMaxChatCompletionRequest
from keepwarm.dialects.openai import OpenAIChat
from keepwarm.dialects.openapi import Route, openapi
from tests.golden.transcripts import BOUNDS, HERE

MINIMAX = MiniMaxChat(BOUNDS)
OPENAI = OpenAIChat(BOUNDS)
USER = {"role": "user", "content": "q"}
IDENTITY = Identity("chatcmpl-1", 1)
END = (ChoiceFinished("stop", 5), Finished(Usage(3, 0, 0, 5)))


def chat(**members: Any) -> bytes:
    return json.dumps({"model": "MiniMax-M2.1", "messages": [USER]} | members).encode()


def answered(content: Any, **members: Any) -> bytes:
    return chat(messages=[USER, {"role": "assistant", "content": content, **members}, USER])


def whole(body: bytes, *events: Event) -> dict[str, Any]:
    renderer = MINIMAX.renderer(MINIMAX.parse_chat({}, body), IDENTITY)
    for event in (Started(3, 0), *events):
        assert renderer.feed(event) == []
    return dict(json.loads(renderer.whole()))


def message_of(body: bytes, *events: Event) -> dict[str, Any]:
    return dict(whole(body, *events)["choices"][0]["message"])


def streamed(body: bytes, *events: Event) -> list[dict[str, Any]]:
    renderer = MINIMAX.renderer(MINIMAX.parse_chat({}, body), IDENTITY)
    frames = [frame for event in (Started(3, 0), *events) for frame in renderer.feed(event)]
    assert frames[-1].data == b"[DONE]"
    return [json.loads(frame.data) for frame in frames[:-1]]


@pytest.mark.parametrize(
    "body,param",
    [
        (chat(temperature=0), "temperature"),
        (chat(temperature=-0.5), "temperature"),
        (chat(temperature=1.01), "temperature"),
        (chat(temperature="1"), "temperature"),
        (chat(n=2), "n"),
        (chat(n=0), "n"),
        (chat(reasoning_split="yes"), "reasoning_split"),
        (answered("x", reasoning_details=[1]), "messages[1].reasoning_details[0]"),
    ],
)
def test_refused_with_its_path(body: bytes, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        MINIMAX.parse_chat({}, body)
    assert (caught.value.kind, caught.value.param) == (ErrorKind.INVALID_REQUEST, param)


def test_temperatures() -> None:
    assert MINIMAX.parse_chat({}, chat()).request.sampling.temperature == 1.0
    assert MINIMAX.parse_chat({}, chat(temperature=0.01)).request.sampling.temperature == 0.01
    assert MINIMAX.parse_chat({}, chat(temperature=1)).request.sampling.temperature == 1.0


@pytest.mark.parametrize("value", [1.5, 99, "x", {"5": 100}, {"a": "b"}, [], None])
@pytest.mark.parametrize("member", ["presence_penalty", "frequency_penalty", "logit_bias"])
def test_penalties_and_biases_are_ignored_whatever_they_are(member: str, value: Any) -> None:
    assert MINIMAX.parse_chat({}, chat(**{member: value})) == MINIMAX.parse_chat({}, chat())


def test_a_plain_request_means_what_it_means_to_openai() -> None:
    body = chat(temperature=0.5, max_tokens=7, stop="x", n=1, response_format={"type": "json_object"})
    assert MINIMAX.parse_chat({}, body).request == OPENAI.parse_chat({}, body).request


def test_reasoning_is_in_the_content_between_tags() -> None:
    message = message_of(chat(), ReasoningDelta("They "), ReasoningDelta("greet."), TextDelta("\n\nHi"), *END)
    assert message["content"] == "<think>They greet.</think>\n\nHi"
    assert not {"reasoning_content", "reasoning_details"} & set(message)


def test_reasoning_split() -> None:
    body = chat(reasoning_split=True)
    message = message_of(body, ReasoningDelta("They "), ReasoningDelta("greet."), TextDelta("Hi"), *END)
    assert message["content"] == "Hi"
    (detail,) = message["reasoning_details"]
    assert (detail["type"], detail["text"]) == ("reasoning.text", "They greet.")


def test_an_answer_without_reasoning_has_neither_form() -> None:
    for body in (chat(), chat(reasoning_split=True)):
        message = message_of(body, TextDelta("Hi"), *END)
        assert message["content"] == "Hi"
        assert "reasoning_details" not in message


def test_streamed_details_hold_only_what_is_new() -> None:
    chunks = streamed(chat(reasoning_split=True, stream=True), ReasoningDelta("They "), ReasoningDelta("greet."), *END)
    details = [
        detail["text"]
        for chunk in chunks
        for choice in chunk["choices"]
        for detail in choice["delta"].get("reasoning_details", ())
    ]
    assert details == ["They ", "greet."]


def test_the_tag_is_closed_before_a_call_and_opened_again_behind_it() -> None:
    call = (ToolCallDelta(0, "f"), ToolCallDelta(0, arguments="{}"))
    events = (ReasoningDelta("a"), TextDelta("b"), ReasoningDelta("c"), *call, ChoiceFinished("tool_calls", 5), END[1])
    message = message_of(chat(tools=[{"type": "function", "function": {"name": "f"}}]), *events)
    assert message["content"] == "<think>a</think>b<think>c</think>"
    assert message["tool_calls"][0]["id"].startswith("call_")


def test_the_tag_is_closed_when_the_answer_ends_in_it() -> None:
    assert message_of(chat(), ReasoningDelta("Let me"), *END)["content"] == "<think>Let me</think>"


deltas = st.lists(st.builds(ReasoningDelta, st.text()) | st.builds(TextDelta, st.text()))


@given(deltas, st.booleans())
def test_streamed_and_whole_answers_say_the_same(events: list[ReasoningDelta | TextDelta], split: bool) -> None:
    body = chat(reasoning_split=split)
    message = message_of(body, *events, *END)
    parts = [
        choice["delta"] for chunk in streamed(chat(reasoning_split=split, stream=True), *events, *END)
        for choice in chunk["choices"]
    ]  # fmt: skip
    assert "".join(part.get("content", "") for part in parts) == message["content"]
    told = [detail["text"] for part in parts for detail in part.get("reasoning_details", ())]
    assert "".join(told) == "".join(detail["text"] for detail in message.get("reasoning_details", ()))


@pytest.mark.parametrize("split", [False, True])
@given(st.text(st.characters(exclude_characters="<"), min_size=1), st.text())
def test_an_answer_sent_back_says_what_was_thought(split: bool, thought: str, text: str) -> None:
    message = message_of(chat(reasoning_split=split), ReasoningDelta(thought), TextDelta(text), *END)
    (_, back, _) = MINIMAX.parse_chat({}, chat(messages=[USER, message, USER])).request.messages
    assert (back.reasoning, back.text) == (thought, text)


def test_a_text_that_only_looks_like_a_thought_stays() -> None:
    for text in ("<think>never closed", "say <think>x</think>", "</think>x", "<thinking>x</thinking>"):
        (_, back, _) = MINIMAX.parse_chat({}, answered(text)).request.messages
        assert (back.reasoning, back.text) == (None, text)
    (message,) = MINIMAX.parse_chat(
        {}, chat(messages=[{"role": "user", "content": "<think>x</think>y"}])
    ).request.messages
    assert (message.reasoning, message.text) == (None, "<think>x</think>y")


def test_a_breakpoint_stays_behind_its_part() -> None:
    marked = {"type": "text", "text": "<think>x</think>", "prompt_cache_breakpoint": {}}
    (_, back, _) = MINIMAX.parse_chat({}, answered([marked, {"type": "text", "text": "y"}])).request.messages
    assert [(part.text, part.mark) for part in back.texts] == [("", Mark()), ("y", None)]
    assert back.reasoning == "x"


def test_usage_as_recorded() -> None:
    usage = whole(chat(), TextDelta("Hi"), ChoiceFinished("stop", 80), Finished(Usage(20, 32, 0, 80)))["usage"]
    assert usage == {
        "prompt_tokens": 52,
        "completion_tokens": 80,
        "total_tokens": 132,
        "total_characters": 0,
        "prompt_tokens_details": {"cached_tokens": 32, "cache_write_tokens": 0},
    }


def test_streamed_usage_is_in_a_chunk_without_choices() -> None:
    *chunks, last = streamed(chat(stream=True, stream_options={"include_usage": True}), TextDelta("Hi"), *END)
    assert last["choices"] == []
    assert last["usage"]["total_characters"] == 0
    assert all(chunk["usage"] is None for chunk in chunks)
    # Not sent unasked: MiniMax's own streaming example looks at choices[0] of every chunk.
    assert all(chunk["choices"] for chunk in streamed(chat(stream=True), TextDelta("Hi"), *END))


@pytest.mark.parametrize("kind", list(ErrorKind))
def test_errors_have_openais_words(kind: ErrorKind) -> None:
    error = ApiError(kind, "what happened", param="n", retry_after_s=3)
    assert MINIMAX.render_error(error) == OPENAI.render_error(error)
    renderer = MINIMAX.renderer(MINIMAX.parse_chat({}, chat(stream=True)), IDENTITY)
    renderer.feed(ReasoningDelta("hm"))
    (frame,) = renderer.feed(Failed(kind, "what happened"))
    assert frame.data == OPENAI.render_error(ApiError(kind, "what happened")).body


def test_the_sdk_reads_a_split_answer() -> None:
    body = chat(reasoning_split=True)
    renderer = MINIMAX.renderer(MINIMAX.parse_chat({}, body), IDENTITY)
    for event in (ReasoningDelta("hm"), TextDelta("Hi"), *END):
        renderer.feed(event)
    completion = ChatCompletion.model_validate_json(renderer.whole())
    details: Any = getattr(completion.choices[0].message, "reasoning_details")  # noqa: B009 - as MiniMax's example does
    assert details[0]["text"] == "hm"


def test_accepted_requests_fit_the_openapi_document() -> None:
    route = Route("POST", "/minimax/v1/chat/completions", Access.USE, "Chat", request=MiniMaxChatCompletionRequest)
    components = json.loads(openapi((route,), title="Keepwarm", version="1"))["components"]
    schema = {"$ref": "#/components/schemas/MiniMaxChatCompletionRequest", "components": components}
    cases = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((HERE / "requests").glob("*.json"))]
    accepted = [case["body"] for case in cases if "request" in case["expect"].get("minimax", {})]
    assert len(accepted) > 5
    for body in accepted:
        jsonschema.validate(body, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(accepted[0] | {"temperature": 0}, schema)


def test_a_request_parsed_elsewhere_is_rendered_with_tags() -> None:
    plain = Parsed(MINIMAX.parse_chat({}, chat()).request, stream=False)
    renderer = MINIMAX.renderer(plain, IDENTITY)
    for event in (ReasoningDelta("hm"), *END):
        renderer.feed(event)
    assert json.loads(renderer.whole())["choices"][0]["message"]["content"] == "<think>hm</think>"


documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
MEMBERS = ["messages", "temperature", "n", "presence_penalty", "logit_bias", "reasoning_split", "prompt_cache_options"]


@given(st.dictionaries(st.sampled_from(MEMBERS), documents), documents)
def test_hostile_bodies_are_answered(members: dict[str, Any], details: Any) -> None:
    for body in (chat(**members), answered("x", reasoning_details=details)):
        refused = None
        try:
            MINIMAX.parse_chat({}, body)
        except ApiError as error:
            refused = error
        if refused is not None:
            assert refused.kind is ErrorKind.INVALID_REQUEST
            assert len(refused.message) < 1_000
