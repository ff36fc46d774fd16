"""keepwarm prices: list, show and check price sheets."""

from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from keepwarm.billing.price_book import effective
from keepwarm.billing.sheet import ModelPrices, ObjectRates, PriceSheet, decimal_text
from keepwarm.billing.sheet_file import Draft, SheetError, drafted, drafts_in, priced_sheets, shipped_drafts
from keepwarm.cli.failure import fail
from keepwarm.cli.options import AsJson, ConfigFile, configured
from keepwarm.core.clock import SystemClock

LIST_EXAMPLE = "keepwarm prices list --config keepwarm.toml"
SHOW_EXAMPLE = "keepwarm prices show kimi@2024-07-01"
CHECK_EXAMPLE = "keepwarm prices check house.toml"

SheetName = Annotated[str, typer.Argument(help="NAME for what is effective today, or NAME@VERSION.")]
SheetPath = Annotated[Path, typer.Argument(metavar="FILE", help="A price sheet in TOML.")]


def list_sheets(config: ConfigFile = None, as_json: AsJson = False) -> None:
    """List the shipped price sheets and those of the configuration."""
    drafts = (*shipped_drafts(), *_own_drafts(config))
    sheets = _sheets(drafts)
    if as_json:
        _print_json([_summary(sheet) for sheet in sheets])
        return
    by_id = {draft.id: draft for draft in drafts}
    now = SystemClock().now()
    table = Table()
    for heading in ("sheet", "currency", "from", "today", "models", "terms"):
        table.add_column(heading, no_wrap=heading == "sheet")
    for sheet in sheets:
        is_effective = effective([other for other in sheets if other.name == sheet.name], now) is sheet
        from_day, terms = sheet.effective_from.isoformat(), ", ".join(by_id[sheet.id].terms)
        row = (sheet.id, sheet.currency, from_day, "yes" if is_effective else "", ", ".join(sheet.models), terms)
        table.add_row(*map(escape, row))
    Console().print(table)


def show(sheet: SheetName, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Show what a price sheet says, per million tokens."""
    drafts = (*shipped_drafts(), *_own_drafts(config))
    found = _found(_sheets(drafts), sheet)
    [draft] = [draft for draft in drafts if draft.id == found.id]
    terms = {name: _written(part) for name, part in draft.terms.items()}
    if as_json:
        _print_json({**_summary(found), "prices": found.models, "terms": terms})
        return
    console = Console()
    console.print(
        f"{found.id}, in {found.currency}, from {found.effective_from} on. {escape(found.source)}", soft_wrap=True
    )
    if found.models:
        console.print(_table(found))
    for name, prices in found.models.items():
        if said := _said_of_objects(prices.objects, found.currency):
            console.print(f"{escape(name)}: {said}", soft_wrap=True)
    for name, part in terms.items():
        said = ", ".join(f"{key} {value}" for key, value in part.items())
        console.print(f"terms {escape(name)}: {escape(said)}", soft_wrap=True)


def check(file: SheetPath, config: ConfigFile = None) -> None:
    """Check a price sheet, beside the shipped ones and those of the configuration. Exit status 1 when it has a mistake."""
    try:
        draft = drafted(file.read_text(encoding="utf-8"), file.name)
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read {file}: {error}")
    except SheetError as error:
        fail(str(error))
    others = (*shipped_drafts(), *_own_drafts(config, but=file))
    [sheet] = [sheet for sheet in _sheets((*others, draft)) if sheet.id == draft.id]
    n_models, n_terms = len(sheet.models), len(draft.terms)
    typer.echo(
        f"{sheet.id}: good; {n_models} models and {n_terms} terms in {sheet.currency}, from {sheet.effective_from} on"
    )


def _own_drafts(config_file: Path | None, but: Path | None = None) -> tuple[Draft, ...]:
    """Sheets of the configuration's folder, without the file `but`."""
    folder = configured(config_file, None, None).billing.sheets_dir
    if folder is None:
        return ()
    is_in = but is not None and but.resolve().parent == Path(folder).resolve()
    try:
        return tuple(
            draft for draft in drafts_in(Path(folder)) if but is None or not (is_in and draft.where == but.name)
        )
    except SheetError as error:
        fail(str(error))


def _sheets(drafts: tuple[Draft, ...]) -> tuple[PriceSheet, ...]:
    try:
        return priced_sheets(drafts)
    except SheetError as error:
        fail(str(error))


def _found(sheets: tuple[PriceSheet, ...], wanted: str) -> PriceSheet:
    versions = [sheet for sheet in sheets if wanted in (sheet.name, sheet.id)]
    found = versions[0] if "@" in wanted and versions else effective(versions, SystemClock().now())
    if found is None:
        fail(f"there is no price sheet {wanted}; keepwarm prices list shows them")
    return found


def _table(sheet: PriceSheet) -> Table:
    table = Table()
    table.add_column("model", no_wrap=True)
    for heading in ("prompt", "input", "read", "write 5m", "write 1h", "output", "batch"):
        table.add_column(heading, justify="right")
    for name, prices in sheet.models.items():
        for cells in _tier_rows(prices):
            table.add_row(escape(name), *cells)
    return table


def _tier_rows(prices: ModelPrices) -> list[tuple[str, ...]]:
    rows = []
    for tier in prices.tiers:
        bound = "any" if len(prices.tiers) == 1 else "longer"
        if tier.prompt_tokens_max is not None:
            bound = f"≤ {tier.prompt_tokens_max:,}"
        amounts = map(decimal_text, (tier.input, tier.read, tier.write, tier.write_long, tier.output))
        rows.append((bound, *amounts, "" if prices.batch_multiple == 1 else f"{float(prices.batch_multiple):g}×"))
    return rows


def _said_of_objects(objects: ObjectRates, currency: str) -> str:
    if objects == ObjectRates():
        return ""
    said = [f"creation {'as input' if objects.creation_is_input else decimal_text(objects.creation)}"]
    if objects.storage is not None:
        unit = "minute" if objects.storage.unit_s == 60 else "hour"
        begun = f"begun {unit}" if objects.storage.begun_counts else unit
        said.append(f"storage {decimal_text(objects.storage.nano_per_unit)} per {begun}")
    if objects.read is not None:
        said.append(f"read {decimal_text(objects.read)}")
    if objects.call_nano:
        said.append(f"{decimal_text(objects.call_nano)} {currency} per call that reads one")
    return "cache objects: " + ", ".join(said)


def _written(part: msgspec.Struct) -> dict[str, str]:
    """What terms say, as the file writes it."""
    said: dict[str, str] = {}
    for key, value in msgspec.structs.asdict(part).items():
        if isinstance(value, msgspec.Struct):
            said |= {f"{key}.{inner}": text for inner, text in _written(value).items()}
        elif isinstance(value, str):
            said[key] = value
    return said


def _summary(sheet: PriceSheet) -> dict[str, object]:
    return {
        "id": sheet.id,
        "name": sheet.name,
        "version": sheet.version,
        "currency": sheet.currency,
        "effective_from": sheet.effective_from,
        "source": sheet.source,
        "models": list(sheet.models),
    }


def _print_json(value: object) -> None:
    typer.echo(msgspec.json.format(msgspec.json.encode(value, enc_hook=str)))
