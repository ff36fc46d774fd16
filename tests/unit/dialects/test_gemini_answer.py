"""Gemini's answers: both streams come to the whole answer, counts on the wire, and how each ends."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.event import (
    ChoiceFinished,
    Delta,
    Event,
    Failed,
    Finished,
    FinishReason,
    ReasoningDelta,
    Started,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from keepwarm.dialects import Frame, Identity
from keepwarm.dialects.gemini import GeminiContent
from keepwarm.dialects.gemini_answer import AnswerShape, GeminiRenderer, usage_metadata
from tests.golden.transcripts import BOUNDS

GEMINI = GeminiContent(BOUNDS)
IDENTITY = Identity("abc", 0)
USAGE = Usage(fresh=1, cache_read=20, cache_write=300, output=4)
STARTED = Started(321, 20, usage=USAGE)
THOUGHTS = {"generationConfig": {"thinkingConfig": {"includeThoughts": True}}}


def renderer(shape: AnswerShape, **members: Any) -> GeminiRenderer:
    body = {"contents": [{"parts": [{"text": "q"}]}]} | members
    return GEMINI.renderer(GEMINI.parse_generate("m", shape, json.dumps(body).encode()), IDENTITY)


def ended(reason: FinishReason = "stop", stop: str | None = None) -> list[Event]:
    return [ChoiceFinished(reason, 4, stop=stop), Finished(USAGE)]


def frames(shape: AnswerShape, events: Sequence[Event], **members: Any) -> list[Frame]:
    rendering = renderer(shape, **members)
    return [frame for event in events for frame in rendering.feed(event)]


def array(events: Sequence[Event], **members: Any) -> list[dict[str, Any]]:
    found = frames("array", events, **members)
    assert all(frame.is_raw for frame in found)
    assert found[0].data.startswith(b"[") and found[-1].data.endswith(b"]")
    elements: list[dict[str, Any]] = json.loads(b"".join(frame.data for frame in found))
    return elements


def streamed(events: Sequence[Event], **members: Any) -> list[dict[str, Any]]:
    """Of both streams, which hold the same."""
    found = frames("events", events, **members)
    assert all(not frame.is_raw and frame.name is None and b"\n" not in frame.data for frame in found)
    elements = [json.loads(frame.data) for frame in found]
    assert elements == array(events, **members)
    return elements


def whole(events: Sequence[Event], **members: Any) -> dict[str, Any]:
    rendering = renderer("whole", **members)
    for event in events:
        assert rendering.feed(event) == []
    body: dict[str, Any] = json.loads(rendering.whole())
    return body


def parts(answer: dict[str, Any]) -> list[dict[str, Any]]:
    (candidate,) = answer["candidates"]
    found: list[dict[str, Any]] = candidate["content"]["parts"]
    return found


@st.composite
def answers(draw: st.DrawFn) -> list[Delta]:
    """Deltas as engines tell them: calls one after the other, their name first."""
    deltas: list[Delta] = []
    n_calls = 0
    for kind in draw(st.lists(st.sampled_from(["text", "reasoning", "call"]), max_size=8)):
        if kind == "text":
            deltas.append(TextDelta(draw(st.text(max_size=3))))
        elif kind == "reasoning":
            deltas.append(ReasoningDelta(draw(st.text(max_size=3))))
        else:
            arguments = json.dumps(
                draw(st.dictionaries(st.text(max_size=2), st.integers() | st.text(max_size=2), max_size=2))
            )
            cut = draw(st.integers(0, len(arguments)))
            deltas.append(ToolCallDelta(n_calls, f"f{n_calls}"))
            deltas += [ToolCallDelta(n_calls, arguments=piece) for piece in (arguments[:cut], arguments[cut:])]
            n_calls += 1
    return deltas


def kinds_of(deltas: Sequence[Delta]) -> dict[str, Any]:
    """What the answer says: texts, thoughts and calls, each in their order."""
    calls: list[list[str]] = []
    for delta in deltas:
        if isinstance(delta, ToolCallDelta):
            if delta.name is not None:
                calls.append([delta.name, ""])
            calls[-1][1] += delta.arguments
    return {
        "text": "".join(delta.text for delta in deltas if isinstance(delta, TextDelta)),
        "thought": "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta)),
        "calls": [(name, json.loads(arguments)) for name, arguments in calls],
    }


def kinds_in(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    calls = [part["functionCall"] for part in found if "functionCall" in part]
    texts = [part for part in found if "text" in part]
    return {
        "text": "".join(part["text"] for part in texts if "thought" not in part),
        "thought": "".join(part["text"] for part in texts if part.get("thought")),
        "calls": [(call["name"], call["args"]) for call in calls],
    }


@given(answers())
def test_any_answer_is_told_and_the_whole_is_the_stream_folded(deltas: list[Delta]) -> None:
    events = [STARTED, *deltas, *ended()]
    elements, answer = streamed(events, **THOUGHTS), whole(events, **THOUGHTS)
    assert (
        kinds_in([part for element in elements for part in parts(element)])
        == kinds_of(deltas)
        == kinds_in(parts(answer))
    )
    assert all(parts(element) for element in elements)
    assert all("finishReason" not in element["candidates"][0] for element in elements[:-1])
    last = elements[-1]
    assert last["candidates"][0] | {"content": 0} == answer["candidates"][0] | {"content": 0}
    assert last | {"candidates": 0} == answer | {"candidates": 0}
    assert answer["candidates"][0].keys() == {"finishReason", "tokenCount", "index", "content"}
    assert (answer["modelVersion"], answer["responseId"]) == ("m", "abc")
    ids = [part["functionCall"]["id"] for part in parts(answer) if "functionCall" in part]
    assert ids == [f"f{i}:{i}" for i in range(len(ids))]


@given(answers())
def test_thoughts_are_told_only_to_who_asks(deltas: list[Delta]) -> None:
    events = [STARTED, *deltas, *ended()]
    expected = kinds_of(deltas) | {"thought": ""}
    assert kinds_in([part for element in streamed(events) for part in parts(element)]) == expected
    assert kinds_in(parts(whole(events))) == expected


@given(answers(), st.integers(0, 20))
def test_a_turn_that_fails_ends_the_stream_with_an_error(deltas: list[Delta], at: int) -> None:
    events: list[Event] = [STARTED, *deltas][: at + 1]
    failed = [*events, Failed(ErrorKind.ENGINE_DOWN, "gone", retry_after_s=3)]
    detail = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "3s"}
    error = {"code": 503, "message": "gone", "status": "UNAVAILABLE", "details": [detail]}
    *before, last = streamed(failed)
    assert last == {"error": error}
    begun = [frame for frame in frames("events", events) if frame.data]
    assert before == [json.loads(frame.data) for frame in begun]
    with pytest.raises(ApiError) as caught:
        whole(failed)
    assert (caught.value.kind, caught.value.retry_after_s) == (ErrorKind.ENGINE_DOWN, 3)


def test_an_array_is_whole_also_when_nothing_had_begun() -> None:
    found = frames("array", [Failed(ErrorKind.OVERLOADED, "full")])
    assert b"".join(frame.data for frame in found) == (
        b'[{"error":{"code":503,"message":"full","status":"UNAVAILABLE"}}]'
    )


def test_an_array_is_open_from_the_start_and_has_its_commas_ahead() -> None:
    rendering = renderer("array")
    assert [frame.data for frame in rendering.feed(STARTED)] == [b"["]
    first, second = rendering.feed(TextDelta("a")), rendering.feed(TextDelta("b"))
    assert first[0].data.startswith(b"{") and second[0].data.startswith(b",\r\n{")
    assert rendering.feed(ended()[0]) == []
    assert [frame.data[-1:] for frame in rendering.feed(ended()[1])] == [b"}", b"]"]


@pytest.mark.parametrize("reason,expected", [("stop", "STOP"), ("length", "MAX_TOKENS"), ("tool_calls", "STOP")])
def test_why_it_ended(reason: FinishReason, expected: str) -> None:
    assert whole([STARTED, TextDelta("x"), *ended(reason, "END")])["candidates"][0]["finishReason"] == expected


def test_a_call_is_told_before_the_text_behind_it() -> None:
    events = [
        STARTED,
        TextDelta("a"),
        ToolCallDelta(0, "f"),
        TextDelta("b"),
        ToolCallDelta(1, "g", "{}"),
        *ended("tool_calls"),
    ]
    f, g = ({"functionCall": {"id": f"{name}:{i}", "name": name, "args": {}}} for i, name in enumerate("fg"))
    assert parts(whole(events)) == [{"text": "a"}, f, {"text": "b"}, g]
    assert [parts(element) for element in streamed(events)] == [[{"text": "a"}], [f, {"text": "b"}], [g]]


def test_an_id_counts_on_from_the_history() -> None:
    call = {"functionCall": {"name": "f"}}
    history = [{"parts": [{"text": "q"}]}, {"role": "model", "parts": [call, call]}, {"parts": [{"text": "q"}]}]
    (part,) = parts(whole([STARTED, ToolCallDelta(0, "f", "{}"), *ended("tool_calls")], contents=history))
    assert part["functionCall"]["id"] == "f:2"


@pytest.mark.parametrize("arguments", ["[]", "{", "1", "x", "[" * 100_000])
def test_arguments_that_are_no_object(arguments: str) -> None:
    events = [STARTED, ToolCallDelta(0, "f", arguments), *ended("tool_calls")]
    for answer in (whole(events), streamed(events)[-1]):
        assert parts(answer) == [{"text": ""}]
        assert answer["candidates"][0]["finishReason"] == "MALFORMED_FUNCTION_CALL"
        assert answer["candidates"][0]["finishMessage"].startswith("Malformed function call: ")


def test_candidates_end_together() -> None:
    events = [
        STARTED, TextDelta("a"), TextDelta("b", 1), ChoiceFinished("stop", 1), ChoiceFinished("length", 3, 1),
        Finished(USAGE),
    ]  # fmt: skip
    members = {"generationConfig": {"candidateCount": 2}}
    answer, last = whole(events, **members), streamed(events, **members)[-1]
    assert [(c["index"], c["finishReason"], c["tokenCount"]) for c in answer["candidates"]] == [
        (0, "STOP", 1), (1, "MAX_TOKENS", 3),
    ]  # fmt: skip
    assert [c["content"]["parts"] for c in answer["candidates"]] == [[{"text": "a"}], [{"text": "b"}]]
    assert [c["index"] for c in last["candidates"]] == [0, 1]


def test_logprobs_only_for_who_asks() -> None:
    tokens = (TokenLogprob(b"a", -0.5, ((b"a", -0.5), (b"b", float("-inf")))), TokenLogprob(b"c", -1.5))
    events = [STARTED, TextDelta("a", logprobs=tokens[:1]), TextDelta("", logprobs=tokens[1:]), *ended()]
    plain = whole(events)["candidates"][0]
    assert not {"avgLogprobs", "logprobsResult"} & plain.keys()
    assert len(streamed(events)) == 2
    members = {"generationConfig": {"responseLogprobs": True, "logprobs": 2}}
    found = whole(events, **members)["candidates"][0]
    assert found["avgLogprobs"] == -1.0
    assert found["logprobsResult"] == {
        "chosenCandidates": [{"token": "a", "logProbability": -0.5}, {"token": "c", "logProbability": -1.5}],
        "topCandidates": [
            {"candidates": [{"token": "a", "logProbability": -0.5}, {"token": "b", "logProbability": -9999.0}]},
            {"candidates": []},
        ],
    }
    assert len(streamed(events, **members)) == 3


counts = st.integers(0, 10**6)


@given(counts, counts, counts, counts)
def test_counts_add_up(fresh: int, read: int, written: int, output: int) -> None:
    usage = Usage(fresh, read, written, output)
    wire = whole([STARTED, ChoiceFinished("stop", output), Finished(usage)])["usageMetadata"]
    assert wire["promptTokenCount"] == usage.prompt
    assert wire["totalTokenCount"] == wire["promptTokenCount"] + wire["candidatesTokenCount"] == usage.prompt + output
    assert wire["promptTokensDetails"] == [{"modality": "TEXT", "tokenCount": usage.prompt}]
    assert wire.get("cachedContentTokenCount", 0) == read
    assert wire.get("cacheTokensDetails", []) == ([{"modality": "TEXT", "tokenCount": read}] if read else [])
    assert wire.get("cachedContentTokenCount") != 0
    assert usage_metadata(usage).total_token_count == wire["totalTokenCount"]


def test_token_counts() -> None:
    details = [{"modality": "TEXT", "tokenCount": 9}]
    assert json.loads(GEMINI.render_token_count(9)) == {"totalTokens": 9, "promptTokensDetails": details}
    found = json.loads(GEMINI.render_token_count(9, 4))
    assert found == {"totalTokens": 9, "promptTokensDetails": details, "cachedContentTokenCount": 4}


def test_the_keepalive_is_a_blank_line() -> None:
    assert GEMINI.keepalive == Frame(b"\n", is_raw=True)
