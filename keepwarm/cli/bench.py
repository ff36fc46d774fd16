"""keepwarm bench: measure this machine, beside raw llama.cpp where there is something to compare with."""

import importlib
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from keepwarm.bench import BenchError
from keepwarm.cli.failure import fail
from keepwarm.cli.options import ConfigFile, DataDir
from keepwarm.config import ConfigError

TTFT_EXAMPLE = "keepwarm bench ttft --tokens 5000 --out ttft.json"
GATEWAY_EXAMPLE = "keepwarm bench gateway --requests 20000"
AGENT_EXAMPLE = "keepwarm bench agent --turns 20 --out agent.json"
STORE_EXAMPLE = "keepwarm bench store --data-dir DIR --out store.json"
LEDGER_EXAMPLE = "keepwarm bench ledger --data-dir DIR --out ledger.json"
TOKENS_MIN = 640  # automatic reuse begins at 512
TURNS_MIN = 3  # shares are counted from the third on
QUICK_TURNS = 6

Tokens = Annotated[int, typer.Option("--tokens", min=TOKENS_MIN, help="Length of the long prompts.")]
AgentTurns = Annotated[int, typer.Option("--turns", min=TURNS_MIN, help="Length of the session.")]
BaseTokens = Annotated[int, typer.Option("--tokens", min=TOKENS_MIN, help="Length of tools and system text.")]
Quick = Annotated[bool, typer.Option("--quick", help="Fewer rounds: to see that it works, not to quote.")]
Requests = Annotated[int, typer.Option("--requests", min=10, help="How many, in the longest part.")]
LedgerTurns = Annotated[int, typer.Option("--turns", min=10, help="How many a round, with many callers.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="Write the JSON there (default: <date>-<kind>.json here)."),
]


def ttft(
    tokens: Tokens = 5000,
    quick: Quick = False,
    data_dir: DataDir = None,
    config_file: ConfigFile = None,
    out: Out = None,
) -> None:
    """Time to the first token, cold and warm, decoding and several users, through HTTP beside raw llama.cpp.

    Ten minutes and more on two cores; nothing else should run. The exit status says nothing about the numbers.
    """
    module = importlib.import_module("keepwarm.bench.ttft")  # here, as below: it loads llama.cpp
    plan = module.Plan(n_tokens=tokens, quick=quick)
    try:
        module.run_and_show(plan, Console(), data_dir=data_dir, config_file=config_file, out=out)
    except (BenchError, ConfigError) as error:
        fail(str(error))


def gateway(requests: Requests = 20_000, out: Out = None) -> None:
    """What the gateway costs beside the engine: latency, requests per second on one core, memory, and what billing adds.

    Less than a minute; nothing else should run.
    """
    module = importlib.import_module("keepwarm.bench.gateway")
    try:
        module.run_and_show(requests, Console(), out=out)
    except BenchError as error:
        fail(str(error))


def store(
    tokens: Tokens = 5000,
    quick: Quick = False,
    data_dir: DataDir = None,
    config_file: ConfigFile = None,
    out: Out = None,
) -> None:
    """The prefix store and its disk: restarts, restoring, durable objects, prompts without reuse, the index.

    Ten minutes and more on two cores; nothing else should run. The disk is that of --data-dir, or of temporary files.
    As root it drops the machine's page cache again and again, not with --quick.
    """
    module = importlib.import_module("keepwarm.bench.store")
    plan = module.Plan(n_tokens=tokens, quick=quick)
    try:
        module.run_and_show(plan, Console(), data_dir=data_dir, config_file=config_file, out=out)
    except (BenchError, ConfigError) as error:
        fail(str(error))


def agent(
    turns: AgentTurns = 20,
    tokens: BaseTokens = 2500,
    quick: Quick = False,
    data_dir: DataDir = None,
    config_file: ConfigFile = None,
    out: Out = None,
) -> None:
    """A coding agent's session with tools, tool results and cache breakpoints, turn by turn, caching on and off.

    Some five minutes on two cores; nothing else should run. --quick stops after six turns.
    """
    module = importlib.import_module("keepwarm.bench.agent")
    plan = module.Plan(n_turns=min(turns, QUICK_TURNS) if quick else turns, base_tokens=tokens)
    try:
        module.run_and_show(plan, Console(), data_dir=data_dir, config_file=config_file, out=out)
    except (BenchError, ConfigError) as error:
        fail(str(error))


def ledger(turns: LedgerTurns = 10_000, data_dir: DataDir = None, out: Out = None) -> None:
    """How many turns a second the ledger holds and settles on SQLite, each on the disk before it is acknowledged.

    Some ten seconds. The disk is that of --data-dir, or of temporary files, which some systems keep in memory.
    """
    module = importlib.import_module("keepwarm.bench.ledger")
    try:
        module.run_and_show(turns, Console(), data_dir=data_dir, out=out)
    except BenchError as error:
        fail(str(error))
