"""Normalisers on whole requests: what they change, where breakpoints end up, and that two turns of an agent agree."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from keepwarm.cache.normalise import NORMALISERS, normalise
from keepwarm.config import NORMALISERS as CONFIGURABLE
from keepwarm.config import ConfigError, ModelConfig, load
from keepwarm.core.request import ChatRequest, DocumentPart, Mark, Message, Part, TextPart, Tool, ToolCall

ALL = tuple(NORMALISERS)
SHORT, LONG = Mark(300), Mark(3600)


def billing(cch: str) -> str:
    return f"x-anthropic-billing-header: cc_version=2.1.117.48f; cc_entrypoint=cli; cch={cch};"


def agent_system(clock: str) -> str:
    return (
        "You are a coding agent that works in a terminal. Use the tools to read, change and test the user's project.\n\n"
        "# Tone\nBe concise. Point at code as path:line, for example src/app/session.ts:120.\n\n"
        "Here is what is known of where you run:\n<env>\nWorking directory: /srv/shop\nIs directory a git repo: yes\n"
        f"Platform: linux\n{clock}\n</env>\n"
        "Recent commits:\n4f1c2d0 2026-11-24 09:15:01 Checkout totals\n"
    )


def reminder(text: str = "Your mode has changed from plan to build.") -> str:
    return f"<system-reminder>\n{text}\n</system-reminder>"


def system(*texts: str) -> Message:
    return Message("system", tuple(TextPart(text) for text in texts))


def user(*texts: str) -> Message:
    return Message("user", tuple(TextPart(text) for text in texts))


CALLS = Message("assistant", (), tool_calls=(ToolCall("call_1", "bash", '{"command": "npm test"}'),))
RESULT = Message("tool", (TextPart("2 passed, 1 failed at 14:03:22"),), tool_call_id="call_1")
TOOL = Tool("bash", "Runs a command.", "{}")


def request(*messages: Message, tools: Sequence[Tool] = (TOOL,)) -> ChatRequest:
    return ChatRequest("m", messages, tuple(tools))


def marked(text: str, mark: Mark | None = SHORT) -> TextPart:
    return TextPart(text, mark)


def rewritten(asked: ChatRequest, *names: str) -> ChatRequest:
    return normalise(asked, names)[0]


def test_the_configuration_knows_the_names() -> None:
    assert set(CONFIGURABLE) == set(NORMALISERS)
    assert ModelConfig().normalise == ("billing-header",)
    assert load(None, {"data_dir": "x", "model": {"normalise": list(ALL)}}).model.normalise == ALL
    assert load(None, {"data_dir": "x", "model": {"normalise": []}}).model.normalise == ()
    with pytest.raises(
        ConfigError, match=r"model.normalise: 'clocks' is not one of billing-header, clock, moving-reminder"
    ):
        load(None, {"data_dir": "x", "model": {"normalise": ["clock", "clocks"]}})


def test_nothing_listed_nothing_changed() -> None:
    asked = request(system(billing("1"), agent_system("Current time: 14:03:22")), user("Hi", reminder()))
    assert normalise(asked, ()) == (asked, ())


def test_the_billing_block_goes() -> None:
    prompt = agent_system("Today's date: 2026-11-25")
    asked = request(system(billing("71fea"), prompt), user("Hi"))
    assert normalise(asked, ("billing-header",)) == (request(system(prompt), user("Hi")), ("billing-header: system",))
    joined = request(system(f"{billing('71fea')}\n{prompt}"), user("Hi"))
    assert rewritten(joined, "billing-header") == request(system(prompt), user("Hi"))


def test_a_system_message_of_nothing_else_goes_and_one_that_was_empty_before_stays() -> None:
    asked = request(system(billing("71fea")), system(""), user("Hi"))
    assert rewritten(asked, "billing-header") == request(system(""), user("Hi"))


def test_users_and_tools_may_speak_of_the_header_and_of_the_time() -> None:
    result = replace(RESULT, parts=(TextPart("Current time: 14:03:22"),))
    asked = request(user(billing("71fea")), CALLS, result)
    assert normalise(asked, ("billing-header", "clock")) == (asked, ())


def test_the_clock_keeps_the_date_and_what_is_no_clock() -> None:
    asked = request(system(agent_system("Today's date: 2026-11-25 14:03:22")), user("Is it 14:03?"), CALLS, RESULT)
    left, told = normalise(asked, ("clock",))
    prompt = agent_system("Today's date: 2026-11-25")
    assert left == request(system(prompt), *asked.messages[1:])
    assert "2026-11-24 09:15:01" in prompt
    assert told == ("clock: system",)


def test_what_was_changed_is_told_by_place() -> None:
    asked = request(
        system(f"{billing('1')}\nYou help."), system("Today is 2026-11-25 14:03"), user("Hi"),
        system("Current time: 14:03:22"), user(reminder(), "Go on"),
    )  # fmt: skip
    told = ("billing-header: system", "clock: system", "clock: messages[1]", "moving-reminder: messages[2]")
    assert normalise(asked, ALL)[1] == told


def test_the_reminder_is_read_at_the_very_end_and_history_is_the_same_without_it() -> None:
    turns = [
        request(system("s"), user("Fix it", reminder())),
        request(system("s"), user("Fix it", reminder()), CALLS, RESULT),
        request(system("s"), user("Fix it"), CALLS, RESULT, Message("assistant", (TextPart("Done."),)),
                user("Thanks", reminder())),
    ]  # fmt: skip
    behind = TextPart(f"\n{reminder()}")
    first, second, third = (rewritten(turn, "moving-reminder").messages for turn in turns)
    assert first == (system("s"), replace(user("Fix it"), parts=(TextPart("Fix it"), behind)))
    assert second == (system("s"), user("Fix it"), CALLS, replace(RESULT, parts=(*RESULT.parts, behind)))
    assert third[:4] == (system("s"), user("Fix it"), CALLS, RESULT)
    assert third[-1].parts == (TextPart("Thanks"), behind)


def test_reminders_of_older_messages_and_of_tools_stay_where_they_are() -> None:
    lasting = user(reminder("The project's rules: …"), "Fix it")
    result = replace(RESULT, parts=(TextPart(f"ok\n{reminder('The list is empty.')}"),))
    asked = request(lasting, CALLS, result, Message("assistant", (TextPart("Done."),)), user("Thanks"))
    assert normalise(asked, ALL) == (asked, ())


def test_an_answer_that_is_continued_stays_last() -> None:
    asked = request(user("Fix it", reminder()), Message("assistant", (TextPart("Well,"),), partial=True))
    assert normalise(asked, ALL) == (asked, ())


def test_a_reminder_alone_in_its_message_stays_as_it_is() -> None:
    asked = request(CALLS, RESULT, user(reminder()))
    assert normalise(asked, ALL) == (asked, ())


def test_the_messages_of_a_cache_object_stay_as_they_are() -> None:
    stored = (system(f"{billing('1')}\nCurrent time: 14:03:22"), user("Read this", reminder()))
    asked = request(*stored, CALLS, RESULT)
    assert normalise(asked, ALL, n_fixed=2) == (asked, ())
    assert normalise(asked, ALL, n_fixed=1)[1] == ("moving-reminder: messages[0]",)
    longer = request(
        *stored, Message("assistant", (TextPart("Read."),)), system(billing("2")), user("Go on", reminder())
    )
    left, told = normalise(longer, ALL, n_fixed=2)
    assert left.messages[:2] == stored
    assert left.messages[3].parts == (TextPart("Go on"), TextPart(f"\n{reminder()}"))
    assert told == ("billing-header: messages[2]", "moving-reminder: messages[2]")


def test_a_document_at_the_end_is_no_obstacle() -> None:
    document = DocumentPart("application/pdf", b"%PDF", "messages[0].content[1]")
    asked = request(Message("user", (TextPart(reminder()), document)))
    assert rewritten(asked, "moving-reminder").messages[0].parts == (document, TextPart(f"\n{reminder()}"))


def test_a_mark_goes_to_the_part_before() -> None:
    asked = request(Message("user", (TextPart("Fix it"), marked(reminder(), LONG))), tools=())
    (message,) = rewritten(asked, "moving-reminder").messages
    assert message.parts == (marked("Fix it", LONG), TextPart(f"\n{reminder()}"))
    both = request(Message("user", (marked("Fix it", LONG), marked(reminder(), SHORT))), tools=())
    assert rewritten(both, "moving-reminder").messages[0].parts[0] == marked("Fix it", LONG)


def test_a_mark_stays_with_a_part_that_keeps_text() -> None:
    asked = request(Message("user", (marked(f"Fix it\n\n{reminder()}"),)))
    (message,) = rewritten(asked, "moving-reminder").messages
    assert message.parts == (marked("Fix it"), TextPart(f"\n{reminder()}"))


def test_the_reminder_is_behind_the_last_messages_mark_too() -> None:
    asked = request(user("Fix it", reminder()), CALLS, replace(RESULT, mark=LONG))
    *_, last = rewritten(asked, "moving-reminder").messages
    assert last == replace(RESULT, parts=(marked(RESULT.text, LONG), TextPart(f"\n{reminder()}")))


def test_a_mark_of_an_emptied_message_becomes_the_messages() -> None:
    asked = request(Message("user", (marked(reminder()),)), CALLS, RESULT)
    first, *_ = rewritten(asked, "moving-reminder").messages
    assert first == Message("user", (), mark=SHORT)


def test_a_mark_with_nothing_of_its_message_before_it_goes_to_what_comes_before() -> None:
    block = Message("system", (marked(billing("71fea")), TextPart("You help.")))
    left = rewritten(request(block, user("Hi")), "billing-header")
    assert left == request(system("You help."), user("Hi"), tools=[replace(TOOL, mark=SHORT)])
    assert rewritten(request(block, user("Hi"), tools=()), "billing-header") == request(
        system("You help."), user("Hi"), tools=()
    )
    behind = rewritten(request(system("a"), block, user("Hi")), "billing-header")
    assert behind.messages[0].parts == (marked("a"),)
    called = rewritten(request(user("a"), CALLS, RESULT, CALLS, block), "billing-header")
    assert called.messages[3] == replace(CALLS, mark=SHORT)


def test_a_mark_of_a_system_message_that_goes_is_not_lost() -> None:
    gone = replace(system(billing("71fea")), mark=LONG)
    left = rewritten(request(system("a"), gone, user("Hi")), "billing-header")
    assert left == request(Message("system", (marked("a", LONG),)), user("Hi"))


CLOCKS = ["Today's date: 2026-11-25 {}", "Current time: {}", "Current date and time is 2026-11-25T{}Z"]


@given(st.sampled_from(CLOCKS), st.times(), st.times(), st.integers(0, 16**5 - 1), st.integers(0, 16**5 - 1))
def test_two_requests_that_differ_in_volatile_lines_only_become_equal(
    clock: str, one: object, other: object, first: int, second: int
) -> None:
    def asked(time: object, checksum: int) -> ChatRequest:
        prompt = agent_system(clock.format(format(time, "%H:%M:%S")))
        block = Message("system", (TextPart(billing(f"{checksum:05x}")), TextPart(prompt, SHORT)))
        return request(block, user("Fix the failing test"), CALLS, RESULT)

    assert rewritten(asked(one, first), *ALL) == rewritten(asked(other, second), *ALL)


marks = st.none() | st.sampled_from([Mark(), SHORT, LONG])
TEXTS = ["", "Fix it", "Fix it\n", billing("1"), f"{billing('2')}\nYou help.", reminder(), f"a\n{reminder('b')}\nc",
         "Current time: 14:03:22", "Today's date: 2026-11-25 14:03", "\n"]  # fmt: skip
parts: st.SearchStrategy[Part] = st.builds(TextPart, st.sampled_from(TEXTS) | st.text(max_size=5), marks) | st.builds(
    DocumentPart, st.just("text/plain"), st.just(b"x"), st.just("p"), mark=marks
)
messages = st.builds(
    Message,
    st.sampled_from(["system", "user", "assistant", "tool"]),
    st.lists(parts, max_size=4).map(tuple),
    mark=marks,
    tool_calls=st.sampled_from([(), CALLS.tool_calls]),
)
requests = st.builds(
    ChatRequest, st.just("m"), st.lists(messages, max_size=6).map(tuple), st.sampled_from([(), (TOOL,)])
)
names = st.permutations(ALL).flatmap(lambda order: st.integers(0, len(order)).map(lambda n: tuple(order[:n])))


@given(requests, names)
def test_twice_is_once(asked: ChatRequest, listed: tuple[str, ...]) -> None:
    once, _ = normalise(asked, listed)
    assert normalise(once, listed) == (once, ())


@given(requests, names)
def test_told_if_and_only_if_changed(asked: ChatRequest, listed: tuple[str, ...]) -> None:
    left, told = normalise(asked, listed)
    assert (left == asked) == (not told)
    assert {line.split(":")[0] for line in told} <= set(listed)


@given(requests, names)
def test_what_no_pattern_is_in_is_left_alone(asked: ChatRequest, listed: tuple[str, ...]) -> None:
    """Assistants' messages, tool calls, documents, and everything but the texts, marks and places named."""
    left, _ = normalise(asked, listed)
    kept = [message for message in asked.messages if message.role != "system"]
    now = [message for message in left.messages if message.role != "system"]
    assert [m.role for m in kept] == [m.role for m in now]
    for before, after in zip(kept, now, strict=True):
        assert (before.tool_calls, before.name, before.partial) == (after.tool_calls, after.name, after.partial)
        assert documents(before) == documents(after)
        if before.role == "assistant":
            assert texts(before) == texts(after)


def documents(message: Message) -> list[bytes]:
    return [part.data for part in message.parts if isinstance(part, DocumentPart)]


def texts(message: Message) -> list[str]:
    return [part.text for part in message.parts if isinstance(part, TextPart)]


@given(requests, names)
def test_marks_never_become_more_and_the_longest_never_lives_shorter(
    asked: ChatRequest, listed: tuple[str, ...]
) -> None:
    left, _ = normalise(asked, listed)
    before, after = all_marks(asked), all_marks(left)
    assert len(after) <= len(before)
    if after:
        assert max(mark.ttl_s or 0 for mark in after) <= max(mark.ttl_s or 0 for mark in before)
    if asked.tools and before:  # else a mark may stand before everything
        assert max(mark.ttl_s or 0 for mark in after) == max(mark.ttl_s or 0 for mark in before)


def all_marks(asked: ChatRequest) -> list[Mark]:
    found = [tool.mark for tool in asked.tools]
    for message in asked.messages:
        found += [*(part.mark for part in message.parts), message.mark]
    return [mark for mark in found if mark is not None]


def test_a_long_hostile_conversation_is_linear() -> None:
    """Many messages, many near matches: done in one pass each. A quadratic rewrite would take minutes."""
    shuffled = random.Random(7)
    pieces = ["<system-reminder>", "</env>", "<env>", "Current time: 14:03 ", "Today is 1", " 1", "\n", ". ", "\n# "]
    text = "".join(shuffled.choices(pieces, k=20_000))
    asked = request(*[system(f"{billing('1')}\n{text[:200]}")] * 4_000, system(text), user(text))
    assert len(normalise(asked, ALL)[0].messages) == 4_002
