"""The kill harness by hand: `python -m scripts.crash` (or `make crash`) runs 200 rounds and shows how they go.

A round puts a real server under load, kills the engine, the gateway or both at a random instant, and checks what was
promised once it is back (docs/testing.md). The first broken promise ends the run with exit status 1 and the command that
does the round again. Rounds come from the seed, which is printed; without `--seed` it is drawn.
"""

import argparse
import secrets
import sys
import tempfile
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from keepwarm.core.clock import SystemClock
from keepwarm.launch import LaunchError, ending_on_sigterm
from tests.crash.rounds import Report, RoundFailed, Run, opened

N_ROUNDS = 200
SEED_MAX = 1_000_000


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.crash", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--rounds", type=int, default=N_ROUNDS, help=f"how many (default {N_ROUNDS})")
    parser.add_argument("--seed", type=int, help="of the run; drawn and printed when it is not given")
    parser.add_argument("--only-round", type=int, metavar="K", help="only this round of the run")
    parser.add_argument("--repeat", type=int, default=1, help="with --only-round: do it so many times")
    parser.add_argument("--from", dest="start", type=Path, metavar="DIR", help="begin with a failed round's kept copy")
    parser.add_argument("--folder", type=Path, help="where data and logs go (default: a new temporary directory)")
    chosen = parser.parse_args(arguments)
    if chosen.start is not None and not chosen.start.is_dir():
        parser.error(f"--from {chosen.start}: there is no such directory")
    return chosen


def numbers(chosen: argparse.Namespace) -> list[int]:
    """The rounds to do, in order."""
    if chosen.only_round is not None:
        return [chosen.only_round] * chosen.repeat
    return list(range(chosen.rounds))


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit status."""
    chosen = options(arguments)
    seed = secrets.randbelow(SEED_MAX) if chosen.seed is None else chosen.seed
    folder = chosen.folder or Path(tempfile.mkdtemp(prefix="keepwarm-crash-"))
    console = Console()
    console.print(f"seed {seed}, data and logs in {folder}")
    try:
        with ending_on_sigterm(), opened(seed, folder, SystemClock(), chosen.start) as run:
            reports = _shown(run, numbers(chosen), console)
    except RoundFailed as failed:
        console.print(f"[red]failed[/red]: {failed}", highlight=False, soft_wrap=True)
        return 1
    except LaunchError as failed:
        console.print(f"[red]failed[/red] at the first start: {failed}; logs are in {folder}", highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    console.print(_summary(reports), highlight=False)
    return 0


def _shown(run: Run, wanted: list[int], console: Console) -> list[Report]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    reports = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("rounds", total=len(wanted))
        for number in wanted:
            report = run.round(number)
            reports.append(report)
            progress.update(
                task, advance=1, description=f"round {number}: {report.victim}, {report.n_ready} ready kept"
            )
    return reports


def _summary(reports: list[Report]) -> str:
    killed = Counter(report.victim for report in reports)
    return (
        f"{len(reports)} rounds kept every promise. "
        f"Killed: {', '.join(f'{who} {n}' for who, n in sorted(killed.items()))}. "
        f"{sum(report.n_answers for report in reports):,} calls answered, "
        f"{sum(report.n_unanswered for report in reports):,} cut off; "
        f"{sum(report.n_ready for report in reports):,} times an object was ready and had to be kept; "
        f"{sum(report.n_compared for report in reports):,} answers compared with cold ones."
    )


if __name__ == "__main__":
    sys.exit(main())
