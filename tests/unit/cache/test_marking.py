import pytest
from msgspec.structs import replace

from keepwarm.cache.marking import (
    MARKS_MAX,
    Chat,
    Numbered,
    Spot,
    breakpoints,
    common_length,
    following,
    mark_offsets,
    number,
    variants,
)
from keepwarm.core.prompt import Breakpoint
from keepwarm.core.request import Mark, Message, TextPart, Tool, ToolCall

SHORT, LONG = Mark(300), Mark(3600)
CALL, OTHER_CALL = ToolCall("1", "f", "{}"), ToolCall("2", "g", "{}")


def tool(name: str, mark: Mark | None = None) -> Tool:
    return Tool(name, "", "{}", mark)


def says(role: str, *texts: str | tuple[str, Mark], **more: object) -> Message:
    return Message(role, tuple(TextPart(text) if isinstance(text, str) else TextPart(*text) for text in texts), **more)


def test_a_request_without_marks_stays_as_it_is() -> None:
    chat = Chat([says("user", "Hi")], [tool("f")])
    assert number(chat) == (chat, ())


def test_blocks_are_counted_in_the_order_tools_system_messages() -> None:
    chat = Chat(
        [
            says("system", "one", ("two", LONG)),
            says("user", ("three", SHORT)),
            says("assistant", "four", tool_calls=(CALL, OTHER_CALL), mark=SHORT),
            says("tool", ("result", SHORT), tool_call_id="1"),
            says("tool", "more", ("result", SHORT), tool_call_id="2"),
            says("user", ("five", Mark())),
            says("tool", "late", tool_call_id="2", mark=LONG),
        ],
        [tool("f"), tool("g", LONG)],
    )
    numbered, spots = number(chat)
    assert [(spot.position, spot.ttl_s) for spot in spots] == [
        (2, 3600), (4, 3600), (5, 300), (7, 300), (8, 300), (8, 300), (9, None), (10, 3600),
    ]  # fmt: skip
    assert [spot.tool for spot in spots] == [1, *[None] * 7]
    assert [(spot.message, spot.part) for spot in spots[1:]] == [
        (0, 1), (1, 0), (2, None), (3, 0), (4, 1), (5, 0), (6, 1),
    ]  # fmt: skip
    assert numbered.tools[1].mark == Numbered(3600, number=0)
    assert numbered.messages[2].mark == Numbered(300, number=3)
    assert numbered.messages[6] == replace(
        chat.messages[6], parts=(TextPart("late"), TextPart("", Numbered(3600, number=7))), mark=None
    )


def test_the_latest_marks_count() -> None:
    chat = Chat([says("user", *((f"{i}", SHORT) for i in range(MARKS_MAX + 3)))], [tool("f", SHORT)])
    numbered, spots = number(chat)
    assert [spot.position for spot in spots] == [i + 2 for i in range(3, MARKS_MAX + 3)]
    assert numbered.tools[0].mark is None
    marks = [part.mark for part in numbered.messages[0].texts]
    assert marks == [None] * 3 + [Numbered(300, number=i) for i in range(MARKS_MAX)]


@pytest.mark.parametrize(
    "parts, offsets",
    [
        (("one", "two"), [3, 6]),
        ((" one ", " two \n"), [4, 9]),
        (("one", " \n"), [3, 3]),
        (("  ", "one"), [5]),
        (("", " "), []),
    ],
)
def test_marks_lie_behind_text_and_depend_on_nothing_after_it(parts: tuple[str, ...], offsets: list[int]) -> None:
    numbered, _ = number(Chat([says("user", *((part, SHORT) for part in parts))]))
    (message,) = numbered.messages
    assert [offset for offset, _ in mark_offsets(message, message.text)] == offsets


def test_variants_begin_alike_and_go_on_differently() -> None:
    chat = Chat(
        [
            says("system", "S"),
            says("user", "one", ("two", SHORT), "three"),
            says("assistant", "", tool_calls=(CALL,), mark=SHORT),
            says("tool", "x"),
        ],
        [tool("f", SHORT), tool("g")],
        generate=True,
        thinking=False,
    )
    numbered, (first, second, third) = number(chat)
    of_tool, of_text, of_calls = (list(variants(numbered, spot)) for spot in (first, second, third))
    assert {one.thinking for one in [*of_tool, *of_text, *of_calls]} == {False}
    assert [[t.name for t in one.tools] for one in of_tool] == [["f"], ["f", "x"]]
    assert [[m.role for m in one.messages] for one in of_tool] == [["system", "user"]] * 2
    assert [one.messages[-1].text for one in of_text] == ["onetwoa", "onetwo("]
    assert [[m.role for m in one.messages[3:]] for one in of_calls] == [[], ["user"], ["tool"]]
    assert [one.generate for one in of_calls] == [True, False, False]
    assert {one.messages[2].tool_calls for one in of_calls} == {(CALL,)}


def test_a_result_may_follow_while_a_call_waits_for_it() -> None:
    called = says("assistant", "", tool_calls=(CALL, OTHER_CALL))
    first, second = says("tool", "x", tool_call_id="1"), says("tool", "y", tool_call_id="2")
    ids = [
        [one.tool_call_id for one in following(messages, ("a",), ("user",))]
        for messages in ([called], [called, first], [called, first, second], [first], [])
    ]
    assert ids == [[None, "1"], [None, "2"], [None], [None], [None]]


def test_marks_in_one_place_are_one() -> None:
    spots = [
        (Spot(300, 4), 30), (Spot(3600, 2), 30), (Spot(None, 1), 10), (Spot(300, 9), 0), (Spot(None, 5), 30),
    ]  # fmt: skip
    assert breakpoints(spots) == (Breakpoint(10, None, 1), Breakpoint(30, 3600, 5))


@pytest.mark.parametrize(
    "left, right, n",
    [("", "", 0), ("a", "", 0), ("abc", "abd", 2), ("abc", "abcd", 3), ("xa", "a", 0), ("aé", "aé", 2)],
)
def test_common_length(left: str, right: str, n: int) -> None:
    assert common_length(left, right) == common_length(right, left) == n
