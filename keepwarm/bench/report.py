"""The result of a run: raw samples, medians, ratios against their targets; as JSON and as a table."""

import operator
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Generic, Literal, TypeVar

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from keepwarm.bench import BenchError
from keepwarm.bench.machine import Machine, Versions
from keepwarm.engine import ModelInfo

Comparison = Literal["≤", "≥"]
COMPARE: dict[Comparison, Callable[[float, float], bool]] = {"≤": operator.le, "≥": operator.ge}

S = TypeVar("S", bound=Struct)


class Ratio(Struct, frozen=True):
    """One measured value against what it is to reach; `value` and `reached` are None where there was no baseline."""

    name: str
    value: float | None
    unit: str
    comparison: Comparison
    target: float
    reached: bool | None


class Report(Struct, Generic[S]):
    """The whole of a run. `samples` has every raw measurement (times in ms), `medians` what they come to.

    `model` is None where no model was run.
    """

    kind: str
    created_at: str
    machine: Machine
    versions: Versions
    model: ModelInfo | None
    settings: dict[str, str | int | bool]
    ratios: list[Ratio]
    medians: dict[str, float]
    samples: S


def ratio(name: str, value: float | None, unit: str, comparison: Comparison, target: float) -> Ratio:
    """A value judged."""
    reached = None if value is None else COMPARE[comparison](value, target)
    return Ratio(name, None if value is None else round(value, 4), unit, comparison, target, reached)


def quotient(above: float | None, below: float | None) -> float | None:
    """`above` / `below`; None when one of them is not known or nothing can be divided by it."""
    return None if above is None or not below else above / below


def percent(above: float | None, below: float | None) -> float | None:
    """`above` in percent of `below`, None as in `quotient`."""
    found = quotient(above, below)
    return None if found is None else found * 100


def encoded(report: Report[S]) -> bytes:
    """The report as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"


def publish(report: Report[S], console: Console, out: Path | None) -> None:
    """Write the report to `out` (default: <date>-<kind>.json here) and print its tables. Raises BenchError."""
    path = out or Path(f"{report.created_at[:10]}-{report.kind}.json")
    console.print(median_table(report.medians))
    measured = report.kind if report.model is None else f"{report.kind}: {report.model.weights}"
    console.print(ratio_table(f"{measured} on {report.machine.cpu}", report.ratios))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(report))
    except OSError as exc:
        raise BenchError(f"cannot write {path}: {exc.strerror}; choose another --out") from exc
    console.print(f"Every sample is in {path}", highlight=False, markup=False)


def timestamp(unix_s: float) -> str:
    """A time as ISO 8601 in UTC."""
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="seconds")


def ratio_table(title: str, ratios: Sequence[Ratio]) -> Table:
    """A row per ratio."""
    found = Table(title=escape(title), title_justify="left")
    found.add_column("measured")
    for heading in ("value", "target"):
        found.add_column(heading, justify="right")
    found.add_column("reached", justify="center")
    for one in ratios:
        value = "no baseline" if one.value is None else f"{shown(one.value)} {one.unit}"
        reached = {None: "", True: "[green]yes[/]", False: "[bold red]no[/]"}[one.reached]
        found.add_row(escape(one.name), value, f"{one.comparison} {shown(one.target)} {one.unit}", reached)
    return found


def median_table(medians: dict[str, float]) -> Table:
    """A row per median."""
    found = Table(title="Medians", title_justify="left")
    found.add_column("what")
    found.add_column("value", justify="right")
    for name, value in medians.items():
        found.add_row(escape(name), shown(value))
    return found


def shown(value: float) -> str:
    """Three digits behind the point for small numbers, none for large ones."""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:,.3g}" if abs(value) < 1 else f"{value:,.2f}"
