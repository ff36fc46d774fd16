"""Rate limits against a naive twin: a list of everything that was ever taken, added up anew for every question.

Few organisations, small limits and short waits, so that windows fill, end and are corrected after their end. The same
operations run on the counters in memory, whose library lives by the machine's clock, and on a Redis.
"""

import asyncio
from collections.abc import Awaitable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest.mock import patch

import hypothesis.strategies as st
import msgspec
import pytest
import redis
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from keepwarm.config import RatesConfig
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.principal import Principal, Role
from keepwarm.core.rate_limit import Allowance, LimitState, OrgLimits
from keepwarm.gateway.rate_limits import RateLimits, Ticket
from keepwarm.gateway.rate_store import open_rate_store
from tests.world import FakeClock, capturing_log

T = TypeVar("T")

ALL = OrgLimits(concurrency=3, rpm=4, tpm=20, tpd=45)
LIMITS = {"all": ALL, "same": ALL, "tokens": OrgLimits(tpm=10), "day": OrgLimits(rpm=3, tpd=30)}
LENGTHS_S = {"rpm": 60, "tpm": 60, "tpd": 86_400}
organisations = st.sampled_from([*LIMITS, "all"])


def principal(organisation: str) -> Principal:
    own = msgspec.json.encode(LIMITS[organisation])
    return Principal(organisation, organisation, "default", 1, "k", Role.MEMBER, limits=own)


@dataclass
class Taken:
    organisation: str
    kind: str
    at: float
    n: int


class Twin:
    def __init__(self) -> None:
        self.taken: list[Taken] = []

    def same_window(self, one: Taken, now: float) -> bool:
        return one.at // LENGTHS_S[one.kind] == now // LENGTHS_S[one.kind]

    def used(self, organisation: str, kind: str, now: float) -> int:
        return sum(
            one.n
            for one in self.taken
            if (one.organisation, one.kind) == (organisation, kind) and self.same_window(one, now)
        )

    def fits(self, organisation: str, kind: str, n: int, now: float) -> bool:
        limit = getattr(LIMITS[organisation], kind)
        return limit is None or self.used(organisation, kind, now) + n <= limit

    def take(self, organisation: str, kind: str, n: int, now: float) -> Taken:
        one = Taken(organisation, kind, now, n)
        self.taken.append(one)
        return one

    def wait_s(self, kind: str, now: float) -> int:
        return ceil(self.reset_s(kind, now))

    def reset_s(self, kind: str, now: float) -> float:
        return (now // LENGTHS_S[kind] + 1) * LENGTHS_S[kind] - now


@dataclass
class Turn:
    organisation: str
    n_places: int
    stack: AsyncExitStack
    ticket: Ticket
    is_admitted: bool = False
    is_inside: bool = True
    taken: tuple[Taken, ...] = ()  # until it is corrected


async def refusal(call: Awaitable[T]) -> T | ApiError:
    """What the call gives, or what it is refused with."""
    try:
        return await call
    except ApiError as error:
        return error


class Limiting(RuleBasedStateMachine):
    turns = Bundle("turns")
    redis_url: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.clock = FakeClock()
        self.clock.now_s = 20_000 * 86_400 - 150.0  # two and a half minutes to midnight
        self.library = patch("limits.aio.storage.memory.time", SimpleNamespace(time=self.clock.now))
        self.library.start()
        self.store = open_rate_store(self.redis_url)
        self.run(self.store.counters.reset())
        self.rates = RateLimits(RatesConfig(), self.store, self.clock, capturing_log()[0])
        self.twin = Twin()
        self.inside: list[Turn] = []

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(coroutine)

    def teardown(self) -> None:
        for turn in list(self.inside):
            self.leave(turn)
        assert not self.rates._places
        self.run(self.store.close())
        self.runner.close()
        self.library.stop()

    @rule(seconds=st.sampled_from([0.5, 10.0, 29.5, 30.0, 59.0, 60.0, 100.0, 43_200.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(target=turns, organisation=organisations, n=st.integers(1, 4))
    def enter(self, organisation: str, n: int) -> Turn | None:
        now, limits = self.clock.now(), LIMITS[organisation]
        places = sum(turn.n_places for turn in self.inside if turn.organisation == organisation)
        has_place = limits.concurrency is None or places + n <= limits.concurrency
        may = self.twin.fits(organisation, "rpm", 1, now)
        stack = AsyncExitStack()
        ticket = self.run(refusal(stack.enter_async_context(self.rates.enter(principal(organisation), n))))
        if limits.concurrency is not None and n > limits.concurrency:
            assert isinstance(ticket, ApiError) and ticket.kind is ErrorKind.INVALID_REQUEST
        elif not has_place:
            assert isinstance(ticket, ApiError) and "max concurrency" in ticket.message
        elif not may:
            assert isinstance(ticket, ApiError) and ticket.retry_after_s == self.twin.wait_s("rpm", now)
        if isinstance(ticket, ApiError):
            assert not (has_place and may)
            return None
        self.twin.take(organisation, "rpm", 1, now)
        turn = Turn(organisation, n, stack, ticket)
        self.inside.append(turn)
        return turn

    @rule(turn=turns, n=st.integers(0, 22))
    def admit(self, turn: Turn | None, n: int) -> None:
        if turn is None or turn.is_admitted or not turn.is_inside:
            return
        now, limits = self.clock.now(), LIMITS[turn.organisation]
        never = any(limit is not None and n > limit for limit in (limits.tpm, limits.tpd))
        full = [kind for kind in ("tpm", "tpd") if not self.twin.fits(turn.organisation, kind, n, now)]
        error = self.run(refusal(self.rates.admit(turn.ticket, n)))
        if never:
            assert error is not None and error.kind is ErrorKind.INVALID_REQUEST
            return
        if full:
            assert error is not None and error.retry_after_s == self.twin.wait_s(full[0], now)
            assert f"current: {self.twin.used(turn.organisation, full[0], now)}, this request: {n}" in error.message
            return
        assert error is None
        turn.is_admitted = True
        turn.taken = tuple(self.twin.take(turn.organisation, kind, n, now) for kind in ("tpm", "tpd"))

    @rule(turn=turns, n_used=st.integers(0, 25))
    def correct(self, turn: Turn | None, n_used: int) -> None:
        if turn is None:
            return
        self.run(self.rates.correct(turn.ticket, n_used))
        for one in turn.taken:
            if self.twin.same_window(one, self.clock.now()):
                one.n = n_used
        turn.taken = ()

    @rule(turn=turns)
    def leave(self, turn: Turn | None) -> None:
        if turn is not None and turn.is_inside:
            self.run(turn.stack.aclose())
            turn.is_inside = False
            self.inside.remove(turn)

    @invariant()
    def what_is_left_is_what_the_twin_has_left(self) -> None:
        now = self.clock.now()
        for organisation, limits in LIMITS.items():
            left = {
                kind: Allowance(
                    limit,
                    max(limit - self.twin.used(organisation, kind, now), 0),
                    self.twin.reset_s(kind, now),
                )
                for kind in LENGTHS_S
                if (limit := getattr(limits, kind)) is not None
            }
            told = self.run(self.rates.state(principal(organisation)))
            assert told == LimitState(now, left.get("rpm"), left.get("tpm"), left.get("tpd"), organisation)

    @invariant()
    def places_are_those_of_the_turns_inside(self) -> None:
        self.rates.check_integrity()
        assert self.rates._places.total() == sum(turn.n_places for turn in self.inside)


TestInMemory = Limiting.TestCase
TestInMemory.settings = settings(max_examples=100, stateful_step_count=40)


def test_in_redis(redis_url: str) -> None:
    """Its keys live a minute of real time, longer than any example here."""

    class InRedis(Limiting):
        pass

    InRedis.redis_url = redis_url
    run_state_machine_as_test(InRedis, settings=settings(max_examples=15, stateful_step_count=30))


async def test_processes_on_one_redis_never_admit_more_than_the_limit(redis_url: str) -> None:
    """Two gateways, 200 turns at once that want 7 of 500 tokens each: 71 fit, and what they give back is there again."""
    clock = FakeClock()
    stores = [await asyncio.to_thread(open_rate_store, redis_url) for _ in range(2)]
    processes = [RateLimits(RatesConfig(), store, clock, capturing_log()[0]) for store in stores]
    await stores[0].counters.reset()
    own = msgspec.json.encode(OrgLimits(tpm=500, tpd=10_000))
    acme = Principal("acme", "acme", "default", 1, "k", Role.MEMBER, limits=own)
    admitted: list[tuple[RateLimits, Ticket]] = []
    kinds: set[ErrorKind] = set()

    async def turn(rates: RateLimits) -> None:
        async with rates.enter(acme) as ticket:
            refused = await refusal(rates.admit(ticket, 7))
            if refused is None:
                admitted.append((rates, ticket))
            else:
                kinds.add(refused.kind)

    async with asyncio.TaskGroup() as tasks:
        for number in range(200):
            tasks.create_task(turn(processes[number % 2]))
    state = await processes[0].state(acme)
    assert 0 < len(admitted) <= 500 // 7
    assert kinds == {ErrorKind.RATE_LIMITED}
    assert state.minute_tokens is not None and state.day_tokens is not None
    assert state.minute_tokens.remaining == 500 - 7 * len(admitted)  # refusals have given back whatever they had taken
    assert state.day_tokens.remaining == 10_000 - 7 * len(admitted)
    for rates, ticket in admitted:
        await rates.correct(ticket, 2)
    state = await processes[1].state(acme)
    assert state.minute_tokens is not None and state.minute_tokens.remaining == 500 - 2 * len(admitted)
    for store in stores:
        await store.close()


async def test_a_redis_that_has_started_again_is_used_again(redis_url: str) -> None:
    """Its counts are gone, and a turn that has taken of the old ones gives back none of the new ones."""
    own = msgspec.json.encode(OrgLimits(tpm=500))
    acme = Principal("acme", "acme", "default", 1, "k", Role.MEMBER, limits=own)
    store = await asyncio.to_thread(open_rate_store, redis_url)
    rates = RateLimits(RatesConfig(), store, FakeClock(), capturing_log()[0])
    async with rates.enter(acme) as ticket:
        await rates.admit(ticket, 400)
        with redis.Redis.from_url(redis_url) as client:  # what a start leaves of the old one: nothing
            client.flushall()
            assert client.client_kill_filter(_type="normal", skipme=True) == 1
        async with rates.enter(acme) as next_ticket:
            while (refused := await refusal(rates.admit(next_ticket, 300))) is not None:
                assert refused.kind is ErrorKind.OVERLOADED  # until the loop has seen that the connection is gone
        await rates.correct(ticket, 0)
    state = await rates.state(acme)
    assert state.minute_tokens is not None and state.minute_tokens.remaining == 500
    await store.close()


async def test_a_redis_that_is_not_there_refuses_limited_turns_only(tmp_path: Path) -> None:
    log, lines = capturing_log()
    store = await asyncio.to_thread(open_rate_store, f"unix://{tmp_path}/nobody")
    rates = RateLimits(RatesConfig(), store, FakeClock(), log)
    unlimited = Principal("acme", "acme", "default", 1, "k", Role.MEMBER)
    async with rates.enter(unlimited) as ticket:
        await rates.admit(ticket, 10**9)
    with pytest.raises(ApiError, match="store of rate limits") as caught:
        await rates.enter(msgspec.structs.replace(unlimited, limits=b'{"rpm":1}')).__aenter__()
    assert caught.value.kind is ErrorKind.OVERLOADED
    assert [line["error"] for line in lines] == ["ConnectionError"]
    await store.close()
