"""The table of routes under their mounts, and the Starlette application made from it.

    /v1, /moonshot/v1                        Kimi's dialect, which is OpenAI's with additions; in /v1 Anthropic's messages, too
    /openai/v1                               OpenAI's dialect alone
    /anthropic/v1, /minimax/anthropic/v1     Anthropic's
    /minimax/v1                              MiniMax's, in OpenAI's shape
    /v1beta, /gemini/v1beta, /gemini/v1      Gemini's; in /v1, too, where no other dialect has the path
    /upload/v1beta, /upload/v1               its uploads, and the same below /gemini
    /                                        health, the operator's calls, the OpenAPI document and its page

A path belongs to the dialect of its mount, also when there is no such route: every error is in that dialect's words. Where
dialects meet at one path (/v1/models, /v1/files) an API key in Google's form or the header `anthropic-version` tells them
apart.
"""

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import msgspec
from msgspec import Struct
from starlette.applications import Starlette
from starlette.routing import BaseRoute, Mount, Router
from starlette.routing import Route as Path
from starlette.types import ASGIApp, Receive, Scope, Send

from keepwarm import __version__
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.principal import Access, check_access
from keepwarm.dialects import WireBounds
from keepwarm.dialects.anthropic import AnthropicMessages
from keepwarm.dialects.anthropic_answer import MessageReply, MessageStreamEvent, TokenCountReply
from keepwarm.dialects.anthropic_error import AnthropicErrorBody
from keepwarm.dialects.anthropic_model import AnthropicModel, AnthropicModelList
from keepwarm.dialects.anthropic_request import CountTokensRequest, MessagesRequest
from keepwarm.dialects.caching import (
    CacheDeletedReply,
    CacheListReply,
    CacheReply,
    CacheUpdateRequest,
    KimiCaching,
    NewCacheRequest,
    TagDeletedReply,
    TagListReply,
    TagReply,
    TagRequest,
)
from keepwarm.dialects.gemini import GeminiContent
from keepwarm.dialects.gemini_error import missing_key
from keepwarm.dialects.kimi import (
    CACHE_HEADER,
    DRY_RUN_HEADER,
    RESET_TTL_HEADER,
    KimiChat,
    KimiChatCompletionRequest,
    TokenEstimateReply,
)
from keepwarm.dialects.kimi_files import KimiFiles
from keepwarm.dialects.minimax import MiniMaxChat, MiniMaxChatCompletionRequest
from keepwarm.dialects.openai import OpenAIChat
from keepwarm.dialects.openai_answer import ChatCompletion, ChatCompletionChunk
from keepwarm.dialects.openai_error import ErrorBody
from keepwarm.dialects.openai_model import ModelItem, ModelList
from keepwarm.dialects.openai_request import ChatCompletionRequest
from keepwarm.dialects.openapi import Param, Route, openapi
from keepwarm.gateway.history import TurnRecord
from keepwarm.gateway.phases import Phases
from keepwarm.gateway.stream import internal_error
from keepwarm.server.admin import admin_entries
from keepwarm.server.billing import billing_entries, kimi_balance_entries
from keepwarm.server.endpoints import (
    CachingCalls,
    Call,
    ChatCalls,
    Entry,
    EstimateCalls,
    Health,
    MessagesCalls,
    ModelDialect,
    OperatorCalls,
    Services,
    StoreReply,
    query,
)
from keepwarm.server.exchange import Exchange
from keepwarm.server.gemini import GeminiEntries
from keepwarm.server.page import render_page
from keepwarm.server.uploads import (
    KimiFileCalls,
    google_key,
    kimi_file_entries,
)
from keepwarm.telemetry import where

KIMI_MOUNTS = ("/v1", "/moonshot/v1")
OPENAI_MOUNT = "/openai/v1"
ANTHROPIC_MOUNTS = ("/anthropic/v1", "/minimax/anthropic/v1")
MINIMAX_MOUNT = "/minimax/v1"
VERSION_HEADER = b"anthropic-version"
GEMINI_ROOTS = ("", "/gemini")
GEMINI_VERSIONS = ("/v1beta", "/v1")
GOOGLE_KEY_HEADER, GOOGLE_KEY_FIELD = b"x-goog-api-key", re.compile(rb"(?:^|&)key=")
KEY_HEADERS = (b"authorization", b"x-api-key", GOOGLE_KEY_HEADER)
TITLE = "Keepwarm"
DESCRIPTION = (
    "An LLM API server whose main feature is context caching. Kimi's calls under /v1 are also under /moonshot/v1, Anthropic's "
    "(/v1/messages) also under /anthropic/v1 and /minimax/anthropic/v1."
)

USE_PARAMS = (
    Param(CACHE_HEADER, "id of the cache object whose messages this request repeats", where="header"),
    Param(DRY_RUN_HEADER, "1: only tell whether the cache would be used", where="header"),
    Param(RESET_TTL_HEADER, "seconds the cache lives on after this call", int, where="header"),
)
LIST_PARAMS = (
    Param("limit", "at most this many, 20 by default", int),
    Param("order", "asc or desc by time of creation, desc by default"),
    Param("after", "begin behind this one"),
    Param("before", "end ahead of this one"),
)
METADATA_PARAM = Param("metadata", "all given pairs must be there", dict[str, str], deep=True)

CHAT_BODIES: Mapping[str, type[Struct]] = MappingProxyType(
    {
        "kimi": KimiChatCompletionRequest,
        "openai": ChatCompletionRequest,
        "minimax": MiniMaxChatCompletionRequest,
    }
)


def application(services: Services) -> Starlette:
    """The ASGI application that serves `services`."""
    bounds = msgspec.convert(services.config.limits, WireBounds, from_attributes=True)
    kimi, openai, minimax = KimiChat(bounds), OpenAIChat(bounds), MiniMaxChat(bounds)
    anthropic, gemini = AnthropicMessages(bounds), GeminiContent(bounds)
    kimi_files = KimiFileCalls(services.files, KimiFiles(), services.config.limits)
    books = (services.storage, services.ledger, services.identities, services.runtime.clock)
    kimi_entries = [
        *chat_entries(services, kimi),
        *kimi_only_entries(services, kimi, KimiCaching(bounds)),
        *kimi_file_entries(kimi_files),
        *kimi_balance_entries(*books),
    ]
    openai_entries, minimax_entries = chat_entries(services, openai), chat_entries(services, minimax)
    messages_entries, models_entries = messages_entries_of(services, anthropic)
    gemini_entries = GeminiEntries(services, gemini, bounds)
    operator_entries = [*operator_entries_of(services), *admin_entries(services), *billing_entries(*books)]
    documents = Documents(
        [
            *(_under(KIMI_MOUNTS[0], route) for route, _ in (*kimi_entries, *messages_entries)),
            *(_under(OPENAI_MOUNT, route) for route, _ in openai_entries),
            *(_under(ANTHROPIC_MOUNTS[0], route) for route, _ in (*messages_entries, *models_entries)),
            *(_under(MINIMAX_MOUNT, route) for route, _ in minimax_entries),
            *(_under("/v1beta", route) for route, _ in gemini_entries.all),
            *(_under("/upload/v1beta", route) for route, _ in gemini_entries.uploads),
            *(route for route, _ in operator_entries),
        ]
    )
    root = _shared(
        _paths(services, kimi, kimi_entries),
        anthropic=_paths(services, anthropic, models_entries),
        gemini=_paths(services, gemini, gemini_entries.all),
    )
    root = [*_paths(services, anthropic, messages_entries), *root]
    routes: list[BaseRoute] = [
        Mount(KIMI_MOUNTS[0], _router(services, kimi, root)),
        Mount(KIMI_MOUNTS[1], _router(services, kimi, _paths(services, kimi, kimi_entries))),
        Mount(OPENAI_MOUNT, _router(services, openai, _paths(services, openai, openai_entries))),
        Mount(MINIMAX_MOUNT, _router(services, minimax, _paths(services, minimax, minimax_entries))),
    ]
    for mount in ANTHROPIC_MOUNTS:
        paths = _paths(services, anthropic, [*messages_entries, *models_entries])
        routes.append(Mount(mount, _router(services, anthropic, paths)))
    routes.extend(_gemini_routes(services, gemini, gemini_entries))
    routes.extend(_paths(services, kimi, [*operator_entries, *documents.entries()]))
    app = Starlette(routes=routes)
    app.router.redirect_slashes = False
    app.router.default = PathCalls(services, kimi, None, {})
    return app


def _gemini_routes(services: Services, dialect: GeminiContent, entries: GeminiEntries) -> list[BaseRoute]:
    """Every mount of Gemini's but /v1, which it shares."""
    routes: list[BaseRoute] = []
    for root in GEMINI_ROOTS:
        for version in GEMINI_VERSIONS:
            uploads = _paths(services, dialect, entries.uploads)
            routes.append(Mount(f"{root}/upload{version}", _router(services, dialect, uploads)))
            if root + version not in KIMI_MOUNTS:
                routes.append(Mount(root + version, _router(services, dialect, _paths(services, dialect, entries.all))))
        routes.extend(_paths(services, dialect, [(_under(root, route), call) for route, call in entries.discovery]))
    return routes


def chat_entries(services: Services, dialect: KimiChat | OpenAIChat | MiniMaxChat) -> list[Entry]:
    """What all dialects in OpenAI's shape serve."""
    calls = ChatCalls(services, dialect)
    chat = Route(
        "POST",
        "/chat/completions",
        Access.USE,
        "Answer a conversation, whole or streamed",
        request=CHAT_BODIES[dialect.name],
        response=ChatCompletion,
        events=ChatCompletionChunk,
        params=USE_PARAMS if dialect.name == "kimi" else (),
    )
    return [
        (chat.tagged("chat", ErrorBody), calls.chat),
        (
            Route("GET", "/models", Access.READ, "The names requests may use", response=ModelList).tagged(
                "models", ErrorBody
            ),
            calls.models,
        ),
        (
            Route("GET", "/models/{model}", Access.READ, "One of them", response=ModelItem).tagged("models", ErrorBody),
            calls.model,
        ),
    ]


def messages_entries_of(services: Services, dialect: AnthropicMessages) -> tuple[list[Entry], list[Entry]]:
    """Anthropic's messages, and its models list."""
    calls = MessagesCalls(services, dialect)
    messages: list[Entry] = [
        (
            Route(
                "POST", "/messages", Access.USE, "Answer a conversation, whole or streamed", request=MessagesRequest,
                response=MessageReply, events=MessageStreamEvent,
            ),
            calls.chat,
        ),
        (
            Route(
                "POST", "/messages/count_tokens", Access.READ, "Count the tokens of a conversation's prompt",
                request=CountTokensRequest, response=TokenCountReply,
            ),
            calls.count_tokens,
        ),
    ]  # fmt: skip
    models: list[Entry] = [
        (Route("GET", "/models", Access.READ, "The names requests may use", response=AnthropicModelList), calls.models),
        (Route("GET", "/models/{model}", Access.READ, "One of them", response=AnthropicModel), calls.model),
    ]
    return (
        [(route.tagged("messages", AnthropicErrorBody), call) for route, call in messages],
        [(route.tagged("models", AnthropicErrorBody), call) for route, call in models],
    )


def kimi_only_entries(services: Services, dialect: KimiChat, caching: KimiCaching) -> list[Entry]:
    """The token estimate, cache objects and their tags."""
    calls = CachingCalls(services, caching)
    estimate = Route(
        "POST",
        "/tokenizers/estimate-token-count",
        Access.READ,
        "Count the tokens of a conversation's prompt",
        request=KimiChatCompletionRequest,
        response=TokenEstimateReply,
    )
    objects: list[Entry] = [
        (
            Route("POST", "/caching", Access.USE, "Create a cache", request=NewCacheRequest, response=CacheReply),
            calls.create,
        ),
        (
            Route(
                "GET",
                "/caching",
                Access.READ,
                "List caches",
                response=CacheListReply,
                params=(*LIST_PARAMS, METADATA_PARAM),
            ),
            calls.list,
        ),
        (
            Route(
                "POST", "/caching/refs/tags", Access.USE, "Bind or move a tag", request=TagRequest, response=TagReply
            ),
            calls.bind_tag,
        ),
        (
            Route("GET", "/caching/refs/tags", Access.READ, "List tags", response=TagListReply, params=LIST_PARAMS),
            calls.tags,
        ),
        (Route("GET", "/caching/refs/tags/{tag}", Access.READ, "One tag", response=TagReply), calls.tag),
        (
            Route("DELETE", "/caching/refs/tags/{tag}", Access.USE, "Delete a tag", response=TagDeletedReply),
            calls.unbind_tag,
        ),
        (
            Route("GET", "/caching/refs/tags/{tag}/content", Access.READ, "The cache it names", response=CacheReply),
            calls.tagged,
        ),
        (Route("GET", "/caching/{cache_id}", Access.READ, "One cache", response=CacheReply), calls.get),
        (
            Route(
                "PUT", "/caching/{cache_id}", Access.USE, "Change it", request=CacheUpdateRequest, response=CacheReply
            ),
            calls.update,
        ),
        (Route("DELETE", "/caching/{cache_id}", Access.USE, "Delete it", response=CacheDeletedReply), calls.delete),
    ]
    return [
        (estimate.tagged("chat", ErrorBody), EstimateCalls(services, dialect).estimate),
        *((route.tagged("caching", ErrorBody), call) for route, call in objects),
    ]


def operator_entries_of(services: Services) -> list[Entry]:
    """Health, the prefix store, and in a development server the way to try a crash of the engine."""
    calls = OperatorCalls(services)
    health = Route("GET", "/health", Access.PUBLIC, "200 when turns are served, 503 before", response=Health)
    store = Route(
        "GET", "/admin/store", Access.OPERATOR, "What the prefix store holds, in counts and bytes", response=StoreReply
    )
    turn = Route(
        "GET", "/admin/turns/{turn_id}", Access.READ, "A recent turn, and why it missed the cache", response=TurnRecord
    )
    entries: list[Entry] = [
        (health.tagged("operation", ErrorBody), calls.health),
        (store.tagged("operation", ErrorBody), calls.store),
        (turn.tagged("operation", ErrorBody), calls.turn),
    ]
    if services.config.dev:
        restart = Route("POST", "/admin/engine/restart", Access.OPERATOR, "End the engine's process (--dev only)")
        entries.append((restart.tagged("operation", ErrorBody), calls.restart_engine))
    return entries


class Documents:
    """/openapi.json and /docs, made when they are first asked for, off the event loop."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self._routes = routes
        self._document: bytes | None = None
        self._page: bytes | None = None

    def entries(self) -> list[Entry]:
        return [
            (Route("GET", "/openapi.json", Access.PUBLIC, "The OpenAPI document"), self.send_document),
            (Route("GET", "/docs", Access.PUBLIC, "The OpenAPI document as a page"), self.send_page),
        ]

    async def send_document(self, exchange: Exchange) -> None:
        await exchange.reply(await self._made())

    async def send_page(self, exchange: Exchange) -> None:
        document = await self._made()
        if self._page is None:
            self._page = await asyncio.to_thread(render_page, document)
        await exchange.reply(self._page, content_type="text/html; charset=utf-8")

    async def _made(self) -> bytes:
        if self._document is None:
            self._document = await asyncio.to_thread(
                openapi, self._routes, title=TITLE, version=__version__, description=DESCRIPTION
            )
        return self._document


def _under(mount: str, route: Route) -> Route:
    return msgspec.structs.replace(route, path=mount + route.path)


def credentials(exchange: Exchange) -> str | None:
    """The Authorization header's value, or what clients of Anthropic's and Google's send in its place."""
    key = exchange.headers.get("x-api-key") or google_key(exchange)
    return exchange.headers.get("authorization") or (None if key is None else f"Bearer {key}")


def _check_one_key(scope: Scope) -> None:
    """Raises ApiError(INVALID_REQUEST) for a header twice: a proxy may have checked the other one."""
    given = [name for name, _ in scope["headers"] if name in KEY_HEADERS]
    for name in given:
        if given.count(name) > 1:
            raise ApiError(ErrorKind.INVALID_REQUEST, f"the request has {given.count(name)} {name.decode()} headers")


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of a path."""

    call: Call
    route: Route

    def needs_key(self, exchange: Exchange) -> bool:
        """Whether this request must show one."""
        if self.route.access is Access.PUBLIC:
            return False
        secret = self.route.bearer_param
        return secret is None or not dict(query(exchange)).get(secret)


class PathCalls:
    """An ASGI application for one path: key, method, call, and every error in the mount's dialect.

    `path` None is any path without a route.
    """

    def __init__(
        self, services: Services, dialect: ModelDialect, path: str | None, operations: dict[str, Operation]
    ) -> None:
        self._services = services
        self._dialect = dialect
        self._path = path
        self._operations = operations

    @property
    def operations(self) -> Mapping[str, Operation]:
        """By method, what this path has."""
        return self._operations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # a lifespan or a websocket: nothing here speaks those
        runtime = self._services.runtime
        began = runtime.clock.monotonic()
        turn_id = runtime.ids.new(self._dialect.id_prefix)
        exchange = Exchange(scope, receive, send, turn_id, Phases(runtime.clock), self._services.config.limits)
        error: ApiError | None = None
        try:
            await self._serve(exchange, scope)
        except ApiError as exc:
            error = exc
        except TimeoutError:
            error = ApiError(ErrorKind.CLIENT_CLOSED, "the client stopped reading")
        except Exception as exc:  # noqa: BLE001 - the last resort: the client gets an error, the log the place
            runtime.log.error(  # noqa: TRY400 - no traceback: its message may hold a client's text
                "request failed", turn_id=turn_id, error=type(exc).__name__, where=where(exc)
            )
            error = internal_error()
        if error is not None:
            exchange.log_fields["error"] = error.kind.value
            if exchange.status is None:
                allow = [("allow", ", ".join(self._operations))] if error.kind is ErrorKind.METHOD_NOT_ALLOWED else []
                reply = self._dialect.render_error(error, turn_id)
                await exchange.reply_error(reply, [*allow, *exchange.error_headers])
        if self._path != "/health":
            self._log(exchange, scope["method"], (runtime.clock.monotonic() - began) * 1000)

    async def _serve(self, exchange: Exchange, scope: Scope) -> None:
        limit = self._services.config.limits.header_bytes_max
        n_bytes = len(scope["raw_path"]) + sum(len(name) + len(value) for name, value in scope["headers"])
        if n_bytes > limit:
            message = f"the request's path and headers have {n_bytes:,} bytes, limit {limit:,}"
            raise ApiError(ErrorKind.HEADERS_TOO_LARGE, message)
        if self._path is None:
            raise ApiError(ErrorKind.UNKNOWN_ROUTE, f"there is nothing at {scope['path'][:200]!r}; see /docs")
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        operation = self._operations.get(method)
        if operation is None:
            allowed = ", ".join(self._operations)
            message = f"{scope['method']} is not possible here, {allowed} is"
            raise ApiError(ErrorKind.METHOD_NOT_ALLOWED, message)
        if operation.needs_key(exchange):
            with exchange.phases.measure("auth"):
                _check_one_key(scope)
                given = credentials(exchange)
                if given is None and isinstance(self._dialect, GeminiContent):
                    raise missing_key()
                principal = await self._services.auth.principal(given)
            exchange.identify(principal)
            check_access(principal, operation.route.access)
        await operation.call(exchange)

    def _log(self, exchange: Exchange, method: str, ms: float) -> None:
        """One line per request, without anything a client wrote but the model's name."""
        self._services.runtime.log.info(
            "request",
            turn_id=exchange.turn_id,
            tenant=exchange.tenant,
            dialect=self._dialect.name,
            method=method,
            path=self._path or "unknown",
            status=exchange.status,
            ms=round(ms, 3),
            **exchange.log_fields,
        )


class ByClient:
    """An ASGI application for a path that several dialects have: Google's clients send their key in a form of their own,
    Anthropic's name a version, others do neither.
    """

    def __init__(self, other: ASGIApp, *, anthropic: ASGIApp | None, gemini: ASGIApp | None) -> None:
        self._other, self._anthropic, self._gemini = other, anthropic, gemini

    @property
    def applications(self) -> Mapping[str, ASGIApp]:
        """By who is served by them: "other", "anthropic", "gemini"."""
        found = {"other": self._other, "anthropic": self._anthropic, "gemini": self._gemini}
        return {name: app for name, app in found.items() if app is not None}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        names = {name for name, _ in scope["headers"]} if scope["type"] == "http" else set()
        if self._gemini is not None and (GOOGLE_KEY_HEADER in names or GOOGLE_KEY_FIELD.search(scope["query_string"])):
            await self._gemini(scope, receive, send)
        elif self._anthropic is not None and VERSION_HEADER in names:
            await self._anthropic(scope, receive, send)
        else:
            await self._other(scope, receive, send)


def _shared(others: Sequence[Path], *, anthropic: Sequence[Path], gemini: Sequence[Path]) -> list[Path]:
    """All paths; where `others` have one that the two have as well, the client decides."""
    claims = {route.path: route.endpoint for route in anthropic}
    googles = {route.path: route.endpoint for route in gemini}
    mine = {route.path for route in others}
    told_apart = [
        Path(
            route.path,
            ByClient(route.endpoint, anthropic=claims.get(route.path), gemini=googles.get(route.path)),
        )
        for route in others
    ]
    return [*(route for route in gemini if route.path not in mine), *told_apart]


def _router(services: Services, dialect: ModelDialect, paths: Sequence[BaseRoute]) -> Router:
    unknown = PathCalls(services, dialect, None, {})
    return Router(paths, redirect_slashes=False, default=unknown)


def _paths(services: Services, dialect: ModelDialect, entries: Sequence[Entry]) -> list[Path]:
    """One Starlette route per path, for all methods: which of them it has is for `PathCalls` to say."""
    by_path: dict[str, dict[str, Operation]] = {}
    for route, call in entries:
        by_path.setdefault(route.path, {})[route.method] = Operation(call, route)
    return [
        # A model's name may have slashes in it ("org/name").
        Path(path.replace("{model}", "{model:path}"), PathCalls(services, dialect, path, operations))
        for path, operations in by_path.items()
    ]
