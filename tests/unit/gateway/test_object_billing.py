"""Limits and money of cache objects through HTTP: what is asked before one is made or made again, and what goes back."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from keepwarm.billing.budget import Budget, Period, Scope
from keepwarm.config import RatesConfig
from keepwarm.core.clock import RandomIds
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.event import Event, Failed
from keepwarm.core.identity import OrganisationChange
from keepwarm.core.prompt import Plan
from keepwarm.core.rate_limit import LimitOverrides
from keepwarm.gateway.identities import Identities
from tests.engines import says
from tests.paid import Paid, paid
from tests.world import Answer, until

TEXT = "x" * 500
NO_ROOM = [Failed(ErrorKind.OVERLOADED, "no room")]


def no_room(plan: Plan) -> Sequence[Event]:
    """Objects cannot be made; turns go well."""
    return NO_ROOM if plan.pin_id else says("ok")(plan)


class Way(msgspec.Struct, frozen=True):
    """One way for an object to be over or failed, and to be brought back."""

    name: str
    currency: str
    path: str
    lose: Callable[[Paid], Awaitable[str]]  # gives the id of an object that was made and is over, or has failed
    revive: Callable[[Paid, str, str], Awaitable[Answer]]  # by id and key

    async def told(self, at: Paid, object_id: str) -> Any:
        return (await at.server.request("GET", f"{self.path}/{object_id}", key=at.key)).json()


async def expired(at: Paid) -> str:
    made = await at.server.ready_cache(TEXT, key=at.key, model="kimi", ttl=60)
    at.server.clock.advance(61.0)
    await at.server.running.paying.tick()
    await at.server.running.warming.tick()
    return str(made["id"])


async def failed(at: Paid) -> str:
    """It was never ready."""
    at.server.engine.script = no_room
    made = await at.server.ready_cache(TEXT, key=at.key, model="kimi", ttl=3600)
    assert made["status"] == "error"
    await unheld(at)
    at.server.engine.script = says("ok")
    return str(made["id"])


async def content_lost(at: Paid) -> str:
    """It was ready, and could not be made again when an engine had gone."""
    created = await create_content(at)
    assert created.status == 200, created.body
    at.server.engine.script = no_room
    at.server.engine.lose()
    await until(lambda: any(line.get("status") == "error" for line in at.server.logged))
    at.server.engine.script = says("ok")
    at.server.clock.advance(1.0)  # lives are told apart by when they began
    return str(created.json()["name"].removeprefix("cachedContents/"))


async def create_content(at: Paid, text: str = TEXT) -> Answer:
    body = {"model": "models/gemini", "contents": [{"role": "user", "parts": [{"text": text}]}], "ttl": "3600s"}
    return await at.server.request("POST", "/v1beta/cachedContents", body, key=at.key)


async def create(at: Paid, text: str = TEXT, **fields: Any) -> Answer:
    body = {"model": "kimi", "messages": [{"role": "system", "content": text}], **fields}
    return await at.server.request("POST", "/v1/caching", body, key=at.key)


async def put(at: Paid, object_id: str, key: str) -> Answer:
    return await at.server.request("PUT", f"/v1/caching/{object_id}", {"ttl": 600}, key=key)


async def patch(at: Paid, object_id: str, key: str) -> Answer:
    return await at.server.request("PATCH", f"/v1beta/cachedContents/{object_id}", {"ttl": "600s"}, key=key)


async def reset_ttl(at: Paid, object_id: str, key: str) -> Answer:
    """By a turn whose own model costs nothing."""
    cache = {"role": "cache", "content": f"cache_id={object_id};reset_ttl=600"}
    body = {"model": "small", "messages": [cache, {"role": "user", "content": "?"}]}
    return await at.server.request("POST", "/v1/chat/completions", body, key=key)


KIMI, GEMINI = "/v1/caching", "/v1beta/cachedContents"
WAYS = (
    Way("expired-put", "CNY", KIMI, expired, put),
    Way("failed-put", "CNY", KIMI, failed, put),
    Way("expired-reset_ttl", "CNY", KIMI, expired, reset_ttl),
    Way("failed-reset_ttl", "CNY", KIMI, failed, reset_ttl),
    Way("lost-patch", "USD", GEMINI, content_lost, patch),
)
REFUSED = {
    ("prepaid", KIMI): (429, "exceeded_current_quota_error"),
    ("prepaid", GEMINI): (429, "RESOURCE_EXHAUSTED"),
    ("budget", KIMI): (429, "exceeded_current_quota_error"),
    ("budget", GEMINI): (429, "RESOURCE_EXHAUSTED"),
    ("models", KIMI): (403, "permission_denied_error"),
    ("models", GEMINI): (403, "PERMISSION_DENIED"),
}
ways = pytest.mark.parametrize("way", WAYS, ids=[way.name for way in WAYS])


async def unheld(at: Paid) -> None:
    """What is given back is so right after the status can be seen."""
    while await at.holds():  # noqa: ASYNC110
        await asyncio.sleep(0)


async def restrict(at: Paid, by: str, currency: str) -> str:
    """Have the organisation refused what costs money, and give a key that is: for `models` only the key is."""
    if by == "models":
        return await at.key_for("small")
    if by == "prepaid":
        identities = Identities(at.server.storage, at.server.clock, RandomIds(), tiers={}, default_tier=None)
        await identities.change_organisation("acme", OrganisationChange(is_prepaid=True))
    else:
        await at.server.running.ledger.set_budget(Budget(Scope("acme"), currency, Period.TOTAL, hard_nano=1))
    return at.key


def set_quota(at: Paid, n_tokens: int) -> None:
    caching = at.server.running.turns._caching
    caching._config = msgspec.structs.replace(caching._config, tenant_tokens_max=n_tokens)


@ways
@pytest.mark.parametrize("by", ["prepaid", "budget", "models"])
async def test_a_revival_is_refused_as_a_new_object_is_and_leaves_the_old_one_as_it_was(
    tmp_path: Path, way: Way, by: str
) -> None:
    async with paid(tmp_path) as at:
        object_id = await way.lose(at)
        before, n_rows = await way.told(at, object_id), len(await at.rows("hold", "creation"))
        key = await restrict(at, by, way.currency)
        answer = await way.revive(at, object_id, key)
        if way.revive is reset_ttl:  # the answer is out by then
            kind = ErrorKind.PERMISSION_DENIED if by == "models" else ErrorKind.QUOTA_EXCEEDED
            (line,) = [line for line in at.server.logged if line["event"] == "lifetime not renewed"]
            assert (answer.status, line["kind"]) == (200, kind.value)
        else:
            error = answer.json()["error"]
            assert (answer.status, error.get("type") or error["status"]) == REFUSED[by, way.path]
        assert await way.told(at, object_id) == before
        assert len(await at.rows("hold", "creation")) == n_rows
        assert await at.holds() == []
        assert await at.faults() == []


@ways
async def test_a_revival_holds_before_it_is_made_and_closes_that_once(tmp_path: Path, way: Way) -> None:
    async with paid(tmp_path) as at:
        object_id = await way.lose(at)
        n_before = len(await at.rows("creation"))
        at.server.running.warming._adopted_epoch = 0  # it computes nothing before it has seen this engine's leases
        assert (await way.revive(at, object_id, at.key)).status == 200
        (hold,) = await at.holds()
        assert hold.amount_nano > 0
        at.server.running.warming._adopted_epoch = at.server.engine.epoch
        await unheld(at)
        made = (await at.rows("creation"))[n_before:]
        assert [(row.turn_id, row.creation_nano, -row.held_nano) for row in made] == [
            (hold.turn_id, hold.amount_nano, hold.amount_nano)
        ]
        assert await at.faults() == []


@ways
async def test_each_revival_that_fails_gives_its_own_hold_back(tmp_path: Path, way: Way) -> None:
    async with paid(tmp_path) as at:
        object_id = await way.lose(at)
        n_before = len(await at.rows("release"))
        at.server.engine.script = no_room
        for n_attempts in range(1, 4):
            assert (await way.revive(at, object_id, at.key)).status == 200
            while len(await at.rows("release")) < n_before + n_attempts:  # noqa: ASYNC110
                await asyncio.sleep(0)
            assert await at.holds() == []
        at.server.engine.script = says("ok")
        n_made = len(await at.rows("creation"))
        assert (await way.revive(at, object_id, at.key)).status == 200
        while len(await at.rows("creation")) == n_made:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert await at.holds() == []
        turns = [row.turn_id for row in await at.rows("hold")]
        assert len(turns) == len(set(turns))
        assert await at.faults() == []


@pytest.mark.parametrize("statement,make", [("INSERT", create), ("INSERT", create_content), ("UPDATE", put)])
async def test_what_could_not_be_written_holds_nothing(tmp_path: Path, statement: str, make: Any) -> None:
    async with paid(tmp_path, limits=LimitOverrides(tpm=2_000)) as at:
        arguments = (await expired(at), at.key) if make is put else ()
        await at.server.storage.run(
            lambda connection: connection.exec_driver_sql(
                f"CREATE TRIGGER refuse BEFORE {statement} ON cache_objects BEGIN SELECT RAISE(ABORT, 'refused'); END"
            )
        )
        assert (await make(at, *arguments)).status == 500
        assert len(await at.rows("hold")) == (2 if make is put else 1)
        assert await at.holds() == []
        assert await at.tokens_left() == 2_000
        assert await at.faults() == []


async def test_a_revived_object_deleted_before_it_is_ready_costs_nothing_more(tmp_path: Path) -> None:
    async with paid(tmp_path) as at:
        object_id = await expired(at)
        before = await at.balanced()
        at.server.running.warming._adopted_epoch = 0
        assert (await put(at, object_id, at.key)).status == 200
        assert len(await at.holds()) == 1
        assert (await at.server.request("DELETE", f"/v1/caching/{object_id}", key=at.key)).status == 200
        assert await at.balanced() == before
        assert await at.faults() == []


async def test_an_object_that_lives_is_extended_without_a_hold(tmp_path: Path) -> None:
    async with paid(tmp_path) as at:
        made = await at.server.ready_cache(TEXT, key=at.key, model="kimi", ttl=600)
        await restrict(at, "prepaid", "CNY")
        assert (await put(at, made["id"], at.key)).status == 200
        assert (await at.server.settled(made["id"], key=at.key))["status"] == "ready"
        at.server.clock.advance(100.0)
        assert (await reset_ttl(at, made["id"], at.key)).status == 200
        assert (await at.server.cache(made["id"], key=at.key))["expired_at"] == at.server.clock.now() + 600
        assert [len(await at.rows(kind)) for kind in ("hold", "creation")] == [1, 1]


async def test_two_who_revive_the_same_object_hold_once(tmp_path: Path) -> None:
    async with paid(tmp_path) as at:
        object_id = await expired(at)
        at.server.running.warming._adopted_epoch = 0
        set_quota(at, 600)  # room for it once: the later ones change an object that is on its way already
        answers = await asyncio.gather(*(put(at, object_id, at.key) for _ in range(4)))
        assert [answer.status for answer in answers] == [200] * 4
        assert len(await at.holds()) == 1
        at.server.running.warming._adopted_epoch = at.server.engine.epoch
        assert (await at.server.settled(object_id, key=at.key))["status"] == "ready"
        assert len(await at.rows("creation")) == 2
        await at.balanced()


async def test_changed_again_right_after_its_revival_it_is_still_another_life(tmp_path: Path) -> None:
    async with paid(tmp_path) as at:
        object_id = await expired(at)  # a second ago
        at.server.running.warming._adopted_epoch = 0
        await put(at, object_id, at.key)
        await put(at, object_id, at.key)
        at.server.running.warming._adopted_epoch = at.server.engine.epoch
        assert (await at.server.settled(object_id, key=at.key))["status"] == "ready"
        assert len(await at.rows("creation")) == 2
        await at.balanced()


async def test_an_object_renewed_while_it_is_made_is_metered_to_its_new_end(tmp_path: Path) -> None:
    async with paid(tmp_path) as at:
        gate = asyncio.Semaphore(1)
        at.server.engine.gate = gate.acquire
        made = await at.server.create_cache(TEXT, key=at.key, model="kimi", ttl=60)
        await until(lambda: bool(at.server.engine.running))
        at.server.engine.gate = None  # for the turn; the object's computation waits
        assert (await reset_ttl(at, made["id"], at.key)).status == 200
        assert await at.rows("creation") == []
        at.server.clock.advance(100.0)  # over the end that it had when its computation began
        gate.release()
        assert (await at.server.settled(made["id"], key=at.key))["status"] == "ready"
        at.server.clock.advance(1000.0)
        await at.server.running.paying.tick()
        assert sum(row.n_units for row in await at.rows("storage")) == 500


async def test_a_failure_of_a_computation_that_is_stale_ends_nothing(tmp_path: Path) -> None:
    async with paid(tmp_path) as at:
        made = await at.server.ready_cache(TEXT, key=at.key, model="kimi", ttl=600)
        gate = asyncio.Semaphore(1)
        at.server.engine.gate, at.server.engine.script = gate.acquire, no_room
        await put(at, made["id"], at.key)
        await until(lambda: bool(at.server.engine.running))
        at.server.engine.gate, at.server.engine.script = None, says("ok")
        await put(at, made["id"], at.key)
        gate.release()
        assert (await at.server.settled(made["id"], key=at.key))["status"] == "ready"
        assert "stale" in [line.get("status") for line in at.server.logged]
        assert len(await at.rows("creation")) == 1
        await at.balanced()


def is_limited(answer: Answer, path: str) -> bool:
    """Whether it is a refusal by a rate limit in the dialect's own shape, that says when to come back."""
    if answer.status != 429:
        return False
    error, after_s = answer.json()["error"], int(answer.headers["retry-after"])
    assert after_s >= 1
    if path == KIMI:
        return bool(error["type"] == "rate_limit_reached_error")
    (info,) = [detail for detail in error["details"] if detail["@type"].endswith("RetryInfo")]
    assert info["retryDelay"] == f"{after_s}s"
    return bool(error["status"] == "RESOURCE_EXHAUSTED")


makers = pytest.mark.parametrize("path,make", [(KIMI, create), (GEMINI, create_content)], ids=["kimi", "gemini"])


@makers
async def test_making_an_object_takes_one_request_of_the_minute(tmp_path: Path, path: str, make: Any) -> None:
    async with paid(tmp_path, limits=LimitOverrides(rpm=2)) as at:
        assert [(await make(at)).status for _ in range(2)] == [200, 200]
        assert is_limited(await make(at), path)
        assert is_limited(await at.ask("small", "hello"), KIMI), "turns and objects count together"
        at.server.clock.advance(60.0)
        assert (await make(at)).status == 200


@makers
async def test_making_an_object_takes_its_tokens(tmp_path: Path, path: str, make: Any) -> None:
    async with paid(tmp_path, limits=LimitOverrides(tpm=1_200)) as at:
        assert (await make(at)).status == 200
        n_tokens = 1_200 - await at.tokens_left()
        assert 500 < n_tokens < 600
        assert (await make(at)).status == 200
        refused = await make(at)
        assert is_limited(refused, path)
        assert f"current: {2 * n_tokens}, this request: {n_tokens}, limit: 1200" in refused.json()["error"]["message"]
        assert len((await at.server.request("GET", path, key=at.key)).json().get("data", ["", ""])) == 2
        assert await at.tokens_left() == 1_200 - 2 * n_tokens
        await unheld(at)
        assert [len(await at.rows(kind)) for kind in ("hold", "creation")] == [2, 2]
        assert (await make(at, "x" * 1_300)).status == 400, "no wait would help"


@makers
async def test_tokens_read_from_the_cache_come_back_where_they_do_not_count(
    tmp_path: Path, path: str, make: Any
) -> None:
    rates = RatesConfig(cache_reads_count=False)
    async with paid(tmp_path, limits=LimitOverrides(tpm=1_200), rates=rates) as at:
        at.server.engine.script = says("ok", cache_read=400)
        for n_made in range(1, 6):
            assert (await make(at)).status == 200
            while 1_200 - await at.tokens_left() > 200 * n_made:  # noqa: ASYNC110 - Kimi's goes on behind its answer
                await asyncio.sleep(0)
            assert 1_200 - await at.tokens_left() > 100 * n_made


@makers
@pytest.mark.parametrize("why", ["no room", "no credit", "a quota"])
async def test_tokens_come_back_where_nothing_was_made(tmp_path: Path, path: str, make: Any, why: str) -> None:
    async with paid(tmp_path, prepaid=why == "no credit", limits=LimitOverrides(tpm=2_000)) as at:
        if why == "no room":
            at.server.engine.script = no_room
        if why == "a quota":
            set_quota(at, 100)
        assert ((await make(at)).status == 200) == (why == "no room" and path == KIMI)
        while await at.tokens_left() < 2_000:  # noqa: ASYNC110 - Kimi's goes on behind its answer
            await asyncio.sleep(0)
        assert await at.holds() == []


async def test_tokens_of_an_object_deleted_before_its_turn_came_are_given_back(tmp_path: Path) -> None:
    async with paid(tmp_path, limits=LimitOverrides(tpm=2_000)) as at:
        at.server.running.warming._adopted_epoch = 0
        first, second = [(await create(at)).json()["id"] for _ in range(2)]
        assert await at.tokens_left() < 1_000
        await at.server.request("DELETE", f"{KIMI}/{first}", key=at.key)
        await at.server.request("DELETE", f"{KIMI}/{second}", key=at.key)
        while await at.tokens_left() < 2_000:  # noqa: ASYNC110 - where the next attempt finds it gone
            await asyncio.sleep(0.01)
        assert at.server.running.paying._tickets == {}


async def test_tokens_of_an_object_whose_time_is_over_before_its_turn_comes_are_given_back(tmp_path: Path) -> None:
    async with paid(tmp_path, limits=LimitOverrides(tpd=2_000)) as at:
        at.server.running.warming._adopted_epoch = 0
        await create(at, ttl=10)
        assert len(await at.holds()) == 1
        at.server.clock.advance(11.0)
        at.server.running.warming._adopted_epoch = at.server.engine.epoch
        await unheld(at)
        assert at.server.running.paying._tickets == {}
        assert await at.faults() == []


async def test_making_a_content_has_a_place_as_long_as_it_takes(tmp_path: Path) -> None:
    async with paid(tmp_path, limits=LimitOverrides(concurrency=1)) as at:
        gate = asyncio.Semaphore(0)
        at.server.engine.gate = gate.acquire
        making = asyncio.create_task(create_content(at))
        await until(lambda: at.server.running.turns.n_turns == 1)
        assert is_limited(await at.ask("small", "hello"), KIMI)
        assert is_limited(await create_content(at), GEMINI)
        at.server.engine.gate = None
        gate.release()
        assert (await making).status == 200
        assert (await at.ask("small", "hello")).status == 200


@ways
async def test_a_revival_is_limited_as_a_new_object_is(tmp_path: Path, way: Way) -> None:
    async with paid(tmp_path, limits=LimitOverrides(concurrency=1, rpm=9, tpd=100_000)) as at:
        object_id = await way.lose(at)
        at.server.clock.advance(60.0)
        before, n_requests = await way.told(at, object_id), 2 if way.revive is reset_ttl else 1
        for _ in range(9 - n_requests + 1):
            assert (await at.ask("small", "hello")).status == 200
        answer = await way.revive(at, object_id, at.key)
        if way.revive is reset_ttl:
            (line,) = [line for line in at.server.logged if line["event"] == "lifetime not renewed"]
            assert (answer.status, line["kind"]) == (200, "rate_limited")
        else:
            assert is_limited(answer, way.path)
        assert await way.told(at, object_id) == before
        at.server.clock.advance(60.0)
        assert (await way.revive(at, object_id, at.key)).status == 200
        await unheld(at)
        await until(lambda: object_id in at.server.engine.pins and at.server.engine.is_clean)
        at.server.assert_clean()


async def test_a_revival_takes_the_objects_tokens_and_gives_them_back_if_it_fails(tmp_path: Path) -> None:
    async with paid(tmp_path, limits=LimitOverrides(tpm=1_200)) as at:
        object_id = await expired(at)
        assert await at.tokens_left() == 1_200
        at.server.engine.script = no_room
        await put(at, object_id, at.key)
        while await at.tokens_left() < 1_200:  # noqa: ASYNC110
            await asyncio.sleep(0)
        at.server.engine.script = says("ok")
        await put(at, object_id, at.key)
        assert (await at.server.settled(object_id, key=at.key))["status"] == "ready"
        assert 600 < await at.tokens_left() < 700


async def test_a_soft_budget_that_an_object_passes_is_told(tmp_path: Path) -> None:
    async with paid(tmp_path) as at:
        budget = Budget(Scope("acme"), "CNY", Period.TOTAL, soft_nano=1)
        await at.server.running.ledger.set_budget(budget)
        made = (await create(at)).json()
        (told,) = [line for line in at.server.logged if line["event"] == "soft budget passed"]
        assert told["object_id"] == made["id"] and "0.000000001 CNY" in told["budget"]
        await at.server.settled(made["id"], key=at.key)


@contextmanager
def leaving_while_written(at: Paid, statement: str) -> Iterator[list[Callable[[], None]]]:
    """Who is put into the list is called while the first commit of a transaction with `statement` takes its time."""
    leave: list[Callable[[], None]] = []
    engine, loop, left = at.server.storage._engine, asyncio.get_running_loop(), threading.Event()
    seen: list[str] = []

    def told(_connection: Any, _cursor: Any, text: str, *_more: Any) -> None:
        seen.extend([text] if statement in text else [])

    def go() -> None:
        leave.pop()()
        loop.call_later(0.05, left.set)  # the turn has been cancelled by then; if not, the test tests less

    def commits(_connection: Any) -> None:
        if seen and leave:
            loop.call_soon_threadsafe(go)
            left.wait(timeout=10)

    sa.event.listen(engine, "before_cursor_execute", told)
    sa.event.listen(engine, "commit", commits)
    yield leave
    sa.event.remove(engine, "before_cursor_execute", told)
    sa.event.remove(engine, "commit", commits)


async def reset_and_leave(at: Paid, object_id: str, ttl_s: int) -> None:
    """A turn that resets the object's lifetime, by a client that leaves while that is being written."""
    cache = {"role": "cache", "content": f"cache_id={object_id};reset_ttl={ttl_s}"}
    body = {"model": "small", "messages": [cache, {"role": "user", "content": "?"}], "stream": True}
    with leaving_while_written(at, "UPDATE cache_objects") as leave:
        call = at.server.call("POST", "/v1/chat/completions", body, key=at.key)
        leave.append(call.disconnect)
        await call.task
        await at.server.running.turns.drained()
        assert not leave


async def test_what_is_kept_longer_is_paid_longer_though_the_client_left_meanwhile(tmp_path: Path) -> None:
    async with paid(tmp_path) as at:
        made = await at.server.ready_cache(TEXT, key=at.key, model="kimi", ttl=600)
        await reset_and_leave(at, made["id"], 86_400)
        for _ in range(4):
            at.server.clock.advance(10_000.0)
            await at.server.running.paying.tick()
        assert (await at.server.cache(made["id"], key=at.key))["status"] == "ready"
        assert sum(row.n_units for row in await at.rows("storage")) == 40_000
        assert await at.faults() == []


async def test_a_revival_whose_client_left_meanwhile_stays_held(tmp_path: Path) -> None:
    """Else many could be begun with the credit for one."""
    async with paid(tmp_path) as at:
        object_id = await expired(at)
        at.server.running.warming._adopted_epoch = 0  # the engine is busy with others' objects
        await reset_and_leave(at, object_id, 600)
        assert (await at.server.cache(object_id, key=at.key))["status"] == "pending"
        (hold,) = await at.holds()
        assert hold.amount_nano == -(await at.rows("creation"))[0].cash_nano
        at.server.running.warming._adopted_epoch = at.server.engine.epoch
        await at.server.running.warming.tick()
        assert (await at.server.settled(object_id, key=at.key))["status"] == "ready"
        await until(lambda: not at.server.running.warming._wanted)
        assert len(await at.rows("creation")) == 2
        assert await at.holds() == []


async def test_what_failed_is_kept_no_longer_though_the_database_was_busy(tmp_path: Path) -> None:
    async with paid(tmp_path) as at:
        made = await at.server.ready_cache(TEXT, key=at.key, model="kimi", ttl=86_400)
        at.server.clock.advance(60.0)
        n_busy = 1

        def busy(_connection: Any, _cursor: Any, text: str, *_more: Any) -> None:
            nonlocal n_busy
            if n_busy and text.startswith("UPDATE storage_meters"):
                n_busy = 0
                raise ApiError(ErrorKind.OVERLOADED, "the database is locked by another process; retry")

        sa.event.listen(at.server.storage._engine, "before_cursor_execute", busy)
        at.server.engine.script = no_room
        at.server.engine.lose()
        await until(lambda: any(line.get("status") == "error" for line in at.server.logged))
        sa.event.remove(at.server.storage._engine, "before_cursor_execute", busy)
        assert n_busy == 0
        at.server.clock.advance(36_000.0)
        await at.server.running.paying.tick()
        assert (await at.server.cache(made["id"], key=at.key))["status"] == "error"
        assert sum(row.n_units for row in await at.rows("storage")) == 60
        assert await at.faults() == []
