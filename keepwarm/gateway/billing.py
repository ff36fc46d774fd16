"""Limits and money around one turn: what it may take is taken before the engine starts, what it took is written after.

    enter     a place of the organisation's concurrency, one request of its minute
    reserve   tokens of its minute and day for prompt and longest answer; a hold of what that can cost at most
    leaving   settles by the engine's counts, or gives all back when nothing was evaluated; limits are corrected

Leaving happens before the turn's terminal event goes out, so whoever has read an answer finds it in the ledger; it goes on
when the turn is cancelled meanwhile. A turn whose client went away, or that failed, pays for what had been evaluated and
produced by then. Where the engine died its counts died with it: nothing is charged.

With --dev there are no organisations: nothing is limited, nothing is written.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Protocol

from blake3 import blake3
from msgspec import Struct
from msgspec.structs import replace

from keepwarm.billing.act import Hold, Repeat, Settlement
from keepwarm.billing.ledger import Ledger
from keepwarm.billing.price import ceiling_nano, turn_charge, uncached_nano
from keepwarm.billing.price_book import PriceBook
from keepwarm.billing.row import Payer, Priced, TurnUse
from keepwarm.billing.sheet import ModelPrices
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.event import Usage
from keepwarm.core.principal import Principal
from keepwarm.core.rate_limit import LimitState
from keepwarm.engine import Counts
from keepwarm.gateway.rate_limits import RateLimits, Ticket
from keepwarm.gateway.runtime import Runtime
from keepwarm.telemetry import where

COUNTS_S_MAX = 10.0  # a cancelled run tells its counts within one step of the engine; a step is a few hundred ms


class TurnFacts(Struct, frozen=True):
    """What a bill says of its turn."""

    turn_id: str
    principal: Principal
    dialect: str
    model: str
    n_choices: int
    repeat: Repeat | None = None


class Ending(Protocol):
    """Who knows why a turn was cancelled."""

    def cancelled_by(self) -> ErrorKind: ...


class Bill:
    """One turn's, from when it is let in until it has ended."""

    def __init__(self, facts: TurnFacts, ticket: Ticket | None) -> None:
        self.facts = facts
        self.ticket = ticket  # None: not limited
        self.prices: tuple[Priced, ModelPrices] | None = None
        self.object_tokens = 0
        self.is_reserved = False
        self.is_held = False
        self.status = ErrorKind.INTERNAL.value
        self._whole: Usage | None = None
        self._counts: list[Counts] = []

    def counts(self) -> Counts:
        """Set by the engine if its run is given up, and by the turn when the run has ended."""
        counts: Counts = asyncio.get_running_loop().create_future()
        self._counts.append(counts)
        return counts

    def names(self, object_id: str) -> None:
        """The request has this cache object in it. A tag may mean another one when it is sent again: another request."""
        repeat = self.facts.repeat
        if repeat is not None:
            digest = blake3(object_id.encode(), key=repeat.body_digest).digest()
            self.facts = replace(self.facts, repeat=replace(repeat, body_digest=digest))

    def finished(self, usage: Usage) -> None:
        """The turn went well; `usage` is all choices' together."""
        self.status = "finished"
        self._whole = usage

    async def usage(self) -> Usage | None:
        """All that was evaluated and produced, once runs that were given up have told; None: not known."""
        if self._whole is not None:
            return self._whole
        known = []
        for counts in self._counts:
            try:
                async with asyncio.timeout(COUNTS_S_MAX):
                    told = await counts
            except TimeoutError:
                told = None
            if told is not None:
                known.append(told)
        return merged(known)


class Billing:
    """Limits and ledger for turns. One per server."""

    def __init__(self, ledger: Ledger, prices: PriceBook, rates: RateLimits, runtime: Runtime) -> None:
        self._ledger = ledger
        self._prices = prices
        self._rates = rates
        self._clock = runtime.clock
        self._tasks = runtime.tasks
        self._log = runtime.log
        self._closing: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def enter(self, facts: TurnFacts, ending: Ending) -> AsyncIterator[Bill]:
        """Let a turn in, and settle it when the context is left. Raises ApiError(RATE_LIMITED)."""
        principal = facts.principal
        if not principal.is_billed:
            yield Bill(facts, None)
            return
        async with self._rates.enter(principal, facts.n_choices) as ticket:
            bill = Bill(facts, ticket)
            try:
                yield bill
            except asyncio.CancelledError:
                bill.status = ending.cancelled_by().value
                raise
            except ApiError as error:  # also its time being over
                bill.status = error.kind.value
                raise
            finally:
                closing = self._tasks.create_task(self._close(bill))
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)
                await asyncio.shield(closing)

    async def reserve(self, bill: Bill, n_prompt: int, n_output_max: int, object_tokens: int) -> None:
        """Take tokens and money for the longest the turn can be. Raises ApiError: RATE_LIMITED, QUOTA_EXCEEDED."""
        facts = bill.facts
        if bill.ticket is None:
            return
        n_output = n_output_max * facts.n_choices
        bill.is_reserved = True
        bill.object_tokens = object_tokens
        await self._rates.admit(bill.ticket, n_prompt + n_output)
        found = self._prices.priced(facts.model, self._clock.now())
        if found is None:
            return
        bill.prices = priced, prices = found
        amount = ceiling_nano(prices, n_prompt, n_output, n_object=min(object_tokens, n_prompt))
        bill.is_held = True
        excesses = await self._ledger.hold(
            Hold(
                facts.turn_id,
                payer_of(facts.principal),
                facts.dialect,
                facts.model,
                priced,
                amount,
                is_prepaid=facts.principal.is_prepaid,
                repeat=facts.repeat,
            )
        )
        for excess in excesses:
            self._log.warning("soft budget passed", turn_id=facts.turn_id, budget=excess.message)

    def sells(self, object_model: str, model: str) -> bool:
        """Whether a turn that asks for `model` pays for a cache object made for `object_model` as such.

        Names of one model may have prices of their own, such as Kimi's by length, with the same ones for objects. Where those
        differ, what was made and is kept at the one is read as anything else is.
        """
        made, asked = (self._prices.priced(name, self._clock.now()) for name in (object_model, model))
        if made is None or asked is None:
            return False
        return (made[0].currency, made[1].objects) == (asked[0].currency, asked[1].objects)

    async def limits(self, principal: Principal) -> LimitState:
        """What is left of the organisation's limits, for the headers of an answer."""
        return await self._rates.state(principal)

    async def drained(self) -> None:
        """Wait until every turn that has ended is settled."""
        while self._closing:
            await asyncio.wait(set(self._closing))

    async def _close(self, bill: Bill) -> None:
        if bill.ticket is None or not bill.is_reserved:
            return
        try:
            usage = await bill.usage()
            if usage is not None and not (usage.prompt or usage.output):
                usage = None
            try:
                await self._write(bill, usage)
            finally:
                await self._rates.correct(bill.ticket, 0 if usage is None else self._rates.counted(usage))
        except Exception as exc:  # noqa: BLE001 - the turn boundary: the answer is out; a hold stays open and expires
            self._log.error("turn not settled", turn_id=bill.facts.turn_id, error=type(exc).__name__, where=where(exc))

    async def _write(self, bill: Bill, usage: Usage | None) -> None:
        facts = bill.facts
        if usage is None:
            if bill.is_held:
                await self._ledger.release(facts.turn_id, payer_of(facts.principal), facts.repeat)
            return
        priced, prices = bill.prices or (None, None)
        n_object = min(bill.object_tokens, usage.cache_read)
        charge = None if prices is None else turn_charge(prices, usage, n_object=n_object)
        uncached = None if prices is None else uncached_nano(prices, usage)
        await self._ledger.settle(
            Settlement(
                facts.turn_id,
                payer_of(facts.principal),
                facts.dialect,
                facts.model,
                bill.status,
                priced,
                TurnUse(usage, n_object, charge, uncached),
                facts.repeat,
            )
        )


def payer_of(principal: Principal) -> Payer:
    return Payer(principal.organisation, principal.project, principal.key_id)


def merged(counts: Iterable[Usage]) -> Usage | None:
    """One turn's usage from its choices': they share the prompt, so the longest of its counts stands; output adds up."""
    known = list(counts)
    if not known:
        return None
    prompt = max(known, key=lambda usage: (usage.prompt, -usage.cache_read))  # of equals the one that computed it
    return replace(prompt, output=sum(usage.output for usage in known))
