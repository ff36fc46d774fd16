"""The composition root: builds every object, in order, and runs the server until it is told to stop.

    storage → tokenizer → templating → engine process (supervised) → gateway services → HTTP

All background work lives in one task group: if any of it breaks, the server ends instead of serving without it. llama.cpp
is not imported here; the vocabulary and grammars load it when they are opened, the model lives in the engine's process.
"""

import asyncio
import contextlib
import importlib
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec
import uvicorn
import uvloop
from blake3 import blake3
from starlette.applications import Starlette

from keepwarm.billing.ledger import Ledger
from keepwarm.billing.meter import Meters
from keepwarm.billing.price_book import PriceBook, load_price_book
from keepwarm.cache.objects import Objects
from keepwarm.cache.render import Templating
from keepwarm.config import Config, ConfigError, ModelConfig
from keepwarm.core.clock import Clock, Ids, RandomIds, SystemClock
from keepwarm.core.request import Tool
from keepwarm.dialects import WireBounds
from keepwarm.dialects.kimi import KimiChat
from keepwarm.dialects.openai import OpenAIChat
from keepwarm.engine.local import EngineFault, LocalEngine, open_tokenizer
from keepwarm.gateway.admission import Admission
from keepwarm.gateway.auth import Auth, DevAuth, KeyAuth
from keepwarm.gateway.billing import COUNTS_S_MAX, Billing
from keepwarm.gateway.breakpoints import Breakpoints
from keepwarm.gateway.caching import Caching
from keepwarm.gateway.documents import Documents
from keepwarm.gateway.file_disk import FileDisk
from keepwarm.gateway.file_rows import FileRows
from keepwarm.gateway.files import Files
from keepwarm.gateway.history import History
from keepwarm.gateway.identities import Identities
from keepwarm.gateway.lookups import Lookups
from keepwarm.gateway.models import ServedModels
from keepwarm.gateway.object_billing import ObjectBilling
from keepwarm.gateway.rate_limits import RateLimits
from keepwarm.gateway.rate_store import open_rate_store
from keepwarm.gateway.reading import Reading
from keepwarm.gateway.rendering import Rendering
from keepwarm.gateway.runtime import Runtime
from keepwarm.gateway.settling import Settling
from keepwarm.gateway.turn import Turns
from keepwarm.gateway.warming import EpochEngine, Warming
from keepwarm.gateway.warmup import WarmText, WarmUp, read_prompts
from keepwarm.server.connection import bounded_http
from keepwarm.server.endpoints import RestartableEngine, Services
from keepwarm.server.routes import application
from keepwarm.storage import Storage, StorageError, database
from keepwarm.telemetry import Log, configure

STOP_S = 10.0  # running turns may end by themselves for this long after a signal, then they get an error
STOP_REST_S = 5.0  # for the errors to go out
SETTLE_S = COUNTS_S_MAX + 2.0  # then for turns that were given up to tell what they used, and for the ledger
HOLD_REST_S = 60.0  # a hold outlives the longest turn by so much: its settling may have to wait for the database
BACKLOG = 2048


class ServeError(Exception):
    """The server cannot start or go on; the message is one line that says what to do."""


class ServingEngine(EpochEngine, RestartableEngine, Protocol):
    """What the application needs of its engine."""


@dataclass(frozen=True, slots=True)
class Model:
    """The text side of the served model: its templating and its grammars, and the engine that runs it."""

    templating: Templating
    to_gbnf: Callable[[str], str]
    engine: ServingEngine


@dataclass(frozen=True, slots=True)
class Gateway:
    """A running gateway."""

    app: Starlette
    turns: Turns
    warming: Warming
    settling: Settling
    ledger: Ledger
    paying: ObjectBilling


def serve(config: Config) -> None:
    """Serve until SIGINT or SIGTERM. Raises ServeError."""
    log = configure(config.log_format)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(_serve(config, log, SystemClock(), RandomIds()))
        except (EngineFault, StorageError) as fault:
            raise ServeError(str(fault)) from fault
        except BaseExceptionGroup as group:
            first = _first(group)
            if isinstance(first, EngineFault | ConfigError):
                raise ServeError(str(first)) from group
            raise


async def _serve(config: Config, log: Log, clock: Clock, ids: Ids) -> None:
    began = clock.monotonic()
    limits = config.limits
    with _listen(config) as listener:  # first: a taken port is found before a model is loaded
        storage = await asyncio.to_thread(
            Storage.open, database(config.database_url, config.data_dir), limits.db_busy_s_max
        )
        try:
            tokenizer = await asyncio.to_thread(open_tokenizer, config)
            try:
                templating = Templating(tokenizer, fragment_cache_bytes=limits.fragment_cache_bytes)
            except ValueError as exc:
                raise ServeError(f"the model's chat template cannot be used: {exc}") from exc
            engine = LocalEngine(config, templating.digest, clock, ids)
            model = Model(templating, schema_to_gbnf, engine)
            async with asyncio.TaskGroup() as tasks:
                supervisor = tasks.create_task(engine.supervise())
                async with gateway(config, model, storage, clock, ids, log) as running:
                    announcing = tasks.create_task(_announce(config, engine, listener, log, clock, began))
                    await Server(config, running).serve(sockets=[listener])
                    announcing.cancel()
                supervisor.cancel()
        finally:
            await asyncio.to_thread(storage.close)


@asynccontextmanager
async def gateway(
    config: Config, model: Model, storage: Storage, clock: Clock, ids: Ids, log: Log
) -> AsyncIterator[Gateway]:
    """The gateway and its background work, for as long as the context lasts. Raises ConfigError for a `[[warm]]` file."""
    objects = Objects(storage)
    models = ServedModels(config.model, any_name=config.dev)
    admission = Admission(config.limits.turns_max, config.limits.turns_per_organisation_max)
    auth = DevAuth() if config.dev else KeyAuth(storage, clock)
    identities = Identities(storage, clock, ids, tiers=config.rates.tiers, default_tier=config.rates.default_tier)
    prompts = await _warm_prompts(config, auth)
    is_durable = await asyncio.to_thread(config.disk_bytes) != 0  # once: what is free on the disk changes
    templating = model.templating
    reading = Reading(config.limits)
    disk = FileDisk(Path(config.data_dir) / "files")
    files = Files(config.limits, disk, FileRows(storage), reading, clock, ids, log)
    await files.recover()
    prices = await asyncio.to_thread(load_price_book, config.billing, config.model, clock.now())
    counters = await asyncio.to_thread(open_rate_store, config.rates.redis_url)
    rates = RateLimits(config.rates, counters, clock, log)
    rendering = Rendering(templating, model.to_gbnf, config.limits, Documents(config.limits, reading, files))
    ledger = Ledger(storage, clock, ids, hold_s=config.limits.turn_s_max + HOLD_REST_S)
    try:
        async with (
            _billing(ledger, prices, rates, partial(Runtime, clock, ids, log)) as billing,
            asyncio.TaskGroup() as tasks,
        ):
            runtime = Runtime(clock, ids, log, tasks)
            warmup = WarmUp(prompts, rendering, model.engine, runtime)
            paying = ObjectBilling(ledger, Meters(storage, clock, prices.prices_or_none), prices, rates, runtime)
            warming = Warming(objects, rendering, model.engine, warmup, paying, runtime, is_durable=is_durable)
            settling = Settling(config.cache, rendering, model.engine, runtime)
            caching = Caching(config, models, admission, objects, rendering, model.engine, warming, paying, runtime)
            breakpoints = Breakpoints(
                storage, runtime, root=_root(config.model, templating), tokens_min=config.cache.mark_tokens_min
            )
            await breakpoints.load()
            history = History(templating.decode)
            lookups = Lookups(config.cache, models, breakpoints, history, template=templating.digest)
            turns = Turns(config, admission, caching, rendering, model.engine, settling, lookups, billing, runtime)
            services = Services(
                config,
                auth,
                identities,
                models,
                turns,
                caching,
                lookups,
                files,
                ledger,
                storage,
                model.engine,
                runtime,
                int(clock.now()),
            )
            await paying.recover()
            await warming.recover()
            background = [
                tasks.create_task(warming.work()),
                tasks.create_task(warming.follow_engine()),
                tasks.create_task(warming.follow_damage()),
                tasks.create_task(warming.tick_forever()),
                tasks.create_task(settling.work()),
                tasks.create_task(warmup.work()),
                tasks.create_task(files.work()),
                tasks.create_task(files.tick_forever()),
                tasks.create_task(paying.tick_forever()),
            ]
            try:
                yield Gateway(application(services), turns, warming, settling, ledger, paying)
            finally:
                turns.stop()
                with contextlib.suppress(TimeoutError):  # what is not settled by then is held, and expires
                    async with asyncio.timeout(SETTLE_S):
                        await turns.drained()
                for task in background:
                    task.cancel()
    finally:
        await counters.close()
        await asyncio.to_thread(rendering.close)
        await asyncio.to_thread(disk.close)


@asynccontextmanager
async def _billing(
    ledger: Ledger, prices: PriceBook, rates: RateLimits, runtime_of: Callable[[asyncio.TaskGroup], Runtime]
) -> AsyncIterator[Billing]:
    """Limits and ledger for turns, with the ledger's worker in a group of their own.

    It outlives the other tasks: a fault of one of those ends all turns, and what they have used is charged.
    """
    async with asyncio.TaskGroup() as lasting:
        working = lasting.create_task(ledger.work())
        billing = Billing(ledger, prices, rates, runtime_of(lasting))
        try:
            yield billing
        finally:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SETTLE_S):
                    await billing.drained()
            working.cancel()


def _root(model: ModelConfig, templating: Templating) -> bytes:
    """Names what a breakpoint's prefix depends on beside its tokens."""
    parts = (model.name, model.path or "", model.kv_type, templating.digest)
    return blake3("\x00".join(parts).encode()).digest()


async def _warm_prompts(config: Config, auth: Auth) -> tuple[WarmText, ...]:
    """The prompts of `[[warm]]`, read. With --dev their tenant is given as the key that requests carry."""
    tenants: dict[str, str] = {}
    if config.dev:
        for prompt in config.warm:
            tenants[prompt.tenant] = (await auth.principal(f"Bearer {prompt.tenant}")).tenant
    dialect = OpenAIChat(msgspec.convert(config.limits, WireBounds, from_attributes=True))

    def tools_of(raw: bytes) -> tuple[Tool, ...]:
        """As a client's are read, so that the bits are the same."""
        message = {"role": "user", "content": "-"}
        body = msgspec.json.encode({"model": "-", "messages": [message], "tools": msgspec.Raw(raw)})
        return dialect.parse_chat({}, body).request.tools or ()

    return await asyncio.to_thread(read_prompts, config.warm, tenants, tools_of)


class Server(uvicorn.Server):
    """uvicorn with an end: signals end it, turns get `STOP_S` to finish, then a terminal error."""

    def __init__(self, config: Config, running: Gateway) -> None:
        limits = config.limits
        dialect = KimiChat(msgspec.convert(limits, WireBounds, from_attributes=True))
        super().__init__(
            uvicorn.Config(
                running.app,
                http=bounded_http(limits, dialect.render_error),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # X-Forwarded-* would let a client choose its address
                timeout_keep_alive=limits.keep_alive_s,
                timeout_graceful_shutdown=int(STOP_S + STOP_REST_S),
            )
        )
        self._turns = running.turns

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        stopping = asyncio.get_running_loop().call_later(STOP_S, self._turns.stop)
        try:
            await super().shutdown(sockets)
        finally:
            stopping.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn's, does not raise the signal again: the engine's process is to be ended in order first."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)


def schema_to_gbnf(schema: str) -> str:
    """GBNF for a JSON Schema. Raises ValueError."""
    module = importlib.import_module("keepwarm.engine.llama")  # not at the top: it loads llama.cpp
    return str(module.json_schema_to_gbnf(schema))


async def _announce(
    config: Config, engine: LocalEngine, listener: socket.socket, log: Log, clock: Clock, began: float
) -> None:
    """The one line that says the server is ready."""
    async for _epoch in engine.epochs():
        info = engine.status().model
        assert info is not None
        log.info(
            "ready",
            url=_url(listener),
            model=config.model.name,
            weights=info.weights,
            attention=info.attention,
            determinism=info.determinism,
            granularity=info.granularity,
            n_ctx=info.n_ctx,
            start_s=round(clock.monotonic() - began, 1),
        )
        return


def _listen(config: Config) -> socket.socket:
    """Raises ServeError."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=BACKLOG)
    except OSError as exc:
        message = f"cannot listen on {config.host}:{config.port}: {exc.strerror}; choose another --host or --port"
        raise ServeError(message) from exc


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
