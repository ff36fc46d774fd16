"""keepwarm plan: what recorded requests would have cost under every caching scheme, and which marks pay.

Prints a table of schemes and lifetimes and one of marks; `--json` and `--csv` keep the numbers, `--plot` draws them. Nothing
of it touches a server or its data directory.
"""

import csv
import importlib
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from keepwarm.billing.sheet import NANO
from keepwarm.billing.sheet_file import SheetError, drafts_in, shipped_drafts
from keepwarm.cli.failure import fail
from keepwarm.cli.options import ConfigFile, ModelFile, configured
from keepwarm.config import Config
from keepwarm.core.clock import SystemClock
from keepwarm.engine import Tokenizer
from keepwarm.engine.local import EngineFault, open_tokenizer
from keepwarm.planner import PlanError
from keepwarm.planner.plan import SCHEMES, MarkRow, Plan, Row, Scheme, planned
from keepwarm.planner.plot import page
from keepwarm.planner.prices import BASE, Catalogue, Shown
from keepwarm.planner.traffic import Traffic

EXAMPLE = "keepwarm plan requests.jsonl --prices anthropic=house/large --plot plan.html"
TABLE_COLUMNS = 160
NAMES = ", ".join(scheme.name for scheme in SCHEMES)

Log = Annotated[Path, typer.Argument(metavar="LOG", help="A log of requests, a trace, or a directory of sessions.")]
Prices = Annotated[
    list[str] | None,
    typer.Option(
        "--prices",
        metavar="[SCHEME=]SHEET/MODEL",
        help=f"Prices of a scheme ({NAMES}), or of all; terms of a sheet may stand for a model. May be repeated.",
        show_default=False,
    ),
]
Base = Annotated[
    str,
    typer.Option("--base", metavar="SHEET/MODEL", help="Whose input and output price go with terms that have none."),
]
Only = Annotated[
    list[str] | None,
    typer.Option("--scheme", metavar="SCHEME", help="Only this one; may be repeated.", show_default=False),
]
Strict = Annotated[bool, typer.Option("--strict", help="End at the first line that cannot be read.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers there.")]
CsvFile = Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write the table of schemes there.")]
PlotFile = Annotated[Path | None, typer.Option("--plot", metavar="FILE.html", help="Draw the costs there.")]


def plan(  # noqa: PLR0913 - a command has the options it has
    log: Log,
    prices: Prices = None,
    base: Base = BASE,
    only: Only = None,
    strict: Strict = False,
    config_file: ConfigFile = None,
    model: ModelFile = None,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
    plot_file: PlotFile = None,
) -> None:
    """Replay a log of requests against every caching scheme and print hit rates, costs and the marks that pay.

    Knows logs of OpenAI's and Anthropic's request bodies with their times, a line of JSON each, and the traces that
    `keepwarm replay` knows, and traces of whole prompts as texts, which LMCache publishes of agents.
    """
    config = configured(config_file, model, None)
    console = _console()
    try:
        schemes = _schemes(only or ())
        shown = _shown(schemes, prices or (), base, config)
        traffic = _traffic(log, config, strict=strict)
        made = _planned(traffic, schemes, shown)
    except (PlanError, SheetError, EngineFault) as error:
        fail(str(error))
    _print(console, made)
    if json_file is not None:
        _write(
            json_file, msgspec.json.format(msgspec.json.encode({"kind": "plan", **_members(made)}), indent=1) + b"\n"
        )
    if csv_file is not None:
        _write(csv_file, _csv(made.rows).encode())
    if plot_file is not None:
        _write(plot_file, page(made).encode())


def _schemes(only: Sequence[str]) -> tuple[Scheme, ...]:
    for name in only:
        if name not in [scheme.name for scheme in SCHEMES]:
            raise PlanError(f"there is no scheme {name!r}; known: {NAMES}")
    return tuple(scheme for scheme in SCHEMES if not only or scheme.name in only)


def _shown(schemes: Sequence[Scheme], given: Sequence[str], base: str, config: Config) -> dict[str, Shown]:
    own = () if config.billing.sheets_dir is None else drafts_in(Path(config.billing.sheets_dir))
    catalogue = Catalogue((*shipped_drafts(), *own), SystemClock().now(), base)
    targets = {scheme.name: scheme.prices for scheme in schemes}
    for one in sorted(given, key=lambda text: "=" in text):  # those for all come first
        name, equals, target = one.rpartition("=")
        if not equals:
            targets = dict.fromkeys(targets, target)
        elif name in targets:
            targets[name] = target
        else:
            raise PlanError(f"--prices {one}: {name!r} is no scheme that is planned; those are {', '.join(targets)}")
    return {name: catalogue.shown(target) for name, target in targets.items()}


def _traffic(path: Path, config: Config, *, strict: bool) -> Traffic:
    log = importlib.import_module("keepwarm.planner.log")  # here: it loads templates and tokenisation
    texts = importlib.import_module("keepwarm.planner.texts")
    bounds = log.Bounds()
    if texts.is_text_trace(path):
        with _reading(path) as on_bytes:
            found: Traffic = texts.text_traffic(path, _tokenizer(config).encode_plain, bounds, on_bytes)
        return found
    if log.is_trace(path):
        traced: Traffic = log.trace_traffic(path, bounds)
        return traced
    bodies = importlib.import_module("keepwarm.planner.bodies")
    try:
        rendering = bodies.Bodies(_tokenizer(config), config.limits)
    except ValueError as exc:
        raise PlanError(f"the model's chat template cannot be used: {exc}") from exc
    with _reading(path) as on_bytes:
        found, skipped = log.log_traffic(path, rendering.rendered, bounds, strict=strict, on_bytes=on_bytes)
    if skipped.n_lines:
        message = f"keepwarm: {skipped.n_lines:,} lines of {path} were skipped; {' '.join(skipped.first.split())}"
        typer.echo(message, err=True)
    return found


def _tokenizer(config: Config) -> Tokenizer:
    try:
        return open_tokenizer(config)
    except EngineFault as exc:
        raise PlanError(f"requests are split by the model's tokenizer: {exc}") from exc


@contextmanager
def _reading(path: Path) -> Iterator[Callable[[int], None]]:
    """A bar while a file, or all of a directory, is read; yields what moves it on by so many bytes."""
    files = path.iterdir() if path.is_dir() else [path]
    with _progress() as progress:
        task = progress.add_task("reading", total=sum(file.stat().st_size for file in files))
        yield lambda n: progress.advance(task, n)


def _planned(traffic: Traffic, schemes: Sequence[Scheme], shown: dict[str, Shown]) -> Plan:
    with _progress() as progress:
        task = progress.add_task("", total=None)
        return planned(traffic, schemes, shown, lambda name: progress.update(task, description=name, advance=1))


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _console() -> Console:
    """As wide as the tables where nobody looks at a terminal, so that a file or pipe gets all of them."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, TABLE_COLUMNS))


def _print(console: Console, made: Plan) -> None:
    said = f"{made.log}: {made.n_requests:,} requests, {made.n_tokens:,} prompt tokens"
    if any(row.output_nano is None for row in made.rows):
        said += "; without answers, whose lengths the log does not tell of all requests"
    console.print(said, markup=False, highlight=False, soft_wrap=True)
    console.print(_table(made.rows))
    if made.marks:
        console.print("Marks: what each place saves alone, and what the recommended ones add to those before")
        console.print(_marks_table(made.marks))
    for label in dict.fromkeys(f"{row.scheme}: {row.prices}, {row.currency}" for row in made.rows):
        console.print(label, markup=False, highlight=False, soft_wrap=True)


def _table(rows: Sequence[Row]) -> Table:
    table = Table()
    for heading in ("scheme", "lifetime"):
        table.add_column(heading, no_wrap=True)
    for heading in ("hits", "fresh", "read", "write", "objects", "output", "total", "saving"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("where")
    for row in rows:
        objects_nano = row.creation_nano + row.storage_nano + row.call_nano
        amounts = (row.fresh_nano, row.read_nano, row.write_nano, objects_nano, row.output_nano, row.total_nano)
        table.add_row(
            row.scheme,
            row.ttl,
            f"{100 * row.hit_rate:.1f} %",
            *(_amount(nano) for nano in amounts),
            f"{100 * row.saving:.1f} %",
            escape(", ".join(row.places)),
        )
    return table


def _marks_table(marks: Sequence[MarkRow]) -> Table:
    table = Table()
    table.add_column("scheme", no_wrap=True)
    table.add_column("lifetime", no_wrap=True)
    table.add_column("after")
    for heading in ("requests", "tokens", "saves alone", "recommended"):
        table.add_column(heading, justify="right")
    for row in marks:
        if row.gain_nano is None and row.place.startswith("message "):
            continue  # the files have them all
        table.add_row(
            row.scheme,
            row.ttl,
            escape(row.place),
            f"{row.n_prompts:,}",
            f"{row.n_tokens_mean:,}",
            _amount(row.saving_alone_nano),
            "" if row.gain_nano is None else f"+{_amount(row.gain_nano)}",
        )
    return table


def _amount(nano: int | None) -> str:
    """To the nearest hundredth of a cent; the files have it whole."""
    if nano is None:
        return ""
    return f"{nano / NANO:,.4f}" if abs(nano) < 1000 * NANO else f"{nano / NANO:,.2f}"


def _members(made: Plan) -> dict[str, object]:
    rows = [{**msgspec.structs.asdict(row), "saving_nano": row.saving_nano} for row in made.rows]
    return {**msgspec.structs.asdict(made), "rows": rows}


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    names = (*Row.__struct_fields__, "saving_nano")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        values = {**msgspec.structs.asdict(row), "saving_nano": row.saving_nano, "places": "; ".join(row.places)}
        writer.writerow("" if values[name] is None else values[name] for name in names)
    return text.getvalue()


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as exc:
        fail(f"cannot write {path}: {exc.strerror}; choose another file")
