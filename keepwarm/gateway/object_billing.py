"""Limits and money around the life of a cache object: its making is limited and held, then charged when it is ready.

    enter      a place of the organisation's concurrency, one request of its minute; `admit`: the object's tokens
    held       a hold of what making it costs
    evaluated  the tokens that the making took are corrected, once it has ended
    ready      the making is charged, which ends the hold, and a meter begins; once for a life
    moved      the meter runs on to the new end, in the object's own transaction; `failed`: it ends now, likewise
    deleted    the meter ends now, or the hold if it was never ready; at its expiry it ends by itself

A life is from ready to expiry: an object that expired and is made again is paid again, one that is only looked after
(another name, a longer lifetime, computed again after damage) is not. Who pays stays the same for all of its lives, since
that is also who pays for its keeping. Objects without a key were made with --dev.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from msgspec.structs import replace

from keepwarm.billing.act import Creation, Hold
from keepwarm.billing.ledger import Ledger
from keepwarm.billing.meter import Metered, Meters, WithObject
from keepwarm.billing.price import Charge, creation_nano
from keepwarm.billing.price_book import PriceBook
from keepwarm.billing.row import Payer
from keepwarm.core.cache_object import NS_PER_S, CacheObject
from keepwarm.core.event import Usage
from keepwarm.core.identity import organisation_of
from keepwarm.core.principal import Principal
from keepwarm.gateway.rate_limits import RateLimits, Ticket
from keepwarm.gateway.runtime import Runtime
from keepwarm.gateway.ticking import tick_forever

TICK_S = 10.0  # how late storage is charged; being late changes no amount
MAKINGS_MAX = 100_000  # objects whose tokens are still to be corrected, as many as may wait for the engine


class Making:
    """A call that has an object made, from when it is let in; `has_begun` once the object is on its way."""

    def __init__(self, principal: Principal, ticket: Ticket | None) -> None:
        self.principal = principal
        self.ticket = ticket  # None: not limited
        self.has_begun = False


class ObjectBilling:
    """One per server."""

    def __init__(self, ledger: Ledger, meters: Meters, prices: PriceBook, rates: RateLimits, runtime: Runtime) -> None:
        self._ledger = ledger
        self._meters = meters
        self._prices = prices
        self._rates = rates
        self._clock = runtime.clock
        self._log = runtime.log
        self._tickets: dict[str, Ticket] = {}  # by object id, until its making has ended

    async def recover(self) -> None:
        """At start: what is ready and not metered is metered from now on, and holds nobody closed are given back."""
        for metered in await self._meters.missing():
            found = self._prices.priced(metered.model, self._clock.now())
            await self._meters.open(replace(metered, priced=None if found is None else found[0]))
        await self._ledger.tick()

    @asynccontextmanager
    async def enter(self, principal: Principal, n_places: int = 1) -> AsyncIterator[Making]:
        """Let a call in that has an object made; `n_places` is 0 within a turn, which has its place.

        Tokens it has taken by then go back when it is left and nothing has begun. Raises ApiError(RATE_LIMITED).
        """
        if not principal.is_billed:
            yield Making(principal, None)
            return
        async with self._rates.enter(principal, n_places) as ticket:
            making = Making(principal, ticket)
            try:
                yield making
            finally:
                if not making.has_begun:
                    await self._rates.correct(ticket, 0)

    async def admit(self, making: Making, n_tokens: int) -> None:
        """Take the object's tokens of the organisation's minute and day. Raises ApiError(RATE_LIMITED)."""
        if making.ticket is not None:
            await self._rates.admit(making.ticket, n_tokens)

    @asynccontextmanager
    async def held(self, making: Making, obj: CacheObject) -> AsyncIterator[None]:
        """Hold what making the object costs; when what is done in this context fails, it goes back.

        Else the object is about to be made, and `evaluated` and `ready` or `deleted` are to follow. Raises
        ApiError(QUOTA_EXCEEDED).
        """
        try:
            await self._reserve(making.principal, obj)
            yield
            making.has_begun = True
        finally:
            if not making.has_begun:
                await self._release(obj.id)
            else:
                await self._take_over(making, obj.id)

    async def evaluated(self, object_id: str, usage: Usage | None) -> None:
        """The making has ended, and has used this; None: nothing. Nothing happens where none has begun."""
        ticket = self._tickets.pop(object_id, None)
        if ticket is not None:
            await self._rates.correct(ticket, 0 if usage is None else self._rates.counted(usage))

    async def ready(self, obj: CacheObject) -> None:
        """The object is ready, maybe once more. Again after a crash it is the same life."""
        payer = payer_for(obj)
        if payer is None:
            return
        now = self._clock.now()
        making = await self._meters.making(obj.id)
        if making is None:
            await self._meters.extend(obj.id, now)
            return
        priced, prices = self._prices.priced(obj.model, now) or (None, None)
        charge = None if prices is None else Charge(creation=creation_nano(prices, obj.n_tokens))
        await self._ledger.charge_creation(
            Creation(making, payer, obj.id, obj.dialect, obj.model, priced, obj.n_tokens, charge)
        )
        metered = Metered(
            object_id=obj.id,
            organisation=payer.organisation,
            project=payer.project,
            key_id=payer.key_id,
            dialect=obj.dialect,
            model=obj.model,
            priced=priced,
            n_tokens=obj.n_tokens,
            began_at=now,
            ends_at=ends_at(obj),
        )
        await self._meters.open(metered)

    def moved(self, seen_at: float) -> WithObject:
        """For the transaction that gives an object, which lived at `seen_at`, another end."""
        return self._meters.moved(seen_at)

    @property
    def failed(self) -> WithObject:
        """For the transaction in which an object fails; it may have been ready before, and is kept no longer."""
        return self._meters.failed

    async def deleted(self, object_id: str) -> None:
        """It could not be made, or is gone before its time: what it was kept for is charged. Unknown is no error."""
        await self._meters.close(object_id, self._clock.now())
        await self._release(object_id)

    async def given_up(self, object_id: str) -> None:
        """It will not be computed, since it is gone or over: what its making has taken goes back."""
        await self.evaluated(object_id, None)
        await self._release(object_id)

    async def tick(self) -> None:
        """Charge what has been kept since the last time; give back holds that nobody closed, lapse vouchers."""
        await self._meters.close_deleted()
        await self._meters.tick()
        await self._ledger.tick()

    async def tick_forever(self) -> None:
        """The one periodic task."""
        await tick_forever(self.tick, TICK_S)

    async def _take_over(self, making: Making, object_id: str) -> None:
        """Keep the making's ticket until it is told what was used; one that another making has left there takes nothing."""
        if making.ticket is None or (len(self._tickets) >= MAKINGS_MAX and object_id not in self._tickets):
            return
        left = self._tickets.get(object_id)
        self._tickets[object_id] = making.ticket
        if left is not None:
            await self._rates.correct(left, 0)

    async def _reserve(self, principal: Principal, obj: CacheObject) -> None:
        found, payer = self._prices.priced(obj.model, self._clock.now()), payer_for(obj)
        if found is None or payer is None:
            return
        making = await self._meters.making(obj.id)
        if making is None:
            return  # it lives, so that nothing will be charged
        priced, prices = found
        amount = creation_nano(prices, obj.n_tokens)
        excesses = await self._ledger.hold(
            Hold(making, payer, obj.dialect, obj.model, priced, amount, is_prepaid=principal.is_prepaid)
        )
        for excess in excesses:
            self._log.warning("soft budget passed", object_id=obj.id, budget=excess.message)

    async def _release(self, object_id: str) -> None:
        making = await self._meters.making(object_id)
        if making is not None:
            await self._ledger.release(making)


def payer_for(obj: CacheObject) -> Payer | None:
    """Who pays for an object: the organisation is the tenant, or what stands ahead of its project."""
    if obj.key_id is None or obj.project is None:
        return None
    return Payer(organisation_of(obj.tenant), obj.project, obj.key_id)


def ends_at(obj: CacheObject) -> float:
    """Unix seconds, with the part of a second that Gemini's lifetimes have."""
    return obj.expires_at - obj.early_ns / NS_PER_S
