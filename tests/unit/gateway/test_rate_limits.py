"""A turn is let in within its organisation's limits, and what it did not use comes back."""

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from types import SimpleNamespace

import msgspec
import pytest
from limits.errors import StorageError
from msgspec.structs import replace

from keepwarm.config import ConfigError, RatesConfig, load
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.event import Usage
from keepwarm.core.principal import Principal, Role
from keepwarm.core.rate_limit import KIMI_TIERS, Allowance, LimitState, OrgLimits
from keepwarm.gateway.rate_limits import RateLimits
from keepwarm.gateway.rate_store import REDIS_CONNECTIONS_MAX, open_rate_store
from keepwarm.telemetry import Log
from tests.world import FakeClock, capturing_log

ACME = Principal("acme", "acme", "default", 1, "ci", Role.MEMBER)
MINUTE_S, DAY_S = 60, 86_400


def limiting(config: RatesConfig, clock: FakeClock, log: Log | None = None) -> RateLimits:
    return RateLimits(config, open_rate_store(None), clock, log or capturing_log()[0])


def limited(principal: Principal = ACME, **own: int | None) -> Principal:
    return replace(principal, limits=msgspec.json.encode(own))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeClock]:
    """Noon, UTC, and the library's counters live by it, too."""
    clock = FakeClock()
    clock.now_s = 20_000.5 * DAY_S
    monkeypatch.setattr("limits.aio.storage.memory.time", SimpleNamespace(time=clock.now))
    return clock


@pytest.fixture
def rates(clock: FakeClock) -> Iterator[RateLimits]:
    rates = limiting(RatesConfig(), clock)
    yield rates
    rates.check_integrity()


async def begin(rates: RateLimits, principal: Principal, n_tokens: int | None = None) -> None:
    """A turn that uses all it was admitted for."""
    async with rates.enter(principal) as ticket:
        if n_tokens is not None:
            await rates.admit(ticket, n_tokens)


async def refused(rates: RateLimits, principal: Principal, n_tokens: int | None = None) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await begin(rates, principal, n_tokens)
    return caught.value


async def left(rates: RateLimits, principal: Principal) -> tuple[int | None, int | None, int | None]:
    """Remaining requests of the minute, tokens of the minute, tokens of the day."""
    state = await rates.state(principal)
    allowances = (state.requests, state.minute_tokens, state.day_tokens)
    requests, minute, day = (None if allowance is None else allowance.remaining for allowance in allowances)
    return requests, minute, day


async def test_without_limits_nothing_is_refused_and_nothing_told(rates: RateLimits, clock: FakeClock) -> None:
    async with AsyncExitStack() as inside:
        for _ in range(2000):
            ticket = await inside.enter_async_context(rates.enter(ACME))
            await rates.admit(ticket, 10**9)
    assert await rates.state(ACME) == LimitState(clock.now(), organisation="acme")


async def test_with_dev_keys_nothing_is_limited_even_with_a_default_tier(clock: FakeClock) -> None:
    rates = limiting(RatesConfig(default_tier="free"), clock)
    assert rates.limits(ACME) == KIMI_TIERS["free"]
    assert rates.limits(replace(ACME, key_id=None)) == OrgLimits()


async def test_the_turn_over_the_concurrency_is_refused_and_takes_no_request(rates: RateLimits) -> None:
    acme = limited(concurrency=1, rpm=2)
    async with rates.enter(acme):
        error = await refused(rates, acme)
    assert (error.kind, error.retry_after_s) == (ErrorKind.RATE_LIMITED, 1)
    assert error.message == (
        "Your account acme<ci> request reached max concurrency: 1, please try again after 1 seconds"
    )
    assert await left(rates, acme) == (1, None, None)
    await begin(rates, acme)


async def test_each_choice_takes_a_place_and_all_together_one_request(rates: RateLimits) -> None:
    acme = limited(concurrency=4, rpm=9)
    async with rates.enter(acme, 3):
        assert (await refused_entering(rates, acme, 2)).kind is ErrorKind.RATE_LIMITED
        async with rates.enter(acme, 1):
            assert await left(rates, acme) == (7, None, None)


async def refused_entering(rates: RateLimits, principal: Principal, n_turns: int) -> ApiError:
    with pytest.raises(ApiError) as caught:
        async with rates.enter(principal, n_turns):
            pytest.fail("entered")
    return caught.value


async def test_more_choices_than_places_can_never_run(rates: RateLimits) -> None:
    error = await refused_entering(rates, limited(concurrency=2), 3)
    assert (error.kind, error.param) == (ErrorKind.INVALID_REQUEST, "n")
    assert "3 choices" in error.message and "concurrency is 2" in error.message


async def test_a_place_comes_back_when_the_turn_fails_or_its_request_is_refused(rates: RateLimits) -> None:
    acme = limited(concurrency=1, rpm=1)
    with pytest.raises(ZeroDivisionError):
        async with rates.enter(acme):
            raise ZeroDivisionError
    assert "max organization RPM" in (await refused(rates, acme)).message
    assert "max organization RPM" in (await refused(rates, acme)).message  # not "max concurrency"


async def test_the_request_over_the_minute_is_told_when_the_next_one_begins(
    rates: RateLimits, clock: FakeClock
) -> None:
    acme = limited(rpm=2)
    clock.advance(17.5)
    for _ in range(2):
        await begin(rates, acme)
    error = await refused(rates, acme)
    assert error.kind is ErrorKind.RATE_LIMITED
    assert error.message == (
        "Your account acme<ci> request reached max organization RPM: 2, please try again after 43 seconds"
    )
    clock.advance(42.4)
    assert (await refused(rates, acme)).retry_after_s == 1
    clock.advance(0.1)
    await begin(rates, acme)


async def test_tokens_of_the_minute(rates: RateLimits, clock: FakeClock) -> None:
    acme = limited(tpm=100)
    await begin(rates, acme, 60)
    error = await refused(rates, acme, 41)
    assert (error.kind, error.retry_after_s) == (ErrorKind.RATE_LIMITED, 60)
    assert error.message == (
        "Your account acme<ci> request reached organization TPM rate limit, current: 60, this request: 41, limit: 100, "
        "please try again after 60 seconds"
    )
    await begin(rates, acme, 40)
    clock.advance(MINUTE_S)
    await begin(rates, acme, 100)


async def test_tokens_of_the_day_come_back_at_midnight(rates: RateLimits, clock: FakeClock) -> None:
    acme = limited(tpd=100)
    await begin(rates, acme, 60)
    error = await refused(rates, acme, 41)
    assert error.retry_after_s == DAY_S // 2
    assert "organization TPD rate limit, current: 60, this request: 41, limit: 100" in error.message
    clock.advance(DAY_S / 2 - 1)
    assert (await refused(rates, acme, 41)).retry_after_s == 1
    clock.advance(1)
    await begin(rates, acme, 100)


async def test_a_refusal_takes_from_neither_window(rates: RateLimits) -> None:
    acme = limited(tpm=100, tpd=50)
    await refused(rates, acme, 51)
    await begin(rates, acme, 30)
    for _ in range(3):
        await refused(rates, acme, 21)  # the day refuses after the minute would not
    assert await left(rates, acme) == (None, 70, 20)


@pytest.mark.parametrize(
    "own,word", [({"tpm": 100, "tpd": 500}, "TPM limit is 100"), ({"tpd": 100}, "TPD limit is 100")]
)
async def test_a_request_larger_than_the_whole_limit_is_told_that_no_wait_helps(
    rates: RateLimits, own: dict[str, int], word: str
) -> None:
    error = await refused(rates, limited(**own), 101)
    assert (error.kind, error.param, error.retry_after_s) == (ErrorKind.INVALID_REQUEST, "max_tokens", None)
    assert "101 tokens" in error.message and word in error.message
    await begin(rates, limited(**own), 100)


async def test_what_was_not_used_goes_back_once(rates: RateLimits) -> None:
    acme = limited(tpm=100, tpd=1000)
    async with rates.enter(acme) as ticket:
        await rates.admit(ticket, 80)
        await rates.correct(ticket, 30)
        assert await left(rates, acme) == (None, 70, 970)
        await rates.correct(ticket, 0)
        assert await left(rates, acme) == (None, 70, 970)


async def test_a_turn_that_never_ran_gives_all_back(rates: RateLimits) -> None:
    acme = limited(tpm=100, tpd=1000)
    async with rates.enter(acme) as ticket:
        await rates.correct(ticket, 0)  # nothing was taken yet
        await rates.admit(ticket, 80)
        await rates.correct(ticket, 0)
    assert await left(rates, acme) == (None, 100, 1000)


async def test_more_used_than_admitted_counts_too(rates: RateLimits) -> None:
    acme = limited(tpm=100)
    async with rates.enter(acme) as ticket:
        await rates.admit(ticket, 80)
        await rates.correct(ticket, 130)
    assert await left(rates, acme) == (None, 0, None)


async def test_a_correction_does_not_reach_the_next_minute(rates: RateLimits, clock: FakeClock) -> None:
    acme = limited(tpm=100, tpd=1000)
    clock.advance(MINUTE_S / 2)
    async with rates.enter(acme) as ticket:
        await rates.admit(ticket, 80)
        minute = ticket.taken[0]
        clock.advance(MINUTE_S / 2)
        await begin(rates, acme, 50)
        await rates.correct(ticket, 10)
    assert await left(rates, acme) == (None, 50, 1000 - 50 - 10)
    assert await rates._counters.get(minute.key) == 80  # the store is not asked to change what nobody will read


async def test_a_count_the_store_has_forgotten_does_not_become_a_credit(rates: RateLimits) -> None:
    acme = limited(tpm=100)
    async with rates.enter(acme) as ticket:
        await rates.admit(ticket, 80)
        await rates._counters.reset()
        await begin(rates, acme, 10)
        await rates.correct(ticket, 0)
    assert await left(rates, acme) == (None, 100, None)


async def test_organisations_do_not_share_and_their_keys_and_projects_do(rates: RateLimits) -> None:
    acme = limited(rpm=1, tpm=10)
    await begin(rates, acme, 10)
    other_key = replace(acme, key_id=2, key_name="nightly", project="other", tenant="acme/other")
    assert "acme<nightly>" in (await refused(rates, other_key)).message
    await begin(rates, replace(acme, organisation="acme/other"), 10)


async def test_what_is_left_with_the_time_it_comes_back(rates: RateLimits, clock: FakeClock) -> None:
    acme = limited(rpm=3, tpm=100, tpd=1000)
    clock.advance(15)
    await begin(rates, acme, 40)
    assert await rates.state(acme) == LimitState(
        clock.now(),
        Allowance(3, 2, 45.0),
        Allowance(100, 60, 45.0),
        Allowance(1000, 960, DAY_S / 2 - 15),
        "acme",
    )


async def test_cache_reads_count_as_configured(clock: FakeClock) -> None:
    usage = Usage(fresh=1, cache_read=20, cache_write=300, output=4000)
    for cache_reads_count, n_tokens in ((True, 4321), (False, 4301)):
        config = RatesConfig(cache_reads_count=cache_reads_count)
        assert limiting(config, clock).counted(usage) == n_tokens


async def test_a_store_that_fails_refuses_turns_and_ends_none(clock: FakeClock) -> None:
    log, lines = capturing_log()
    rates = limiting(RatesConfig(), clock, log)
    acme = limited(rpm=5, tpm=100)

    async def broken(*_arguments: object, **_named: object) -> int:
        raise StorageError(ConnectionError("the address is nobody's business"))

    async with rates.enter(acme) as ticket:
        await rates.admit(ticket, 10)
        rates._counters.get = broken  # type: ignore[method-assign, assignment]
        rates._counters.incr = broken  # type: ignore[method-assign, assignment]
        error = await refused(rates, acme)
        assert (error.kind, error.retry_after_s) == (ErrorKind.OVERLOADED, 1)
        assert await rates.state(acme) == LimitState(clock.now(), organisation="acme")
        await rates.correct(ticket, 0)
    assert lines and all(line["event"] == "rate limits' store failed" for line in lines)
    assert "address" not in str(lines)
    rates.check_integrity()
    assert not rates._places


async def test_a_request_that_does_not_fit_touches_no_counter(rates: RateLimits) -> None:
    """Else one client's refused requests would, for a moment, keep out another one's that fit."""
    acme = limited(rpm=2, tpm=100, tpd=50)
    await begin(rates, acme, 50)
    counters, changed = rates._counters, []
    incr = counters.incr

    async def told(key: str, expiry: int, amount: int = 1) -> int:
        changed.append(key.split("/")[1])
        return await incr(key, expiry, amount)

    counters.incr = told  # type: ignore[method-assign]
    await refused(rates, acme, 1)  # by the day
    await refused(rates, acme)  # by the minute's requests
    assert changed == ["rpm"]


async def test_a_store_that_fails_half_way_gets_back_what_it_gave(rates: RateLimits) -> None:
    acme = limited(tpm=100, tpd=1000)
    counters = rates._counters
    incr = counters.incr

    async def failing(key: str, expiry: int, amount: int = 1) -> int:
        if "/tpd/" in key:
            raise StorageError(ConnectionError())
        return await incr(key, expiry, amount)

    counters.incr = failing  # type: ignore[method-assign]
    assert (await refused(rates, acme, 40)).kind is ErrorKind.OVERLOADED
    assert await left(rates, acme) == (None, 100, 1000)


@pytest.mark.parametrize("at", ["tpm", "tpd"])
async def test_a_turn_cancelled_while_it_is_admitted_gives_back_what_it_took(rates: RateLimits, at: str) -> None:
    """Also what the store has counted and not answered yet."""
    acme = limited(tpm=100, tpd=1000)
    counters, counted = rates._counters, asyncio.Event()
    incr = counters.incr

    async def slow(key: str, expiry: int, amount: int = 1) -> int:
        found = await incr(key, expiry, amount)
        if f"/{at}/" in key and amount > 0:
            counted.set()
            await asyncio.Event().wait()
        return found

    counters.incr = slow  # type: ignore[method-assign]
    async with asyncio.TaskGroup() as tasks:
        turn = tasks.create_task(begin(rates, acme, 40))
        await counted.wait()
        assert await left(rates, acme) == (None, 60, 1000 if at == "tpm" else 960)
        turn.cancel()
    assert turn.cancelled()
    assert await left(rates, acme) == (None, 100, 1000)


async def test_a_turn_cancelled_while_it_waits_for_the_store_gives_nothing_back(rates: RateLimits) -> None:
    """It has taken nothing; else who leaves early would lower the count of the others."""
    acme = limited(tpm=100, tpd=1000)
    slots = rates._slots
    async with asyncio.TaskGroup() as tasks:
        await begin(rates, acme, 40)
        while not slots.locked():
            await slots.acquire()
        turn = tasks.create_task(begin(rates, acme, 40))
        await asyncio.sleep(0)
        turn.cancel()
        await asyncio.wait([turn])
        for _ in range(REDIS_CONNECTIONS_MAX):
            slots.release()
    assert await left(rates, acme) == (None, 60, 960)


@pytest.mark.parametrize(
    "rates,problem",
    [
        ({"default_tier": "silver"}, r"\$.rates.default_tier: 'silver' is not one of free, .*, gold"),
        ({"redis_url": "http://localhost"}, r"\$.rates.redis_url must begin with one of redis://, "),
        ({"tiers": {"gold": {"rpm": 0}}}, r"`int` >= 1 - at `\$.rates.tiers\[...\].rpm"),
        ({"tiers": {"gold": {"rps": 1}}}, "unknown field `rps`"),
    ],
)
def test_rates_that_cannot_be_meant_end_the_start(rates: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load(None, {"rates": {"tiers": {"gold": {"rpm": 1}}, **rates}})


def test_tiers_of_the_configuration_are_read() -> None:
    config = load(None, {"rates": {"default_tier": "gold", "tiers": {"gold": {"rpm": 7}}}})
    assert config.rates.tiers == {"gold": OrgLimits(rpm=7)}


def test_a_redis_url_that_is_none_ends_the_start_without_its_password() -> None:
    with pytest.raises(ConfigError, match=r"rates\.redis_url cannot be used") as caught:
        open_rate_store("redis://:geheim@localhost:6379/?db=x")
    assert "geheim" not in str(caught.value)
