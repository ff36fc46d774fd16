"""The events of one turn on their way from the engine to the reader: merged over choices, bounded, ended once.

`Choices` (pure) merges the n runs of a turn:

    run 0   Started  delta  delta  ChoiceFinished  Finished ┐
    run 1   Started  delta  ChoiceFinished  Finished        ┴→  Started  deltas with `choice`  …  one Finished

`EventStream` is the buffer between the turn's task and the response writer. Invariant: at most one terminal event goes
in, nothing follows it, and whoever reads up to it has read everything.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

from msgspec.structs import replace

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.event import Event, Failed, Finished, Started, Usage


class Choices:
    """Merges the event streams of a turn's `n` runs over the same prompt."""

    def __init__(self, n: int) -> None:
        self._ended: list[Finished | None] = [None] * n
        self._started = False
        self._held: list[Event] = []  # other choices' events, until choice 0 has said what was found in the store

    def feed(self, choice: int, event: Event) -> list[Event]:
        """The merged events that `event` of run `choice` lets go. `Failed` is not fed: it ends the turn as it is."""
        assert not isinstance(event, Failed)
        match event:
            case Started():
                if choice != 0:
                    return []
                self._started = True
                held, self._held = self._held, []
                return [event, *held]
            case Finished():
                assert self._ended[choice] is None, f"choice {choice} ended twice"
                self._ended[choice] = event
                return []
            case _:
                numbered = replace(event, choice=choice) if choice else event
                if self._started:
                    return [numbered]
                self._held.append(numbered)
                return []

    def finished(self) -> Finished:
        """The turn's terminal event once all runs have ended. The prompt counts once (choice 0's), output is summed."""
        ended = [event for event in self._ended if event is not None]
        assert len(ended) == len(self._ended), "a run has not ended"
        n_output = sum(event.usage.output for event in ended)
        return Finished(usage=replace(ended[0].usage, output=n_output), timings=ended[0].timings)


def internal_error() -> ApiError:
    """What a client is told of our bugs."""
    return ApiError(ErrorKind.INTERNAL, "internal error; the server's log has it under this request's id")


@asynccontextmanager
async def closing(events: AsyncIterator[Event]) -> AsyncIterator[AsyncIterator[Event]]:
    """An engine's run, cancelled there when the context is left before its end."""
    try:
        yield events
    finally:
        if isinstance(events, AsyncGenerator):
            await events.aclose()


class EventStream:
    """A bounded buffer with one writer (the turn) and one reader (the response)."""

    def __init__(self, events_max: int) -> None:
        self._events_max = events_max
        self._waiting: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self.terminal: Finished | Failed | None = None
        self.error: ApiError | None = None
        self.started: Started | None = None

    def emit(self, event: Event) -> None:
        """Hand an event to the reader. Raises ApiError(TIMEOUT) when the reader is too far behind."""
        assert self.terminal is None, f"{event!r} after {self.terminal!r}"
        if isinstance(event, Finished | Failed):
            self.terminal = event
        elif len(self._waiting) >= self._events_max:
            message = f"{len(self._waiting)} events of the answer are waiting to be read, limit {self._events_max}"
            raise ApiError(ErrorKind.TIMEOUT, message)
        elif isinstance(event, Started):
            self.started = event
        self._waiting.append(event)
        self._arrived.set()

    def fail(self, error: ApiError, usage: Usage | None = None) -> None:
        """End with `Failed`, unless the stream has ended already."""
        if self.terminal is None:
            self.error = error
            self.emit(Failed(error.kind, error.message, usage, error.retry_after_s))

    async def begin(self) -> None:
        """Wait until the turn has started. Raises ApiError when it fails before that, so an HTTP status can tell."""
        await self._arrived.wait()
        if self.error is not None and self.started is None:
            raise self.error

    @property
    def is_read(self) -> bool:
        """Whether the terminal event has been read."""
        return self.terminal is not None and not self._waiting

    async def batch(self, silence_s: float | None) -> list[Event]:
        """All events that have arrived since the last call, waiting for one; [] after `silence_s` without any."""
        if not self._waiting:
            assert self.terminal is None, "everything has been read"
            try:
                async with asyncio.timeout(silence_s):
                    await self._arrived.wait()
            except TimeoutError:
                return []
        self._arrived.clear()
        events = list(self._waiting)
        self._waiting.clear()
        return events
