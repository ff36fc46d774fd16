"""Cache objects and tags at rest: queries, and nothing that decides.

Which status follows which is `core.cache_object.TRANSITIONS`; this module applies it to rows. Every change is one
transaction. A computation of an object's prefix may come back late, so its outcome is a compare-and-set on the
`generation` it was started for: an object that was updated meanwhile takes no notice of it. Rows are written for the
tenant that owns them, and every read a client can cause names the tenant; `find` and `everyones` are for the operator
and for ids that come from the engine. Where a caller names a dialect, another one's object looks like none.
"""

from collections.abc import Callable
from typing import Any

import msgspec
import sqlalchemy as sa

from keepwarm.core.cache_object import NS_PER_S, CacheObject, Cause, ObjectStatus, Page, Tag, Walk, next_status
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.request import Message, ObjectDialect, Tool, ToolChoice
from keepwarm.storage import Storage, count
from keepwarm.tables import cache_objects, cache_tags

Pairs = tuple[tuple[str, str], ...]

LIVE = (ObjectStatus.PENDING.value, ObjectStatus.READY.value)
FORGETS = ("gemini",)  # no client of these can name an object whose time is over, so nothing is kept of it
STARTS_OVER = (Cause.UPDATED, Cause.ENGINE_LOST)  # these make a computation that is under way worthless


def after(
    obj: CacheObject, cause: Cause, *, n_tokens: int | None = None, error: str | None = None
) -> CacheObject | None:
    """The object after `cause`, or None when the cause means nothing in its status."""
    status = next_status(obj.status, cause)
    if status is None:
        return None
    return msgspec.structs.replace(
        obj,
        status=status,
        generation=obj.generation + (cause in STARTS_OVER),
        n_tokens=obj.n_tokens if n_tokens is None else n_tokens,
        error=error,
    )


Also = Callable[[sa.Connection, CacheObject], None]  # in the same transaction, with the object as it is then


def nothing(_connection: sa.Connection, _obj: CacheObject) -> None:
    """The usual `Also`."""


KEPT_MAX = 10_000  # of a tenant: what is over can be brought back, and has its messages in the database until then
TAGS_MAX = 10_000  # of a tenant


class Objects:
    """The cache objects of all tenants. Times are unix seconds.

    Of a tenant at most `kept_max` are kept, those that are over among them, and `tags_max` tags.
    """

    def __init__(self, storage: Storage, *, kept_max: int = KEPT_MAX, tags_max: int = TAGS_MAX) -> None:
        self._storage = storage
        self._kept_max = kept_max
        self._tags_max = tags_max

    async def insert(self, obj: CacheObject, tags: tuple[str, ...] = ()) -> None:
        """Add an object with a new id, and bind these tags to it, taking them from other objects of the tenant.

        Where that is one too many, what has been over for the longest time is deleted. Raises ApiError(QUOTA_EXCEEDED)
        for too many tags.
        """

        def add(connection: sa.Connection) -> None:
            connection.execute(sa.insert(cache_objects).values(_row(obj)))
            for tag in tags:
                self._bind(connection, Tag(tag=tag, tenant=obj.tenant, object_id=obj.id, created_at=obj.created_at))
            self._forget(connection, obj.tenant, obj.created_at)

        await self._storage.run(add)

    async def get(self, tenant: str, object_id: str, dialect: ObjectDialect | None = None) -> CacheObject | None:
        return await self._storage.run(lambda connection: _one(connection, _owned(tenant, object_id, dialect)))

    async def by_tag(self, tenant: str, tag: str, dialect: ObjectDialect | None = None) -> CacheObject | None:
        """The object a tag points to."""
        bound = sa.select(cache_tags.c.object_id).where(cache_tags.c.tenant == tenant, cache_tags.c.tag == tag)
        wanted = sa.and_(cache_objects.c.tenant == tenant, cache_objects.c.id.in_(bound), _of(dialect))
        return await self._storage.run(lambda connection: _one(connection, wanted))

    async def update(
        self,
        tenant: str,
        object_id: str,
        *,
        now: float,
        metadata: Pairs | None = None,
        expires_at: int | None = None,
        early_ns: int = 0,
        dialect: ObjectDialect | None = None,
        also: Also = nothing,
    ) -> CacheObject | None:
        """Change what is not None and start over (`UPDATED`); None when the tenant has no such object.

        `early_ns` goes with `expires_at`; `also` is done with it.
        """

        def change(connection: sa.Connection) -> CacheObject | None:
            old = _one(connection, _owned(tenant, object_id, dialect))
            if old is None:
                return None
            new = after(old, Cause.UPDATED)
            assert new is not None, f"an update means something in every status, also {old.status}"
            new = msgspec.structs.replace(new, updated_at=int(now))
            if metadata is not None:
                new = msgspec.structs.replace(new, metadata=metadata)
            if expires_at is not None:
                new = msgspec.structs.replace(new, expires_at=expires_at, early_ns=early_ns)
            _write(connection, new)
            also(connection, new)
            return new

        return await self._storage.run(change)

    async def renew(
        self,
        tenant: str,
        object_id: str,
        *,
        expires_at: int,
        now: float,
        early_ns: int = 0,
        dialect: ObjectDialect | None = None,
        also: Also = nothing,
    ) -> CacheObject | None:
        """Give an object that is live at `now` another lifetime and change nothing else; None when there is no such one.

        `also` is done with it.
        """

        def change(connection: sa.Connection) -> CacheObject | None:
            old = _one(connection, _owned(tenant, object_id, dialect))
            if old is None or next_status(old.effective_status(now), Cause.RENEWED) is None:
                return None
            new = msgspec.structs.replace(old, expires_at=expires_at, early_ns=early_ns, updated_at=int(now))
            _write(connection, new)
            also(connection, new)
            return new

        return await self._storage.run(change)

    async def settle(
        self, object_id: str, generation: int, cause: Cause, *, n_tokens: int | None = None, error: str | None = None,
        also: Also = nothing,
    ) -> CacheObject | None:  # fmt: skip
        """Apply the outcome of the computation that was started for `generation`; `also` is done with it.

        None, and no change, when the object is gone, was updated since, or is in a status where the cause means nothing.
        """

        def change(connection: sa.Connection) -> CacheObject | None:
            old = _one(connection, cache_objects.c.id == object_id)
            if old is None or old.generation != generation:
                return None
            new = after(old, cause, n_tokens=n_tokens, error=error)
            if new is not None:
                _write(connection, new)
                also(connection, new)
            return new

        return await self._storage.run(change)

    async def delete(self, tenant: str, object_id: str, dialect: ObjectDialect | None = None) -> bool:
        """Delete an object and its tags; False when the tenant has no such object."""
        statement = sa.delete(cache_objects).where(_owned(tenant, object_id, dialect))
        return await self._storage.run(lambda connection: connection.execute(statement).rowcount == 1)

    async def usage(self, tenant: str, now: float) -> tuple[int, int]:
        """How many live (pending or ready, unexpired) objects the tenant has, and their tokens in all."""
        query = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(cache_objects.c.n_tokens), 0)).where(
            cache_objects.c.tenant == tenant, _live(now)
        )

        def read(connection: sa.Connection) -> tuple[int, int]:
            n_objects, n_tokens = connection.execute(query).one()
            return n_objects, n_tokens

        return await self._storage.run(read)

    async def engine_lost(self, now: float, held: frozenset[str] = frozenset()) -> list[CacheObject]:
        """The engine started anew and holds the leases of `held`, no others: other ready objects start over.

        Returns all that are now to be computed.
        """
        ready = sa.select(cache_objects.c.id).where(cache_objects.c.status == ObjectStatus.READY.value)

        def change(connection: sa.Connection) -> list[CacheObject]:
            for object_id in set(connection.execute(ready).scalars()) - held:  # ids first: messages may be large
                old = _one(connection, cache_objects.c.id == object_id)
                assert old is not None, "read in this transaction"
                new = after(old, Cause.ENGINE_LOST)
                assert new is not None, "a ready object can lose its state"
                _write(connection, new)
            return _many(connection, _pending(now))

        return await self._storage.run(change)

    async def pending(self, now: float) -> list[CacheObject]:
        """Unexpired objects still to be computed, oldest first."""
        return await self._storage.run(lambda connection: _many(connection, _pending(now)))

    async def live_ids(self, now: float) -> set[str]:
        """Ids of everyone's objects that are pending or ready, and unexpired: those whose state is to be kept."""
        query = sa.select(cache_objects.c.id).where(_live(now))
        return await self._storage.run(lambda connection: set(connection.execute(query).scalars()))

    async def expire(self, now: float, limit: int) -> list[str]:
        """Mark at most `limit` objects whose time is over, the longest expired first; returns their ids.

        Those of a dialect that `FORGETS` are deleted. Look-ups do not wait for this: they go by the object's own
        `effective_status` and `is_over`.
        """
        columns = cache_objects.c
        kept = sa.and_(columns.status.in_(LIVE), columns.expires_at <= now)
        failed = sa.and_(
            columns.status == ObjectStatus.ERROR.value, columns.expires_at <= now, columns.dialect.in_(FORGETS)
        )
        query = sa.select(columns.id, columns.status, columns.dialect).where(sa.or_(kept, failed))

        def change(connection: sa.Connection) -> list[str]:
            rows = connection.execute(query.order_by(columns.expires_at, columns.seq).limit(limit)).all()
            for row in rows:
                if row.dialect in FORGETS:
                    connection.execute(sa.delete(cache_objects).where(columns.id == row.id))
                    continue
                status = next_status(ObjectStatus(row.status), Cause.EXPIRED)
                assert status is not None, "a live object can expire"
                connection.execute(sa.update(cache_objects).where(columns.id == row.id).values(status=status.value))
            return [row.id for row in rows]

        return await self._storage.run(change)

    async def bind(self, tag: Tag, dialect: ObjectDialect | None = None) -> Tag:
        """Point a tag at an object; an existing tag of that name moves and keeps its `created_at`.

        Raises ApiError: UNKNOWN_CACHE when the tenant has no such object, QUOTA_EXCEEDED for a tag too many.
        """

        def change(connection: sa.Connection) -> Tag:
            wanted = sa.select(cache_objects.c.seq).where(_owned(tag.tenant, tag.object_id, dialect))
            if connection.execute(wanted).one_or_none() is None:
                raise ApiError(ErrorKind.UNKNOWN_CACHE, f"there is no cache {tag.object_id}", param="cache_id")
            return self._bind(connection, tag)

        return await self._storage.run(change)

    async def tag(self, tenant: str, name: str) -> Tag | None:
        return await self._storage.run(lambda connection: _tag(connection, tenant, name))

    async def tags(self, tenant: str, page: Page) -> list[Tag]:
        """A page of the tenant's tags by time of creation; `Page.metadata` plays no part.

        Raises ApiError(INVALID_REQUEST) when `after` or `before` is no tag of the tenant.
        """

        def read(connection: sa.Connection) -> list[Tag]:
            names = _page(connection, cache_tags, cache_tags.c.tag, tenant, msgspec.structs.replace(page, metadata=()))
            query = sa.select(cache_tags).where(cache_tags.c.tenant == tenant, cache_tags.c.tag.in_(names))
            found = {row.tag: _tag_of(row) for row in connection.execute(query)}
            return [found[name] for name in names]

        return await self._storage.run(read)

    async def unbind(self, tenant: str, name: str) -> None:
        """Delete a tag; an unknown one is no error."""
        statement = sa.delete(cache_tags).where(cache_tags.c.tenant == tenant, cache_tags.c.tag == name)
        await self._storage.run(lambda connection: connection.execute(statement))

    async def find(self, object_id: str) -> CacheObject | None:
        """An object whoever owns it. For the operator and the engine's own ids, never for a client."""
        return await self._storage.run(lambda connection: _one(connection, cache_objects.c.id == object_id))

    async def everyones(self, tenant: str | None = None) -> list[CacheObject]:
        """The objects of all tenants or of one, oldest first. For the operator's command line, never for a client."""
        wanted = sa.true() if tenant is None else cache_objects.c.tenant == tenant
        return await self._storage.run(lambda connection: _many(connection, wanted))

    async def walk(self, tenant: str, dialect: ObjectDialect, walk: Walk, now: float) -> list[CacheObject]:
        """Up to `walk.limit` of the tenant's objects whose time is not over, without their messages and tools."""
        columns = cache_objects.c
        empty = sa.literal(b"[]", sa.LargeBinary)
        light: list[sa.ColumnElement[Any]] = [
            empty.label(column.name) if column.name in ("messages", "tools") else column for column in columns
        ]
        query = sa.select(*light).where(
            columns.tenant == tenant,
            columns.dialect == dialect,
            columns.expires_at - columns.early_ns / float(NS_PER_S) > now,
        )
        order = (columns.created_at, columns.id)
        if walk.after is not None:
            query = query.where(sa.tuple_(*order) < sa.tuple_(*walk.after))
        query = query.order_by(*(column.desc() for column in order)).limit(walk.limit)
        return await self._storage.run(lambda connection: [_object(row) for row in connection.execute(query)])

    # The last of the class: below its definition `list` would mean this method.
    async def list(self, tenant: str, page: Page, dialect: ObjectDialect | None = None) -> list[CacheObject]:
        """A page of the tenant's objects by time of creation; see `_page` for what `after` and `before` mean.

        Raises ApiError(INVALID_REQUEST) when `after` or `before` is no object of the tenant.
        """

        def read(connection: sa.Connection) -> list[CacheObject]:
            ids = _page(connection, cache_objects, cache_objects.c.id, tenant, page, _of(dialect))
            rows = connection.execute(sa.select(cache_objects).where(cache_objects.c.id.in_(ids)))
            found = {row.id: _object(row) for row in rows}
            return [found[object_id] for object_id in ids]

        return await self._storage.run(read)

    def _bind(self, connection: sa.Connection, tag: Tag) -> Tag:
        """Raises ApiError(QUOTA_EXCEEDED)."""
        old = _tag(connection, tag.tenant, tag.tag)
        if old is None:
            n_tags = count(connection, cache_tags, cache_tags.c.tenant == tag.tenant)
            if n_tags >= self._tags_max:
                message = f"you have {n_tags:,} tags, limit {self._tags_max:,}; delete one first"
                raise ApiError(ErrorKind.QUOTA_EXCEEDED, message)
            connection.execute(sa.insert(cache_tags).values(msgspec.structs.asdict(tag)))
            return tag
        named = sa.and_(cache_tags.c.tenant == tag.tenant, cache_tags.c.tag == tag.tag)
        connection.execute(sa.update(cache_tags).where(named).values(object_id=tag.object_id))
        return msgspec.structs.replace(old, object_id=tag.object_id)

    def _forget(self, connection: sa.Connection, tenant: str, now: float) -> None:
        """Delete what is over, the longest first, until there are no more than may be kept."""
        columns = cache_objects.c
        n_more = count(connection, cache_objects, columns.tenant == tenant) - self._kept_max
        if n_more <= 0:
            return
        is_over = sa.and_(columns.tenant == tenant, columns.status.not_in(LIVE), columns.expires_at <= now)
        oldest = sa.select(columns.seq).where(is_over).order_by(columns.expires_at, columns.seq).limit(n_more)
        connection.execute(sa.delete(cache_objects).where(columns.seq.in_(oldest)))


def _page(
    connection: sa.Connection, table: sa.Table, key: sa.Column[str], tenant: str, page: Page,
    among: sa.ColumnElement[bool] | None = None,
) -> list[str]:  # fmt: skip
    """Keys of a page, in the order of the list (creation, or its reverse).

    `after` starts the page behind that key, `before` ends it ahead of that key. With `before` alone the page is the one
    that ends there, so that a client can walk back:

        list        a b c d e f g       limit 2
        after=b         c d
        before=f          d e
        after=b, before=d   c
    """
    order = (table.c.created_at, table.c.seq)
    mine = table.c.tenant == tenant if among is None else sa.and_(table.c.tenant == tenant, among)
    walks_back = page.before is not None and page.after is None
    query = sa.select(key, cache_objects.c.metadata) if page.metadata else sa.select(key).limit(page.limit)
    query = query.where(mine)
    for name, anchor in (("after", page.after), ("before", page.before)):
        if anchor is None:
            continue
        at = connection.execute(sa.select(*order).where(mine, key == anchor)).one_or_none()
        if at is None:
            raise ApiError(ErrorKind.INVALID_REQUEST, f"{name}: there is no {anchor!r} in this list", param=name)
        is_later = (name == "after") != page.descending
        query = query.where(sa.tuple_(*order) > sa.tuple_(*at) if is_later else sa.tuple_(*order) < sa.tuple_(*at))
    query = query.order_by(*(column.desc() if page.descending != walks_back else column for column in order))
    rows = connection.execute(query).all()
    wanted = set(page.metadata)
    keys = [row[0] for row in rows if not wanted or wanted <= set(_pairs(row.metadata) or ())][: page.limit]
    return keys[::-1] if walks_back else keys


def _tag(connection: sa.Connection, tenant: str, name: str) -> Tag | None:
    query = sa.select(cache_tags).where(cache_tags.c.tenant == tenant, cache_tags.c.tag == name)
    row = connection.execute(query).one_or_none()
    return None if row is None else _tag_of(row)


def _tag_of(row: sa.Row[tuple[object, ...]]) -> Tag:
    return Tag(tag=row.tag, tenant=row.tenant, object_id=row.object_id, created_at=row.created_at)


def _owned(tenant: str, object_id: str, dialect: ObjectDialect | None = None) -> sa.ColumnElement[bool]:
    return sa.and_(cache_objects.c.tenant == tenant, cache_objects.c.id == object_id, _of(dialect))


def _of(dialect: ObjectDialect | None) -> sa.ColumnElement[bool]:
    return sa.true() if dialect is None else cache_objects.c.dialect == dialect


def _live(now: float) -> sa.ColumnElement[bool]:
    return sa.and_(cache_objects.c.status.in_(LIVE), cache_objects.c.expires_at > now)


def _pending(now: float) -> sa.ColumnElement[bool]:
    return sa.and_(cache_objects.c.status == ObjectStatus.PENDING.value, cache_objects.c.expires_at > now)


def _one(connection: sa.Connection, wanted: sa.ColumnElement[bool]) -> CacheObject | None:
    row = connection.execute(sa.select(cache_objects).where(wanted)).one_or_none()
    return None if row is None else _object(row)


def _many(connection: sa.Connection, wanted: sa.ColumnElement[bool]) -> list[CacheObject]:
    query = sa.select(cache_objects).where(wanted).order_by(cache_objects.c.created_at, cache_objects.c.seq)
    return [_object(row) for row in connection.execute(query)]


def _write(connection: sa.Connection, obj: CacheObject) -> None:
    """Write what can change of an object; its messages and tools never do, and may be large."""
    values = {
        "status": obj.status.value,
        "generation": obj.generation,
        "expires_at": obj.expires_at,
        "n_tokens": obj.n_tokens,
        "metadata": _metadata(obj.metadata),
        "error": obj.error,
        "early_ns": obj.early_ns,
        "updated_at": obj.updated_at,
    }
    connection.execute(sa.update(cache_objects).where(cache_objects.c.id == obj.id).values(values))


def _row(obj: CacheObject) -> dict[str, str | int | bytes | None]:
    return {
        "id": obj.id,
        "tenant": obj.tenant,
        "model": obj.model,
        "status": obj.status.value,
        "generation": obj.generation,
        "created_at": obj.created_at,
        "expires_at": obj.expires_at,
        "n_tokens": obj.n_tokens,
        "name": obj.name,
        "description": obj.description,
        "metadata": _metadata(obj.metadata),
        "error": obj.error,
        "tools": msgspec.json.encode(obj.tools),
        "messages": msgspec.json.encode(obj.messages),
        "dialect": obj.dialect,
        "tool_choice": None if obj.tool_choice == ToolChoice() else msgspec.json.encode(obj.tool_choice),
        "early_ns": obj.early_ns,
        "updated_at": obj.updated_at,
        "project": obj.project,
        "key_id": obj.key_id,
    }


def _object(row: sa.Row[tuple[object, ...]]) -> CacheObject:
    return CacheObject(
        id=row.id,
        tenant=row.tenant,
        model=row.model,
        status=ObjectStatus(row.status),
        created_at=row.created_at,
        expires_at=row.expires_at,
        messages=msgspec.json.decode(row.messages, type=tuple[Message, ...]),
        tools=msgspec.json.decode(row.tools, type=tuple[Tool, ...]),
        n_tokens=row.n_tokens,
        name=row.name,
        description=row.description,
        metadata=_pairs(row.metadata),
        error=row.error,
        generation=row.generation,
        dialect=row.dialect,
        tool_choice=ToolChoice() if row.tool_choice is None else msgspec.json.decode(row.tool_choice, type=ToolChoice),
        early_ns=row.early_ns,
        updated_at=row.updated_at,
        project=row.project,
        key_id=row.key_id,
    )


def _metadata(pairs: Pairs | None) -> bytes | None:
    return None if pairs is None else msgspec.json.encode(pairs)


def _pairs(metadata: bytes | None) -> Pairs | None:
    return None if metadata is None else msgspec.json.decode(metadata, type=Pairs)
