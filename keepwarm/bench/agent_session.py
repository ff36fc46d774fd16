"""A coding agent's session as such a client sends it: growing history, tools, tool results, cache breakpoints. Pure.

    tools    ……………………………………… last one: breakpoint of an hour        the same in every turn
    system   identity; instructions: breakpoint of an hour              the same in every turn
    messages task │ call, result │ call, result │ …                     each turn adds one round
                                          newest message's last block: breakpoint of five minutes

Nothing here depends on a model's answer: the assistant's turns are scripted, so sessions of one seed are the same on every
server. Texts are drawn from a seed, with lengths in the tokens of the vocabulary given, and are nobody's code.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import count
from types import MappingProxyType
from typing import TypeAlias

import msgspec
import numpy as np
from msgspec import Struct

Json: TypeAlias = "bool | int | str | list[Json] | dict[str, Json]"
CountTokens: TypeAlias = Callable[[str], int]
Lines: TypeAlias = Iterator[str]

MODEL = "claude-sonnet-4-5"  # any name is served
LONG: Mapping[str, Json] = MappingProxyType({"type": "ephemeral", "ttl": "1h"})
SHORT: Mapping[str, Json] = MappingProxyType({"type": "ephemeral"})
RESULT_TOKENS_MIN = 20
AROUND_TOKENS = 45  # what a template puts around a call and its result, about

IDENTITY = "You are a coding agent that works in the user's repository by calling tools."
INSTRUCTIONS = """\
# How to work
- Read before you write. Say in one sentence what you are about to do, then call a tool.
- Change as little as the task needs; keep the style of the file that you are in.
- Run the tests after every change, and quote the line that failed when one did.
- Never delete files, never push, never change settings outside the repository.
- When a result is long, look at the part that matters and leave the rest.
- Finish with two sentences: what was wrong, and what you changed.

# The repository, as found at the start
"""
TASK = """\
The nightly import rejects statements whose last line has no newline, and the totals are off by one entry afterwards. Find
out why, fix it with the smallest change that is right, and add a test that fails without it.

<system-reminder>
Conventions of this repository, and what was changed last:
"""

MODULES = (
    "ledger",
    "parser",
    "statement",
    "import_job",
    "totals",
    "currency",
    "report",
    "storage",
    "schedule",
    "audit",
)
VERBS = ("load", "join", "check", "round", "collect", "sort", "post", "match", "group", "count")
NOUNS = ("entry", "line", "batch", "account", "amount", "header", "balance", "period", "record", "footer")
FOLDERS = ("src/core", "src/jobs", "src/io", "tests/unit", "tests/jobs")


class Call(Struct, frozen=True):
    """One tool call and what came of it."""

    name: str
    input: dict[str, Json]
    result: str


class Step(Struct, frozen=True):
    """What the assistant says and calls. Several calls go out together, and their results come back together."""

    text: str
    calls: tuple[Call, ...]


class Size(Struct, frozen=True):
    """How long things are, in tokens; where the fixed texts alone are longer, as long as they are.

    `base` is tools and system text, `task` the first message, `step` what a turn adds.
    """

    n_turns: int = 20
    base_tokens: int = 2_500
    task_tokens: int = 800
    step_tokens: tuple[int, int] = (120, 180)


class Session:
    """All turns of one session. `count_tokens` is the model's own."""

    def __init__(self, seed: int, size: Size, count_tokens: CountTokens) -> None:
        self._draw = np.random.default_rng(seed)
        self._count = count_tokens
        self._tools = tools()
        n_fixed = count_tokens(msgspec.json.encode(self._tools).decode()) + count_tokens(IDENTITY + INSTRUCTIONS)
        self._system = INSTRUCTIONS + self._filled(self._notes(), size.base_tokens - n_fixed)
        self._task = TASK + self._filled(self._notes(), size.task_tokens - count_tokens(TASK)) + "\n</system-reminder>"
        self._steps = [self._step(number, size.step_tokens) for number in range(size.n_turns - 1)]

    def body(self, number: int, max_tokens: int) -> bytes:
        """The request of a turn, from 1 on."""
        messages: list[dict[str, Json]] = [{"role": "user", "content": [{"type": "text", "text": self._task}]}]
        for at, step in enumerate(self._steps[: number - 1]):
            messages += _messages(step, at)
        newest = messages[-1]["content"]
        assert isinstance(newest, list) and isinstance(newest[-1], dict)
        newest[-1]["cache_control"] = dict(SHORT)
        system = [_text(IDENTITY), _text(self._system) | {"cache_control": dict(LONG)}]
        return msgspec.json.encode(
            {
                "model": MODEL,
                "max_tokens": max_tokens,
                "temperature": 0,
                "stream": True,
                "tools": [*self._tools[:-1], self._tools[-1] | {"cache_control": dict(LONG)}],
                "system": system,
                "messages": messages,
            }
        )

    # --- texts

    def _filled(self, lines: Lines, n_tokens: int) -> str:
        """The first lines that come to `n_tokens` or just more; none for a number below 1."""
        n_found, found = 0, []
        while n_found < n_tokens:
            found.append(next(lines))
            n_found += self._count(found[-1] + "\n")
        return "\n".join(found)

    def _step(self, number: int, step_tokens: tuple[int, int]) -> Step:
        """Every fifth one calls two tools at once."""
        kinds = (self._listing, self._search, self._reading, self._reading, self._tests, self._edit, self._command)
        text = f"{self._one(('I look', 'Next I look', 'Let me look'))} at how {self._noun()} and {self._noun()} are {self._verb()}ed."
        n_calls = 2 if number % 5 == 4 else 1
        n_around = AROUND_TOKENS * n_calls + self._count(text)
        n_tokens = int(self._draw.integers(*step_tokens, endpoint=True)) - n_around
        calls = [kinds[(number + i) % len(kinds)](n_tokens // n_calls) for i in range(n_calls)]
        return Step(text, tuple(calls))

    def _call(self, name: str, arguments: dict[str, Json], lines: Lines, n_tokens: int) -> Call:
        n_arguments = self._count(name + msgspec.json.encode(arguments).decode())
        return Call(name, arguments, self._filled(lines, max(RESULT_TOKENS_MIN, n_tokens - n_arguments)))

    def _listing(self, n_tokens: int) -> Call:
        lines = (f"{self._path()}  {self._number(400, 9000)} bytes" for _ in count())
        return self._call("list_directory", {"path": self._one(FOLDERS)}, lines, n_tokens)

    def _search(self, n_tokens: int) -> Call:
        pattern = f"{self._verb()}_{self._noun()}"
        lines = (f"{self._path()}:{self._number(1, 300)}: {pattern}({self._noun()}, {self._noun()})" for _ in count())
        return self._call("search_text", {"pattern": pattern, "path": "src"}, lines, n_tokens)

    def _reading(self, n_tokens: int) -> Call:
        first = self._number(1, 200)
        return self._call("read_file", {"path": self._path(), "first_line": first}, self._code(first), n_tokens)

    def _tests(self, n_tokens: int) -> Call:
        lines = (
            f"tests/unit/test_{self._one(MODULES)}.py::test_{self._verb()}_{self._noun()} "
            f"{self._one(('PASSED', 'PASSED', 'PASSED', 'FAILED'))}"
            for _ in count()
        )
        return self._call("run_tests", {"selection": self._one(MODULES)}, lines, n_tokens)

    def _edit(self, n_tokens: int) -> Call:
        old, new = f"return {self._noun()}", f"return {self._verb()}_{self._noun()}({self._noun()})"
        arguments: dict[str, Json] = {"path": self._path(), "old": old, "new": new}
        return self._call("edit_file", arguments, self._code(self._number(1, 200)), n_tokens)

    def _command(self, n_tokens: int) -> Call:
        return self._call("run_command", {"command": f"git log -5 -- {self._path()}"}, self._notes(), n_tokens)

    def _code(self, first: int) -> Lines:
        number = first
        while True:
            verb, noun, other = self._verb(), self._noun(), self._noun()
            for line in (
                f"def {verb}_{noun}({other}, limit={self._number(2, 99)}):",
                f'    """The {noun} of {other}, {verb}ed."""',
                f"    found = [one.{noun} for one in {other} if one.{self._noun()} > limit]",
                f"    return {self._verb()}_{self._noun()}(found)",
                "",
            ):
                yield f"{number:5d}  {line}"
                number += 1

    def _notes(self) -> Lines:
        while True:
            yield (
                f"- `{self._path()}` has {self._number(2, 40)} functions that {self._verb()} the {self._noun()} of each "
                f"{self._noun()}; {self._one(MODULES)} calls it before the {self._noun()} is {self._verb()}ed."
            )

    def _path(self) -> str:
        return f"{self._one(FOLDERS)}/{self._one(MODULES)}.py"

    def _verb(self) -> str:
        return self._one(VERBS)

    def _noun(self) -> str:
        return self._one(NOUNS)

    def _one(self, words: tuple[str, ...]) -> str:
        return words[int(self._draw.integers(len(words)))]

    def _number(self, low: int, high: int) -> int:
        return int(self._draw.integers(low, high))


def tools() -> list[dict[str, Json]]:
    """The tools of a small coding agent, as a client declares them."""
    path = _property("string", "Path from the repository's root.")
    return [
        _tool("list_directory", "Files and folders in a folder, with sizes.", {"path": path}),
        _tool(
            "search_text",
            "Lines that match a regular expression, as path:line: text. At most 200 are returned.",
            {"pattern": _property("string", "The expression; case counts."), "path": path},
        ),
        _tool(
            "read_file",
            "A part of a file with line numbers. Long files are read in parts of 2,000 lines.",
            {"path": path, "first_line": _property("integer", "Where to begin, from 1 on.")},
        ),
        _tool(
            "edit_file",
            "Replace a text that occurs exactly once in a file by another. Read the file before.",
            {"path": path, "old": _property("string", "What is there."), "new": _property("string", "What is to be.")},
        ),
        _tool(
            "write_file",
            "Write a whole new file. It must not exist; change those that do with edit_file.",
            {"path": path, "content": _property("string", "All of the file.")},
        ),
        _tool(
            "run_tests",
            "Run the tests whose names contain a word; the summary and the first failures come back.",
            {"selection": _property("string", "The word; empty for all tests.")},
        ),
        _tool(
            "run_command",
            "Run a shell command in the repository's root, without network, for at most two minutes.",
            {"command": _property("string", "One command line.")},
        ),
    ]


def _property(kind: str, description: str) -> Json:
    return {"type": kind, "description": description}


def _tool(name: str, description: str, properties: dict[str, Json]) -> dict[str, Json]:
    schema: Json = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"name": name, "description": description, "input_schema": schema}


def _text(text: str) -> dict[str, Json]:
    return {"type": "text", "text": text}


def _messages(step: Step, number: int) -> list[dict[str, Json]]:
    """The assistant's turn with its calls, and the user's with their results."""
    ids = [f"toolu_{number:02d}_{i}" for i in range(len(step.calls))]
    calls: list[Json] = [
        {"type": "tool_use", "id": id_, "name": call.name, "input": call.input}
        for id_, call in zip(ids, step.calls, strict=True)
    ]
    results: list[Json] = [
        {"type": "tool_result", "tool_use_id": id_, "content": [_text(call.result)]}
        for id_, call in zip(ids, step.calls, strict=True)
    ]
    return [{"role": "assistant", "content": [_text(step.text), *calls]}, {"role": "user", "content": results}]
