"""cache_control: where it may stand, how many, in which order, and what the top-level form adds."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.request import ChatRequest, Mark
from keepwarm.dialects.anthropic import AnthropicMessages
from tests.golden.transcripts import BOUNDS

ANTHROPIC = AnthropicMessages(BOUNDS)
SHORT, LONG = Mark(300), Mark(3600)
CONTROLS = {None: None, SHORT: {"type": "ephemeral"}, LONG: {"type": "ephemeral", "ttl": "1h"}}
FIVE = {"type": "ephemeral", "ttl": "5m"}


def text(words: str, mark: Mark | None = None) -> dict[str, Any]:
    return {"type": "text", "text": words, "cache_control": CONTROLS[mark]}


def tool(name: str, mark: Mark | None = None) -> dict[str, Any]:
    return {"name": name, "input_schema": {"type": "object"}, "cache_control": CONTROLS[mark]}


def call(call_id: str, mark: Mark | None = None) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": "f", "input": {}, "cache_control": CONTROLS[mark]}


def result(call_id: str, content: Any, mark: Mark | None = None) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, "cache_control": CONTROLS[mark]}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def assistant(*content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(content)}


def parsed(*messages: Any, **members: Any) -> ChatRequest:
    body = {"model": "m", "max_tokens": 1, "messages": messages} | members
    return ANTHROPIC.parse_chat({}, json.dumps(body).encode()).request


def refused(*messages: Any, **members: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parsed(*messages, **members)
    assert caught.value.kind is ErrorKind.INVALID_REQUEST
    return caught.value


def marks(request: ChatRequest) -> list[tuple[str, Mark]]:
    """Every mark of a neutral request with what carries it."""
    found = [(one.name, one.mark) for one in request.tools]
    for message in request.messages:
        found += [(getattr(part, "text", "file"), part.mark) for part in message.parts]
        found.append((message.role, message.mark))
    return [(what, mark) for what, mark in found if mark is not None]


def test_every_block_that_can_carries_its_own() -> None:
    first = parsed(
        user(text("a", SHORT), text("b")),
        tools=[tool("f"), tool("g", LONG)],
        system=[text("s", LONG), text("t", SHORT)],
    )
    assert marks(first) == [("g", LONG), ("s", LONG), ("t", SHORT), ("a", SHORT)]
    source = {"type": "text", "media_type": "text/plain", "data": "d"}
    file = {"type": "base64", "media_type": "application/pdf", "data": ""}
    found = {"type": "search_result", "source": "s", "title": "t", "content": [text("x")]}
    second = parsed(
        user(
            {"type": "document", "source": source, "cache_control": FIVE},
            {"type": "document", "source": file, "cache_control": FIVE},
            found | {"cache_control": FIVE},
        ),
        {"role": "system", "content": [text("now", SHORT)]},
        user(text("q")),
    )
    assert [mark for _, mark in marks(second)] == [SHORT] * 4
    assert [what for what, _ in marks(second)][1] == "file"


def test_a_calls_mark_is_its_messages_and_the_longest_wins() -> None:
    asked = assistant(text("x"), call("1", LONG), call("2", SHORT))
    request = parsed(user(text("q")), asked, user(result("1", "r"), result("2", "r")))
    assert marks(request) == [("assistant", LONG)]


def test_a_results_mark_is_its_last_parts() -> None:
    asked = assistant(call("1"), call("2"), call("3"))
    results = user(
        result("1", [text("a", LONG), text("b")], LONG), result("2", None, SHORT), result("3", [text("c", SHORT)])
    )
    assert marks(parsed(user(text("q")), asked, results)) == [("a", LONG), ("b", LONG), ("tool", SHORT), ("c", SHORT)]
    both = user(result("1", [text("a", LONG)], SHORT))
    assert marks(parsed(user(text("q")), assistant(call("1")), both)) == [("a", LONG)]


def test_marks_keep_their_places_when_turns_are_merged() -> None:
    request = parsed(user(text("a", LONG)), user(text("b", SHORT)))
    assert marks(request) == [("a", LONG), ("\n\nb", SHORT)]


@pytest.mark.parametrize(
    "control,member",
    [
        ({"type": "forever"}, "type"),
        ({"type": "ephemeral", "ttl": "2h"}, "ttl"),
        ({"type": "ephemeral", "ttl": 300}, "ttl"),
    ],
)
def test_only_ephemeral_for_five_minutes_or_an_hour(control: dict[str, Any], member: str) -> None:
    block = text("a") | {"cache_control": control}
    assert refused(user(block)).param == f"messages[0].content[0].cache_control.{member}"
    assert refused(user(text("a")), cache_control=control).param == f"cache_control.{member}"


def test_some_blocks_cannot_carry_one() -> None:
    for block in ({"type": "thinking", "thinking": "x"}, {"type": "redacted_thinking", "data": "x"}):
        marked = assistant(block | {"cache_control": FIVE}, text("a"))
        error = refused(user(text("q")), marked, user(text("r")))
        assert error.param == "messages[1].content[0].cache_control" and block["type"] in error.message
    error = refused(user(text("a"), text("", SHORT)))
    assert error.param == "messages[0].content[1].cache_control" and "empty text" in error.message
    assert refused(user(text("a")), system=[text("", SHORT)]).param == "system[0].cache_control"
    inner = {"type": "content", "content": [text("x", SHORT)]}
    error = refused(user({"type": "document", "source": inner}))
    assert error.param == "messages[0].content[0].source.content[0].cache_control"


def test_at_most_four() -> None:
    five = [text(str(i), SHORT) for i in range(5)]
    assert len(marks(parsed(user(*five[:4])))) == 4
    error = refused(user(*five))
    assert error.message == "A maximum of 4 blocks with cache_control may be provided. Found 5."
    reply = json.loads(ANTHROPIC.render_error(error, "req_1").body)
    assert reply == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": error.message},
        "request_id": "req_1",
    }


def test_longer_before_shorter_in_the_order_tools_system_messages() -> None:
    assert refused(user(text("a", LONG)), system=[text("s", SHORT)]).param == "messages[0].content[0].cache_control.ttl"
    assert (
        refused(user(text("a")), system=[text("s", LONG)], tools=[tool("f", SHORT)]).param
        == "system[0].cache_control.ttl"
    )
    error = refused(user(text("a", SHORT)), cache_control=CONTROLS[LONG], system=[text("s", LONG)])
    assert error.param == "cache_control.ttl"
    error = refused(user(text("a", SHORT), text("b", LONG)))
    assert "ttl='1h'" in error.message and "must not come after" in error.message and "ttl='5m'" in error.message
    assert len(marks(parsed(user(text("a", SHORT)), system=[text("s", LONG)], tools=[tool("f", LONG)]))) == 3


def test_the_automatic_form_marks_the_last_block() -> None:
    control = CONTROLS[LONG]
    string = {"role": "user", "content": "q"}
    assert marks(parsed(string, cache_control=control)) == [("q", LONG)]
    assert marks(parsed(user(text("a"), text("b")), cache_control=control)) == [("b", LONG)]
    asked = [user(text("q")), assistant(call("1")), user(result("1", "r"))]
    assert marks(parsed(*asked, cache_control=control)) == [("r", LONG)]
    assert marks(parsed(string, {"role": "assistant", "content": "Dear"}, cache_control=control)) == [("Dear", LONG)]


def test_the_automatic_form_walks_back_to_a_block_that_can_be_marked() -> None:
    thought = {"type": "thinking", "thinking": "x"}
    messages = [user(text("q")), assistant(text("a"), thought, text("")), user(text(""))]
    assert marks(parsed(*messages, cache_control=FIVE)) == [("a", SHORT)]
    assert marks(parsed(user(text("")), system="s", cache_control=FIVE)) == [("s", SHORT)]
    assert marks(parsed(user(text("")), tools=[tool("f")], cache_control=FIVE)) == [("f", SHORT)]
    assert marks(parsed(user(text("")), cache_control=FIVE)) == []


def test_the_automatic_form_beside_explicit_marks() -> None:
    four = [text(str(i), SHORT) for i in range(4)]
    assert marks(parsed(user(*four), cache_control=FIVE)) == marks(parsed(user(*four)))
    error = refused(user(*four, text("last")), cache_control=FIVE)
    assert error.message == "A maximum of 4 blocks with cache_control may be provided. Found 5."
    error = refused(user(text("a", LONG)), cache_control=FIVE)
    assert error.param == "cache_control.ttl" and "messages[0].content[0]" in error.message
    assert (
        refused(user(text("a", SHORT), text("b")), cache_control=CONTROLS[LONG]).param
        == "messages[0].content[1].cache_control.ttl"
    )


def test_the_count_of_tokens_checks_the_same_marks() -> None:
    body = {"model": "m", "messages": [user(*(text(str(i), SHORT) for i in range(5)))]}
    with pytest.raises(ApiError, match="Found 5"):
        ANTHROPIC.parse_count({}, json.dumps(body).encode())


mark = st.sampled_from([None, None, SHORT, LONG])


@given(st.lists(mark, max_size=2), st.lists(mark, max_size=3), st.lists(mark, min_size=1, max_size=4), mark)
def test_random_marks_are_kept_or_refused_as_the_rules_say(
    on_tools: list[Mark | None], on_system: list[Mark | None], on_text: list[Mark | None], top: Mark | None
) -> None:
    wanted = [*on_tools, *on_system, *on_text]
    if top is not None and wanted[-1] is None:
        wanted[-1] = top
    lifetimes = [one.ttl_s or 0 for one in wanted if one is not None]
    is_allowed = (
        len(lifetimes) <= 4
        and sorted(lifetimes, reverse=True) == lifetimes
        and (top is None or on_text[-1] in (None, top))
    )
    members = {
        "tools": [tool(f"f{i}", one) for i, one in enumerate(on_tools)],
        "system": [text(f"s{i}", one) for i, one in enumerate(on_system)],
        "cache_control": CONTROLS[top],
    }
    content = [text(f"m{i}", one) for i, one in enumerate(on_text)]
    if not is_allowed:
        error = refused(user(*content), **members)
        assert ANTHROPIC.render_error(error).status == 400
        return
    names = [f"f{i}" for i in range(len(on_tools))] + [f"s{i}" for i in range(len(on_system))]
    names += [f"m{i}" for i in range(len(on_text))]
    expected = [(name, one) for name, one in zip(names, wanted, strict=True) if one is not None]
    assert marks(parsed(user(*content), **members)) == expected
