"""Anthropic's answers: the order of stream events, counts on the wire, and that a whole answer is its stream, folded."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.core.cache_lookup import CacheLookup, MissCause
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
    ToolCallDelta,
    Usage,
)
from keepwarm.dialects import Frame, Identity
from keepwarm.dialects.anthropic import AnthropicMessages
from keepwarm.dialects.anthropic_answer import MessageRenderer, message_usage
from keepwarm.dialects.anthropic_diagnostics import REASONS
from tests.golden.transcripts import BOUNDS

ANTHROPIC = AnthropicMessages(BOUNDS)
IDENTITY = Identity("msg_1", 0)
USAGE = Usage(fresh=1, cache_read=20, cache_write=300, output=4, cache_write_long=100)
STARTED = Started(321, 20, usage=USAGE)


def renderer(*, stream: bool, **members: Any) -> MessageRenderer:
    body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "q"}], "stream": stream} | members
    return ANTHROPIC.renderer(ANTHROPIC.parse_chat({}, json.dumps(body).encode()), IDENTITY)


def ended(reason: FinishReason = "stop", stop: str | None = None) -> list[Event]:
    return [ChoiceFinished(reason, n_output=4, stop=stop), Finished(USAGE)]


def streamed(events: Sequence[Event], **members: Any) -> list[dict[str, Any]]:
    told = renderer(stream=True, **members)
    frames: list[Frame] = [frame for event in events for frame in told.feed(event)]
    found = [json.loads(frame.data) for frame in frames]
    assert [frame.name for frame in frames] == [one["type"] for one in found]
    assert all(b"\n" not in frame.data for frame in frames)
    return found


def whole(events: Sequence[Event], **members: Any) -> dict[str, Any]:
    told = renderer(stream=False, **members)
    for event in events:
        assert told.feed(event) == []
    return json.loads(told.whole())


def folded(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A client: checks the order of C.8 and folds what it gets."""
    first, *rest = events
    assert first["type"] == "message_start"
    message, is_open = first["message"], False
    assert message["content"] == [] and message["stop_reason"] is None
    while rest[0]["type"].startswith("content_block"):
        event = rest.pop(0)
        content = message["content"]
        if event["type"] == "content_block_start":
            assert not is_open and event["index"] == len(content)
            is_open = True
            content.append(event["content_block"] | {"pieces": []})
        elif event["type"] == "content_block_delta":
            assert is_open and event["index"] == len(content) - 1
            content[-1]["pieces"].append(event["delta"])
        else:
            assert is_open and event["index"] == len(content) - 1
            is_open = False
            content[-1] = closed(content[-1])
    assert not is_open
    delta, stop = rest
    assert (delta["type"], stop) == ("message_delta", {"type": "message_stop"})
    return message | delta["delta"] | {"usage": delta["usage"]}


def closed(block: dict[str, Any]) -> dict[str, Any]:
    pieces = block.pop("pieces")
    if block["type"] == "text":
        assert all(piece["type"] == "text_delta" for piece in pieces)
        return block | {"text": "".join(piece["text"] for piece in pieces)}
    if block["type"] == "tool_use":
        assert block["input"] == {} and all(piece["type"] == "input_json_delta" for piece in pieces)
        return block | {"input": json.loads("".join(piece["partial_json"] for piece in pieces) or "{}")}
    *thoughts, signature = pieces
    assert all(piece["type"] == "thinking_delta" for piece in thoughts) and signature["type"] == "signature_delta"
    thinking = "".join(piece["thinking"] for piece in thoughts)
    return block | {"thinking": thinking, "signature": signature["signature"]}


@st.composite
def answers(draw: st.DrawFn) -> list[Delta]:
    """Deltas as engines tell them: calls one after the other, their name first."""
    deltas: list[Delta] = []
    for kind in draw(st.lists(st.sampled_from(["text", "reasoning", "call"]), max_size=8)):
        if kind == "text":
            deltas.append(TextDelta(draw(st.text(max_size=3))))
        elif kind == "reasoning":
            deltas.append(ReasoningDelta(draw(st.text(max_size=3))))
        else:
            index = sum(isinstance(delta, ToolCallDelta) and delta.name is not None for delta in deltas)
            arguments = json.dumps(
                draw(st.dictionaries(st.text(max_size=2), st.integers() | st.text(max_size=2), max_size=2))
            )
            cut = draw(st.integers(0, len(arguments)))
            deltas.append(ToolCallDelta(index, f"f{index}"))
            deltas += [ToolCallDelta(index, arguments=piece) for piece in (arguments[:cut], arguments[cut:])]
    return deltas


def content_of(deltas: Sequence[Delta]) -> list[tuple[str, Any]]:
    """What the answer says, kind by kind."""
    found: list[tuple[str, Any]] = []
    for delta in deltas:
        if isinstance(delta, ToolCallDelta):
            if delta.name is not None:
                found.append((delta.name, ""))
            found[-1] = (found[-1][0], found[-1][1] + delta.arguments)
        elif delta.text:
            kind = "text" if isinstance(delta, TextDelta) else "thinking"
            if found and found[-1][0] == kind:
                found[-1] = (kind, found[-1][1] + delta.text)
            else:
                found.append((kind, delta.text))
    return [(kind, said if kind in ("text", "thinking") else json.loads(said)) for kind, said in found]


def said_in(message: dict[str, Any]) -> list[tuple[str, Any]]:
    kinds = {"text": "text", "thinking": "thinking", "tool_use": "input"}
    return [(block.get("name", block["type"]), block[kinds[block["type"]]]) for block in message["content"]]


@given(answers())
def test_any_answer_is_told_in_order_and_the_whole_is_the_stream_folded(deltas: list[Delta]) -> None:
    events = [STARTED, *deltas, *ended()]
    message = folded(streamed(events))
    assert said_in(message) == content_of(deltas)
    assert message == whole(events)


@given(answers(), st.integers(0, 20))
def test_a_turn_that_fails_ends_the_stream_with_an_error(deltas: list[Delta], at: int) -> None:
    events: list[Event] = [STARTED, *deltas][: at + 1]
    failed = Failed(ErrorKind.ENGINE_DOWN, "gone", retry_after_s=3)
    found = streamed([*events, failed])
    error = {"type": "overloaded_error", "message": "gone"}
    assert found[-1] == {"type": "error", "error": error, "request_id": "msg_1"}
    assert [one["type"] for one in found[:-1]] == [one["type"] for one in streamed(events)]
    with pytest.raises(ApiError) as caught:
        whole([*events, failed])
    assert (caught.value.kind, caught.value.retry_after_s) == (ErrorKind.ENGINE_DOWN, 3)


def test_ids_and_signatures_are_derived_from_the_turn() -> None:
    events = [STARTED, ReasoningDelta("x"), ToolCallDelta(0, "f"), ToolCallDelta(1, "g"), *ended("tool_calls")]
    first, again = whole(events), whole(events)
    assert first == again
    ids = [block["id"] for block in first["content"] if block["type"] == "tool_use"]
    assert len(set(ids)) == 2 and all(one.startswith("toolu_") and len(one) == 30 for one in ids)
    assert first["content"][0]["signature"]


@pytest.mark.parametrize(
    "reason,stop,expected",
    [
        ("stop", None, ("end_turn", None)),
        ("stop", "END", ("stop_sequence", "END")),
        ("length", None, ("max_tokens", None)),
        ("tool_calls", None, ("tool_use", None)),
    ],
)
def test_why_it_stopped(reason: FinishReason, stop: str | None, expected: tuple[str, str | None]) -> None:
    message = whole([STARTED, TextDelta("x"), *ended(reason, stop)], max_tokens=1)
    assert (message["stop_reason"], message["stop_sequence"]) == expected


def test_an_answer_cut_by_the_window_says_so() -> None:
    message = whole([STARTED, TextDelta("x"), *ended("length")], max_tokens=32_000)
    assert message["stop_reason"] == "model_context_window_exceeded"


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_warming_answers_nothing(reason: FinishReason) -> None:
    message = whole([STARTED, *ended(reason)], max_tokens=0)
    assert (message["content"], message["stop_reason"]) == ([], "max_tokens")


def test_hidden_thoughts_leave_an_empty_block() -> None:
    events = [STARTED, ReasoningDelta("secret"), TextDelta("a"), *ended()]
    members = {"thinking": {"type": "adaptive", "display": "omitted"}}
    message = folded(streamed(events, **members))
    assert said_in(message) == [("thinking", ""), ("text", "a")] and message["content"][0]["signature"]
    assert message == whole(events, **members)


counts = st.integers(0, 10**6)


@given(counts, counts, counts, counts, st.data())
def test_counts_add_up(fresh: int, read: int, written: int, output: int, data: st.DataObject) -> None:
    usage = Usage(fresh, read, written, output, data.draw(st.integers(0, written)))
    wire = message_usage(usage)
    creation = wire.cache_creation
    assert wire.input_tokens + wire.cache_creation_input_tokens + wire.cache_read_input_tokens == usage.prompt
    assert creation.ephemeral_5m_input_tokens + creation.ephemeral_1h_input_tokens == wire.cache_creation_input_tokens
    assert creation.ephemeral_1h_input_tokens == usage.cache_write_long
    assert min(creation.ephemeral_5m_input_tokens, creation.ephemeral_1h_input_tokens) >= 0
    assert (wire.input_tokens, wire.cache_read_input_tokens, wire.output_tokens) == (fresh, read, output)


def test_usage_at_the_start_is_the_prompts_and_at_the_end_the_turns() -> None:
    found = streamed([STARTED, TextDelta("x"), *ended()])
    start, end = found[0]["message"]["usage"], found[-2]["usage"]
    assert end == {
        "input_tokens": 1,
        "cache_creation_input_tokens": 300,
        "cache_read_input_tokens": 20,
        "cache_creation": {"ephemeral_5m_input_tokens": 200, "ephemeral_1h_input_tokens": 100},
        "output_tokens": 4,
    }
    assert start == end | {"output_tokens": 0}
    bare = streamed([Started(30, 10), *ended()])[0]["message"]["usage"]
    assert (bare["input_tokens"], bare["cache_read_input_tokens"], bare["cache_creation_input_tokens"]) == (20, 10, 0)


def explained(lookup: CacheLookup | None, previous: str | None = "msg_0") -> Any:
    events = [Started(30, 0, lookup=lookup), *ended()]
    members = {"diagnostics": {"previous_message_id": previous}}
    message = whole(events, **members)
    assert streamed(events, **members)[0]["message"]["diagnostics"] == message["diagnostics"]
    return message["diagnostics"] and message["diagnostics"]["cache_miss_reason"]


def test_diagnostics_only_for_who_asks() -> None:
    lookup = CacheLookup("miss", 0, cause=MissCause.TOOLS_CHANGED, n_missed=7, compare_found=True)
    events = [Started(30, 0, lookup=lookup), *ended()]
    assert "diagnostics" not in whole(events) and "diagnostics" not in streamed(events)[0]["message"]
    assert explained(lookup) == {"type": "tools_changed", "cache_missed_input_tokens": 7}
    assert explained(lookup, None) is None


def test_diagnostics_have_a_word_for_every_cause() -> None:
    assert REASONS.keys() == set(MissCause)
    for cause, word in REASONS.items():
        found = explained(CacheLookup("partial", 3, cause=cause, n_missed=7, compare_found=True))
        if word is None:
            assert found is None
        else:
            lost = {"cache_missed_input_tokens": 7} if word.endswith("_changed") else {}
            assert found == {"type": word} | lost
    assert explained(CacheLookup("hit", 30, compare_found=True)) is None
    gone = CacheLookup("miss", 0, cause=MissCause.SYSTEM_CHANGED, n_missed=7, compare_found=False)
    assert explained(gone) == {"type": "previous_message_not_found"}
    assert explained(None) == {"type": "unavailable"}


def test_the_keepalive_is_a_ping() -> None:
    assert ANTHROPIC.keepalive == Frame(b'{"type":"ping"}', "ping")
