"""The life of a cache object: create, look up, update, delete, and the tags that name it.

A created object is on disk before the call answers `pending`; `warming` makes it `ready`. Gemini's are the same objects,
but `create_ready` answers when the object is ready or leaves nothing behind, and one whose time is over is not there.
Objects belong to a tenant and a dialect, and another one's look like none at all. Quotas are checked and taken under one
lock, so simultaneous creates cannot pass them together.
"""

import asyncio
from functools import partial
from typing import Protocol

from keepwarm.cache.objects import Also, Objects, nothing
from keepwarm.config import Config
from keepwarm.core.cache_object import CacheObject, NewObject, ObjectStatus, ObjectUpdate, Page, Tag, Walk
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.principal import Principal, check_allowed
from keepwarm.core.request import ChatRequest, ObjectDialect
from keepwarm.engine import Engine
from keepwarm.gateway.admission import Admission
from keepwarm.gateway.lifetime import exact_expiry, expiry
from keepwarm.gateway.models import ServedModels
from keepwarm.gateway.object_billing import Making, ObjectBilling
from keepwarm.gateway.object_use import CONTENT_NOT_FOUND, ObjectUse, use_object
from keepwarm.gateway.rendering import Rendering
from keepwarm.gateway.runtime import Runtime
from keepwarm.gateway.warming import Warming
from keepwarm.gateway.window import ready_model, served_model

WINDOW_REST = 2  # tokens after the object: a turn evaluates at least its last two
REVIVABLE = (ObjectStatus.INACTIVE, ObjectStatus.ERROR)


class Change(Protocol):
    """A change of an object that is there, and what is done in the same transaction."""

    async def __call__(self, tenant: str, object_id: str, /, *, also: Also) -> CacheObject | None:
        """None: there is no such one."""
        ...


class Caching:
    """All calls on cache objects and tags. Every method takes the tenant first."""

    def __init__(  # noqa: PLR0913 (each is a service of its own, handed in by the composition root)
        self,
        config: Config,
        models: ServedModels,
        admission: Admission,
        objects: Objects,
        rendering: Rendering,
        engine: Engine,
        warming: Warming,
        billing: ObjectBilling,
        runtime: Runtime,
    ) -> None:
        self._config = config.cache
        self._limits = config.limits
        self._models = models
        self._admission = admission
        self._objects = objects
        self._rendering = rendering
        self._engine = engine
        self._warming = warming
        self._billing = billing
        self._clock = runtime.clock
        self._ids = runtime.ids
        self._quota = asyncio.Lock()

    async def create(self, principal: Principal, new: NewObject) -> CacheObject:
        """Store a new object, `pending`, with its tokens taken and what making it costs held.

        Raises ApiError: UNKNOWN_MODEL, INVALID_REQUEST, PROMPT_TOO_LONG, QUOTA_EXCEEDED, RATE_LIMITED, OVERLOADED,
        ENGINE_DOWN, PERMISSION_DENIED for a model that the key may not use.
        """
        check_allowed(principal, new.model)
        with self._admission.enter(principal.organisation):  # rendering is work, too
            async with self._billing.enter(principal) as making:
                obj = await self._read(principal, new)
                await self._insert(making, obj, new.tags)
        self._warming.want(obj)
        return obj

    async def create_ready(self, principal: Principal, new: NewObject) -> CacheObject:
        """Store a new object and compute it; whatever keeps it from being ready leaves nothing behind.

        Raises as `create`, ApiError(TIMEOUT), and what the computation failed with.
        """
        check_allowed(principal, new.model)
        ready_model(self._engine)
        turn_s_max = self._limits.turn_s_max
        try:
            async with asyncio.timeout(turn_s_max):
                with self._admission.enter(principal.organisation):  # it is a turn without an answer, and takes as long
                    async with self._billing.enter(principal) as making:
                        obj = await self._read(principal, new)
                        await self._insert(making, obj, new.tags)
                        return await self._computed(obj)
        except TimeoutError as exc:
            message = f"the cached content was not computed within {turn_s_max:g} s"
            raise ApiError(ErrorKind.TIMEOUT, message) from exc

    async def get(self, tenant: str, object_id: str, dialect: ObjectDialect = "kimi") -> CacheObject:
        """Raises ApiError(UNKNOWN_CACHE)."""
        obj = await self._objects.get(tenant, object_id, dialect)
        if obj is None or (dialect == "gemini" and obj.is_over(self._clock.now())):
            raise _unknown(object_id, dialect)
        return obj

    async def extend(self, principal: Principal, object_id: str, update: ObjectUpdate) -> CacheObject:
        """Gemini's update: another lifetime and nothing else. Only an object that has failed is computed again.

        Raises ApiError: UNKNOWN_CACHE, INVALID_REQUEST for an end that is not in the future, and as `update` for an object
        that has failed.
        """
        now, tenant = self._clock.now(), principal.tenant
        obj = await self.get(tenant, object_id, "gemini")
        end, early = exact_expiry(now, expires_at=update.expires_at, ttl_s=update.ttl_s, early_ns=update.early_ns)
        renewed = await self._objects.renew(
            tenant, object_id, expires_at=end, early_ns=early, now=now, dialect="gemini", also=self._billing.moved(now)
        )
        if renewed is not None:
            return renewed
        change = partial(self._objects.update, now=now, expires_at=end, early_ns=early, dialect="gemini")
        return await self._started_over(principal, obj, change, end)

    async def walk(self, tenant: str, walk: Walk) -> list[CacheObject]:
        """The tenant's Gemini objects from a place on, newest first, without their messages and tools."""
        return await self._objects.walk(tenant, "gemini", walk, self._clock.now())

    async def update(
        self, principal: Principal, object_id: str, update: ObjectUpdate, *, n_places: int = 1
    ) -> CacheObject:
        """Change metadata or lifetime; the object is `pending` again. One that is over or has failed is made anew by it.

        `n_places` as in `ObjectBilling.enter`. Raises ApiError: UNKNOWN_CACHE, INVALID_REQUEST; and where the object is
        made anew PERMISSION_DENIED, QUOTA_EXCEEDED, RATE_LIMITED, OVERLOADED: then it stays as it was.
        """
        now = self._clock.now()
        expires_at = expiry(self._config, now, expires_at=update.expires_at, ttl_s=update.ttl_s)
        obj = await self.get(principal.tenant, object_id)
        change = partial(self._objects.update, now=now, metadata=update.metadata, expires_at=expires_at, dialect="kimi")
        return await self._started_over(principal, obj, change, expires_at, n_places)

    async def renew(self, principal: Principal, object_id: str, ttl_s: int) -> CacheObject:
        """`reset_ttl` on use, within a turn: a live object goes on under its status, any other is made anew.

        Raises as `update`.
        """
        now = self._clock.now()
        expires_at = expiry(self._config, now, expires_at=None, ttl_s=ttl_s)
        assert expires_at is not None
        moved = self._billing.moved(now)
        renewed = await self._objects.renew(
            principal.tenant, object_id, expires_at=expires_at, now=now, dialect="kimi", also=moved
        )
        if renewed is not None:
            return renewed
        return await self.update(principal, object_id, ObjectUpdate(ttl_s=ttl_s), n_places=0)

    async def delete(self, tenant: str, object_id: str, dialect: ObjectDialect = "kimi") -> None:
        """Raises ApiError(UNKNOWN_CACHE)."""
        if dialect == "gemini":
            await self.get(tenant, object_id, dialect)  # one whose time is over
        if not await self._objects.delete(tenant, object_id, dialect):
            raise _unknown(object_id, dialect)
        await self._billing.deleted(object_id)
        await self._warming.drop(object_id)

    async def bind_tag(self, tenant: str, name: str, object_id: str) -> Tag:
        """Make `name` mean this object, whatever it meant before. Raises ApiError(UNKNOWN_CACHE)."""
        return await self._objects.bind(Tag(name, tenant, object_id, int(self._clock.now())), "kimi")

    async def tag(self, tenant: str, name: str) -> Tag:
        """Raises ApiError(UNKNOWN_CACHE)."""
        tag = await self._objects.tag(tenant, name)
        if tag is None:
            raise ApiError(ErrorKind.UNKNOWN_CACHE, f"tag {name!r} not found")
        return tag

    async def tags(self, tenant: str, page: Page) -> list[Tag]:
        """One page of the tenant's tags; `after` and `before` are tag names."""
        return await self._objects.tags(tenant, page)

    async def tagged(self, tenant: str, name: str) -> CacheObject:
        """The object a tag points to. Raises ApiError(UNKNOWN_CACHE)."""
        return await self.get(tenant, (await self.tag(tenant, name)).object_id)

    async def unbind_tag(self, tenant: str, name: str) -> None:
        """An unknown tag is no error."""
        await self._objects.unbind(tenant, name)

    async def applied(self, tenant: str, request: ChatRequest) -> ObjectUse:
        """The request with the messages of the cache object it names, by id or tag.

        Raises ApiError: UNKNOWN_MODEL, INVALID_REQUEST for a lifetime it cannot have, and as `use_object`.
        """
        served, use = self._models.resolve(request.model), request.cache
        if use is None:
            return ObjectUse(request)
        expiry(self._config, self._clock.now(), expires_at=None, ttl_s=use.reset_ttl_s, param="reset_ttl")
        if use.tag is not None:
            found = await self._objects.by_tag(tenant, use.tag, use.dialect)
        else:
            assert use.object_id is not None
            found = await self._objects.get(tenant, use.object_id, use.dialect)
        same_model = found is not None and self._models.means(found.model, served)
        return use_object(request, use, found, same_model=same_model, now=self._clock.now())

    def note_use(self, obj: CacheObject) -> None:
        """A turn has used the object: after a restart of the engine it comes before those that nobody asks for."""
        self._warming.used(obj.id)

    async def _read(self, principal: Principal, new: NewObject) -> CacheObject:
        """A new object, `pending` and not stored yet, with its documents read and its length known."""
        now, tenant = self._clock.now(), principal.tenant
        expires_at, early_ns = self._lifetime(new, now)
        self._models.resolve(new.model)
        read = await self._rendering.with_documents(tenant, ChatRequest(new.model, new.messages))
        n_tokens = (await self._rendering.object_prefix(tenant, read.messages, new.tools)).prompt.n_tokens
        self._check_size(n_tokens, new.dialect)
        return CacheObject(
            id=self._ids.new("cache-") if new.dialect == "kimi" else self._ids.new("") + self._ids.new(""),
            tenant=tenant,
            model=new.model,
            status=ObjectStatus.PENDING,
            created_at=int(now),
            expires_at=expires_at,
            messages=read.messages,
            tools=new.tools,
            n_tokens=n_tokens,
            name=new.name,
            description=new.description,
            metadata=new.metadata,
            dialect=new.dialect,
            tool_choice=new.tool_choice,
            early_ns=early_ns,
            project=principal.project if principal.is_billed else None,
            key_id=principal.key_id,
        )

    async def _insert(self, making: Making, obj: CacheObject, tags: tuple[str, ...]) -> None:
        """Whatever fails leaves nothing behind. Raises ApiError: QUOTA_EXCEEDED, RATE_LIMITED, OVERLOADED."""
        await self._billing.admit(making, obj.n_tokens)
        async with self._quota:
            await self._check_quota(obj.tenant, obj.n_tokens, obj.created_at)
            async with self._billing.held(making, obj):
                is_stored = False
                try:
                    await self._objects.insert(obj, tags)
                    is_stored = True
                finally:
                    if not is_stored:  # given up in the middle, it may be stored all the same
                        await self._objects.delete(obj.tenant, obj.id)

    async def _computed(self, obj: CacheObject) -> CacheObject:
        """The object once it is ready. Raises ApiError when it cannot be, or is deleted meanwhile."""
        is_made = False
        try:
            failure = await self._warming.computed(obj)
            if failure is not None:
                raise ApiError(failure.kind, failure.message, retry_after_s=failure.retry_after_s)
            found = await self._objects.get(obj.tenant, obj.id, obj.dialect)
            if found is None and not obj.is_over(self._clock.now()):
                raise _unknown(obj.id, obj.dialect)
            is_made = True
            return found or obj  # with a lifetime that was shorter than its making
        finally:
            if not is_made:
                await self._objects.delete(obj.tenant, obj.id)
                await self._billing.deleted(obj.id)
                await self._warming.drop(obj.id)

    async def _started_over(
        self, principal: Principal, obj: CacheObject, change: Change, expires_at: int | None, n_places: int = 1
    ) -> CacheObject:
        """The object after `change`, `pending`; `expires_at` is its end then, None the one it has."""
        if _is_revived(obj, self._clock.now(), expires_at):
            changed = await self._revived(principal, obj, change, expires_at, n_places)
        else:
            changed = await self._changed(obj, change)
        self._warming.want(changed)
        return changed

    async def _changed(self, obj: CacheObject, change: Change) -> CacheObject:
        """Raises ApiError(UNKNOWN_CACHE)."""
        now = self._clock.now()
        return await _applied(obj, change, nothing if obj.is_over(now) else self._billing.moved(now))

    async def _revived(
        self, principal: Principal, obj: CacheObject, change: Change, expires_at: int | None, n_places: int
    ) -> CacheObject:
        """`change` gives the object another life, and has it computed: limits, quota and money are those of a new one."""
        check_allowed(principal, obj.model)
        async with self._billing.enter(principal, n_places) as making:
            await self._billing.admit(making, obj.n_tokens)
            async with self._quota:
                now = self._clock.now()
                found = await self.get(obj.tenant, obj.id, obj.dialect)
                if not _is_revived(found, now, expires_at):  # another call was faster
                    return await self._changed(found, change)
                await self._check_quota(obj.tenant, obj.n_tokens, now)
                async with self._billing.held(making, obj):
                    try:
                        return await _applied(found, change)
                    except BaseException:  # cancelled, say: it may have been written all the same
                        making.has_begun = True  # while it is not known
                        making.has_begun = await self._is_changed(found)
                        raise

    async def _is_changed(self, obj: CacheObject) -> bool:
        """Whether the object is no longer as it was; one that is to be computed is wanted."""
        found = await self._objects.get(obj.tenant, obj.id, obj.dialect)
        if found is None or found.generation == obj.generation:
            return False
        self._warming.want(found)
        return True

    def _lifetime(self, new: NewObject, now: float) -> tuple[int, int]:
        """(expires_at, early_ns). Raises ApiError(INVALID_REQUEST)."""
        if new.dialect == "gemini":
            return exact_expiry(now, expires_at=new.expires_at, ttl_s=new.ttl_s, early_ns=new.early_ns)
        expires_at = expiry(self._config, now, expires_at=new.expires_at, ttl_s=new.ttl_s)
        return (int(now) + self._config.default_ttl_s if expires_at is None else expires_at), 0

    def _check_size(self, n_tokens: int, dialect: ObjectDialect) -> None:
        n_ctx = served_model(self._engine).n_ctx
        n_tokens_min = min(self._config.object_tokens_min, n_ctx // 2)
        if dialect == "gemini" and n_tokens < n_tokens_min:
            message = (  # the one clients look for
                f"Cached content is too small. total_token_count={n_tokens}, min_total_token_count={n_tokens_min}"
            )
            raise ApiError(ErrorKind.INVALID_REQUEST, message, param="contents")
        if n_tokens + WINDOW_REST > n_ctx:
            message = (
                f"messages and tools have {n_tokens} tokens; the model's window of {n_ctx} leaves {n_ctx - WINDOW_REST}"
            )
            raise ApiError(ErrorKind.PROMPT_TOO_LONG, message, param="messages")
        if dialect == "kimi" and n_tokens > self._config.object_tokens_max:
            message = f"messages and tools have {n_tokens} tokens; a cache may have {self._config.object_tokens_max}"
            raise ApiError(ErrorKind.INVALID_REQUEST, message, param="messages")

    async def _check_quota(self, tenant: str, n_tokens: int, now: float) -> None:
        n_objects, n_live = await self._objects.usage(tenant, now)
        if n_objects >= self._limits.objects_per_tenant_max:
            message = f"you have {n_objects} live caches, limit {self._limits.objects_per_tenant_max}; delete one first"
            raise ApiError(ErrorKind.QUOTA_EXCEEDED, message)
        if n_live + n_tokens > self._config.tenant_tokens_max:
            message = (
                f"your live caches hold {n_live} tokens and this one has {n_tokens}, "
                f"limit {self._config.tenant_tokens_max}; delete one first"
            )
            raise ApiError(ErrorKind.QUOTA_EXCEEDED, message)
        n_bytes_max = self._config.tenant_lease_bytes_max
        if n_bytes_max is None:
            return
        bytes_per_token = served_model(self._engine).bytes_per_token
        n_bytes, n_bytes_live = n_tokens * bytes_per_token, n_live * bytes_per_token
        if n_bytes_live + n_bytes > n_bytes_max:
            message = (
                f"this cache needs {n_bytes:,} bytes and your live caches hold {n_bytes_live:,}, "
                f"limit {n_bytes_max:,}; delete one first"
            )
            raise ApiError(ErrorKind.QUOTA_EXCEEDED, message)

    # The last of the class: below its definition `list` would mean this method.
    async def list(self, tenant: str, page: Page) -> list[CacheObject]:
        """One page of the tenant's Kimi objects. Raises ApiError(INVALID_REQUEST) for an unknown `after` or `before`."""
        return await self._objects.list(tenant, page, "kimi")


def _unknown(object_id: str, dialect: ObjectDialect = "kimi") -> ApiError:
    message = CONTENT_NOT_FOUND if dialect == "gemini" else f"cache {object_id!r} not found"
    return ApiError(ErrorKind.UNKNOWN_CACHE, message)


async def _applied(obj: CacheObject, change: Change, also: Also = nothing) -> CacheObject:
    """Raises ApiError(UNKNOWN_CACHE)."""
    changed = await change(obj.tenant, obj.id, also=also)
    if changed is None:
        raise _unknown(obj.id, obj.dialect)
    return changed


def _is_revived(obj: CacheObject, now: float, expires_at: int | None) -> bool:
    """Whether an update that ends the object's life at `expires_at` (None: as it is) begins another one.

    With an end that has passed nothing is computed.
    """
    return obj.effective_status(now) in REVIVABLE and (expires_at is not None or not obj.is_over(now))
