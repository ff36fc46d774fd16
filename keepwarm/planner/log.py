"""Reading what is planned for: a log of requests, a line of JSON each, or a recorded trace.

A line is `{"at": TIME, "request": BODY}`, with `"response": {"usage": …}` and `"dialect": "openai"` or `"anthropic"` where
they are known, or a body itself with its time as one more member, `at` or `timestamp`. Times are Unix seconds or RFC 3339.
Lines may be in any order. What cannot be read is skipped and counted, or ends it when reading is strict; a bound that is
passed always does.
"""

from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import msgspec
from msgspec import Struct

from keepwarm.core.errors import ApiError
from keepwarm.planner import PlanError
from keepwarm.planner.bodies import DialectName, Rendered
from keepwarm.planner.numbers import BLOCK_TOKENS
from keepwarm.planner.traffic import Chain, Prompt, Traffic, traced
from keepwarm.replay import ReplayError
from keepwarm.replay.trace import read as read_trace

UNIX_S_MAX = 32_503_680_000  # the year 3000: a greater number is in milliseconds or smaller units
TIME_KEYS = ("at", "timestamp")
Render = Callable[[DialectName, bytes], Rendered]


class Bounds(Struct, frozen=True):
    """How much is read. Blocks are what memory goes to: some 150 bytes for each of a prompt's."""

    line_bytes_max: int = 64 << 20
    requests_max: int = 200_000
    blocks_max: int = 20_000_000
    trace_bytes_max: int = 1 << 30


class Skipped(Struct, frozen=True):
    """Lines that could not be read, and what was wrong with the first of them ("" when all could)."""

    n_lines: int = 0
    first: str = ""


class _LineError(Exception):
    """A line cannot be read."""


class _Content(Struct):
    type: str = ""


class _ProbedMessage(Struct):
    role: str = ""
    content: str | list[_Content] | None = None


class _ProbedTool(Struct):
    input_schema: object = None


class _Probe(Struct):
    """What tells the two dialects apart."""

    messages: list[_ProbedMessage] = []
    tools: list[_ProbedTool] | None = None
    system: object = None
    stop_sequences: object = None
    thinking: object = None
    cache_control: object = None


class _Usage(Struct):
    completion_tokens: int | None = None
    output_tokens: int | None = None


class _Response(Struct):
    usage: _Usage | None = None


def is_trace(path: Path) -> bool:
    """Whether it is a trace for `keepwarm replay` and not a log of bodies. Raises PlanError."""
    if path.is_dir() or path.suffix == ".json":
        return True
    with opened(path) as file:
        first = file.readline(Bounds().line_bytes_max)
    try:
        members = msgspec.json.decode(first, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError:
        return False
    return "hash_ids" in members or "block_size" in members


def trace_traffic(path: Path, bounds: Bounds) -> Traffic:
    """A trace that `keepwarm.replay.trace` knows. Raises PlanError."""
    files = path.glob("*.json") if path.is_dir() else [path]
    n_bytes = sum(file.stat().st_size for file in files if file.is_file())
    if n_bytes > bounds.trace_bytes_max:
        raise PlanError(f"{path} has {n_bytes:,} bytes, and {bounds.trace_bytes_max:,} are read at most; cut it")
    try:
        trace = read_trace(path)
    except ReplayError as exc:
        raise PlanError(str(exc)) from exc
    within(len(trace.requests), sum(len(request.blocks) for request in trace.requests), bounds, str(path))
    chains = [Chain(one.time_s, one.n_tokens, one.blocks, one.n_output) for one in trace.requests]
    return traced(trace.name, trace.block_tokens, chains)


def log_traffic(
    path: Path, render: Render, bounds: Bounds, *, strict: bool, on_bytes: Callable[[int], None] = lambda _n: None
) -> tuple[Traffic, Skipped]:  # fmt: skip
    """A log of bodies; `render` raises ApiError for one that is none. `on_bytes` is told how much each line was.

    Raises PlanError: the file cannot be read, a bound is passed, nothing in it can be read, or a line cannot (`strict`).
    """
    prompts: list[Prompt] = []
    n_blocks = n_skipped = 0
    first = ""
    for number, line in numbered_lines(path, bounds, on_bytes):
        try:
            prompts.append(_prompt(line, render))
        except _LineError as exc:
            if strict:
                raise PlanError(f"{path}, line {number:,}: {exc}") from exc
            n_skipped += 1
            first = first or f"line {number:,}: {exc}"
            continue
        n_blocks += len(prompts[-1].blocks) + len(prompts[-1].spots)
        within(len(prompts), n_blocks, bounds, f"{path}, line {number:,}")
    if not prompts:
        raise PlanError(f"{path} has no request that can be read{f'; {first}' if first else ''}")
    prompts.sort(key=lambda prompt: prompt.at_s)
    return Traffic(path.stem, BLOCK_TOKENS, tuple(prompts)), Skipped(n_skipped, first)


def numbered_lines(path: Path, bounds: Bounds, on_bytes: Callable[[int], None]) -> Iterator[tuple[int, bytes]]:
    """The lines that have something in them, from 1; `on_bytes` is told how much each of all was. Raises PlanError."""
    number = 0
    with opened(path) as file:
        while line := file.readline(bounds.line_bytes_max + 1):
            number += 1
            on_bytes(len(line))
            if len(line) > bounds.line_bytes_max:
                raise PlanError(f"{path}, line {number:,}: longer than {bounds.line_bytes_max:,} bytes")
            if line.strip():
                yield number, line


def within(n_requests: int, n_blocks: int, bounds: Bounds, where: str) -> None:
    """Raises PlanError when more than is read has been read."""
    if n_requests > bounds.requests_max:
        raise PlanError(f"{where}: more than {bounds.requests_max:,} requests; give a shorter log")
    if n_blocks > bounds.blocks_max:
        raise PlanError(
            f"{where}: the prompts up to here have more than {bounds.blocks_max:,} blocks; give a shorter log"
        )


def _prompt(line: bytes, render: Render) -> Prompt:
    try:
        members = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError as exc:
        raise _LineError(f"not an object in JSON: {exc}") from exc
    times = [members.pop(key) for key in TIME_KEYS if key in members]
    if not times:
        raise _LineError('no time; give "at" or "timestamp"')
    at_s = _time_s(times[0])
    request, answer, named = members.get("request"), members.get("response"), members.get("dialect")
    body = msgspec.json.encode(members) if request is None else bytes(request)
    dialect = _dialect(body, named if request is not None else None)
    try:
        found = render(dialect, body)
    except ApiError as exc:
        raise _LineError(f"no request of {dialect}'s: {exc.message}") from exc
    n_output = _n_output(answer) if request is not None and answer is not None else None
    return Prompt(at_s, found.n_tokens, found.blocks, found.spots, found.places, n_output)


def _time_s(raw: msgspec.Raw) -> float:
    try:
        time = msgspec.json.decode(raw, type=float | datetime)
    except msgspec.DecodeError as exc:
        raise _LineError("its time is neither Unix seconds nor RFC 3339") from exc
    if isinstance(time, datetime):
        if time.tzinfo is None:
            raise _LineError("its time has no zone; write it like 2026-01-31T12:00:00Z")
        return time.timestamp()
    if not 0 <= time <= UNIX_S_MAX:
        raise _LineError(f"its time {time:.0f} is not in Unix seconds")
    return time


def _dialect(body: bytes, named: msgspec.Raw | None) -> DialectName:
    try:
        if named is not None:
            dialect: DialectName = msgspec.json.decode(named, type=DialectName)
            return dialect
        probe = msgspec.json.decode(body, type=_Probe)
    except msgspec.DecodeError as exc:
        raise _LineError(f"not a request: {exc}") from exc
    if any(message.role in ("system", "developer", "tool") for message in probe.messages):
        return "openai"
    members = (probe.system, probe.stop_sequences, probe.thinking, probe.cache_control)
    if any(member is not None for member in members):
        return "anthropic"
    if any(tool.input_schema is not None for tool in probe.tools or ()):
        return "anthropic"
    blocks = (block for message in probe.messages if isinstance(message.content, list) for block in message.content)
    return "anthropic" if any(block.type in ("tool_use", "tool_result", "thinking") for block in blocks) else "openai"


def _n_output(answer: msgspec.Raw) -> int | None:
    try:
        usage = msgspec.json.decode(answer, type=_Response).usage
    except msgspec.DecodeError as exc:
        raise _LineError(f"its response cannot be read: {exc}") from exc
    if usage is None:
        return None
    n_output = usage.completion_tokens if usage.completion_tokens is not None else usage.output_tokens
    if n_output is not None and n_output < 0:
        raise _LineError(f"its response has {n_output} output tokens")
    return n_output


def opened(path: Path) -> BinaryIO:
    """Raises PlanError."""
    try:
        return path.open("rb")
    except OSError as exc:
        raise PlanError(f"cannot read {path}: {exc.strerror}; give a log or a trace") from exc
