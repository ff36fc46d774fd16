"""The story of one turn, from an authenticated request to its one terminal event:

    admission permit → limits → cache object → normalise, read documents → render → hold → breakpoints
                     → engine.lease → planner → engine.run(plan) → events → settle

Every step that takes something is a context manager, so all of it is back before the reader sees the terminal event,
and on error, cancellation and timeout just the same. The reader and the turn are separate tasks: a slow or vanished
client never holds the engine. Non-streamed answers are the same events, collected.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext

from msgspec.structs import replace

from keepwarm.billing.act import Repeat
from keepwarm.cache.planner import plan_turn
from keepwarm.cache.render import Built
from keepwarm.config import Config
from keepwarm.core.cache_lookup import CacheLookup
from keepwarm.core.cache_object import CacheObject, ObjectStatus
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.event import ChoiceFinished, Event, Failed, Finished, Started, Usage
from keepwarm.core.principal import Principal, check_allowed
from keepwarm.core.prompt import OutputRules
from keepwarm.core.rate_limit import LimitState
from keepwarm.core.request import ChatRequest
from keepwarm.engine import Engine
from keepwarm.gateway.admission import Admission
from keepwarm.gateway.billing import Bill, Billing, TurnFacts
from keepwarm.gateway.caching import Caching
from keepwarm.gateway.history import TurnRecord
from keepwarm.gateway.lookups import Look, Lookups
from keepwarm.gateway.object_use import ObjectUse
from keepwarm.gateway.phases import Phases
from keepwarm.gateway.rendering import Rendering
from keepwarm.gateway.runtime import Runtime
from keepwarm.gateway.settling import AnswerText, Conversation, Settling
from keepwarm.gateway.stream import Choices, EventStream, closing, internal_error
from keepwarm.gateway.window import ready_model
from keepwarm.telemetry import where

SEED_BYTES = 4  # of the digest of an Idempotency-Key


class RunFailed(ApiError):
    """A run of the engine ended in `Failed`."""

    def __init__(self, event: Failed) -> None:
        super().__init__(event.kind, event.message, retry_after_s=event.retry_after_s)
        self.usage = event.usage


class Turn:
    """One request and its answer, as its reader sees it: `begin`, then `batch` until `terminal` is there."""

    def __init__(
        self,
        turn_id: str,
        principal: Principal,
        request: ChatRequest,
        phases: Phases,
        events_max: int,
        *,
        dialect: str,
        began_at: float,
        repeat: Repeat | None = None,
    ) -> None:
        self.turn_id = turn_id
        self.principal = principal
        self.tenant = principal.tenant
        self.repeat = repeat
        self.request = request
        self.dialect = dialect
        self.began_at = began_at
        self.phases = phases
        self.stream = EventStream(events_max)
        self.object: CacheObject | None = None  # the cache object in use, if one applies
        self.object_use = ObjectUse(request)  # as it was when the turn began
        self.n_tokens_saved = 0  # by the object; 0 where it was not ready: what is read then is not its doing
        self.max_tokens_cut = False  # an answer longer than the window leaves room for is cut, not refused
        self.rewritten: tuple[str, ...] = ()  # what normalisers changed
        self.lookup: CacheLookup | None = None  # once it has started
        self.answer = AnswerText()
        self.conversation: Conversation | None = None  # to settle when the turn is over
        self._task: asyncio.Task[None] | None = None
        self._cause = ApiError(ErrorKind.CLIENT_CLOSED, "the client closed the connection")
        self._is_cancelled = False

    def facts(self) -> TurnFacts:
        """What its bill says of it."""
        return TurnFacts(self.turn_id, self.principal, self.dialect, self.request.model, self.request.n, self.repeat)

    def start(self, task: asyncio.Task[None]) -> None:
        self._task = task
        task.add_done_callback(self._ended)

    def cancel(self, cause: ApiError | None = None) -> None:
        """End the turn within one step; its terminal event tells the cause (by default: the client went away)."""
        assert self._task is not None
        if cause is not None:
            self._cause = cause
        self._is_cancelled = True
        self._task.cancel()

    def cancelled_by(self) -> ErrorKind:
        """Why it is being cancelled: `cancel` tells, and without it the server is coming down by a fault of its own."""
        return self._cause.kind if self._is_cancelled else ErrorKind.INTERNAL

    def take(self, event: Event) -> None:
        """Pass an event of the answer on to the reader. Raises ApiError(TIMEOUT) when that one is too far behind."""
        if isinstance(event, Started):
            self.lookup = event.lookup
            if self.object is not None and self.object_use.status is ObjectStatus.READY:
                self.n_tokens_saved = min(event.cache_read, self.object.n_tokens)
        self.answer.feed(event)
        self.stream.emit(event)

    def _ended(self, _task: asyncio.Task[None]) -> None:
        self.stream.fail(self._cause)  # only a cancelled turn has no terminal event yet


class Turns:
    """Runs turns. One per server."""

    def __init__(  # noqa: PLR0913 (each is a service of its own, handed in by the composition root)
        self,
        config: Config,
        admission: Admission,
        caching: Caching,
        rendering: Rendering,
        engine: Engine,
        settling: Settling,
        lookups: Lookups,
        billing: Billing,
        runtime: Runtime,
    ) -> None:
        self._config = config
        self._admission = admission
        self._caching = caching
        self._rendering = rendering
        self._engine = engine
        self._settling = settling
        self._lookups = lookups
        self._billing = billing
        self._clock = runtime.clock
        self._tasks = runtime.tasks
        self._log = runtime.log
        self._open: set[Turn] = set()
        self._running: set[asyncio.Task[None]] = set()
        self._stopping: ApiError | None = None

    @asynccontextmanager
    async def open(
        self, turn_id: str, principal: Principal, request: ChatRequest, phases: Phases, *, dialect: str,
        max_tokens_cut: bool = False, repeat: Repeat | None = None,
    ) -> AsyncIterator[Turn]:  # fmt: skip
        """Run a turn while the context lasts. Leaving it early cancels the turn and waits until it has given all back."""
        if self._stopping is not None:
            raise self._stopping
        turn = Turn(
            turn_id,
            principal,
            request if repeat is None else _repeatable(request, repeat),
            phases,
            self._config.limits.event_queue_max,
            dialect=dialect,
            began_at=self._clock.now(),
            repeat=repeat,
        )
        turn.max_tokens_cut = max_tokens_cut
        task = self._tasks.create_task(self._run(turn))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        turn.start(task)
        self._open.add(turn)
        try:
            yield turn
        finally:
            self._open.discard(turn)
            if not task.done():
                turn.cancel()
                await asyncio.wait([task])

    def stop(self) -> None:
        """The server stops: running turns end with an error now, later ones are refused."""
        self._stopping = ApiError(ErrorKind.ENGINE_DOWN, "the server is stopping; try again", retry_after_s=1)
        for turn in self._open:
            turn.cancel(self._stopping)

    async def drained(self) -> None:
        """Wait until every turn has ended and is settled. After `stop`."""
        while self._running:
            await asyncio.wait(set(self._running))
        await self._billing.drained()

    @property
    def n_turns(self) -> int:
        """Places taken: running and queued turns."""
        return self._admission.n_turns

    async def limits(self, principal: Principal) -> LimitState:
        """What is left of the limits of the caller's organisation."""
        return await self._billing.limits(principal)

    async def count_tokens(self, principal: Principal, request: ChatRequest, phases: Phases) -> tuple[int, int]:
        """Length in tokens of the prompt such a request has, and of the cache object in it (0: none).

        Raises ApiError as a turn would before it runs.
        """
        check_allowed(principal, request.model)
        turn = Turn("", principal, request, phases, events_max=1, dialect="", began_at=self._clock.now())
        with self._admission.enter(principal.organisation):
            request = await self._prepared(turn)
            with phases.measure("render"):
                built = await self._rendering.build(
                    turn.tenant,
                    request.messages,
                    request.tools,
                    request.tool_choice,
                    object_tokens=None,
                    thinking=request.thinking,
                )
        return built.prompt.n_tokens, turn.object.n_tokens if turn.object is not None else 0

    async def _run(self, turn: Turn) -> None:
        """The turn's task: the story, and its one terminal event however it ends."""
        self._note(turn, "running")
        try:
            finished = await self._story(turn)
            self._note(turn, "finished", finished.usage)
            turn.stream.emit(finished)
            if turn.conversation is not None:  # not before: the answer and its bill would wait beside that work
                self._settling.offer(turn.conversation)
        except asyncio.CancelledError:
            self._note(turn, turn.cancelled_by().value)
            raise
        except RunFailed as failed:
            self._fail(turn, failed, failed.usage)
        except ApiError as error:
            self._fail(turn, error)
        except Exception as exc:  # noqa: BLE001 - the turn boundary: whatever it was, the client gets a terminal event
            self._log.error("turn failed", turn_id=turn.turn_id, error=type(exc).__name__, where=where(exc))
            self._fail(turn, internal_error())

    def _fail(self, turn: Turn, error: ApiError, usage: Usage | None = None) -> None:
        self._note(turn, error.kind.value, usage)
        turn.stream.fail(error, usage)

    async def _story(self, turn: Turn) -> Finished:
        check_allowed(turn.principal, turn.request.model)
        with self._admission.enter(turn.principal.organisation, turn.request.n):
            async with self._billing.enter(turn.facts(), turn) as bill:
                finished = await self._in_time(turn, bill)
        return finished

    async def _in_time(self, turn: Turn, bill: Bill) -> Finished:
        """Bounded is all but the billing behind it, so that what is charged as finished is told as that."""
        turn_s_max = self._config.limits.turn_s_max
        try:
            async with asyncio.timeout(turn_s_max):
                return await self._billed(turn, bill)
        except TimeoutError as exc:
            raise ApiError(ErrorKind.TIMEOUT, f"the turn took longer than {turn_s_max:g} s") from exc

    async def _billed(self, turn: Turn, bill: Bill) -> Finished:
        n_ctx = ready_model(self._engine).n_ctx
        request = await self._prepared(turn)
        if turn.object is not None:
            bill.names(turn.object.id)
        if request.cache is not None and request.cache.dry_run:
            return _dry_run(turn)
        with turn.phases.measure("render"):
            object_tokens = turn.object.n_tokens if turn.object is not None else None
            built, rules = await self._rendering.request(
                turn.tenant, request, object_tokens, n_ctx, max_tokens_cut=turn.max_tokens_cut
            )
        if request.thinking and not built.reasoning:
            message = f"model {request.model!r} does not think before it answers: leave thinking out or disable it"
            raise ApiError(ErrorKind.INVALID_REQUEST, message, param="thinking")
        with turn.phases.measure("reserve"):
            await self._billing.reserve(bill, built.prompt.n_tokens, rules.max_tokens, self._sold(turn))
        with self._lookups.begin(turn.turn_id, turn.tenant, request, built, turn.object_use) as look:
            finished = await self._answer(turn, request, built, rules, look, bill)
        await self._renew_object(turn)
        turn.conversation = self._conversation(turn, request)
        bill.finished(finished.usage)
        return finished

    def _sold(self, turn: Turn) -> int:
        """Tokens that are read from a cache object, and paid as such, if all of it is there."""
        obj = turn.object
        is_ready = turn.object_use.status is ObjectStatus.READY  # only then a call pays as one that uses it
        return (
            obj.n_tokens if obj is not None and is_ready and self._billing.sells(obj.model, turn.request.model) else 0
        )

    async def _prepared(self, turn: Turn) -> ChatRequest:
        """The request as it is rendered: with its cache object's messages, volatile lines rewritten, documents read."""
        request = await self._with_object(turn)
        n_fixed = len(turn.object.messages) if turn.object is not None else 0
        request, turn.rewritten = await self._rendering.normalised(request, self._config.model.normalise, n_fixed)
        return await self._rendering.with_documents(turn.tenant, request)

    async def _with_object(self, turn: Turn) -> ChatRequest:
        """The request with the messages of the cache object it names; the turn notes the object if it applies."""
        measured = turn.phases.measure("objects") if turn.request.cache is not None else nullcontext()
        with measured:
            used = await self._caching.applied(turn.tenant, turn.request)
        turn.object, turn.object_use = used.object, used
        return used.request

    def _note(self, turn: Turn, status: str, usage: Usage | None = None) -> None:
        self._lookups.note(
            turn.tenant,
            TurnRecord(
                id=turn.turn_id,
                dialect=turn.dialect,
                model=turn.request.model,
                at=turn.began_at,
                status=status,
                usage=usage,
                lookup=turn.lookup,
                rewritten=turn.rewritten,
            ),
        )

    async def _answer(
        self, turn: Turn, request: ChatRequest, built: Built, rules: OutputRules, look: Look, bill: Bill
    ) -> Finished:  # fmt: skip
        """All choices at once: the engine computes what they share once, and the others wait for it."""
        choices = Choices(request.n)
        if request.n == 1:
            await self._run_choice(turn, request, built, rules, look, choices, bill, 0)
            return choices.finished()
        try:
            async with asyncio.TaskGroup() as runs:
                for choice in range(request.n):
                    runs.create_task(self._run_choice(turn, request, built, rules, look, choices, bill, choice))
        except BaseExceptionGroup as group:
            raise _first(group) from group
        return choices.finished()

    async def _run_choice(
        self, turn: Turn, request: ChatRequest, built: Built, rules: OutputRules, look: Look, choices: Choices,
        bill: Bill, choice: int,
    ) -> None:  # fmt: skip
        run_id, request = _choice_of(turn, request, choice)
        async with AsyncExitStack() as held:
            with turn.phases.measure("lease"):
                lease = await held.enter_async_context(self._engine.lease(built.prompt))
            plan = plan_turn(
                run_id,
                request,
                built,
                rules,
                lease,
                auto_tokens_min=self._config.cache.auto_tokens_min,
                uses_object=turn.object is not None,
                chosen=look.chosen,
            )
            counts = bill.counts()
            events = await held.enter_async_context(closing(self._engine.run(plan, counts)))
            began = False
            try:
                async for event in events:
                    began = True
                    if isinstance(event, Finished | Failed):
                        counts.set_result(event.usage)
                    if isinstance(event, Failed):
                        raise RunFailed(event)
                    for merged in choices.feed(choice, event):
                        turn.take(self._lookups.told(look, merged) if isinstance(merged, Started) else merged)
                    if isinstance(event, Finished):
                        return
            except ApiError:
                if not counts.done() and not began:
                    counts.set_result(None)  # refused before it was a run: there is nothing to wait for
                raise
        raise AssertionError("the engine ended a run without a terminal event")

    async def _renew_object(self, turn: Turn) -> None:
        """`reset_ttl`, after a successful call. The answer is out, so what fails here is noted and no more."""
        use = turn.request.cache
        if turn.object is None or use is None:
            return
        self._caching.note_use(turn.object)
        if use.reset_ttl_s is None:
            return
        try:
            turn.object = await self._caching.renew(turn.principal, turn.object.id, use.reset_ttl_s)
        except ApiError as error:
            self._log.warning(
                "lifetime not renewed", turn_id=turn.turn_id, object_id=turn.object.id, kind=error.kind.value
            )

    def _conversation(self, turn: Turn, request: ChatRequest) -> Conversation | None:
        """With several choices nobody knows which one the conversation goes on with."""
        if self._config.cache.settle == "off" or request.n > 1:
            return None
        return Conversation(turn.turn_id, turn.tenant, request, turn.object, turn.answer)


def _repeatable(request: ChatRequest, repeat: Repeat) -> ChatRequest:
    """With a seed made of the Idempotency-Key, if it has none: every attempt gives the same answer, and no other is to be had
    for the price of one.
    """
    if request.sampling.seed is not None:
        return request
    seed = int.from_bytes(repeat.key_digest[:SEED_BYTES])
    return replace(request, sampling=replace(request.sampling, seed=seed))


def _choice_of(turn: Turn, request: ChatRequest, choice: int) -> tuple[str, ChatRequest]:
    """Run id and request of one choice: a fixed seed counts up, or all choices would be the same."""
    if choice == 0:
        return turn.turn_id, request
    seed = request.sampling.seed
    sampling = replace(request.sampling, seed=None if seed is None else seed + choice)
    return f"{turn.turn_id}-{choice}", replace(request, sampling=sampling)


def _dry_run(turn: Turn) -> Finished:
    """An empty answer that says, by `turn.n_tokens_saved`, what the cache object would have saved. Nothing runs."""
    ready = turn.object is not None and turn.object_use.status is ObjectStatus.READY
    turn.take(Started(n_prompt=0, cache_read=turn.object.n_tokens if turn.object is not None and ready else 0))
    for choice in range(turn.request.n):
        turn.take(ChoiceFinished("stop", n_output=0, choice=choice))
    return Finished(Usage(fresh=0, cache_read=0, cache_write=0, output=0))


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The exception that ended a group of runs; the others were cancelled by it."""
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
