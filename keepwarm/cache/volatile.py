"""What in a text is volatile: patterns of lines that agents write anew in every request. Pure, linear in the text.

Every pattern is narrow on purpose: a text that only speaks of such a line ("always print `Current time:` first") is not
one. Each function is idempotent, and a text without the pattern comes back as it is.
"""

import re
from collections.abc import Iterator

_BILLING = re.compile(r"(?:x-anthropic-billing-header:[^\n]*(?:\n|\Z))+")

REMINDER, REMINDER_END = "<system-reminder>", "</system-reminder>"
ENVIRONMENTS = ("env", "environment", "environment_context")

# 14:03, 14:03:22.123, 2:03 PM, 14:03:22Z, 14:03+02:00. A minute with more digits, or an offset's own "0:00", is none.
_TIME = (
    r"(?<![\d:.+-])\d{1,2}:\d{2}(?::\d{2}(?:[.,]\d{1,9})?)?(?![\d:])(?:[ \t]?(?:[AP]M|[ap]m|[AP]\.M\.|[ap]\.m\.)(?!\w))?"
    r"(?:Z(?!\w)|[ \t]?[+-]\d{2}:?\d{2}(?![\d:]))?"
)
_WEEKDAY = r"(?:mon|tues?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun)(?:day)?"
_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)"
)
_DATE = r"(?:\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{4})(?:T(?=\d)|(?![\w-]))"
_ZONE = r"(?-i:UTC|GMT|[A-Z]{3,4})(?:[+-]\d{1,2}(?::?\d{2})?)?(?![\w:])|(?-i:[A-Z])[a-z]+/[a-z_]+"
# What a date with a time may be made of, so that "2026-11-25 14:03", "Wed Nov 25 14:03:22 UTC 2026" and
# "2:03 PM, Wednesday, November 25th, 2026 (Europe/Oslo)" are found up to their end.
_TOKEN = (
    rf"(?:{_DATE}|{_TIME}|\d{{1,4}}(?:st|nd|rd|th)?(?![\w:])|(?:{_WEEKDAY}|{_MONTH})(?!\w)(?:\.(?=[ \t]\d{{1,2}}(?![\d:])))?"
    rf"|at(?=[ \t])|on(?=[ \t])|{_ZONE})"
)
_VALUE = rf"(?P<value>{_TOKEN}(?:[ \t,()–-]{{0,4}}{_TOKEN})*+)"
_LABEL = (
    r"(?:today(?:['’]s[ \t]date)?|(?:current|local|system)[ \t](?:local[ \t]|utc[ \t]|system[ \t])?"
    r"(?:date(?:[ \t]?(?:and|&|/)?[ \t]?time)?|timestamp|time))"
)
_EMPHASIS = r"(?:\*{1,2}|_{1,2}|`)?"
_FLAGS = re.IGNORECASE | re.MULTILINE
# Within a line: at its start, behind list marks or emphasis if there are any, or at a sentence's; then ":", "is" or "=".
_LINE_CLOCK = re.compile(
    rf"(?P<label>(?:^[ \t]{{0,16}}(?:[-*>#]{{1,6}}[ \t])?{_EMPHASIS}|(?<=[.!?][ ]))(?:the[ \t])?{_LABEL}"
    rf"{_EMPHASIS}[ \t]?(?::|=|is:?(?=[ \t])){_EMPHASIS}[ \t]{{0,4}}){_VALUE}",
    re.IGNORECASE,
)
# As a heading, the time alone on the line below it. It begins with a "#" that the search can jump to.
_HEADED_CLOCK = re.compile(
    rf"(?P<label>#(?<![^\n]#)#{{0,5}}[ \t]{_LABEL}:?[ \t]{{0,4}}\n{{1,2}}[ \t]{{0,4}}){_VALUE}(?=[ \t)]{{0,4}}$)",
    _FLAGS,
)
# As a tag with nothing else in it.
_TAGGED_CLOCK = re.compile(
    rf"(?P<label><current_(?:date|time|datetime|date_time|timestamp)>[ \t\n]{{0,4}}){_VALUE}(?=[ \t\n)]{{0,4}}</)",
    _FLAGS,
)
_TIME_OF_DAY = re.compile(rf"(?:T|[ \t]*,?[ \t]*(?:\b(?:at|on)[ \t]+|[–-][ \t]+)?){_TIME}", re.IGNORECASE)
_MINUTES = re.compile(r":\d\d")  # without which there is no time of day
_ISO = re.compile(rf"(?P<date>(?<![\d-])\d{{4}}-\d{{2}}-\d{{2}})(?:[T \t]{_TIME})+")


def without_billing_header(text: str) -> str:
    """Coding agents' first line of the system text, with a checksum of the request. It says nothing to a model."""
    found = _BILLING.match(text)
    return text[found.end() :] if found else text


def without_time_of_day(text: str) -> str:
    """Behind a clock's label, and in ISO timestamps within <env>: the date stays, the time of day goes."""
    if not _MINUTES.search(text):
        return text
    lines = text.split("\n")
    for i, line in enumerate(lines):
        if _MINUTES.search(line):  # few lines have any, and looking for a label in all of them takes five times as long
            lines[i] = _LINE_CLOCK.sub(_date_alone, line)
    text = _TAGGED_CLOCK.sub(_date_alone, _HEADED_CLOCK.sub(_date_alone, "\n".join(lines)))
    for name in ENVIRONMENTS:
        pieces = list(_blocks(text, f"<{name}>", f"</{name}>"))
        if len(pieces) > 1:
            text = "".join(_ISO.sub(r"\g<date>", piece) if is_block else piece for piece, is_block in pieces)
    return text


def split_reminders(text: str) -> tuple[str, list[str]]:
    """The text without its reminders and the line breaks that set them off, and the reminders."""
    rest: list[str] = []
    reminders: list[str] = []
    for piece, is_block in _blocks(text, REMINDER, REMINDER_END):
        if is_block:
            reminders.append(piece)
        else:
            rest.append(piece)
    kept: list[str] = []
    for i, piece in enumerate(rest):
        own = piece if kept or i == 0 else piece.lstrip("\n")
        own = own.rstrip("\n") if i < len(rest) - 1 else own
        if own:
            kept.append(own)
    left = "".join(kept)
    start = left.find(REMINDER)
    if not reminders or (start >= 0 and left.find(REMINDER_END, start) >= 0):
        return text, []  # none, or pieces that only together make another one: nobody's reminder
    return left, reminders


def _date_alone(found: re.Match[str]) -> str:
    return str(found["label"]) + _TIME_OF_DAY.sub("", found["value"])


def _blocks(text: str, opening: str, closing: str) -> Iterator[tuple[str, bool]]:
    """The text in pieces, each with whether it is a block from `opening` to the next `closing`; the last one is none."""
    at = 0
    while (start := text.find(opening, at)) >= 0 and (end := text.find(closing, start)) >= 0:
        yield text[at:start], False
        yield text[start : end + len(closing)], True
        at = end + len(closing)
    yield text[at:], False
