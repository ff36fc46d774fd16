"""Rate limits of organisations: who may begin a turn, and how many tokens turns may take.

    enter     a place of the concurrency, one request of the minute; refused before any work
    admit     tokens of the minute and of the day for prompt and longest answer: of both or of neither
    correct   once, when the turn has ended: what was not used goes back to the windows it was taken from

Minutes and days are fixed windows of the `limits` library (docs/limits.md has the reasons), aligned to UTC. A window's
number is part of its counter's name, so a correction cannot reach a later window, and a count is never below zero. Counters
are in memory or in Redis; places are counted in this process alone.
"""

from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from math import ceil

from limits import RateLimitItem, RateLimitItemPerDay, RateLimitItemPerMinute
from limits.aio.strategies import FixedWindowRateLimiter
from limits.errors import StorageError
from msgspec import Struct

from keepwarm.config import RatesConfig
from keepwarm.core.clock import Clock
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.event import Usage
from keepwarm.core.principal import Principal
from keepwarm.core.rate_limit import (
    Allowance,
    LimitState,
    OrgLimits,
    parse_overrides,
    resolved_limits,
    tokens_counted,
)
from keepwarm.gateway.rate_store import RateStore
from keepwarm.telemetry import Log

RETRY_AFTER_S = 1  # for a place: turns end every few hundred milliseconds


class Window(Struct, frozen=True):
    """One minute or day of one limit. `names` end in the organisation, so that no two windows share a counter."""

    item: RateLimitItem
    names: tuple[str, ...]
    ends_at: float

    @property
    def key(self) -> str:
        return self.item.key_for(*self.names)


class Ticket:
    """A turn that was let in. `account` is the caller in Kimi's words."""

    def __init__(self, organisation: str, account: str, limits: OrgLimits) -> None:
        self.organisation = organisation
        self.account = account
        self.limits = limits
        self.n_tokens = 0
        self.taken: tuple[Window, ...] = ()  # windows that have given `n_tokens`, until they are corrected


class RateLimits:
    """Counts and refuses. One per server."""

    def __init__(self, config: RatesConfig, store: RateStore, clock: Clock, log: Log) -> None:
        self._config = config
        self._counters = store.counters
        self._slots = store.slots
        self._clock = clock
        self._log = log
        self._windows = FixedWindowRateLimiter(store.counters)
        self._places: Counter[str] = Counter()

    def limits(self, principal: Principal) -> OrgLimits:
        """Of the caller's organisation; none with --dev. Raises ApiError(INVALID_REQUEST) if its tier is not configured."""
        if not principal.is_billed:
            return OrgLimits()
        own = parse_overrides(principal.limits)
        tiers, default = self._config.tiers, self._config.default_tier
        return resolved_limits(principal.tier, own, tiers=tiers, default_tier=default)

    def counted(self, usage: Usage) -> int:
        """Tokens of `usage` that count towards TPM and TPD, for `correct`."""
        return tokens_counted(usage, cache_reads_count=self._config.cache_reads_count)

    @asynccontextmanager
    async def enter(self, principal: Principal, n_turns: int = 1) -> AsyncIterator[Ticket]:
        """`n_turns` places of the concurrency while the context lasts, and one request of the minute.

        Raises ApiError: RATE_LIMITED, INVALID_REQUEST for more turns than there are places, OVERLOADED without a store.
        """
        limits = self.limits(principal)
        account = f"{principal.organisation}<{principal.key_name}>"
        ticket = Ticket(principal.organisation, account, limits)
        with self._place(ticket, n_turns):
            if limits.rpm is not None:
                minute = self._window("rpm", RateLimitItemPerMinute(limits.rpm), ticket.organisation)
                if await self._take((minute,), 1) is not None:
                    reached = f"max organization RPM: {limits.rpm}"
                    raise _limited(ticket, reached, self._wait_s(minute))
            yield ticket

    async def admit(self, ticket: Ticket, n_tokens: int) -> None:
        """Take `n_tokens` of the organisation's minute and day; once a ticket.

        Raises ApiError and takes nothing: RATE_LIMITED, INVALID_REQUEST for more than a whole window has, OVERLOADED without
        a store.
        """
        assert not ticket.taken and n_tokens >= 0
        windows = self._token_windows(ticket.organisation, ticket.limits)
        for window in windows:
            if n_tokens > window.item.amount:
                message = (
                    f"this request is for {n_tokens} tokens (a prompt with max_tokens, or a cache object), your "
                    f"organization's {window.names[0].upper()} limit is {window.item.amount}: no wait will help, ask for less"
                )
                raise ApiError(ErrorKind.INVALID_REQUEST, message, param="max_tokens")
        full = await self._take(windows, n_tokens)
        if full is not None:
            used = await self._used(full)
            reached = (
                f"organization {full.names[0].upper()} rate limit, current: {used}, this request: {n_tokens}, "
                f"limit: {full.item.amount}"
            )
            raise _limited(ticket, reached, self._wait_s(full))
        ticket.taken, ticket.n_tokens = windows, n_tokens

    async def correct(self, ticket: Ticket, n_used: int) -> None:
        """The turn has used `n_used` tokens: the windows that `admit` took from now count those instead.

        A window that has ended stays as it is. A second call, or one without `admit`, changes nothing; nothing is raised.
        """
        windows, ticket.taken = ticket.taken, ()
        await self._add(windows, n_used - ticket.n_tokens)

    async def state(self, principal: Principal) -> LimitState:
        """What is left of the limits of the caller's organisation. Where the store fails it is not known, so absent."""
        limits, now = self.limits(principal), self._clock.now()
        organisation = principal.organisation if principal.is_billed else None
        windows = self._token_windows(principal.organisation, limits)
        if limits.rpm is not None:
            windows = (self._window("rpm", RateLimitItemPerMinute(limits.rpm), principal.organisation), *windows)
        left: dict[str, Allowance] = {}
        try:
            for window in windows:
                remaining = max(window.item.amount - await self._used(window), 0)
                left[window.names[0]] = Allowance(window.item.amount, remaining, max(window.ends_at - now, 0.0))
        except ApiError:
            return LimitState(now, organisation=organisation)
        return LimitState(now, left.get("rpm"), left.get("tpm"), left.get("tpd"), organisation)

    def check_integrity(self) -> None:
        """Assert that no place is counted that nobody has."""
        assert all(held > 0 for held in self._places.values())

    @contextmanager
    def _place(self, ticket: Ticket, n_turns: int) -> Iterator[None]:
        limit, organisation = ticket.limits.concurrency, ticket.organisation
        if limit is not None and n_turns > limit:
            message = f"{n_turns} choices asked for, but your organization's max concurrency is {limit}"
            raise ApiError(ErrorKind.INVALID_REQUEST, message, param="n")
        if limit is not None and self._places[organisation] + n_turns > limit:
            raise _limited(ticket, f"max concurrency: {limit}", RETRY_AFTER_S)
        self._places[organisation] += n_turns
        try:
            yield
        finally:
            self._places[organisation] -= n_turns
            if not self._places[organisation]:
                del self._places[organisation]  # the table must not grow with every organisation ever seen

    def _token_windows(self, organisation: str, limits: OrgLimits) -> tuple[Window, ...]:
        windows: list[Window] = []
        if limits.tpm is not None:
            windows.append(self._window("tpm", RateLimitItemPerMinute(limits.tpm), organisation))
        if limits.tpd is not None:
            windows.append(self._window("tpd", RateLimitItemPerDay(limits.tpd), organisation))
        return tuple(windows)

    def _window(self, kind: str, item: RateLimitItem, organisation: str) -> Window:
        number, length_s = int(self._clock.now() // item.get_expiry()), item.get_expiry()
        return Window(item, (kind, str(number), organisation), float((number + 1) * length_s))

    def _wait_s(self, window: Window) -> int:
        return max(ceil(window.ends_at - self._clock.now()), 1)

    async def _take(self, windows: Sequence[Window], n: int) -> Window | None:
        """Take `n` of every window, or of none and return one that is full. Raises ApiError(OVERLOADED).

        The library counts what it refuses, too, so it is asked first, and what it refuses nevertheless goes back.
        """
        taken: list[Window] = []
        try:
            for window in windows:
                async with self._slots:
                    if not await self._windows.test(window.item, *window.names, cost=n):
                        return window
            for window in windows:
                async with self._slots:
                    taken.append(window)  # first: what has been sent arrives, also when we are cancelled meanwhile
                    fits = await self._windows.hit(window.item, *window.names, cost=n)
                if not fits:
                    await self._add(taken, -n)
                    return window
        except StorageError as exc:
            await self._add(taken[:-1], -n)
            raise self._fault(exc) from exc
        except BaseException:  # cancelled: only to give back
            await self._add(taken, -n)
            raise
        return None

    async def _add(self, windows: Sequence[Window], n: int) -> None:
        """Change the counts of windows that have not ended by `n`. Best effort: what fails is logged."""
        try:
            for window in windows:
                if not n or self._clock.now() >= window.ends_at:  # nobody will read its counter again
                    continue
                async with self._slots:
                    left = await self._counters.incr(window.key, window.item.get_expiry(), n)
                    if left < 0:  # the store has forgotten what was taken
                        await self._counters.incr(window.key, window.item.get_expiry(), -left)
        except StorageError as exc:
            self._fault(exc)

    async def _used(self, window: Window) -> int:
        """Raises ApiError(OVERLOADED)."""
        try:
            async with self._slots:
                return await self._counters.get(window.key)
        except StorageError as exc:
            raise self._fault(exc) from exc

    def _fault(self, exc: StorageError) -> ApiError:
        """Without a store nothing is let in: letting all in would take away the limits just when it is busiest."""
        self._log.warning("rate limits' store failed", error=type(exc.__cause__ or exc).__name__)
        message = "the store of rate limits cannot be reached; try again shortly"
        return ApiError(ErrorKind.OVERLOADED, message, retry_after_s=RETRY_AFTER_S)


def _limited(ticket: Ticket, reached: str, wait_s: int) -> ApiError:
    """In Kimi's words."""
    message = f"Your account {ticket.account} request reached {reached}, please try again after {wait_s} seconds"
    return ApiError(ErrorKind.RATE_LIMITED, message, retry_after_s=wait_s)
