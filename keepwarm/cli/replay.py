"""keepwarm replay: what each eviction policy would have been worth on recorded traffic.

Reads the traces, runs every policy at every capacity, prints a table per trace; `--json` keeps the numbers with what they
were measured on, `--plot` draws them. Nothing of it touches a server or its data directory.
"""

import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from msgspec import Struct
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from keepwarm.cli.failure import fail
from keepwarm.engine.eviction import policy as eviction_policy
from keepwarm.replay import ReplayError
from keepwarm.replay.belady import belady
from keepwarm.replay.plot import Point, page, shown_tokens
from keepwarm.replay.simulate import Outcome, simulate
from keepwarm.replay.trace import Trace, read

EXAMPLE = "keepwarm replay conversation.jsonl --policy cost --policy lru --capacity 1M --capacity 5.1M"
CAPACITIES_DEFAULT = ("1.024M", "5.12M", "10.24M")
CAPACITY = re.compile(r"(\d+(?:\.\d+)?)([kKmM]?)")
UNITS = {"": 1, "k": 1000, "m": 1_000_000}


class PolicyName(StrEnum):
    """What `--policy` takes: the engine's policies, and the optimum that knows the future."""

    LRU = "lru"
    S3FIFO = "s3fifo"
    COST = "cost"
    BELADY = "belady"


class HalfName(StrEnum):
    """Which requests of each trace."""

    FIRST = "first"
    SECOND = "second"
    WHOLE = "whole"


class Row(Struct, frozen=True):
    """One policy on one trace at one capacity, as `--json` gives it."""

    trace: str
    policy: str
    capacity_tokens: int
    block_tokens: int
    n_requests: int
    n_tokens: int
    n_tokens_read: int
    n_evicted: int
    hit_rate: float


Traces = Annotated[list[Path], typer.Argument(metavar="TRACE...", help="Trace files, or directories of sessions.")]
Policies = Annotated[
    list[PolicyName] | None, typer.Option("--policy", help="May be repeated (default: all).", show_default=False)
]
Capacities = Annotated[
    list[str] | None,
    typer.Option(
        "--capacity",
        metavar="TOKENS",
        help=f"Like 64k or 5.1M; may be repeated (default: {', '.join(CAPACITIES_DEFAULT)}).",
        show_default=False,
    ),
]
WhichHalf = Annotated[HalfName, typer.Option("--half", help="Replay only this half of each trace's requests.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers there.")]
PlotFile = Annotated[Path | None, typer.Option("--plot", metavar="FILE.html", help="Draw them there.")]


def replay(
    traces: Traces,
    policies: Policies = None,
    capacities: Capacities = None,
    half: WhichHalf = HalfName.WHOLE,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """Replay recorded traffic against eviction policies and print their token hit rates.

    Knows Mooncake's JSON lines (512-token blocks) and kv-cache-tester's agent sessions, one file or a directory of them.
    `belady` knows the future: no policy can do better.
    """
    sizes = [_tokens(capacity) for capacity in capacities or CAPACITIES_DEFAULT]
    names = [one.value for one in dict.fromkeys(policies or list(PolicyName))]
    try:
        loaded = [read(path).half(half.value) for path in traces]
    except ReplayError as error:
        fail(str(error))
    rows = _rows(loaded, names, sizes)
    console = Console()
    for trace in dict.fromkeys(row.trace for row in rows):
        own = [row for row in rows if row.trace == trace]
        first = own[0]
        console.print(
            f"{trace}: {first.n_requests:,} requests, {first.n_tokens:,} tokens; token hit rates in %",
            markup=False,
            highlight=False,
        )
        console.print(_table(own))
    if json_file is not None:
        _write(json_file, msgspec.json.format(msgspec.json.encode({"kind": "replay", "rows": rows}), indent=1) + b"\n")
    if plot_file is not None:
        points = [Point(row.trace, row.policy, row.capacity_tokens, row.hit_rate) for row in rows]
        _write(plot_file, page(points).encode())


def _tokens(capacity: str) -> int:
    match = CAPACITY.fullmatch(capacity.strip())
    n_tokens = round(float(match[1]) * UNITS[match[2].lower()]) if match else 0
    if n_tokens < 1:
        fail(f"--capacity {capacity} is no number of tokens; give one like 64k or 5.1M")
    return n_tokens


def _rows(traces: Sequence[Trace], names: Sequence[str], sizes: Sequence[int]) -> list[Row]:
    for trace in traces:
        for n_tokens in sizes:
            if n_tokens < trace.block_tokens:
                fail(f"--capacity {n_tokens:,} is less than one block of {trace.name} ({trace.block_tokens} tokens)")
    rows = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=sum(len(trace.requests) for trace in traces) * len(names) * len(sizes))
        for trace in traces:
            for n_tokens in sizes:
                for name in names:
                    progress.update(task, description=escape(f"{trace.name} {name} {shown_tokens(n_tokens)}"))
                    n_blocks_max = n_tokens // trace.block_tokens
                    if name == PolicyName.BELADY:
                        outcome = belady(trace, n_blocks_max, lambda n: progress.advance(task, n))
                    else:
                        chosen = eviction_policy(name, n_blocks_max)
                        outcome = simulate(trace, chosen, n_blocks_max, lambda n: progress.advance(task, n))
                    rows.append(_row(trace, name, n_tokens, outcome))
    return rows


def _row(trace: Trace, name: str, capacity_tokens: int, outcome: Outcome) -> Row:
    return Row(
        trace=trace.name,
        policy=name,
        capacity_tokens=capacity_tokens,
        block_tokens=trace.block_tokens,
        n_requests=len(trace.requests),
        n_tokens=outcome.n_tokens,
        n_tokens_read=outcome.n_tokens_read,
        n_evicted=outcome.n_evicted,
        hit_rate=round(outcome.hit_rate, 5),
    )


def _table(rows: Sequence[Row]) -> Table:
    table = Table()
    table.add_column("policy")
    sizes = list(dict.fromkeys(row.capacity_tokens for row in rows))
    for n_tokens in sizes:
        table.add_column(shown_tokens(n_tokens), justify="right")
    rates = {(row.policy, row.capacity_tokens): f"{100 * row.hit_rate:.1f}" for row in rows}
    for name in dict.fromkeys(row.policy for row in rows):
        table.add_row(name, *(rates[name, n_tokens] for n_tokens in sizes))
    return table


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as exc:
        fail(f"cannot write {path}: {exc.strerror}; choose another file")
