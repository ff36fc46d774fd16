"""What every service of the gateway is handed: time, ids, the log, and the group its tasks live in."""

import asyncio
from dataclasses import dataclass

from keepwarm.core.clock import Clock, Ids
from keepwarm.telemetry import Log


@dataclass(frozen=True, slots=True)
class Runtime:
    """Made once by the composition root; tests make their own with a clock and ids they steer."""

    clock: Clock
    ids: Ids
    log: Log
    tasks: asyncio.TaskGroup
