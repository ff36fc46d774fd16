"""`keepwarm verify`: the start-up self-test again, with more trials, on the model as it would be served."""

import importlib

from rich.console import Console
from rich.table import Table

from keepwarm.config import Config
from keepwarm.core.clock import SystemClock
from keepwarm.engine.layout import LayoutFault
from keepwarm.engine.model import Prepared
from keepwarm.engine.selftest import Check, Report, checks, decode_checks, granularity, layout_of
from keepwarm.engine.worker import prepare_scripted

N_SPLITS = 8  # more than at start-up: somebody is waiting for a verdict, not for a server


def run(config: Config, console: Console) -> bool:
    """Load the configured model, measure, print a table. True if caching is exact here. Raises LoadFault."""
    with console.status("loading") as status:
        prepared = _prepared(config, lambda line: status.update(line))
        model = prepared.model
        done = [_layout_check(prepared)]
        g = granularity(model, lambda line: status.update(line)) if done[0].passed else None
        done.append(
            Check("a granularity was found", g is not None, f"g = {g}" if g else "none of 1, 8, 16, 64 is exact")
        )
        if g is not None:
            for seed in (1, 2):
                status.update(f"random splits, restores and crowds ({seed} of 2)")
                done += checks(model, g, n_splits=N_SPLITS // 2, seed=seed)
        status.update("strict decoding beside other turns")
        done += decode_checks(model)
    console.print(_table(prepared, done))
    return all(check.passed for check in done)


def _prepared(config: Config, report: Report) -> Prepared:
    if config.model.engine == "scripted":
        return prepare_scripted(config)
    prepared: Prepared = importlib.import_module("keepwarm.engine.prepare").prepare(config, SystemClock(), report)
    return prepared  # imported here: it loads llama.cpp


def _layout_check(prepared: Prepared) -> Check:
    try:
        layout = layout_of(prepared.model)
    except LayoutFault as exc:
        return Check("state cut into blocks and put together again", passed=False, detail=str(exc))
    detail = f"{layout.cell_bytes:,} bytes a token"
    return Check("state cut into blocks and put together again", passed=True, detail=detail)


def _table(prepared: Prepared, done: list[Check]) -> Table:
    title = f"{prepared.weights}, {prepared.attention} attention: logits compared bit by bit"
    table = Table("check", "result", "detail", title=title)
    for check in done:
        table.add_row(check.name, "[green]passed[/]" if check.passed else "[red]FAILED[/]", check.detail)
    return table
