"""Gemini's calls: generating, counting, models and cachedContents. Files are in uploads.py.

The model is in the path and says what is to be done behind a colon; a stream is events with `alt=sse`, else one JSON array.
"""

from msgspec.structs import replace

from keepwarm.core.principal import Access, allowed_names
from keepwarm.core.request import ObjectDialect
from keepwarm.dialects import WireBounds
from keepwarm.dialects.gemini import GeminiContent, stream_shape
from keepwarm.dialects.gemini_answer import GeminiTokenCountReply, GenerateContentReply
from keepwarm.dialects.gemini_caching import (
    ContentListReply,
    ContentReply,
    ContentUpdateRequest,
    GeminiCaching,
    NewContentRequest,
)
from keepwarm.dialects.gemini_error import GeminiErrorBody
from keepwarm.dialects.gemini_files import GeminiFiles
from keepwarm.dialects.gemini_model import GeminiModel, GeminiModelList, parse_models_page
from keepwarm.dialects.gemini_request import GeminiCountTokensRequest, GenerateContentRequest
from keepwarm.dialects.openapi import Route
from keepwarm.server.endpoints import ChatCalls, Entry, Services, query
from keepwarm.server.exchange import EVENT_STREAM_TYPE, JSON_TYPE, Exchange
from keepwarm.server.uploads import (
    GeminiFileCalls,
    gemini_discovery_entries,
    gemini_file_entries,
    gemini_upload_entries,
)

OBJECTS: ObjectDialect = "gemini"  # whose cache objects these calls see


class GenerateCalls(ChatCalls):
    """Models and what is done with them."""

    def __init__(self, services: Services, dialect: GeminiContent) -> None:
        super().__init__(services, dialect)
        self._gemini = dialect

    async def generate(self, exchange: Exchange) -> None:
        """POST /models/{model}:generateContent."""
        body = await exchange.body()
        with exchange.phases.measure("parse"):
            parsed = self._gemini.parse_generate(exchange.path_params["model"], "whole", body)
        await self.answer(exchange, parsed)

    async def stream(self, exchange: Exchange) -> None:
        """POST /models/{model}:streamGenerateContent."""
        body = await exchange.body()
        with exchange.phases.measure("parse"):
            shape = stream_shape(query(exchange))
            parsed = self._gemini.parse_generate(exchange.path_params["model"], shape, body)
        await self.answer(exchange, parsed, JSON_TYPE if parsed.is_array else EVENT_STREAM_TYPE)

    async def count_tokens(self, exchange: Exchange) -> None:
        """POST /models/{model}:countTokens."""
        request = self._gemini.parse_count_tokens(exchange.path_params["model"], await exchange.body())
        n_tokens, n_cached = await self._services.turns.count_tokens(exchange.principal, request, exchange.phases)
        await exchange.reply(self._gemini.render_token_count(n_tokens, n_cached))

    async def models(self, exchange: Exchange) -> None:
        """GET /models, page by page."""
        services, page = self._services, parse_models_page(query(exchange))
        names = allowed_names(exchange.principal, services.models.names)
        await exchange.reply(self._gemini.render_models(names, services.created_at, self._n_ctx(), page))


class CachedContentCalls:
    """cachedContents."""

    def __init__(self, services: Services, dialect: GeminiCaching) -> None:
        self._caching = services.caching
        self._dialect = dialect

    async def create(self, exchange: Exchange) -> None:
        """POST /cachedContents: answers when it is computed and durable; a client that leaves before leaves nothing."""
        new = self._dialect.parse_create(await exchange.body())
        obj = await exchange.unless_gone(self._caching.create_ready(exchange.principal, new))
        exchange.log_fields["object_id"] = obj.id
        await exchange.reply(self._dialect.render_object(obj))

    async def list(self, exchange: Exchange) -> None:
        """GET /cachedContents."""
        walk = self._dialect.parse_list(query(exchange))
        found = await self._caching.walk(exchange.tenant, replace(walk, limit=walk.limit + 1))
        shown = found[: walk.limit]
        await exchange.reply(self._dialect.render_list(shown, has_more=len(found) > walk.limit))

    async def get(self, exchange: Exchange) -> None:
        """GET /cachedContents/{cache_id}."""
        obj = await self._caching.get(exchange.tenant, exchange.path_params["cache_id"], OBJECTS)
        await exchange.reply(self._dialect.render_object(obj))

    async def patch(self, exchange: Exchange) -> None:
        """PATCH /cachedContents/{cache_id}."""
        update = self._dialect.parse_patch(query(exchange), await exchange.body())
        obj = await self._caching.extend(exchange.principal, exchange.path_params["cache_id"], update)
        await exchange.reply(self._dialect.render_object(obj))

    async def delete(self, exchange: Exchange) -> None:
        """DELETE /cachedContents/{cache_id}."""
        await self._caching.delete(exchange.tenant, exchange.path_params["cache_id"], OBJECTS)
        await exchange.reply(self._dialect.render_deleted())


class GeminiEntries:
    """What Gemini's dialect serves: `all` under a version, `uploads` under /upload and a version, `discovery` at a root."""

    def __init__(self, services: Services, dialect: GeminiContent, bounds: WireBounds) -> None:
        calls = GenerateCalls(services, dialect)
        caching = CachedContentCalls(services, GeminiCaching(bounds))
        limits = services.config.limits
        files = GeminiFileCalls(services.files, GeminiFiles(limits.file_ttl_s), limits)
        generate = Route(
            "POST",
            "/models/{model}:generateContent",
            Access.USE,
            "Answer a conversation",
            request=GenerateContentRequest,
            response=GenerateContentReply,
        )
        stream = replace(
            generate,
            path="/models/{model}:streamGenerateContent",
            summary="The same, as it is made: events with alt=sse, else an array",
            events=GenerateContentReply,
        )
        count = Route(
            "POST",
            "/models/{model}:countTokens",
            Access.READ,
            "Count the tokens of a prompt",
            request=GeminiCountTokensRequest,
            response=GeminiTokenCountReply,
        )
        generating: list[Entry] = [
            (generate, calls.generate),
            (stream, calls.stream),
            (count, calls.count_tokens),
        ]
        models: list[Entry] = [
            (
                Route("GET", "/models", Access.READ, "The names requests may use", response=GeminiModelList),
                calls.models,
            ),
            (Route("GET", "/models/{model}", Access.READ, "One of them", response=GeminiModel), calls.model),
        ]
        one = "/cachedContents/{cache_id}"
        objects: list[Entry] = [
            (
                Route(
                    "POST",
                    "/cachedContents",
                    Access.USE,
                    "Create a cache",
                    request=NewContentRequest,
                    response=ContentReply,
                ),
                caching.create,
            ),
            (Route("GET", "/cachedContents", Access.READ, "List caches", response=ContentListReply), caching.list),
            (Route("GET", one, Access.READ, "One cache", response=ContentReply), caching.get),
            (
                Route(
                    "PATCH", one, Access.USE, "Change its expiry", request=ContentUpdateRequest, response=ContentReply
                ),
                caching.patch,
            ),
            (Route("DELETE", one, Access.USE, "Delete it"), caching.delete),
        ]
        self.uploads = gemini_upload_entries(files)
        self.discovery = gemini_discovery_entries(files)
        self.all = [
            *((route.tagged("chat", GeminiErrorBody), call) for route, call in generating),
            *((route.tagged("models", GeminiErrorBody), call) for route, call in models),
            *((route.tagged("caching", GeminiErrorBody), call) for route, call in objects),
            *gemini_file_entries(files),
        ]
