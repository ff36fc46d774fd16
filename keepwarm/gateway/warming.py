"""Keeps live cache objects' prefixes leased: computes pending ones, rebuilds what was lost or damaged, drops dead ones.

The truth about objects is in the database, and about leases in the engine; this module holds hints about what to do
next, so losing them costs time only:

    create / update / lease lost ──> wanted ──> worker: lease → plan_object → engine.run ──> settle ready | error
    lease damaged ─────────────────> wanted, still `ready` ──> … ──> nothing to settle | error
    engine READY: ready objects without a whole lease → pending; leases without a live object → engine.drop
    once a second: expired objects → inactive; leases of objects that are gone (also through the CLI) → engine.drop

With a disk tier (`is_durable`) leases outlive both processes, so a lost engine changes nothing until the next one has
said what it holds; without one, ready objects are pending as soon as it is gone. An object is settled by generation, so
a computation begun before an update or in a lost engine is never taken for it; and nothing is computed in an engine
whose leases were not yet compared with the database, which would make what is ready by then pending again. `computed`
is for a call that waits for the outcome: it is told by whatever ends the object's being pending.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from collections.abc import Set as AbstractSet
from contextlib import suppress
from typing import Protocol

from msgspec.structs import replace

from keepwarm.cache.objects import Objects
from keepwarm.cache.planner import plan_object
from keepwarm.core.cache_object import CacheObject, Cause, ObjectStatus
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.event import Failed, Finished
from keepwarm.engine import Engine, EngineState
from keepwarm.gateway.object_billing import ObjectBilling
from keepwarm.gateway.rendering import Rendering
from keepwarm.gateway.runtime import Runtime
from keepwarm.gateway.stream import closing, internal_error
from keepwarm.gateway.ticking import tick_forever
from keepwarm.gateway.warmup import WarmUp
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

    def held_leases(self) -> frozenset[str]:
        """The pin ids whose leases the current process found whole at its start."""
        ...

    def damaged(self) -> AsyncIterator[str]:
        """Pin ids of leases in which a block was found damaged, for one reader; never ends by itself."""
        ...


class Warming:
    """The background side of cache objects."""

    def __init__(
        self,
        objects: Objects,
        rendering: Rendering,
        engine: EpochEngine,
        warmup: WarmUp,
        billing: ObjectBilling,
        runtime: Runtime,
        *,
        is_durable: bool,
    ) -> None:
        """`is_durable`: there is a disk tier. The leases of `warmup` are kept though no object has them."""
        self._objects = objects
        self._rendering = rendering
        self._engine = engine
        self._warmup = warmup
        self._billing = billing
        self._is_durable = is_durable
        self._clock = runtime.clock
        self._ids = runtime.ids
        self._log = runtime.log
        self._wanted: OrderedDict[str, str] = OrderedDict()  # object id -> tenant, next one last
        self._wake = asyncio.Event()
        self._pinned: set[str] = set()
        self._damaged: set[str] = set()  # ready objects to be computed again
        self._adopted_epoch = 0  # the latest whose leases were compared with the database
        self._adopted = asyncio.Event()
        self._last_used: dict[str, float] = {}  # monotonic, of objects used by this process
        self._attempts: dict[str, int] = {}  # engine losses while computing this object
        self._awaited: dict[str, asyncio.Future[Failed | None]] = {}  # by object id: calls that wait for the outcome
        self._is_idle = False

    def want(self, obj: CacheObject) -> None:
        """Compute this object soon, before those already waiting."""
        self._wanted.pop(obj.id, None)
        if len(self._wanted) < WANTED_MAX:
            self._wanted[obj.id] = obj.tenant
        self._wake.set()

    async def computed(self, obj: CacheObject) -> Failed | None:
        """Compute this object soon, and wait until it is no longer pending; why it could not be, if so. One call each."""
        outcome: asyncio.Future[Failed | None] = asyncio.get_running_loop().create_future()
        assert obj.id not in self._awaited, "an object is made by one call"
        self._awaited[obj.id] = outcome
        try:
            self.want(obj)
            return await outcome
        finally:
            self._awaited.pop(obj.id, None)

    def used(self, object_id: str) -> None:
        """Note a use, so that a new engine gets the most recently used objects first."""
        self._last_used[object_id] = self._clock.monotonic()

    async def drop(self, object_id: str) -> None:
        """Give back an object's lease now. One that a lost engine still has on disk is found at its next start."""
        is_waiting = self._wanted.pop(object_id, None) is not None
        self._last_used.pop(object_id, None)
        self._attempts.pop(object_id, None)
        self._pinned.discard(object_id)
        self._damaged.discard(object_id)
        self._tell(object_id, None)
        if is_waiting:
            await self._billing.evaluated(object_id, None)
        try:
            await self._engine.drop(object_id)
        except ApiError as error:
            if error.kind is not ErrorKind.ENGINE_DOWN:
                raise

    async def work(self) -> None:
        """Compute wanted objects one after another, forever."""
        while True:
            while self._wanted:
                object_id, tenant = self._next()
                try:
                    settled = await self.warm(tenant, object_id)
                except ApiError as error:
                    if error.kind not in (ErrorKind.ENGINE_DOWN, ErrorKind.OVERLOADED):
                        raise
                    settled = False
                if not settled:
                    self._wanted.setdefault(object_id, tenant)
                    await self._rest()
            self._wake.clear()
            self._is_idle = True
            await self._wake.wait()
            self._is_idle = False

    async def _rest(self) -> None:
        """Until the next attempt: a while, or until an engine's leases have been compared with the database."""
        self._adopted.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(RETRY_S):
                await self._adopted.wait()

    def _next(self) -> tuple[str, str]:
        """Those that a call waits for go first, in the order of asking: the last in first out would let some time out."""
        awaited = next((object_id for object_id in self._awaited if object_id in self._wanted), None)
        return self._wanted.popitem() if awaited is None else (awaited, self._wanted.pop(awaited))

    async def warm(self, tenant: str, object_id: str) -> bool:
        """Compute one object if it is pending, or ready and damaged. False: its engine is gone or new, try again.

        Raises ApiError: ENGINE_DOWN, OVERLOADED (engine or database).
        """
        engine = self._engine.status()
        epoch = engine.epoch
        if engine.state is not EngineState.READY or self._adopted_epoch != epoch:
            return False  # what is made ready now would be taken for an object whose lease did not survive
        obj = await self._objects.get(tenant, object_id)
        status = None if obj is None else obj.effective_status(self._clock.now())
        is_repair = status is ObjectStatus.READY and object_id in self._damaged
        self._damaged.discard(object_id)  # what is found damaged from now on counts anew
        if obj is None or not (status is ObjectStatus.PENDING or is_repair):
            if status is not ObjectStatus.READY:
                await self._billing.given_up(object_id)
            self._tell(object_id, None)
            return True
        is_done = False
        try:
            is_done = await self._warm(obj, epoch)
        finally:
            if is_repair and not is_done:
                self._damaged.add(object_id)
        return is_done

    async def _warm(self, obj: CacheObject, epoch: int) -> bool:
        object_id = obj.id
        try:
            n_tokens, outcome = await self._compute(obj)
        except ApiError as error:
            if error.kind in (ErrorKind.ENGINE_DOWN, ErrorKind.OVERLOADED):
                raise
            n_tokens, outcome = obj.n_tokens, Failed(error.kind, error.message)
        except Exception as exc:  # noqa: BLE001 - a turn boundary: one object must not stop the others, now or at each start
            self._log.error("warming failed", object_id=object_id, error=type(exc).__name__, where=where(exc))
            n_tokens, outcome = obj.n_tokens, Failed(ErrorKind.INTERNAL, internal_error().message)
        if isinstance(outcome, Failed) and outcome.kind is ErrorKind.ENGINE_DOWN:
            self._attempts[object_id] = self._attempts.get(object_id, 0) + 1
            if self._attempts[object_id] < ATTEMPTS_MAX:
                return False
            if obj.status is ObjectStatus.READY:  # a lost engine is no fault of its lease: turns compute what it lacks
                self._log.error("lease not repaired", object_id=object_id, tenant=obj.tenant, reason=outcome.message)
                return True
        status = self._engine.status()
        is_lost = status.state is not EngineState.READY or status.epoch != epoch
        if isinstance(outcome, Finished) and is_lost:
            return False  # computed in a process that is gone
        return await self._settle(obj, n_tokens, outcome)

    async def _compute(self, obj: CacheObject) -> tuple[int, Finished | Failed]:
        """One turn with no output, on the same road as any other: render, lease, plan, run."""
        built = await self._rendering.object_prefix(obj.tenant, obj.messages, obj.tools)
        async with self._engine.lease(built.prompt) as lease:
            plan = plan_object(self._ids.new("warm-"), obj, built, lease)
            self._pinned.add(obj.id)
            async with closing(self._engine.run(plan)) as events:
                async for event in events:
                    if isinstance(event, Finished):
                        self._pinned.add(obj.id)  # again: a delete meanwhile has dropped a pin that was not there yet
                    if isinstance(event, Finished | Failed):
                        return built.prompt.n_tokens, event
        raise AssertionError("the engine ended a run without a terminal event")

    async def _settle(self, obj: CacheObject, n_tokens: int, outcome: Finished | Failed) -> bool:
        failure = outcome if isinstance(outcome, Failed) else None
        self._attempts.pop(obj.id, None)
        if failure is None and obj.status is ObjectStatus.READY:
            self._log.info("lease repaired", object_id=obj.id, tenant=obj.tenant, n_tokens=n_tokens)
            return True
        settled = await (self._paid(obj, n_tokens) if failure is None else self._failed(obj, failure))
        if settled is None and await self._is_over(obj):
            await self._billing.deleted(obj.id)
        await self._billing.evaluated(obj.id, outcome.usage)
        if settled is not None:  # a stale one is computed again, or is gone and will be dropped
            self._tell(obj.id, failure)
        status = settled.status.value if settled is not None else "stale"
        self._log.info("cache object settled", object_id=obj.id, tenant=obj.tenant, status=status, n_tokens=n_tokens)
        return True

    async def _paid(self, obj: CacheObject, n_tokens: int) -> CacheObject | None:
        """Charged first: a server that dies in between computes it again, and finds that this life is paid."""
        found = await self._objects.get(obj.tenant, obj.id, obj.dialect) or obj  # its end may be another one by now
        await self._billing.ready(replace(found, n_tokens=n_tokens))
        return await self._objects.settle(obj.id, obj.generation, Cause.COMPUTED, n_tokens=n_tokens)

    async def _failed(self, obj: CacheObject, failure: Failed) -> CacheObject | None:
        failed = self._billing.failed
        settled = await self._objects.settle(obj.id, obj.generation, Cause.FAILED, error=failure.message, also=failed)
        if settled is not None:
            await self._billing.deleted(obj.id)
        return settled

    async def _is_over(self, obj: CacheObject) -> bool:
        """Of a stale computation: whether nobody will compute the object again, since it is gone or its time is over."""
        found = await self._objects.get(obj.tenant, obj.id, obj.dialect)
        return found is None or found.generation == obj.generation

    def _tell(self, object_id: str, failure: Failed | None) -> None:
        """Tell the call that waits for this object, if one does, that it is no longer pending."""
        outcome = self._awaited.pop(object_id, None)
        if outcome is not None and not outcome.done():
            outcome.set_result(failure)

    async def follow_engine(self) -> None:
        """Ready objects whose leases a new engine process lacks are pending again and are rebuilt; forever."""
        async for epoch in self._engine.epochs():
            is_followed = False
            while not is_followed:
                try:
                    await self._follow(epoch)
                    is_followed = True
                except ApiError as error:
                    if error.kind is not ErrorKind.OVERLOADED:  # the database is busy
                        raise
                    await asyncio.sleep(RETRY_S)

    async def _follow(self, epoch: int) -> None:
        """This epoch has become ready, or is gone. Raises ApiError(OVERLOADED), and can then be called again."""
        status = self._engine.status()
        is_up = status.state is EngineState.READY and status.epoch == epoch
        if self._is_durable and not is_up:
            self._log.info(f"engine {status.state.value}", epoch=epoch)  # its leases are on disk: the next one tells
            return
        held = self._engine.held_leases() if self._is_durable else frozenset()
        self._pinned = self._pinned | held if self._is_durable else set()
        lost = await self._objects.engine_lost(self._clock.now(), held)
        self._adopted_epoch = epoch
        self._adopted.set()
        self._log.info(f"engine {status.state.value}", epoch=epoch, leases=len(held), objects_to_compute=len(lost))
        self._refill(lost)
        await self._drop_dead(held)
        if is_up:
            self._warmup.want_all()

    async def follow_damage(self) -> None:
        """Have damaged leases computed again before anyone is told; forever."""
        async for pin_id in self._engine.damaged():
            if pin_id in self._warmup.pin_ids:
                self._warmup.want(pin_id)
                continue
            self._log.warning("lease damaged", object_id=pin_id)
            self._damaged.add(pin_id)
            try:
                await self._want_damaged(pin_id)
            except ApiError as error:
                if error.kind is not ErrorKind.OVERLOADED:  # the database is busy: the next tick does it
                    raise

    async def _want_damaged(self, object_id: str) -> None:
        obj = await self._objects.find(object_id)
        if obj is None:
            await self.drop(object_id)
        else:
            self.want(obj)

    async def recover(self) -> None:
        """At start, before any client is answered: without a disk tier nothing of the last process is stored."""
        now = self._clock.now()
        self._refill(await (self._objects.pending(now) if self._is_durable else self._objects.engine_lost(now)))

    def _refill(self, pending: list[CacheObject]) -> None:
        """Want all of these, the most recently used first, then the most recently created."""
        for obj in sorted(pending, key=lambda obj: (self._last_used.get(obj.id, float("-inf")), obj.created_at)):
            self.want(obj)

    async def tick_forever(self) -> None:
        """The one periodic task."""
        await tick_forever(self.tick, TICK_S)

    async def tick(self) -> None:
        """Expire what the clock has expired and give back the pins of objects that are no longer live."""
        now = self._clock.now()
        await self._objects.expire(now, EXPIRE_MAX)
        if self._is_idle:  # a create whose client left in the middle, or more than WANTED_MAX
            self._refill(await self._objects.pending(now))
            for object_id in tuple(self._damaged):
                await self._want_damaged(object_id)
        if self._pinned or self._last_used:
            await self._drop_dead(self._pinned | self._last_used.keys())

    async def _drop_dead(self, object_ids: AbstractSet[str]) -> None:
        live = await self._objects.live_ids(self._clock.now())
        for object_id in object_ids - live - self._warmup.pin_ids:
            await self.drop(object_id)
