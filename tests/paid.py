"""A gateway with an organisation that pays: prices, keys, limits and a ledger to look at. Its models cost by `NAMES`."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa
from msgspec.structs import replace

from keepwarm.billing.price_book import PriceBook, load_price_book
from keepwarm.billing.recount import Fault
from keepwarm.billing.verify import verify
from keepwarm.config import BillingConfig, ModelConfig, RatesConfig
from keepwarm.core.clock import RandomIds
from keepwarm.core.event import ChoiceFinished, Event, Finished, Started, TextDelta, Usage
from keepwarm.core.identity import NewKey, NewOrganisation
from keepwarm.core.prompt import Plan
from keepwarm.core.rate_limit import LimitOverrides
from keepwarm.gateway.auth import KeyAuth
from keepwarm.gateway.identities import Identities
from keepwarm.tables import accounts, holds, ledger_rows
from tests.engines import MODEL, StepEngine
from tests.world import CONFIG, World, world

NANO = 10**9
HOUSE = """
name = "house"
version = "1"
currency = "USD"
effective_from = 2020-01-01
source = "made for tests"
[models.anthropic]
terms = "anthropic@2026/standard"
input = "3"
output = "15"
[models.gemini-pro]
terms = "gemini@2026/2.5-pro"
input = "1.25"
output = "10"
"""
NAMES = {
    "minimax": "minimax@2026/worked-example",
    "kimi": "kimi@2024-07-01/moonshot-v1-8k",
    "kimi-32k": "kimi@2024-07-01/moonshot-v1-32k",
    "claude": "house@1/anthropic",
    "gemini": "house@1/gemini-pro",
}


class Paid(msgspec.Struct):
    """A world with an organisation, its key and its ledger."""

    server: World
    key: str
    book: PriceBook

    async def rows(self, *kinds: str) -> list[Any]:
        query = sa.select(ledger_rows).order_by(ledger_rows.c.seq)
        found = await self.server.storage.run(lambda connection: connection.execute(query).all())
        return [row for row in found if not kinds or row.kind in kinds]

    async def sums(self) -> Any:
        return await self.server.storage.run(lambda connection: connection.execute(sa.select(accounts)).one())

    async def holds(self) -> list[Any]:
        return await self.server.storage.run(lambda connection: connection.execute(sa.select(holds)).all())

    async def faults(self) -> list[Fault]:
        """What is wrong with the whole ledger, counted anew."""
        return [one async for one in verify(self.server.storage, self.book.prices, lambda _n, _of: None)]

    async def key_for(self, *models: str) -> str:
        """Another key of the organisation, that may use these models only."""
        identities = Identities(self.server.storage, self.server.clock, RandomIds(), tiers={}, default_tier=None)
        new = NewKey(RandomIds().new("k"), models=models)
        return (await identities.create_key("acme", new, by=None))[0]

    async def tokens_left(self) -> int:
        """Of the minute that is under way."""
        server = self.server
        principal = await KeyAuth(server.storage, server.clock).principal(f"Bearer {self.key}")
        left = (await server.running.turns.limits(principal)).minute_tokens
        assert left is not None
        return left.remaining

    async def balanced(self) -> int:
        """What was taken from the organisation; sums are those of the rows and nothing is held."""
        rows, sums = await self.rows(), await self.sums()
        assert sums.cash_nano == sum(row.cash_nano for row in rows)
        assert sums.voucher_nano == sum(row.voucher_nano for row in rows)
        assert sums.held_nano == sum(row.held_nano for row in rows) == 0
        assert await self.holds() == []
        return -sums.cash_nano - sums.voucher_nano

    def ask(self, model: str, text: str, **fields: Any) -> Any:
        return self.server.chat(text, key=self.key, model=model, **fields)


@asynccontextmanager
async def paid(
    tmp_path: Path,
    *,
    prepaid: bool = False,
    limits: LimitOverrides | None = None,
    engine: StepEngine | None = None,
    turn_s_max: float = 60.0,
    rates: RatesConfig = RatesConfig(),
) -> AsyncIterator[Paid]:
    sheets = tmp_path / "sheets"
    sheets.mkdir(exist_ok=True)
    (sheets / "house.toml").write_text(HOUSE)
    config = replace(
        CONFIG,
        dev=False,
        model=ModelConfig(name="small", aliases=tuple(NAMES), engine="scripted"),
        cache=replace(CONFIG.cache, object_tokens_min=1, ttl_max_s=86_400),
        limits=replace(CONFIG.limits, turn_s_max=turn_s_max),
        billing=BillingConfig(sheets_dir=str(sheets), models=NAMES),
        rates=rates,
    )
    engine = engine or StepEngine()
    engine.model = replace(MODEL, n_ctx=200_000)
    async with world(tmp_path / "data", config=config, engine=engine) as server:
        identities = Identities(server.storage, server.clock, RandomIds(), tiers={}, default_tier=None)
        if "acme" not in {organisation.id for organisation in await identities.organisations()}:
            await identities.create_organisation(
                NewOrganisation("acme", limits=limits or LimitOverrides(), is_prepaid=prepaid)
            )
        key, _ = await identities.create_key("acme", NewKey(RandomIds().new("k")), by=None)
        book = await asyncio.to_thread(load_price_book, config.billing, config.model, server.clock.now())
        yield Paid(server, key, book)


def used(usage: Usage, *texts: str) -> Any:
    """A script whose counts are these."""

    def script(plan: Plan) -> Sequence[Event]:
        return [
            Started(usage.prompt, usage.cache_read),
            *(TextDelta(text) for text in texts),
            ChoiceFinished("stop", usage.output),
            Finished(usage),
        ]

    return script


async def text_of(server: World, key: str, n_tokens: int, model: str) -> str:
    """A user's message whose whole prompt has `n_tokens`."""
    body = {"model": model, "messages": [{"role": "user", "content": "x" * 100}]}
    counted = await server.request("POST", "/anthropic/v1/messages/count_tokens", body, key=key)
    return "x" * (100 + n_tokens - counted.json()["input_tokens"])
