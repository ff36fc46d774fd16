"""Money around the life of a cache object: its making is held, then charged when it is ready; its keeping runs by time.

    create   a hold of what making it costs
    ready    the making is charged, which ends the hold, and a meter begins; once for a life
    renewed  the meter runs on to the new end
    deleted  the meter ends now, or the hold if it was never ready; at its expiry it ends by itself

A life is from ready to expiry: an object that expired and is made again is paid again, one that is only looked after
(another name, a longer lifetime, computed again after damage) is not. Objects without a key were made with --dev.
"""

from msgspec.structs import replace

from keepwarm.billing.act import Creation, Hold
from keepwarm.billing.ledger import Ledger
from keepwarm.billing.meter import Metered, Meters
from keepwarm.billing.price import Charge, creation_nano
from keepwarm.billing.price_book import PriceBook
from keepwarm.billing.row import Payer
from keepwarm.core.cache_object import NS_PER_S, CacheObject
from keepwarm.core.identity import organisation_of
from keepwarm.core.principal import Principal
from keepwarm.gateway.billing import payer_of
from keepwarm.gateway.runtime import Runtime
from keepwarm.gateway.ticking import tick_forever

TICK_S = 10.0  # how late storage is charged; being late changes no amount


class ObjectBilling:
    """One per server."""

    def __init__(self, ledger: Ledger, meters: Meters, prices: PriceBook, runtime: Runtime) -> None:
        self._ledger = ledger
        self._meters = meters
        self._prices = prices
        self._clock = runtime.clock

    async def recover(self) -> None:
        """At start: what is ready and not metered is metered from now on, and holds nobody closed are given back."""
        for metered in await self._meters.missing():
            found = self._prices.priced(metered.model, self._clock.now())
            await self._meters.open(replace(metered, priced=None if found is None else found[0]))
        await self._ledger.tick()

    async def reserve(self, principal: Principal, obj: CacheObject) -> None:
        """Hold what making the object costs. Raises ApiError(QUOTA_EXCEEDED)."""
        found = self._prices.priced(obj.model, self._clock.now())
        if not principal.is_billed or found is None:
            return
        priced, prices = found
        await self._ledger.hold(
            Hold(
                _making(obj.id, 0),
                payer_of(principal),
                obj.dialect,
                obj.model,
                priced,
                creation_nano(prices, obj.n_tokens),
                is_prepaid=principal.is_prepaid,
            )
        )

    async def ready(self, obj: CacheObject) -> None:
        """The object is ready, maybe once more. Again after a crash it is the same life."""
        payer = payer_for(obj)
        if payer is None:
            return
        n_over, is_living = await self._meters.lives(obj.id)
        if is_living:
            await self._meters.extend(obj.id, ends_at(obj))
            return
        now = self._clock.now()
        priced, prices = self._prices.priced(obj.model, now) or (None, None)
        charge = None if prices is None else Charge(creation=creation_nano(prices, obj.n_tokens))
        making = _making(obj.id, n_over)
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

    async def renewed(self, obj: CacheObject) -> None:
        """The object lives to another end."""
        if payer_for(obj) is not None:
            await self._meters.extend(obj.id, ends_at(obj))

    async def deleted(self, object_id: str) -> None:
        """It could not be made, or is gone before its time: what it was kept for is charged. Unknown is no error."""
        await self._meters.close(object_id, self._clock.now())
        await self._ledger.release(_making(object_id, 0))

    async def tick(self) -> None:
        """Charge what has been kept since the last time; give back holds that nobody closed, lapse vouchers."""
        await self._meters.close_deleted()
        await self._meters.tick()
        await self._ledger.tick()

    async def tick_forever(self) -> None:
        """The one periodic task."""
        await tick_forever(self.tick, TICK_S)


def payer_for(obj: CacheObject) -> Payer | None:
    """Who pays for an object: the organisation is the tenant, or what stands ahead of its project."""
    if obj.key_id is None or obj.project is None:
        return None
    return Payer(organisation_of(obj.tenant), obj.project, obj.key_id)


def ends_at(obj: CacheObject) -> float:
    """Unix seconds, with the part of a second that Gemini's lifetimes have."""
    return obj.expires_at - obj.early_ns / NS_PER_S


def _making(object_id: str, n_lives: int) -> str:
    """Names the making that begins an object's life after `n_lives` others."""
    return f"{object_id}/{n_lives}"
