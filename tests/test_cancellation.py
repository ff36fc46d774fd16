"""A turn is cancelled at each of its await points in turn, and nothing leaks: no permit, no lease, no run, one end at most."""

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest

from keepwarm.core.cache_object import CacheObject
from keepwarm.core.event import Failed, Finished
from keepwarm.core.request import CacheUse, ChatRequest, Message, Sampling, TextPart
from keepwarm.gateway.phases import Phases
from keepwarm.gateway.turn import Turn
from tests.engines import says
from tests.world import World, developer, world

pytestmark = pytest.mark.anyio

TENANT = "t"
QUESTION = Message("user", (TextPart("how?"),))
STEPS_MAX = 200  # far more than any of these turns has


class Stepper:
    """Runs a coroutine to its k-th suspension, then throws CancelledError in, as the loop would."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.reached = False

    async def run(self, turn: Turn, work: Awaitable[None]) -> None:
        """Await `work`, cancelling the turn when it suspends for the k-th time."""
        await _Counted(self, turn, work)


class _Counted:
    """Awaits like its inner coroutine and counts how often that suspends."""

    def __init__(self, stepper: Stepper, turn: Turn, work: Awaitable[None]) -> None:
        self._stepper, self._turn, self._work = stepper, turn, work

    def __await__(self) -> Any:
        inner = self._work.__await__()
        value: Any = None
        error: BaseException | None = None
        n_suspended = 0
        while True:
            try:
                waits_for = inner.send(value) if error is None else inner.throw(error)
            except StopIteration:
                return
            n_suspended += 1
            if n_suspended == self._stepper.k:
                self._stepper.reached = True
                self._turn.cancel()
            try:
                value, error = (yield waits_for), None
            except BaseException as raised:  # noqa: BLE001 - handed on to the inner coroutine
                value, error = None, raised


async def answered(server: World, tenant: str, request: ChatRequest, k: int) -> bool:
    """Run a turn that is cancelled at its k-th suspension; whether it came that far."""
    turns = server.running.turns
    stepper = Stepper(k)
    run = turns._run  # the task's coroutine is what is stepped through
    turns._run = lambda turn: stepper.run(turn, run(turn))  # type: ignore[assignment,method-assign]
    try:
        async with turns.open("turn-1", developer(tenant), request, Phases(server.clock), dialect="kimi") as turn:
            events = []
            while not turn.stream.is_read:
                events += await turn.stream.batch(None)
    finally:
        turns._run = run  # type: ignore[method-assign]
    terminal = [event for event in events if isinstance(event, Failed | Finished)]
    assert terminal == events[-1:], "exactly one terminal event, and it is the last"
    if not stepper.reached:
        assert isinstance(terminal[0], Finished)
    server.assert_clean()
    return stepper.reached


async def object_of(server: World) -> CacheObject:
    created = await server.ready_cache("a long text", key="k1")
    obj = await server.running.warming._objects.find(created["id"])  # whose tenant it is does not matter here
    assert obj is not None
    return obj


@pytest.mark.parametrize("kind", ["plain", "role", "header", "dry run"])
async def test_cancelled_at_every_await_nothing_leaks(tmp_path: Path, kind: str) -> None:
    async with world(tmp_path) as server:
        server.engine.script = says("a", "b")
        obj = await object_of(server)
        requests = {
            "plain": ChatRequest("small", (QUESTION,)),
            "role": ChatRequest("small", (QUESTION,), cache=CacheUse(object_id=obj.id, reset_ttl_s=60)),
            "header": ChatRequest(
                "small", (*obj.messages, QUESTION), cache=CacheUse(object_id=obj.id, resent=True, reset_ttl_s=60)
            ),
            "dry run": ChatRequest("small", (QUESTION,), cache=CacheUse(object_id=obj.id, dry_run=True)),
        }
        n_steps = 0
        for k in range(1, STEPS_MAX):
            if not await answered(server, obj.tenant, requests[kind], k):
                break
            n_steps = k
        else:
            pytest.fail("the turn never came to its end")
        assert n_steps >= {"plain": 4, "role": 6, "header": 6, "dry run": 1}[kind]


async def test_choices_cancelled_at_every_step_of_the_engine_leak_nothing(tmp_path: Path) -> None:
    request = ChatRequest("small", (QUESTION,), n=3, sampling=Sampling(temperature=1.0))
    async with world(tmp_path) as server:
        server.engine.script = says("a", "b")
        for k in range(1, STEPS_MAX):
            n_steps = 0
            async with server.running.turns.open(
                "turn-1", developer("t"), request, Phases(server.clock), dialect="kimi"
            ) as turn:

                async def step(k: int = k, turn: Turn = turn) -> None:
                    nonlocal n_steps
                    n_steps += 1
                    if n_steps == k:
                        turn.cancel()
                    await asyncio.sleep(0)

                server.engine.gate = step
                events = []
                while not turn.stream.is_read:
                    events += await turn.stream.batch(None)
            assert sum(isinstance(event, Failed | Finished) for event in events) == 1
            server.assert_clean()
            if isinstance(events[-1], Finished):
                break
        assert k > 3 * 5  # a lease and five events each
        assert n_steps < k


async def test_cancelled_before_it_began_it_still_ends(tmp_path: Path) -> None:
    async with world(tmp_path) as server:
        request = ChatRequest("small", (QUESTION,))
        async with server.running.turns.open(
            "turn-1", developer(TENANT), request, Phases(server.clock), dialect="kimi"
        ) as turn:
            turn.cancel()
            (event,) = await turn.stream.batch(None)
        assert isinstance(event, Failed)
        server.assert_clean()


async def test_leaving_in_the_middle_gives_everything_back(tmp_path: Path) -> None:
    async with world(tmp_path) as server:
        steps = asyncio.Semaphore(2)
        server.engine.gate = steps.acquire  # type: ignore[assignment]
        request = ChatRequest("small", (QUESTION,))
        async with server.running.turns.open(
            "turn-1", developer(TENANT), request, Phases(server.clock), dialect="kimi"
        ) as turn:
            await turn.stream.begin()
            assert server.engine.running == {"turn-1"}
        server.assert_clean()
        assert server.engine.cancelled == ["turn-1"]
