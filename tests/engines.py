"""An honest little engine for the gateway's tests: the protocol kept to the letter, every event and await steered.

It counts what it holds (leases, runs, pins), so a test can assert that everything came back. What a run says is decided by
its `script`; by default it answers "ok" and counts like an engine with nothing stored.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.event import ChoiceFinished, Event, Finished, Started, TextDelta, Timings, Usage
from keepwarm.core.prompt import Lease, Plan, Prompt
from keepwarm.engine import Counts, EngineState, EngineStatus, ModelInfo, StoreStatus

Script = Callable[[Plan], Sequence[Event]]
N_CTX = 2048

MODEL = ModelInfo(
    digest="0" * 64,
    n_ctx=N_CTX,
    n_streams=8,
    n_vocab=258,
    weights="none",
    attention="plain",
    determinism="strict",
    granularity=1,
    kv_type="none",
    bytes_per_token=8,
)


def says(*texts: str, cache_read: int = 0, reason: str = "stop") -> Script:
    """A script: these deltas, honest counts."""

    def script(plan: Plan) -> Sequence[Event]:
        n_prompt = plan.prompt.n_tokens
        n_output = len(texts) if plan.output.max_tokens else 0
        read = min(cache_read, n_prompt - 1)
        return [
            Started(n_prompt, read),
            *(TextDelta(text) for text in texts[:n_output]),
            ChoiceFinished(reason, n_output),
            Finished(Usage(n_prompt - read, read, 0, n_output), Timings(evaluate_ms=1.5)),
        ]

    return script


def counted(plan: Plan, said: Sequence[Event]) -> Usage:
    """What a run that said this had evaluated and produced: nothing before it started."""
    started = next((event for event in said if isinstance(event, Started)), None)
    if started is None:
        return Usage(0, 0, 0, 0)
    n_output = sum(isinstance(event, TextDelta) for event in said)
    return started.usage or Usage(started.n_prompt - started.cache_read, started.cache_read, 0, n_output)


class StepEngine:
    """An engine whose runs follow `script`. `gate`, when set, is awaited before every event."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or says("ok")
        self.state = EngineState.READY
        self.epoch = 1
        self.gate: Callable[[], Awaitable[object]] | None = None
        self.plans: list[Plan] = []
        self.leases: set[str] = set()
        self.running: set[str] = set()
        self.pins: set[str] = set()
        self.cancelled: list[str] = []
        self.dropped: list[str] = []
        self.overloaded = False
        self.restarts = 0
        self.model: ModelInfo | None = MODEL
        self.store: StoreStatus | None = None
        self._held: frozenset[str] = frozenset()
        self._damaged: asyncio.Queue[str] = asyncio.Queue()
        self._epochs: deque[int] = deque([1])
        self._changed = asyncio.Event()

    @property
    def is_clean(self) -> bool:
        """Whether every lease and run has been given back."""
        return not self.leases and not self.running

    def status(self) -> EngineStatus:
        return EngineStatus(
            self.state, self.epoch, self.state.value, self.model, n_running=len(self.running), store=self.store
        )

    @asynccontextmanager
    async def lease(self, prompt: Prompt) -> AsyncIterator[Lease]:
        await self._step()
        self._require_ready()
        lease = Lease(f"lease-{len(self.plans)}-{len(self.leases)}", 0)
        self.leases.add(lease.lease_id)
        try:
            yield lease
        finally:
            self.leases.discard(lease.lease_id)

    async def run(self, plan: Plan, counts: Counts | None = None) -> AsyncGenerator[Event, None]:
        self._require_ready()
        if self.overloaded:
            raise ApiError(ErrorKind.OVERLOADED, "8 turns are queued, limit 8", retry_after_s=2)
        self.plans.append(plan)
        assert plan.turn_id not in self.running
        self.running.add(plan.turn_id)
        ended = False
        said: list[Event] = []
        try:
            for event in self.script(plan):
                await self._step()
                ended = isinstance(event, Finished)
                said.append(event)
                if ended and plan.pin_id is not None:
                    self.pins.add(plan.pin_id)
                yield event
        finally:
            self.running.discard(plan.turn_id)
            if not ended:
                self.cancelled.append(plan.turn_id)
                if counts is not None and not counts.done():
                    counts.set_result(counted(plan, said))

    async def drop(self, pin_id: str) -> None:
        self._require_ready()
        self.pins.discard(pin_id)
        self.dropped.append(pin_id)

    def restart(self) -> None:
        """End the process: what it held is gone, and a new one is ready at once."""
        self.restarts += 1
        self.lose()

    def lose(self) -> None:
        """The process is gone with all it held, and a new one is ready at once."""
        self.go_down()
        self.come_up()

    def go_down(self) -> None:
        """The process is gone with all it held."""
        self.state = EngineState.DOWN
        self.pins.clear()
        self._tell(self.epoch)

    def come_up(self, held: Iterable[str] = ()) -> None:
        """A new process is ready, and has these leases from the disk."""
        self.epoch += 1
        self.state = EngineState.READY
        self._held = frozenset(held)
        self.pins |= self._held
        self._tell(self.epoch)

    def damage(self, pin_id: str) -> None:
        """A block of this lease is found damaged: it is no longer whole."""
        self.pins.discard(pin_id)
        self._damaged.put_nowait(pin_id)

    def held_leases(self) -> frozenset[str]:
        return self._held

    async def damaged(self) -> AsyncIterator[str]:
        while True:
            yield await self._damaged.get()

    async def epochs(self) -> AsyncIterator[int]:
        while True:
            while self._epochs:
                yield self._epochs.popleft()
            self._changed.clear()
            await self._changed.wait()

    def _tell(self, epoch: int) -> None:
        self._epochs.append(epoch)
        self._changed.set()

    def _require_ready(self) -> None:
        if self.state is not EngineState.READY:
            raise ApiError(ErrorKind.ENGINE_DOWN, "the engine is restarting", retry_after_s=2)

    async def _step(self) -> None:
        if self.gate is not None:
            await self.gate()
        else:
            await asyncio.sleep(0)
