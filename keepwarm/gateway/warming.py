"""Keeps live cache objects' prefixes resident: computes pending ones, rebuilds them in a new engine, drops dead ones.

The truth about objects is in the database; this module holds hints about what to do next and which pins this process
has set, so losing either costs time only:

    create / update / a new engine epoch ──> wanted ──> worker: lease → plan_object → engine.run ──> settle ready | error
    once a second: expired objects → inactive; pins of objects that are gone (also through the CLI) → engine.drop

An object is settled by generation, so a computation begun before an update or in a lost engine is never taken for it.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Protocol

from keepwarm.cache.objects import Objects
from keepwarm.cache.planner import plan_object
from keepwarm.core.cache_object import CacheObject, Cause, ObjectStatus
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.event import Failed, Finished
from keepwarm.engine import Engine
from keepwarm.gateway.rendering import Rendering
from keepwarm.gateway.runtime import Runtime
from keepwarm.gateway.stream import closing, internal_error
from keepwarm.telemetry import where

TICK_S = 1.0  # how late a pin of a dead object may be given back; look-ups go by the clock and are never late
RETRY_S = 0.5  # between attempts while the engine is down or full
ATTEMPTS_MAX = 3  # engine processes one object may take down before it is called faulty
WANTED_MAX = 100_000  # ids with tenants: some 20 MB; more stay pending in the database until the next refill
EXPIRE_MAX = 1000  # objects expired per tick, so that a tick stays short


class EpochEngine(Engine, Protocol):
    """An engine that tells when a new process of it has become ready."""

    def epochs(self) -> AsyncIterator[int]:
        """Each epoch as it becomes READY, beginning with the current one, and again when its process is gone."""
        ...


class Warming:
    """The background side of cache objects."""

    def __init__(self, objects: Objects, rendering: Rendering, engine: EpochEngine, runtime: Runtime) -> None:
        self._objects = objects
        self._rendering = rendering
        self._engine = engine
        self._clock = runtime.clock
        self._ids = runtime.ids
        self._log = runtime.log
        self._wanted: OrderedDict[str, str] = OrderedDict()  # object id -> tenant, next one last
        self._wake = asyncio.Event()
        self._pinned: set[str] = set()
        self._last_used: dict[str, float] = {}  # monotonic, of objects used by this process
        self._attempts: dict[str, int] = {}  # engine losses while computing this object
        self._is_idle = False

    def want(self, obj: CacheObject) -> None:
        """Compute this object soon, before those already waiting."""
        self._wanted.pop(obj.id, None)
        if len(self._wanted) < WANTED_MAX:
            self._wanted[obj.id] = obj.tenant
        self._wake.set()

    def used(self, object_id: str) -> None:
        """Note a use, so that a new engine gets the most recently used objects first."""
        self._last_used[object_id] = self._clock.monotonic()

    async def drop(self, object_id: str) -> None:
        """Give back an object's pin now. A lost engine holds no pins, so ENGINE_DOWN is no error."""
        self._wanted.pop(object_id, None)
        self._last_used.pop(object_id, None)
        self._attempts.pop(object_id, None)
        self._pinned.discard(object_id)
        try:
            await self._engine.drop(object_id)
        except ApiError as error:
            if error.kind is not ErrorKind.ENGINE_DOWN:
                raise

    async def work(self) -> None:
        """Compute wanted objects one after another, forever."""
        while True:
            while self._wanted:
                object_id, tenant = self._wanted.popitem()
                try:
                    settled = await self.warm(tenant, object_id)
                except ApiError as error:
                    if error.kind not in (ErrorKind.ENGINE_DOWN, ErrorKind.OVERLOADED):
                        raise
                    settled = False
                if not settled:
                    self._wanted.setdefault(object_id, tenant)
                    await asyncio.sleep(RETRY_S)
            self._wake.clear()
            self._is_idle = True
            await self._wake.wait()
            self._is_idle = False

    async def warm(self, tenant: str, object_id: str) -> bool:
        """Compute one object if it is still wanted. False: its engine was lost, try again.

        Raises ApiError: ENGINE_DOWN, OVERLOADED (engine or database).
        """
        obj = await self._objects.get(tenant, object_id)
        if obj is None or obj.effective_status(self._clock.now()) is not ObjectStatus.PENDING:
            return True
        epoch = self._engine.status().epoch
        try:
            n_tokens, failure = await self._compute(obj)
        except ApiError as error:
            if error.kind in (ErrorKind.ENGINE_DOWN, ErrorKind.OVERLOADED):
                raise
            n_tokens, failure = obj.n_tokens, Failed(error.kind, error.message)
        except Exception as exc:  # noqa: BLE001 - a turn boundary: one object must not stop the others, now or at each start
            self._log.error("warming failed", object_id=object_id, error=type(exc).__name__, where=where(exc))
            n_tokens, failure = obj.n_tokens, Failed(ErrorKind.INTERNAL, internal_error().message)
        if failure is not None and failure.kind is ErrorKind.ENGINE_DOWN:
            self._attempts[object_id] = self._attempts.get(object_id, 0) + 1
            if self._attempts[object_id] < ATTEMPTS_MAX:
                return False
        if failure is None and self._engine.status().epoch != epoch:
            return False  # computed in a process that is gone
        return await self._settle(obj, n_tokens, failure)

    async def _compute(self, obj: CacheObject) -> tuple[int, Failed | None]:
        """One turn with no output, on the same road as any other: render, lease, plan, run."""
        built = await self._rendering.object_prefix(obj.tenant, obj.messages, obj.tools)
        async with self._engine.lease(built.prompt) as lease:
            plan = plan_object(self._ids.new("warm-"), obj, built, lease)
            self._pinned.add(obj.id)
            async with closing(self._engine.run(plan)) as events:
                async for event in events:
                    if isinstance(event, Failed):
                        return built.prompt.n_tokens, event
                    if isinstance(event, Finished):
                        self._pinned.add(obj.id)  # again: a delete meanwhile has dropped a pin that was not there yet
                        return built.prompt.n_tokens, None
        raise AssertionError("the engine ended a run without a terminal event")

    async def _settle(self, obj: CacheObject, n_tokens: int, failure: Failed | None) -> bool:
        self._attempts.pop(obj.id, None)
        if failure is None:
            settled = await self._objects.settle(obj.id, obj.generation, Cause.COMPUTED, n_tokens=n_tokens)
        else:
            settled = await self._objects.settle(obj.id, obj.generation, Cause.FAILED, error=failure.message)
        status = settled.status.value if settled is not None else "stale"
        self._log.info("cache object settled", object_id=obj.id, tenant=obj.tenant, status=status, n_tokens=n_tokens)
        return True

    async def follow_engine(self) -> None:
        """An engine process that is gone, and a new one, hold nothing: ready objects are pending again and are rebuilt."""
        async for epoch in self._engine.epochs():
            self._pinned.clear()
            lost = await self._objects.engine_lost(self._clock.now())
            state = self._engine.status().state.value
            self._log.info(f"engine {state}", epoch=epoch, objects_to_compute=len(lost))
            self._refill(lost)

    async def recover(self) -> None:
        """At start, before any client is answered: nothing of the last process is resident."""
        self._refill(await self._objects.engine_lost(self._clock.now()))

    def _refill(self, pending: list[CacheObject]) -> None:
        """Want all of these, the most recently used first, then the most recently created."""
        for obj in sorted(pending, key=lambda obj: (self._last_used.get(obj.id, float("-inf")), obj.created_at)):
            self.want(obj)

    async def tick_forever(self) -> None:
        """The one periodic task."""
        while True:
            await asyncio.sleep(TICK_S)
            try:
                await self.tick()
            except ApiError as error:
                if error.kind is not ErrorKind.OVERLOADED:  # the database is busy: the next tick does it
                    raise

    async def tick(self) -> None:
        """Expire what the clock has expired and give back the pins of objects that are no longer live."""
        now = self._clock.now()
        await self._objects.expire(now, EXPIRE_MAX)
        if self._is_idle:  # a create whose client left in the middle, or more than WANTED_MAX
            self._refill(await self._objects.pending(now))
        if self._pinned or self._last_used:
            live = await self._objects.live_ids(now)
            for object_id in (self._pinned | self._last_used.keys()) - live:
                await self.drop(object_id)
