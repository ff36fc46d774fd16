"""Hold and settle turns of one organisation, so many or for ever, naming each that is acknowledged. Started, and killed,
by test_ledger.py.
"""

import asyncio
import itertools
import sys
from pathlib import Path

from keepwarm.core.clock import SystemClock
from keepwarm.storage import Storage
from tests.ledgers import at_work, hold_of, settlement_of

N_CALLERS = 20
COST = 3
CEILING = 2 * COST


async def write(where: Path | str, prefix: str, n_turns: int | None) -> None:
    storage = Storage.open(where, busy_s=20.0)
    numbers = iter(itertools.count() if n_turns is None else range(n_turns))
    async with at_work(storage, SystemClock()) as ledger:

        async def caller() -> None:
            for n in numbers:
                turn_id = f"{prefix}-{n}"
                await ledger.hold(hold_of(turn_id, CEILING))
                say(f"{turn_id}/hold")
                await ledger.settle(settlement_of(turn_id, COST))
                say(f"{turn_id}/settle")

        await asyncio.gather(*(caller() for _ in range(N_CALLERS)))
    storage.close()


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    given, prefix, *count = sys.argv[1:]
    asyncio.run(write(given if "://" in given else Path(given), prefix, int(count[0]) if count else None))
