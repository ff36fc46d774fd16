"""Periodic work over the database, for ever: what the clock has expired, and what was missed."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import NoReturn

from keepwarm.core.errors import ApiError, ErrorKind


async def tick_forever(tick: Callable[[], Awaitable[None]], interval_s: float) -> NoReturn:
    """Call `tick` every `interval_s`. One that finds the database busy is left out, the next one does its work."""
    while True:
        await asyncio.sleep(interval_s)
        try:
            await tick()
        except ApiError as error:
            if error.kind is not ErrorKind.OVERLOADED:
                raise
