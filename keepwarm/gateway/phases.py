"""How long each of the gateway's own phases of a turn took. The engine's are in `Finished.timings`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from keepwarm.core.clock import Clock

Phase = Literal["auth", "read", "parse", "objects", "render", "reserve", "lease"]


class Phases:
    """Milliseconds by phase, in the order they took place; a phase that did not is absent."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.ms: dict[Phase, float] = {}

    @contextmanager
    def measure(self, phase: Phase) -> Iterator[None]:
        begin = self._clock.monotonic()
        try:
            yield
        finally:
            self.ms[phase] = (self._clock.monotonic() - begin) * 1000
