"""Patterns of volatile lines: what they match, what they only resemble, and that a text without them is never touched."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.cache.volatile import split_reminders, without_billing_header, without_time_of_day

HEADER = "x-anthropic-billing-header: cc_version=2.1.117.48f; cc_entrypoint=cli; cch=71fea;"
REMINDER = "<system-reminder>\nYou are in plan mode.\n</system-reminder>"


@pytest.mark.parametrize(
    "text,left",
    [
        (HEADER, ""),
        (f"{HEADER}\n", ""),
        (f"{HEADER}\nYou are an agent.", "You are an agent."),
        (f"{HEADER}\r\nYou are an agent.", "You are an agent."),
        (f"{HEADER}\n{HEADER}\nYou are an agent.", "You are an agent."),
        (f"{HEADER}\n\nYou are an agent.", "\nYou are an agent."),
    ],
)
def test_billing_header_is_the_first_line(text: str, left: str) -> None:
    assert without_billing_header(text) == left


@pytest.mark.parametrize(
    "text",
    [
        f"You are an agent.\n{HEADER}\n",
        f" {HEADER}",
        f"> {HEADER}",
        "x-anthropic-billing-header without a colon",
        "X-Anthropic-Billing-Header: as an HTTP header in somebody's notes",
        "",
    ],
)
def test_a_text_about_the_header_is_left_alone(text: str) -> None:
    assert without_billing_header(text) == text


@pytest.mark.parametrize(
    "text,left",
    [
        ("Today's date: 2026-11-25 14:03:22", "Today's date: 2026-11-25"),
        ("Today’s date is 25.11.2026 14:03", "Today’s date is 25.11.2026"),
        ("Current time: 14:03:22", "Current time: "),
        ("Current time: 2:03 PM, Wednesday, November 25th, 2026", "Current time: , Wednesday, November 25th, 2026"),
        ("Current date and time: 2026-11-25T14:03:22.123Z", "Current date and time: 2026-11-25"),
        ("Current date and time: 2026-11-25T14:03:22+02:00", "Current date and time: 2026-11-25"),
        ("Current Date & Time: 11/25/2026, 2:03:22 PM (UTC, UTC+0:00)", "Current Date & Time: 11/25/2026 (UTC, UTC+0:00)"),
        ("current datetime = 2026/11/25 14:03 UTC", "current datetime = 2026/11/25 UTC"),
        ("System time: Wed Nov 25 14:03:22 UTC 2026", "System time: Wed Nov 25 UTC 2026"),
        ("Current local time: Nov. 25, 2026, 2:03 p.m.", "Current local time: Nov. 25, 2026"),
        ("Today is Wednesday, 25 November 2026, 14:03:22 CET", "Today is Wednesday, 25 November 2026 CET"),
        ("- **Current time:** Wednesday, November 25, 2026 at 2:03 PM (Europe/Oslo)",
         "- **Current time:** Wednesday, November 25, 2026 (Europe/Oslo)"),
        ("You help. The current date and time is Wednesday, November 25, 2026 2:03 PM. Be brief.",
         "You help. The current date and time is Wednesday, November 25, 2026. Be brief."),
        ("## Current Time\n2026-11-25 14:03 (Wednesday)\n\n## Rules", "## Current Time\n2026-11-25 (Wednesday)\n\n## Rules"),
        ("<current_time>2026-11-25T14:03:22Z</current_time>", "<current_time>2026-11-25</current_time>"),
        ("<env>\nPlatform: linux\nStarted 2026-11-25T14:03:22Z\n</env>", "<env>\nPlatform: linux\nStarted 2026-11-25\n</env>"),
        ("<env>2026-11-25 14:03 15:04</env>", "<env>2026-11-25</env>"),
        ("<environment_context>at 2026-11-25 14:03:22.5</environment_context>",
         "<environment_context>at 2026-11-25</environment_context>"),
    ],
)  # fmt: skip
def test_the_time_of_day_goes_and_the_date_stays(text: str, left: str) -> None:
    assert without_time_of_day(text) == left
    assert without_time_of_day(left) == left
    between = f"You are an agent.\n{text}\nKeep to the rules."
    assert without_time_of_day(between) == f"You are an agent.\n{left}\nKeep to the rules."


@pytest.mark.parametrize(
    "text",
    [
        "Today's date: 2026-11-25",
        "Current time zone: 14:03",
        "Always print 'Current time: 14:03' first.",
        "The meeting is at 14:03 on 2026-11-25.",
        "Opening time: 14:03",
        "Time: 14:03",
        "Current time: ask the tool before 14:03",
        "Current time: soon\n14:03",
        "Current time:\n14:03",
        "Today is the day. 14:03",
        "Today: parse logs of the form 2026-11-25T14:03:22Z",
        "Current time: 99 of 14:03",
        "See src/clock.ts:14:03 and 2026-11-25T14:03:22Z.",
        "<env>\nPort: 14:03\n</env>",
        "<env>\n2026-11-25T14:03:22Z",
        "<current_time>14:03 in Oslo</current_time>",
        "## Current Time\n14:03 is late.",
        "Current ratio: 3:10",
        "Current time: 14:3",
        "Current time: 14:031",
        "Current time: Nov. 14:03 Current time: 15:00",  # without the first time the second would begin a sentence
    ],
)
def test_what_only_resembles_a_clock_is_left_alone(text: str) -> None:
    assert without_time_of_day(text) == text


@pytest.mark.parametrize(
    "text,left,n",
    [
        (REMINDER, "", 1),
        (f"\n{REMINDER}\n", "", 1),
        (f"Fix the test.\n\n{REMINDER}", "Fix the test.", 1),
        (f"{REMINDER}\n\nFix the test.\n", "Fix the test.\n", 1),
        (f"\n\nFix\n{REMINDER}\nthe test.\n{REMINDER}\n", "\n\nFix\nthe test.\n", 2),
        (f"{REMINDER}\n{REMINDER}\nFix the test.", "Fix the test.", 2),
        (f"{REMINDER}{REMINDER}", "", 2),
    ],
)
def test_reminders_go_with_the_line_breaks_that_set_them_off(text: str, left: str, n: int) -> None:
    assert split_reminders(text) == (left, [REMINDER] * n)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Fix the test.\n",
        "\n\n",
        "What does <system-reminder> mean?",
        "</system-reminder> and <system-reminder>",
        f"<system-{REMINDER}reminder>x</system-reminder>",
    ],
)
def test_no_reminder_no_change(text: str) -> None:
    assert split_reminders(text) == (text, [])


plain = st.text(st.characters(exclude_characters=":<"))
# Pieces of what the patterns are made of, so that what hypothesis joins from them nearly matches, often.
PIECES = [
    "Current time: ", "current time", "Today is ", "Today's date: ", "## Current Time\n", "<current_time>", "</current_time>",
    "<env>", "</env>", "14:03", "14:03:22", "2:03 PM", "2:03 p.m.", "2026-11-25", "2026-11-25T", "11/25/2026", "Z", "+02:00",
    "UTC", "UTC+1", "Nov", "Nov. ", "Wednesday", "25th", "2026", "T", ", ", " ", "     ", "\n", "\n\n", ". ", "- ", "(", ")",
    "at ", "on ", "is ", "the ", "**", "x", "Europe/Oslo", ":", "1", "-",
    HEADER, "x-anthropic-billing-header:", "<system-reminder>", "</system-reminder>", "<system-", "reminder>",
]  # fmt: skip
nearly = st.lists(st.sampled_from(PIECES) | st.text(max_size=3)).map("".join)


@given(plain)
def test_a_text_without_the_patterns_is_never_changed(text: str) -> None:
    assert without_billing_header(text) == text
    assert without_time_of_day(text) == text
    assert split_reminders(text) == (text, [])


@given(nearly)
def test_twice_is_once(text: str) -> None:
    for rewrite in (without_billing_header, without_time_of_day):
        once = rewrite(text)
        assert rewrite(once) == once
    left, found = split_reminders(text)
    assert split_reminders(left) == (left, [])
    assert all(block.startswith("<system-reminder>") and block.endswith("</system-reminder>") for block in found)


@given(nearly)
def test_nothing_is_added_and_only_the_named_goes(text: str) -> None:
    """What is left is the text with pieces out of it; what a clock loses is made of a time's characters."""
    assert text.endswith(without_billing_header(text))
    left = iter(without_time_of_day(text))
    expected, gone = next(left, None), []
    for character in text:
        if character == expected:
            expected = next(left, None)
        else:
            gone.append(character)
    assert expected is None
    assert set("".join(gone)) <= set("0123456789:.,+- \tTZaApPmMont–")


times = st.times()


@given(times, times, st.sampled_from(["%H:%M", "%H:%M:%S", "%I:%M %p", "%I:%M:%S %p"]))
def test_two_times_of_one_day_are_the_same_text(one: object, other: object, form: str) -> None:
    texts = {
        without_time_of_day(f"You are an agent.\nCurrent date and time: 2026-11-25 {format(time, form)}\nWork.")
        for time in (one, other)
    }
    assert len(texts) == 1
