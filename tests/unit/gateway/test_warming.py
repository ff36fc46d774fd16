"""Leases that outlive the engine and the gateway: what stays ready, what is computed again, what is dropped."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.event import Event, Failed
from keepwarm.core.prompt import Plan
from keepwarm.engine import EngineState
from keepwarm.gateway import warming
from tests.engines import StepEngine, says
from tests.world import DURABLE, World, until, world

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warming, "RETRY_S", 0.0)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path, config=DURABLE) as running:
        yield running


async def status_of(server: World, cache: Any) -> str:
    return str((await server.cache(cache["id"]))["status"])


async def quiet() -> None:
    """Let everyone do what they can, storage's thread too."""
    for _ in range(20):
        await asyncio.sleep(0.001)


def pins_of(server: World) -> list[str | None]:
    return [plan.pin_id for plan in server.engine.plans]


def lines(server: World, event: str) -> list[Any]:
    return [line for line in server.logged if line["event"] == event]


async def test_between_two_engines_nothing_changes(server: World) -> None:
    cache = await server.ready_cache()
    server.engine.go_down()
    await quiet()
    assert await status_of(server, cache) == "ready"
    assert lines(server, "engine down")


async def test_held_objects_stay_ready_and_the_others_are_computed_again(server: World) -> None:
    held, other, bad = [await server.ready_cache(f"text {name}") for name in ("one", "two", "three")]
    server.engine.go_down()
    server.engine.plans.clear()
    steps = asyncio.Semaphore(0)
    server.engine.gate = steps.acquire
    server.engine.come_up([held["id"]])
    await quiet()
    assert [await status_of(server, cache) for cache in (held, other, bad)] == ["ready", "pending", "pending"]
    for _ in range(20):
        steps.release()
    assert {**await server.settled(other["id"])} == other
    assert {**await server.settled(bad["id"])} == bad
    assert sorted(map(str, pins_of(server))) == sorted([other["id"], bad["id"]])
    assert server.engine.pins == {held["id"], other["id"], bad["id"]}
    server.assert_clean()


async def test_a_restarted_gateway_waits_for_what_its_engine_says(tmp_path: Path) -> None:
    async with world(tmp_path, config=DURABLE) as server:
        held, other = await server.ready_cache("text one"), await server.ready_cache("text two")
    engine = StepEngine()
    engine.state, engine.epoch = EngineState.STARTING, 0
    async with world(tmp_path, config=DURABLE, engine=engine) as server:
        await quiet()
        assert [await status_of(server, cache) for cache in (held, other)] == ["ready", "ready"]
        engine.come_up([held["id"]])
        await until(lambda: other["id"] in engine.pins)
        assert (await server.settled(other["id"]))["status"] == "ready"
        assert await status_of(server, held) == "ready"
        assert pins_of(server) == [other["id"]]


async def test_a_pending_object_survives_a_gateway_restart_too(tmp_path: Path) -> None:
    engine = StepEngine()
    engine.gate = asyncio.Semaphore(0).acquire
    async with world(tmp_path, config=DURABLE, engine=engine) as server:
        created = await server.create_cache()
    async with world(tmp_path, config=DURABLE) as server:
        assert (await server.settled(created["id"]))["status"] == "ready"


async def test_a_lease_without_a_live_object_is_dropped(server: World) -> None:
    deleted, expired = await server.ready_cache("text one"), await server.ready_cache("text two", ttl=5)
    server.engine.go_down()
    await server.request("DELETE", f"/v1/caching/{deleted['id']}")
    server.clock.advance(5)
    server.engine.come_up([deleted["id"], expired["id"], "cache-of-another-life"])
    await until(lambda: not server.engine.pins)
    assert await status_of(server, expired) == "inactive"
    assert pins_of(server) == [deleted["id"], expired["id"]], "nothing was computed for them again"


async def test_a_lease_that_was_held_at_the_start_is_dropped_when_its_object_expires(tmp_path: Path) -> None:
    async with world(tmp_path, config=DURABLE) as server:
        cache = await server.ready_cache(ttl=5)
    engine = StepEngine()
    engine.come_up([cache["id"]])
    async with world(tmp_path, config=DURABLE, engine=engine) as server:
        await until(lambda: bool(lines(server, "engine ready")))
        await server.running.warming.tick()
        assert engine.pins == {cache["id"]}
        server.clock.advance(5)
        await server.running.warming.tick()
        assert engine.pins == set()


async def test_nothing_is_made_ready_before_the_new_engines_leases_are_compared(server: World) -> None:
    """Else what was computed just before the comparison would be taken for a lease that was lost."""
    server.engine.go_down()
    await until(lambda: bool(lines(server, "engine down")))
    server.engine.epoch += 1
    server.engine.state = EngineState.READY  # and nobody has been told yet
    created = await server.create_cache()
    await quiet()
    assert await status_of(server, created) == "pending"
    server.engine.come_up()
    assert (await server.settled(created["id"]))["status"] == "ready"
    assert pins_of(server) == [created["id"]]


async def test_a_database_that_is_busy_does_not_end_the_comparison(
    server: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = await server.ready_cache()
    objects = server.running.warming._objects
    whole, n_calls = objects.engine_lost, 0

    async def busy_once(now: float, held: frozenset[str]) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 1:
            raise ApiError(ErrorKind.OVERLOADED, "the database is busy")
        return await whole(now, held)

    monkeypatch.setattr(objects, "engine_lost", busy_once)
    server.engine.lose()
    await until(lambda: cache["id"] in server.engine.pins)
    assert n_calls == 2


async def test_a_damaged_lease_is_computed_again_while_its_object_stays_ready(server: World) -> None:
    cache = await server.ready_cache()
    steps = asyncio.Semaphore(0)
    server.engine.gate = steps.acquire
    server.engine.damage(cache["id"])
    await until(lambda: bool(lines(server, "lease damaged")))
    await quiet()
    assert await server.cache(cache["id"]) == cache
    for _ in range(10):
        steps.release()
    await until(lambda: bool(lines(server, "lease repaired")))
    assert await server.cache(cache["id"]) == cache
    assert pins_of(server) == [cache["id"]] * 2
    assert server.engine.pins == {cache["id"]}
    server.assert_clean()


async def test_a_damaged_lease_that_cannot_be_computed_again_is_an_error_with_the_reason(server: World) -> None:
    cache = await server.ready_cache()
    server.engine.script = lambda plan: [Failed(ErrorKind.OVERLOADED, "no room: it needs 9 bytes more, 3 are free")]
    server.engine.damage(cache["id"])
    await until(lambda: bool(lines(server, "cache object settled")[1:]))
    told = await server.cache(cache["id"])
    assert told["status"] == "error"
    assert "needs 9 bytes more, 3 are free" in told["error"]["message"]
    await quiet()
    assert len(server.engine.plans) == 2, "it is not tried for ever"


async def test_a_damaged_lease_outlives_a_lost_engine(server: World) -> None:
    cache = await server.ready_cache()
    lost = False

    def script(plan: Plan) -> list[Event]:
        nonlocal lost
        if not lost:
            lost = True
            return [Failed(ErrorKind.ENGINE_DOWN, "the engine restarted during this request")]
        return list(says("ok")(plan))

    server.engine.script = script
    server.engine.damage(cache["id"])
    await until(lambda: bool(lines(server, "lease repaired")))
    assert await status_of(server, cache) == "ready"
    assert server.engine.pins == {cache["id"]}


async def test_a_repair_that_takes_every_engine_down_is_given_up_and_the_object_stays_ready(server: World) -> None:
    cache = await server.ready_cache()
    server.engine.plans.clear()
    server.engine.script = lambda plan: [Failed(ErrorKind.ENGINE_DOWN, "the engine restarted during this request")]
    server.engine.damage(cache["id"])
    await until(lambda: bool(lines(server, "lease not repaired")))
    await quiet()
    assert len(server.engine.plans) == warming.ATTEMPTS_MAX
    assert await status_of(server, cache) == "ready"


async def test_a_damaged_lease_of_an_object_that_is_gone_is_dropped(server: World) -> None:
    server.engine.pins.add("cache-gone")
    server.engine.damage("cache-gone")
    server.engine.pins.add("cache-gone")
    await until(lambda: not server.engine.pins)
    assert server.engine.plans == []


async def test_a_damage_whose_look_up_met_a_busy_database_is_repaired_at_the_next_tick(
    server: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = await server.ready_cache()
    objects = server.running.warming._objects

    async def busy(object_id: str) -> Any:
        raise ApiError(ErrorKind.OVERLOADED, f"the database is busy, not looking for {object_id}")

    with monkeypatch.context() as patched:
        patched.setattr(objects, "find", busy)
        server.engine.damage(cache["id"])
        await until(lambda: bool(lines(server, "lease damaged")))
        await quiet()
    assert not lines(server, "lease repaired")
    await server.running.warming.tick()
    await until(lambda: bool(lines(server, "lease repaired")))


async def test_no_room_on_the_disk_is_the_objects_error_and_not_tried_again(server: World) -> None:
    message = "no room to keep this cache: it needs 4,096 bytes more, 100 can be freed"
    server.engine.script = lambda plan: [Failed(ErrorKind.OVERLOADED, message)]
    cache = await server.ready_cache()
    assert (cache["status"], cache["error"]["message"]) == ("error", message)
    await server.running.warming.tick()
    await quiet()
    assert len(server.engine.plans) == 1


@pytest.mark.parametrize("n_steps", [1, 2, 3])
async def test_stopping_in_the_middle_leaves_nothing(tmp_path: Path, n_steps: int) -> None:
    engine = StepEngine()
    engine.gate = asyncio.Semaphore(n_steps).acquire
    async with world(tmp_path, config=DURABLE, engine=engine) as server:
        created = await server.create_cache()
        await quiet()
        assert not engine.is_clean
    assert engine.is_clean
    assert engine.pins == set()
    async with world(tmp_path, config=DURABLE) as server:
        assert (await server.settled(created["id"]))["status"] == "ready"
