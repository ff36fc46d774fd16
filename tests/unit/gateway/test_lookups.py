"""A turn's look-up from its prompt to what the client is told, with the real rules, history and database."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from keepwarm.cache.render import Built
from keepwarm.config import CacheConfig, ModelConfig
from keepwarm.core.cache_lookup import CacheLookup, MissCause
from keepwarm.core.cache_object import CacheObject, ObjectStatus
from keepwarm.core.event import Started
from keepwarm.core.prompt import Breakpoint, Prompt, Tokens
from keepwarm.core.request import ChatRequest, Message, TextPart
from keepwarm.gateway.breakpoints import Breakpoints
from keepwarm.gateway.history import History, TurnRecord
from keepwarm.gateway.lookups import Look, Lookups
from keepwarm.gateway.models import ServedModels
from keepwarm.gateway.object_use import ObjectUse
from keepwarm.gateway.runtime import Runtime
from keepwarm.storage import Storage, database_path
from tests.engines import says
from tests.world import CountingIds, FakeClock, capturing_log, world

pytestmark = pytest.mark.anyio

CONFIG = CacheConfig(auto_tokens_min=600, mark_tokens_min=500)
REQUEST = ChatRequest("small", (Message("user", (TextPart("hello"),)),))
OBJECT = CacheObject(
    id="cache-1",
    tenant="a",
    model="small",
    status=ObjectStatus.READY,
    created_at=0,
    expires_at=2_000_000_000,
    messages=REQUEST.messages,
    tools=(),
    n_tokens=700,
)


def never(_tokens: Tokens) -> str:
    return "…"


def built(n_tokens: int = 1000, *marks: tuple[int, int | None]) -> Built:
    tokens = np.arange(n_tokens, dtype=np.int32)
    return Built(Prompt("a", tokens), breakpoints=tuple(Breakpoint(*mark, n) for n, mark in enumerate(marks, 1)))


@asynccontextmanager
async def lookups(data_dir: Path, clock: FakeClock | None = None) -> AsyncIterator[Lookups]:
    log, _ = capturing_log()
    storage = await asyncio.to_thread(Storage.open, database_path(data_dir), 1.0)
    try:
        async with asyncio.TaskGroup() as tasks:
            runtime = Runtime(clock or FakeClock(), CountingIds(), log, tasks)
            known = Breakpoints(storage, runtime, root=b"root", tokens_min=CONFIG.mark_tokens_min)
            models = ServedModels(ModelConfig(name="small", aliases=("other",)), any_name=False)
            yield Lookups(CONFIG, models, known, History(never), template="t")
    finally:
        await asyncio.to_thread(storage.close)


def told(subject: Lookups, look: Look, n_read: int = 0, n_found: int | None = None) -> CacheLookup:
    n_prompt = len(look.asked.tokens)
    found = n_read if n_found is None else n_found
    started = subject.told(look, Started(n_prompt, n_read, "host" if n_read else None, n_found=found))
    assert started.lookup is not None
    assert (started.n_prompt, started.cache_read) == (n_prompt, n_read)
    return started.lookup


def turn(
    subject: Lookups,
    turn_id: str,
    prompt: Built,
    *,
    tenant: str = "a",
    n_read: int = 0,
    request: ChatRequest = REQUEST,
    use: ObjectUse | None = None,
) -> CacheLookup:
    """A whole turn that ends well."""
    with subject.begin(turn_id, tenant, request, prompt, use or ObjectUse(request)) as look:
        return told(subject, look, n_read)


async def test_automatic_from_the_minimum_on(tmp_path: Path) -> None:
    async with lookups(tmp_path) as subject:
        assert turn(subject, "t1", built(599)).cause is MissCause.BELOW_MINIMUM
        assert turn(subject, "t2", built(600)).cause is MissCause.BELOW_MINIMUM  # what it shares was too short
        assert turn(subject, "t3", built(600), n_read=598).outcome == "hit"
        assert turn(subject, "t4", built(600)).cause is MissCause.EVICTED


async def test_an_alias_is_the_same_model(tmp_path: Path) -> None:
    async with lookups(tmp_path) as subject:
        turn(subject, "t1", built())
        found = turn(subject, "t2", built(), request=replace(REQUEST, model="other"))
        assert found.cause is MissCause.EVICTED


async def test_marks_decide_what_may_be_read(tmp_path: Path) -> None:
    clock = FakeClock()
    async with lookups(tmp_path, clock) as subject:
        with subject.begin("t1", "a", REQUEST, built(1000, (499, 300)), ObjectUse(REQUEST)) as look:
            assert look.chosen is not None
            assert (look.chosen.read_end, look.chosen.write_end) == (0, 0)
            assert told(subject, look).cause is MissCause.BELOW_MINIMUM
        assert turn(subject, "t2", built(1000, (800, 300))).cause is MissCause.FIRST_SEEN
        assert turn(subject, "t3", built(1000, (800, 300)), n_read=800).outcome == "hit"
        assert turn(subject, "t4", built(1000, (800, 300)), n_read=0).cause is MissCause.EVICTED
        clock.advance(300)
        assert turn(subject, "t5", built(1000, (800, 300))).cause is MissCause.EXPIRED


async def test_marks_without_a_lifetime_leave_it_automatic(tmp_path: Path) -> None:
    async with lookups(tmp_path) as subject:
        with subject.begin("t1", "a", REQUEST, built(1000, (800, None)), ObjectUse(REQUEST)) as look:
            assert look.chosen is None
        assert turn(subject, "t2", built(1000, (800, None)), n_read=998).outcome == "hit"


async def test_another_tenant_has_no_part_in_it(tmp_path: Path) -> None:
    async with lookups(tmp_path) as subject:
        turn(subject, "t1", built(1000, (800, 300)))
        found = turn(subject, "t2", built(1000, (800, 300)), tenant="b")
        assert (found.cause, found.compared_with, found.place) == (MissCause.FIRST_SEEN, None, None)
        named = turn(subject, "t3", built(), tenant="b", request=replace(REQUEST, compare_with="t1"))
        assert named.compare_found is False


async def test_a_turn_beside_a_running_one(tmp_path: Path) -> None:
    async with lookups(tmp_path) as subject:
        with subject.begin("t1", "a", REQUEST, built(), ObjectUse(REQUEST)) as first:
            assert told(subject, first).cause is MissCause.FIRST_SEEN
            assert turn(subject, "t2", built(900)).cause is MissCause.STILL_BEING_WRITTEN


async def test_a_turn_that_failed_is_forgotten(tmp_path: Path) -> None:
    async with lookups(tmp_path) as subject:
        with pytest.raises(RuntimeError), subject.begin("t1", "a", REQUEST, built(), ObjectUse(REQUEST)):
            raise RuntimeError
        assert turn(subject, "t2", built()).cause is MissCause.FIRST_SEEN


async def test_a_cancelled_turn_is_forgotten(tmp_path: Path) -> None:
    async with lookups(tmp_path) as subject:
        with pytest.raises(asyncio.CancelledError), subject.begin("t1", "a", REQUEST, built(), ObjectUse(REQUEST)):
            raise asyncio.CancelledError
        assert turn(subject, "t2", built()).cause is MissCause.FIRST_SEEN


async def test_a_cache_object_is_a_promise_and_has_no_minimum(tmp_path: Path) -> None:
    async with lookups(tmp_path) as subject:
        ready = ObjectUse(REQUEST, OBJECT, ObjectStatus.READY)
        short = ObjectUse(REQUEST, replace(OBJECT, n_tokens=100), ObjectStatus.READY)
        assert turn(subject, "t1", built(), use=ready, n_read=700).outcome == "hit"
        assert turn(subject, "t2", built(120), use=short, n_read=100).outcome == "hit"
        assert turn(subject, "t3", built(), use=ready).cause is MissCause.EVICTED
        pending = ObjectUse(REQUEST, OBJECT, ObjectStatus.PENDING)
        assert turn(subject, "t4", built(), use=pending).cause is MissCause.STILL_BEING_WRITTEN
        revived = ObjectUse(REQUEST, OBJECT, ObjectStatus.INACTIVE)
        assert turn(subject, "t5", built(), use=revived).cause is MissCause.EXPIRED


@pytest.mark.parametrize("lost", [MissCause.DELETED, MissCause.EXPIRED])
async def test_an_object_that_is_lost_is_the_cause_unless_all_is_read(tmp_path: Path, lost: MissCause) -> None:
    async with lookups(tmp_path) as subject:
        use = ObjectUse(REQUEST, lost=lost)
        assert turn(subject, "t1", built(), use=use).cause is lost
        assert turn(subject, "t2", built(), use=use, n_read=998).outcome == "hit"


async def test_an_objects_turn_follows_no_marks(tmp_path: Path) -> None:
    async with lookups(tmp_path) as subject:
        use = ObjectUse(REQUEST, OBJECT, ObjectStatus.READY)
        with subject.begin("t1", "a", REQUEST, built(1000, (800, 300)), use) as look:
            assert look.chosen is None


async def test_records_are_the_tenants_own(tmp_path: Path) -> None:
    async with lookups(tmp_path) as subject:
        record = TurnRecord("t1", "openai", "small", 0.0, "running")
        subject.note("a", record)
        assert subject.turn("a", "t1") == record
        assert subject.turn("b", "t1") is None


async def test_the_place_is_told_to_the_tenant_and_to_nobody_else(tmp_path: Path) -> None:
    async with world(tmp_path) as server:
        text = "a confidential text, " * 20
        server.engine.script = says("ok", cache_read=200)
        await server.chat(f"{text}one{text}")
        answer = await server.chat(f"{text}two{text}")
        assert answer.headers["x-keepwarm-cache"] == "partial; read=200; cause=evicted"
        server.engine.script = says("ok", cache_read=426)
        answer = await server.chat(f"{text}ten{text}")
        assert answer.headers["x-keepwarm-cache"] == "partial; read=426; cause=messages_changed"
        path = f"/admin/turns/{answer.json()['id']}"
        place = (await server.request("GET", path)).json()["lookup"]["place"]
        assert (place["block"], place["here"][:3], place["there"][:3]) == (
            "messages[0]",
            "en" + text[0],
            "wo" + text[0],
        )
        assert (await server.request("GET", path, key="k2")).status == 404
        assert server.logged
        assert "confidential" not in repr(server.logged)
