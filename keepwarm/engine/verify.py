"""`keepwarm verify`: the start-up self-test again, with more trials, on the model as it would be served."""

import importlib

from rich.console import Console
from rich.table import Table

from keepwarm.config import Config
from keepwarm.core.clock import SystemClock
from keepwarm.engine.layout import LayoutFault
from keepwarm.engine.model import Model, ModelFault, Prepared
from keepwarm.engine.selftest import (
    CANDIDATES,
    N_TOKENS,
    Check,
    Report,
    checks,
    decode_checks,
    fill,
    granularity,
    layout_of,
    sample_tokens,
)
from keepwarm.engine.worker import prepare_scripted

N_SPLITS = 8  # more than at start-up: somebody is waiting for a verdict, not for a server


def run(config: Config, console: Console) -> bool:
    """Load the configured model, measure, print a table. True if caching is exact here. Raises LoadFault."""
    with console.status("loading") as status:
        prepared = _prepared(config, lambda line: status.update(line))
        model = prepared.model
        whole = prepared.reuse == "snapshots"
        done = [_whole_check(model) if whole else _layout_check(prepared)]
        g = granularity(model, lambda line: status.update(line), whole=whole) if done[0].passed else None
        done.append(
            Check("a granularity was found", g is not None, f"g = {g}" if g else "none of 1, 8, 16, 64 is exact")
        )
        if g is not None:
            for seed in (1, 2):
                status.update(f"random splits, restores and crowds ({seed} of 2)")
                done += checks(model, g, n_splits=N_SPLITS // 2, seed=seed, whole=whole)
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


def _whole_check(model: Model) -> Check:
    """A state saved, loaded into another stream, and saved from there."""
    name = "state kept whole and put back"
    n = min(N_TOKENS, model.n_ctx - 2)
    fill(model, 0, sample_tokens(model.n_vocab, n), g=CANDIDATES[-1])
    blob, target = model.save(0).copy(), model.n_streams - 1
    try:
        model.load(target, blob)
    except ModelFault as exc:
        return Check(name, passed=False, detail=str(exc))
    passed = model.n_held(target) == n and len(model.save(target)) == len(blob)
    return Check(name, passed, detail=f"{len(blob):,} bytes for {n} tokens")


def _table(prepared: Prepared, done: list[Check]) -> Table:
    title = f"{prepared.weights}, {prepared.attention} attention, {prepared.kv_type}: logits compared bit by bit"
    table = Table("check", "result", "detail", title=title)
    for check in done:
        table.add_row(check.name, "[green]passed[/]" if check.passed else "[red]FAILED[/]", check.detail)
    return table
