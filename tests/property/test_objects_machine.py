"""Objects against a naive twin: dictionaries in memory, with the rules written out once more in the plainest way."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from keepwarm.cache.objects import Objects
from keepwarm.core.cache_object import TRANSITIONS, CacheObject, Cause, ObjectStatus, Page, Tag, Walk
from keepwarm.core.errors import ApiError
from keepwarm.core.request import Message, ObjectDialect, TextPart, ToolChoice, ToolMode
from keepwarm.storage import Storage
from keepwarm.tables import cache_objects

T = TypeVar("T")

IDS = tuple(f"cache-{n}" for n in range(6))  # few, so that rules meet
Pairs = tuple[tuple[str, str], ...]
TAGS = ("t", "u", "v")
PENDING, READY, INACTIVE = ObjectStatus.PENDING, ObjectStatus.READY, ObjectStatus.INACTIVE

tenants = st.sampled_from(("alice", "alice", "alice", "bob"))
object_ids = st.sampled_from(IDS)
tag_names = st.sampled_from(TAGS)
times = st.integers(0, 40)
metadata = st.dictionaries(st.sampled_from(['q"', "\x00"]), st.sampled_from(["", "\\'é"]), max_size=2).map(
    lambda pairs: tuple(pairs.items())
)
dialects: st.SearchStrategy[ObjectDialect] = st.sampled_from(("kimi", "kimi", "gemini"))
askers: st.SearchStrategy[ObjectDialect | None] = st.sampled_from((None, "kimi", "gemini"))
early = st.sampled_from((0, 0, 500_000_000))
New = tuple[str, int, Pairs | None, list[str], ObjectDialect, int]
new_objects = st.tuples(
    tenants, st.integers(0, 40), st.none() | metadata, st.lists(tag_names, unique=True, max_size=2), dialects, early
)  # tenant, lifetime, metadata, tags, dialect, nanoseconds before its end
limits = st.integers(1, 3)


class Twin:
    """What Objects should do. `objects` and `tags` are in order of creation."""

    def __init__(self) -> None:
        self.objects: dict[str, CacheObject] = {}
        self.tags: dict[tuple[str, str], Tag] = {}

    def get(self, tenant: str, object_id: str, dialect: ObjectDialect | None = None) -> CacheObject | None:
        obj = self.objects.get(object_id)
        return obj if obj is not None and obj.tenant == tenant and dialect in (None, obj.dialect) else None

    def change(self, obj: CacheObject, cause: Cause, **values: Any) -> CacheObject | None:
        status = TRANSITIONS.get((obj.status, cause))
        if status is None:
            return None
        generation = obj.generation + (1 if cause in (Cause.UPDATED, Cause.ENGINE_LOST) else 0)
        fields = {"error": None, **values, "status": status, "generation": generation}
        self.objects[obj.id] = msgspec.structs.replace(obj, **fields)
        return self.objects[obj.id]

    def bind(self, tag: Tag) -> Tag:
        created_at = self.tags[tag.tenant, tag.tag].created_at if (tag.tenant, tag.tag) in self.tags else tag.created_at
        self.tags[tag.tenant, tag.tag] = Tag(tag.tag, tag.tenant, tag.object_id, created_at)
        return self.tags[tag.tenant, tag.tag]

    def delete(self, obj: CacheObject) -> None:
        del self.objects[obj.id]
        self.tags = {name: tag for name, tag in self.tags.items() if tag.object_id != obj.id}

    def live(self, now: float) -> list[CacheObject]:
        return [obj for obj in self.objects.values() if obj.status in (PENDING, READY) and now < obj.expires_at]


def ends(obj: CacheObject) -> float:
    return obj.expires_at - obj.early_ns / 1e9


def cut(items: Sequence[T], key: Callable[[T], str], page: Page) -> list[T] | None:
    """The page of a list in order of creation; None when an anchor is not in it."""
    keys = [key(item) for item in items]
    if any(anchor is not None and anchor not in keys for anchor in (page.after, page.before)):
        return None
    ordered = list(reversed(items)) if page.descending else list(items)
    keys = [key(item) for item in ordered]
    start = 0 if page.after is None else keys.index(page.after) + 1
    end = len(keys) if page.before is None else keys.index(page.before)
    window = [item for item in ordered[start:end] if set(page.metadata) <= set(getattr(item, "metadata", None) or ())]
    return window[-page.limit :] if page.before is not None and page.after is None else window[: page.limit]


def walks(limit: int, after: str, before: str, wanted: Pairs = ()) -> list[Page]:
    """Every way to page from or to these anchors, in both orders."""
    anchors = ((None, None), (after, None), (None, before), (after, before))
    return [Page(limit, descending, *ends, wanted) for descending in (True, False) for ends in anchors]


class Machine(RuleBasedStateMachine):
    def __init__(self, runner: asyncio.Runner, storage: Storage) -> None:
        super().__init__()
        self.runner = runner
        self.storage = storage
        self.objects = Objects(storage)
        self.twin = Twin()
        self.clock = 0

    def run(self, coroutine: Coroutine[object, object, T]) -> T:
        return self.runner.run(coroutine)

    @initialize(objects=st.lists(new_objects, min_size=2, max_size=len(IDS)))
    def begin(self, objects: list[New]) -> None:
        self.storage.run_sync(lambda connection: connection.execute(cache_objects.delete()))
        for new in objects:
            self.insert(*new)

    @precondition(lambda self: len(self.twin.objects) < len(IDS))
    @rule(new=new_objects)
    def create(self, new: New) -> None:
        self.insert(*new)

    def insert(
        self, tenant: str, lifetime: int, pairs: Pairs | None, tags: list[str], dialect: ObjectDialect, early_ns: int
    ) -> None:
        object_id = next(object_id for object_id in IDS if object_id not in self.twin.objects)
        self.clock += lifetime % 2  # some share a second
        messages = (Message("user", (TextPart(object_id),)),)
        expires_at = self.clock + lifetime
        obj = CacheObject(
            object_id,
            tenant,
            "m",
            PENDING,
            self.clock,
            expires_at,
            messages,
            (),
            lifetime,
            metadata=pairs,
            dialect=dialect,
            early_ns=early_ns,
            tool_choice=ToolChoice(ToolMode.NONE) if early_ns else ToolChoice(),
        )
        self.run(self.objects.insert(obj, tuple(tags)))
        self.twin.objects[object_id] = obj
        for name in tags:
            self.twin.bind(Tag(name, tenant, object_id, self.clock))

    @rule(
        tenant=tenants, object_id=object_ids, pairs=st.none() | metadata, expires_at=st.none() | times, ns=early,
        asker=askers,
    )  # fmt: skip
    def update(
        self, tenant: str, object_id: str, pairs: Pairs | None, expires_at: int | None, ns: int,
        asker: ObjectDialect | None,
    ) -> None:  # fmt: skip
        new = self.run(
            self.objects.update(
                tenant, object_id, now=7.5, metadata=pairs, expires_at=expires_at, early_ns=ns, dialect=asker
            )
        )
        old = self.twin.get(tenant, object_id, asker)
        if old is None:
            assert new is None
            return
        values: dict[str, Any] = {"updated_at": 7} | ({} if pairs is None else {"metadata": pairs})
        values |= {} if expires_at is None else {"expires_at": expires_at, "early_ns": ns}
        assert new == self.twin.change(old, Cause.UPDATED, **values)

    @rule(tenant=tenants, object_id=object_ids, now=times, expires_at=times, half=st.booleans(), ns=early, asker=askers)
    def renew(
        self, tenant: str, object_id: str, now: int, expires_at: int, half: bool, ns: int, asker: ObjectDialect | None
    ) -> None:
        at = now + 0.5 * half
        new = self.run(self.objects.renew(tenant, object_id, expires_at=expires_at, early_ns=ns, now=at, dialect=asker))
        old = self.twin.get(tenant, object_id, asker)
        live = old is not None and old.status.value in ("pending", "ready") and at < ends(old)
        assert (new is not None) == live
        if live:
            assert old is not None
            renewed = msgspec.structs.replace(old, expires_at=expires_at, early_ns=ns, updated_at=now)
            self.twin.objects[object_id] = renewed
            assert new == renewed

    @precondition(lambda self: self.twin.objects)
    @rule(
        data=st.data(),
        cause=st.sampled_from([Cause.COMPUTED, Cause.FAILED]),
        stale=st.sampled_from([0, 0, 1]),
        n_tokens=st.none() | st.just(7),
    )
    def settle(self, data: st.DataObject, cause: Cause, stale: int, n_tokens: int | None) -> None:
        old = self.twin.objects[data.draw(st.sampled_from(sorted(self.twin.objects)))]
        error = "no room" if cause is Cause.FAILED else None
        new = self.run(self.objects.settle(old.id, old.generation - stale, cause, n_tokens=n_tokens, error=error))
        values = {} if n_tokens is None else {"n_tokens": n_tokens}
        assert new == (None if stale else self.twin.change(old, cause, error=error, **values))

    @rule(now=times, limit=st.integers(1, 3))
    def expire(self, now: int, limit: int) -> None:
        ended = [obj for obj in self.twin.objects.values() if obj.expires_at <= now]
        over = [obj for obj in ended if obj.status in (PENDING, READY) or obj.dialect == "gemini"]
        over = sorted(over, key=lambda obj: obj.expires_at)[:limit]
        assert self.run(self.objects.expire(now, limit)) == [obj.id for obj in over]
        for obj in over:
            if obj.dialect == "gemini":
                self.twin.delete(obj)
            else:
                self.twin.objects[obj.id] = msgspec.structs.replace(obj, status=INACTIVE)

    @rule(now=times, held=st.just(frozenset()) | st.frozensets(object_ids))
    def engine_lost(self, now: int, held: frozenset[str]) -> None:
        lost = self.run(self.objects.engine_lost(now, held))
        for obj in list(self.twin.objects.values()):
            if obj.status is READY and obj.id not in held:
                self.twin.change(obj, Cause.ENGINE_LOST)
        assert lost == [obj for obj in self.twin.live(now) if obj.status is PENDING]

    @rule(tenant=tenants, object_id=object_ids, asker=askers)
    def delete(self, tenant: str, object_id: str, asker: ObjectDialect | None) -> None:
        old = self.twin.get(tenant, object_id, asker)
        assert self.run(self.objects.delete(tenant, object_id, asker)) == (old is not None)
        if old is not None:
            self.twin.delete(old)

    @rule(tenant=tenants, name=tag_names, object_id=object_ids, asker=askers)
    def bind(self, tenant: str, name: str, object_id: str, asker: ObjectDialect | None) -> None:
        self.clock += 1
        tag = Tag(name, tenant, object_id, self.clock)
        if self.twin.get(tenant, object_id, asker) is None:
            with pytest.raises(ApiError):
                self.run(self.objects.bind(tag, asker))
        else:
            assert self.run(self.objects.bind(tag, asker)) == self.twin.bind(tag)

    @rule(tenant=tenants, name=tag_names)
    def unbind(self, tenant: str, name: str) -> None:
        self.run(self.objects.unbind(tenant, name))
        self.twin.tags.pop((tenant, name), None)

    @rule(
        tenant=tenants, limit=limits, wanted=st.just(()) | metadata, after=object_ids, before=object_ids, asker=askers
    )
    def list_objects(
        self, tenant: str, limit: int, wanted: Pairs, after: str, before: str, asker: ObjectDialect | None
    ) -> None:
        objects = [obj for object_id in self.twin.objects if (obj := self.twin.get(tenant, object_id, asker))]
        for page in walks(limit, after, before, wanted):
            expected = cut(objects, lambda obj: obj.id, page)
            if expected is None:
                with pytest.raises(ApiError):
                    self.run(self.objects.list(tenant, page, asker))
            else:
                assert self.run(self.objects.list(tenant, page, asker)) == expected

    @rule(tenant=tenants, dialect=dialects, limit=limits, at=times, now=times, half=st.booleans())
    def walk_objects(self, tenant: str, dialect: ObjectDialect, limit: int, at: int, now: int, half: bool) -> None:
        """From every place of a time on, also from those where nothing is."""
        moment = now + 0.5 * half
        found = [obj for object_id in self.twin.objects if (obj := self.twin.get(tenant, object_id, dialect))]
        places = {(obj.created_at, obj.id): obj for obj in found if moment < ends(obj)}
        for after in (None, *((at, object_id) for object_id in IDS)):
            expected = [places[place] for place in sorted(places, reverse=True) if after is None or place < after]
            light = [msgspec.structs.replace(obj, messages=(), tools=()) for obj in expected[:limit]]
            assert self.run(self.objects.walk(tenant, dialect, Walk(limit, after), moment)) == light

    @rule(tenant=tenants, limit=limits, after=tag_names, before=tag_names)
    def list_tags(self, tenant: str, limit: int, after: str, before: str) -> None:
        tags = [tag for tag in self.twin.tags.values() if tag.tenant == tenant]
        for page in walks(limit, after, before):
            expected = cut(tags, lambda tag: tag.tag, page)
            if expected is None:
                with pytest.raises(ApiError):
                    self.run(self.objects.tags(tenant, page))
            else:
                assert self.run(self.objects.tags(tenant, page)) == expected

    @rule(tenant=tenants, object_id=object_ids, name=tag_names, asker=askers)
    def look_up(self, tenant: str, object_id: str, name: str, asker: ObjectDialect | None) -> None:
        assert self.run(self.objects.get(tenant, object_id, asker)) == self.twin.get(tenant, object_id, asker)
        tag = self.twin.tags.get((tenant, name))
        assert self.run(self.objects.tag(tenant, name)) == tag
        tagged = None if tag is None else self.twin.get(tenant, tag.object_id, asker)
        assert self.run(self.objects.by_tag(tenant, name, asker)) == tagged

    @rule(tenant=tenants, now=times)
    def count(self, tenant: str, now: int) -> None:
        live = self.twin.live(now)
        mine = [obj.n_tokens for obj in live if obj.tenant == tenant]
        assert self.run(self.objects.usage(tenant, now)) == (len(mine), sum(mine))
        assert self.run(self.objects.live_ids(now)) == {obj.id for obj in live}
        assert self.run(self.objects.pending(now)) == [obj for obj in live if obj.status is PENDING]

    @invariant()
    def everything_is_equal(self) -> None:
        assert self.run(self.objects.everyones()) == list(self.twin.objects.values())


def test_objects_do_what_the_naive_twin_does(any_database: Path | str) -> None:
    storage = Storage.open(any_database, busy_s=1.0)
    with asyncio.Runner() as runner:
        run_state_machine_as_test(
            lambda: Machine(runner, storage), settings=settings(max_examples=25, stateful_step_count=40)
        )
    storage.close()
