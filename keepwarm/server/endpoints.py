"""What each call does: parse with the mount's dialect, ask the gateway, render. One method per route."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar
from urllib.parse import parse_qsl

import msgspec
from blake3 import blake3
from msgspec import Struct
from msgspec.structs import asdict, replace

from keepwarm import __version__
from keepwarm.billing.act import Repeat
from keepwarm.billing.ledger import Ledger
from keepwarm.config import Config
from keepwarm.core.cache_lookup import CacheLookup
from keepwarm.core.cache_object import Page
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.event import Finished
from keepwarm.core.principal import allowed_names, check_allowed
from keepwarm.dialects import CacheReport, ChatDialect, Identity, Parsed, Renderer
from keepwarm.dialects.anthropic import AnthropicMessages
from keepwarm.dialects.caching import KimiCaching
from keepwarm.dialects.kimi import KimiChat
from keepwarm.dialects.openapi import Route
from keepwarm.engine import Engine, EngineState, EngineStatus, StoreStatus
from keepwarm.gateway.auth import Auth
from keepwarm.gateway.caching import Caching
from keepwarm.gateway.files import Files
from keepwarm.gateway.history import RECORDS_MAX
from keepwarm.gateway.identities import Identities
from keepwarm.gateway.lookups import Lookups
from keepwarm.gateway.models import ServedModels
from keepwarm.gateway.runtime import Runtime
from keepwarm.gateway.turn import Turn, Turns
from keepwarm.gateway.window import served_model
from keepwarm.server.exchange import EVENT_STREAM_TYPE, IDEMPOTENCY_HEADER, KEEPALIVE, Exchange, Headers, encoded
from keepwarm.storage import Storage

QUERY_FIELDS_MAX = 100  # metadata filters and a few scalars
CACHE_HEADER = "x-keepwarm-cache"  # on every answer of a turn
IDEMPOTENCY_CHARS_MAX = 255  # as Stripe has it, whose header this is
TIMINGS_HEADER = "x-keepwarm-timings"  # "1" asks for the milliseconds of every phase with the answer

Call = Callable[[Exchange], Awaitable[None]]
Entry = tuple[Route, Call]
T = TypeVar("T")


class RestartableEngine(Engine, Protocol):
    """An engine with a process that can be ended on purpose."""

    def restart(self) -> None:
        """End the engine's process; a new one is started as after a crash."""
        ...


@dataclass(frozen=True, slots=True)
class Services:
    """The gateway as the edge uses it."""

    config: Config
    auth: Auth
    identities: Identities
    models: ServedModels
    turns: Turns
    caching: Caching
    lookups: Lookups
    files: Files
    ledger: Ledger
    storage: Storage  # reports are read from it
    engine: RestartableEngine
    runtime: Runtime
    created_at: int  # unix seconds; what the models list gives as the models' time of creation


class ModelDialect(ChatDialect, Protocol):
    """A chat dialect with its models list."""

    def render_model(self, name: str, created: int, n_ctx: int | None) -> bytes: ...

    def render_models(self, names: Sequence[str], created: int, n_ctx: int | None) -> bytes: ...


class ChatCalls:
    """Chat completions and models, in one dialect."""

    def __init__(self, services: Services, dialect: ModelDialect) -> None:
        self._services = services
        self._dialect = dialect

    async def chat(self, exchange: Exchange) -> None:
        """POST /chat/completions, POST /messages."""
        body = await exchange.body()
        with exchange.phases.measure("parse"):
            parsed = self._dialect.parse_chat(exchange.headers, body)
        await self.answer(exchange, parsed)

    async def answer(self, exchange: Exchange, parsed: Parsed, stream_type: str = EVENT_STREAM_TYPE) -> None:
        """Run the turn of a parsed request; a stream goes out as `stream_type`."""
        services = self._services
        exchange.log_fields["model"] = parsed.request.model
        identity = Identity(exchange.turn_id, int(services.runtime.clock.now()))
        renderer = self._dialect.renderer(parsed, identity)
        async with (
            services.turns.open(
                exchange.turn_id,
                exchange.principal,
                parsed.request,
                exchange.phases,
                dialect=self._dialect.name,
                max_tokens_cut=parsed.max_tokens_cut,
                repeat=repeat_of(exchange),
            ) as turn,
            _cancelled_on_disconnect(exchange, turn, services.runtime.tasks),
        ):
            try:
                if parsed.stream:
                    await self._stream(exchange, turn, renderer, stream_type)
                else:
                    await self._whole(exchange, turn, renderer)
            except ApiError:
                exchange.error_headers = await self._limit_headers(exchange)
                raise
            finally:
                _log_outcome(exchange, turn)

    async def _stream(self, exchange: Exchange, turn: Turn, renderer: Renderer, stream_type: str) -> None:
        """Frames as they come, one write for all that are there; headers go out when the turn has started."""
        silence_s = self._services.config.limits.sse_comment_s
        keepalive = KEEPALIVE if self._dialect.keepalive is None else encoded(self._dialect.keepalive)
        await turn.stream.begin()
        headers = [*self._cache_headers(turn), *await self._limit_headers(exchange)]
        await exchange.begin_events(headers, stream_type)
        more = True
        while more:
            events = await turn.stream.batch(silence_s)
            data = (
                b"".join(encoded(frame) for event in events for frame in renderer.feed(event)) if events else keepalive
            )
            more = not turn.stream.is_read
            if not more and self._takes_comments and exchange.headers.get(TIMINGS_HEADER) == "1":
                data += b": keepwarm-timings " + _timings(turn) + b"\n\n"
            if data:
                await exchange.write_events(data, more=more)

    async def _whole(self, exchange: Exchange, turn: Turn, renderer: Renderer) -> None:
        """The stream, collected."""
        while not turn.stream.is_read:
            for event in await turn.stream.batch(None):
                renderer.feed(event)
        if turn.stream.error is not None:
            raise turn.stream.error
        headers = [*self._cache_headers(turn), *await self._limit_headers(exchange)]
        if exchange.headers.get(TIMINGS_HEADER) == "1":
            headers.append((TIMINGS_HEADER, _timings(turn).decode()))
        await exchange.reply(renderer.whole(), headers=headers)

    async def _limit_headers(self, exchange: Exchange) -> Headers:
        return self._dialect.limit_headers(await self._services.turns.limits(exchange.principal))

    @property
    def _takes_comments(self) -> bool:
        """Whether the dialect's clients skip comments in a stream."""
        keepalive = self._dialect.keepalive
        return keepalive is None or not keepalive.is_raw

    def _cache_headers(self, turn: Turn) -> Headers:
        """What the look-up came to, and what the dialect tells of the cache object that the turn read from."""
        headers = [] if turn.lookup is None else [(CACHE_HEADER, cache_header(turn.lookup))]
        if turn.object is not None and turn.n_tokens_saved:
            now = int(self._services.runtime.clock.now())
            report = CacheReport(turn.object.id, turn.object.expires_at, now, turn.n_tokens_saved)
            headers += self._dialect.reply_headers(report)
        return headers

    async def models(self, exchange: Exchange) -> None:
        """GET /models."""
        services = self._services
        await exchange.reply(
            self._dialect.render_models(
                allowed_names(exchange.principal, services.models.names), services.created_at, self._n_ctx()
            )
        )

    async def model(self, exchange: Exchange) -> None:
        """GET /models/{model}."""
        name = exchange.path_params["model"]
        check_allowed(exchange.principal, name)
        self._services.models.resolve(name)
        await exchange.reply(self._dialect.render_model(name, self._services.created_at, self._n_ctx()))

    def _n_ctx(self) -> int | None:
        model = self._services.engine.status().model
        return model.n_ctx if model is not None else None


class MessagesCalls(ChatCalls):
    """Anthropic's calls beside the chat."""

    def __init__(self, services: Services, dialect: AnthropicMessages) -> None:
        super().__init__(services, dialect)
        self._messages = dialect

    async def count_tokens(self, exchange: Exchange) -> None:
        """POST /messages/count_tokens."""
        request = self._messages.parse_count(exchange.headers, await exchange.body())
        n_tokens, _ = await self._services.turns.count_tokens(exchange.principal, request, exchange.phases)
        await exchange.reply(self._messages.render_token_count(n_tokens))


class EstimateCalls:
    """Kimi's token estimate, which here is exact."""

    def __init__(self, services: Services, dialect: KimiChat) -> None:
        self._services = services
        self._dialect = dialect

    async def estimate(self, exchange: Exchange) -> None:
        """POST /tokenizers/estimate-token-count."""
        parsed = self._dialect.parse_chat(exchange.headers, await exchange.body())
        n_tokens, _ = await self._services.turns.count_tokens(exchange.principal, parsed.request, exchange.phases)
        await exchange.reply(self._dialect.render_token_estimate(n_tokens))


class CachingCalls:
    """Kimi's cache objects and tags."""

    def __init__(self, services: Services, dialect: KimiCaching) -> None:
        self._caching = services.caching
        self._clock = services.runtime.clock
        self._dialect = dialect

    async def create(self, exchange: Exchange) -> None:
        """POST /caching."""
        new = self._dialect.parse_create(await exchange.body())
        obj = await self._caching.create(exchange.principal, new)
        exchange.log_fields["object_id"] = obj.id
        await exchange.reply(self._dialect.render_object(obj, self._clock.now()))

    async def list(self, exchange: Exchange) -> None:
        """GET /caching."""
        page = self._dialect.parse_list(query(exchange))
        found = await self._caching.list(exchange.tenant, _one_more(page))
        shown = _shown(found, page)
        await exchange.reply(self._dialect.render_list(shown, self._clock.now(), has_more=len(found) > page.limit))

    async def get(self, exchange: Exchange) -> None:
        """GET /caching/{cache_id}."""
        obj = await self._caching.get(exchange.tenant, exchange.path_params["cache_id"])
        await exchange.reply(self._dialect.render_object(obj, self._clock.now()))

    async def update(self, exchange: Exchange) -> None:
        """PUT /caching/{cache_id}."""
        update = self._dialect.parse_update(await exchange.body())
        obj = await self._caching.update(exchange.principal, exchange.path_params["cache_id"], update)
        await exchange.reply(self._dialect.render_object(obj, self._clock.now()))

    async def delete(self, exchange: Exchange) -> None:
        """DELETE /caching/{cache_id}."""
        object_id = exchange.path_params["cache_id"]
        await self._caching.delete(exchange.tenant, object_id)
        await exchange.reply(self._dialect.render_deleted(object_id))

    async def bind_tag(self, exchange: Exchange) -> None:
        """POST /caching/refs/tags."""
        name, object_id = self._dialect.parse_tag(await exchange.body())
        await exchange.reply(self._dialect.render_tag(await self._caching.bind_tag(exchange.tenant, name, object_id)))

    async def tags(self, exchange: Exchange) -> None:
        """GET /caching/refs/tags."""
        page = self._dialect.parse_list(query(exchange))
        found = await self._caching.tags(exchange.tenant, _one_more(page))
        await exchange.reply(self._dialect.render_tags(_shown(found, page), has_more=len(found) > page.limit))

    async def tag(self, exchange: Exchange) -> None:
        """GET /caching/refs/tags/{tag}."""
        tag = await self._caching.tag(exchange.tenant, exchange.path_params["tag"])
        await exchange.reply(self._dialect.render_tag(tag))

    async def tagged(self, exchange: Exchange) -> None:
        """GET /caching/refs/tags/{tag}/content."""
        obj = await self._caching.tagged(exchange.tenant, exchange.path_params["tag"])
        await exchange.reply(self._dialect.render_object(obj, self._clock.now()))

    async def unbind_tag(self, exchange: Exchange) -> None:
        """DELETE /caching/refs/tags/{tag}."""
        name = exchange.path_params["tag"]
        await self._caching.unbind_tag(exchange.tenant, name)
        await exchange.reply(self._dialect.render_tag_deleted(name))


class Health(Struct):
    """The body of GET /health: no tenant's data, so it needs no key."""

    status: str  # "ok" | "starting"
    detail: str
    version: str
    engine: EngineStatus
    n_turns: int


class StoreReply(Struct):
    """The body of GET /admin/store: counts and bytes of all tenants together. `store` is null while there is none."""

    state: EngineState
    epoch: int
    detail: str
    store: StoreStatus | None


class OperatorCalls:
    """What people and machines that run the server ask it."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._encoder = msgspec.json.Encoder()

    async def health(self, exchange: Exchange) -> None:
        """GET /health: 200 only when turns are served, 503 before and while the engine restarts."""
        status = self._services.engine.status()
        ready = status.state is EngineState.READY
        health = Health("ok" if ready else "starting", status.detail, __version__, status, self._services.turns.n_turns)
        await exchange.reply(self._encoder.encode(health), status=200 if ready else 503)

    async def store(self, exchange: Exchange) -> None:
        """GET /admin/store: what the prefix store holds. 503 before an engine was ready for the first time."""
        served_model(self._services.engine)
        status = self._services.engine.status()
        reply = StoreReply(status.state, status.epoch, status.detail, status.store)
        await exchange.reply(self._encoder.encode(reply))

    async def turn(self, exchange: Exchange) -> None:
        """GET /admin/turns/{id}: a recent turn of the key's own tenant, and why it missed."""
        turn_id = exchange.path_params["turn_id"]
        record = self._services.lookups.turn(exchange.tenant, turn_id)
        if record is None:
            message = f"no turn {turn_id[:100]!r} is remembered; the last {RECORDS_MAX:,} of all tenants are"
            raise ApiError(ErrorKind.UNKNOWN_ROUTE, message)
        await exchange.reply(self._encoder.encode(record))

    async def restart_engine(self, exchange: Exchange) -> None:
        """POST /admin/engine/restart: ends the engine's process, as a crash would (only with --dev)."""
        self._services.engine.restart()
        await exchange.reply(b'{"restarting":true}', status=202)


@asynccontextmanager
async def _cancelled_on_disconnect(exchange: Exchange, turn: Turn, tasks: asyncio.TaskGroup) -> AsyncIterator[None]:
    """While the context lasts, a client that goes away cancels the turn within one step."""

    async def watch() -> None:
        await exchange.disconnected()
        turn.cancel()

    watcher = tasks.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()


def cache_header(lookup: CacheLookup) -> str:
    """The value of X-Keepwarm-Cache: "partial; read=512; tier=disk; cause=messages_changed"."""
    fields = [lookup.outcome, f"read={lookup.n_read}"]
    if lookup.tier is not None:
        fields.append(f"tier={lookup.tier}")
    if lookup.cause is not None:
        fields.append(f"cause={lookup.cause.value}")
    return "; ".join(fields)


def repeat_of(exchange: Exchange) -> Repeat | None:
    """What tells a client's retry of a request from another one: the header Idempotency-Key, as digests.

    Raises ApiError(INVALID_REQUEST) for a key that is too long.
    """
    key = exchange.headers.get(IDEMPOTENCY_HEADER, "")
    if not key:
        return None
    if len(key) > IDEMPOTENCY_CHARS_MAX:
        message = f"Idempotency-Key has {len(key)} characters, limit {IDEMPOTENCY_CHARS_MAX}"
        raise ApiError(ErrorKind.INVALID_REQUEST, message, param=IDEMPOTENCY_HEADER)
    return Repeat(blake3(key.encode("latin-1")).digest(), exchange.body_digest)


def _log_outcome(exchange: Exchange, turn: Turn) -> None:
    terminal, error = turn.stream.terminal, turn.stream.error
    usage = terminal.usage if terminal is not None else None
    if usage is not None:
        exchange.log_fields |= asdict(usage)
    if turn.object is not None:
        exchange.log_fields["object_id"] = turn.object.id
    if error is not None:
        exchange.log_fields["error"] = error.kind.value


def _timings(turn: Turn) -> bytes:
    """All phases in milliseconds as JSON: the gateway's, and the engine's where the turn went well."""
    timings: dict[str, float] = {f"{phase}_ms": round(ms, 3) for phase, ms in turn.phases.ms.items()}
    if isinstance(turn.stream.terminal, Finished):
        timings |= {f"engine_{name}": ms for name, ms in asdict(turn.stream.terminal.timings).items()}
    return msgspec.json.encode(timings)


def query(exchange: Exchange) -> list[tuple[str, str]]:
    """Raises ApiError(INVALID_REQUEST)."""
    try:
        return parse_qsl(
            exchange.query_string.decode("latin-1"), keep_blank_values=True, max_num_fields=QUERY_FIELDS_MAX
        )
    except ValueError as exc:
        raise ApiError(ErrorKind.INVALID_REQUEST, f"the query has more than {QUERY_FIELDS_MAX} fields") from exc


def fields_of(exchange: Exchange, known: set[str]) -> dict[str, str]:
    """The query's fields. Raises ApiError(INVALID_REQUEST): a filter that is mistyped must not give more."""
    given: dict[str, str] = {}
    for name, value in query(exchange):
        problem = None
        if name not in known:
            problem = f"is no parameter of this call; it has {', '.join(sorted(known))}"
        elif name in given:
            problem = "is given twice"
        if problem is not None:
            raise ApiError(ErrorKind.INVALID_REQUEST, f"{name[:40]}: {problem}", param=name[:40])
        given[name] = value
    return given


def _one_more(page: Page) -> Page:
    """One more than asked for tells whether there are more."""
    return replace(page, limit=page.limit + 1)


def _shown(found: Sequence[T], page: Page) -> Sequence[T]:
    """Without the one more: it is the first when the page ends at `before`, else the last."""
    if len(found) <= page.limit:
        return found
    return found[-page.limit :] if page.before is not None and page.after is None else found[: page.limit]
