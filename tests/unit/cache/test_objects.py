from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa

from keepwarm.cache.objects import Objects, after
from keepwarm.core.cache_object import TRANSITIONS, CacheObject, Cause, ObjectStatus, Page, Tag, Walk
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.request import Mark, Message, TextPart, Tool, ToolCall, ToolChoice, ToolMode
from keepwarm.storage import Storage
from keepwarm.tables import cache_objects, cache_tags

ALICE, BOB = "alice", "bob"
MESSAGES = (
    Message("system", (TextPart("Be brief."), TextPart("\u2028 “quoted” \\ \x00 🦙", mark=Mark()))),
    Message("assistant", (), tool_calls=(ToolCall("CodeRunner:0", "CodeRunner", '{"a": 1.0,\n"b": [] }'),)),
    Message("tool", (TextPart("1"),), name="CodeRunner", tool_call_id="CodeRunner:0"),
)
TOOLS = (Tool("CodeRunner", "runs code", '{"type":"object","properties":{"code":{"type":"string"}}}'),)


@pytest.fixture
def storage(any_database: Path | str) -> Iterator[Storage]:
    storage = Storage.open(any_database, busy_s=1.0)
    yield storage
    storage.close()


@pytest.fixture
def objects(storage: Storage) -> Objects:
    return Objects(storage)


def an_object(object_id: str, tenant: str = ALICE, *, created_at: int = 100, expires_at: int = 1000) -> CacheObject:
    return CacheObject(
        id=object_id,
        tenant=tenant,
        model="moonshot-v1",
        status=ObjectStatus.PENDING,
        created_at=created_at,
        expires_at=expires_at,
        messages=MESSAGES,
        tools=TOOLS,
        n_tokens=10,
    )


async def ids(objects: Objects, **page: object) -> str:
    return "".join(obj.id for obj in await objects.list(ALICE, msgspec.convert(page, Page)))


async def test_an_object_comes_back_as_it_was_stored(objects: Objects) -> None:
    full = msgspec.structs.replace(
        an_object("cache-1"),
        name="n",
        description="d",
        metadata=(("b", "2"), ("a", "'\"\\\x00")),
        error="e",
        generation=7,
        dialect="gemini",
        tool_choice=ToolChoice(ToolMode.NAMED, "CodeRunner"),
        early_ns=999_999_999,
        updated_at=150,
    )
    bare = msgspec.structs.replace(an_object("cache-2"), messages=(), tools=(), metadata=())
    await objects.insert(full)
    await objects.insert(bare)
    assert await objects.get(ALICE, "cache-1") == full
    assert await objects.get(ALICE, "cache-2") == bare


async def test_another_tenants_object_is_not_there(objects: Objects) -> None:
    await objects.insert(an_object("cache-1"), ("t",))
    assert await objects.get(BOB, "cache-1") is None
    assert await objects.by_tag(BOB, "t") is None
    assert await objects.tag(BOB, "t") is None
    assert await objects.list(BOB, Page()) == []
    assert await objects.tags(BOB, Page()) == []
    assert await objects.update(BOB, "cache-1", now=150, expires_at=1) is None
    assert await objects.delete(BOB, "cache-1") is False
    assert await objects.usage(BOB, 0) == (0, 0)
    await objects.unbind(BOB, "t")
    with pytest.raises(ApiError) as caught:
        await objects.bind(Tag("t", BOB, "cache-1", 1))
    assert caught.value.kind is ErrorKind.UNKNOWN_CACHE
    with pytest.raises(ApiError):
        await objects.list(BOB, Page(after="cache-1"))
    assert await objects.by_tag(ALICE, "t") == await objects.get(ALICE, "cache-1") == an_object("cache-1")


async def test_the_database_itself_refuses_a_tag_on_another_tenants_object(storage: Storage, objects: Objects) -> None:
    await objects.insert(an_object("cache-1"))
    row = {"tenant": BOB, "tag": "t", "object_id": "cache-1", "created_at": 1}
    with pytest.raises(sa.exc.IntegrityError):
        await storage.run(lambda connection: connection.execute(sa.insert(cache_tags).values(row)))


async def test_pages(objects: Objects) -> None:
    for at, object_id in enumerate("abcdefg"):
        await objects.insert(an_object(object_id, created_at=100 + at // 3))  # three share a second
    assert await ids(objects) == "gfedcba"
    assert await ids(objects, descending=False) == "abcdefg"
    assert await ids(objects, limit=2) == "gf"
    assert await ids(objects, limit=2, after="f") == "ed"
    assert await ids(objects, limit=2, after="b", descending=False) == "cd"
    assert await ids(objects, limit=2, before="f", descending=False) == "de"
    assert await ids(objects, limit=2, before="c") == "ed"
    assert await ids(objects, after="b", before="d", descending=False) == "c"
    assert await ids(objects, after="d", before="b", descending=False) == ""
    assert await ids(objects, after="a") == ""


@pytest.mark.parametrize("name", ["after", "before"])
async def test_paging_from_an_unknown_id_names_the_parameter(objects: Objects, name: str) -> None:
    with pytest.raises(ApiError, match="cache-9") as caught:
        await ids(objects, **{name: "cache-9"})
    assert (caught.value.kind, caught.value.param) == (ErrorKind.INVALID_REQUEST, name)
    with pytest.raises(ApiError) as caught:
        await objects.tags(ALICE, msgspec.convert({name: "tag"}, Page))
    assert (caught.value.kind, caught.value.param) == (ErrorKind.INVALID_REQUEST, name)


async def test_metadata_must_match_whole(objects: Objects) -> None:
    for object_id, metadata in (
        ("a", None),
        ("b", ()),
        ("c", (("k", "v"),)),
        ("d", (("k", "v"), ("x", "y"))),
        ("e", (("k", "vv"),)),
    ):
        await objects.insert(msgspec.structs.replace(an_object(object_id), metadata=metadata))
    assert await ids(objects, metadata=[("k", "v")]) == "dc"
    assert await ids(objects, metadata=[("k", "v")], limit=1) == "d"
    assert await ids(objects, metadata=[("x", "y"), ("k", "v")]) == "d"
    assert await ids(objects, metadata=[("k", "v"), ("k", "vv")]) == ""


async def test_a_late_outcome_is_not_taken_for_a_newer_generation(objects: Objects) -> None:
    await objects.insert(an_object("a"))
    updated = await objects.update(ALICE, "a", now=150, metadata=(("k", "v"),))
    assert updated is not None
    assert (updated.generation, updated.metadata, updated.expires_at) == (1, (("k", "v"),), 1000)
    assert await objects.settle("a", 0, Cause.COMPUTED, n_tokens=5) is None
    assert await objects.get(ALICE, "a") == updated
    settled = await objects.settle("a", 1, Cause.COMPUTED, n_tokens=5)
    assert (
        settled
        == await objects.get(ALICE, "a")
        == msgspec.structs.replace(updated, status=ObjectStatus.READY, n_tokens=5)
    )
    assert await objects.settle("a", 0, Cause.FAILED, error="late") is None
    assert await objects.settle("b", 1, Cause.COMPUTED) is None


async def test_an_update_forgets_the_error(objects: Objects) -> None:
    await objects.insert(an_object("a"))
    failed = await objects.settle("a", 0, Cause.FAILED, error="no room")
    assert failed is not None
    assert (failed.status, failed.error) == (ObjectStatus.ERROR, "no room")
    updated = await objects.update(ALICE, "a", now=150.9, expires_at=2000)
    assert updated == msgspec.structs.replace(
        failed, status=ObjectStatus.PENDING, error=None, generation=1, expires_at=2000, updated_at=150
    )


@pytest.mark.parametrize("status", ObjectStatus)
@pytest.mark.parametrize("cause", Cause)
async def test_the_table_of_transitions_is_what_is_applied(
    objects: Objects, status: ObjectStatus, cause: Cause
) -> None:
    await objects.insert(msgspec.structs.replace(an_object("a"), status=status))
    new = await objects.settle("a", 0, cause)
    stored = await objects.get(ALICE, "a")
    assert stored is not None
    assert stored.status is TRANSITIONS.get((status, cause), status)
    assert (new is None) == ((status, cause) not in TRANSITIONS)
    assert new is None or new == stored == after(msgspec.structs.replace(an_object("a"), status=status), cause)


async def test_a_lost_engine_makes_ready_objects_pending_and_names_all_to_be_computed(objects: Objects) -> None:
    for object_id, cause in (
        ("a", Cause.COMPUTED),
        ("b", None),
        ("c", Cause.FAILED),
        ("d", Cause.EXPIRED),
        ("e", Cause.COMPUTED),
    ):
        await objects.insert(an_object(object_id, expires_at=500 if object_id == "e" else 1000))
        if cause is not None:
            await objects.settle(object_id, 0, cause)
    lost = await objects.engine_lost(500)
    assert [(obj.id, obj.status, obj.generation) for obj in lost] == [
        ("a", ObjectStatus.PENDING, 1),
        ("b", ObjectStatus.PENDING, 0),
    ]
    assert lost == await objects.pending(500)
    assert await objects.live_ids(500) == {"a", "b"}
    assert await objects.settle("a", 0, Cause.COMPUTED) is None, "what the old engine computed is gone"
    assert [obj.id for obj in await objects.pending(499)] == ["a", "b", "e"]


async def test_a_new_engine_that_holds_leases_makes_the_other_ready_objects_pending(objects: Objects) -> None:
    for object_id in ("a", "b", "c"):
        await objects.insert(an_object(object_id))
    for object_id in ("a", "b"):
        await objects.settle(object_id, 0, Cause.COMPUTED)
    lost = await objects.engine_lost(500, frozenset({"a", "c", "unknown"}))
    assert [(obj.id, obj.generation) for obj in lost] == [("b", 1), ("c", 0)]
    kept = await objects.get(ALICE, "a")
    assert kept is not None
    assert (kept.status, kept.generation) == (ObjectStatus.READY, 0)


async def test_expiry_is_bounded_oldest_first_and_said_once(objects: Objects) -> None:
    for object_id, expires_at in (("a", 30), ("b", 10), ("c", 20), ("d", 40)):
        await objects.insert(an_object(object_id, expires_at=expires_at))
    assert await objects.usage(ALICE, 29.5) == (2, 20)
    assert await objects.expire(30, 2) == ["b", "c"]
    assert await objects.expire(30, 2) == ["a"]
    assert await objects.expire(30, 2) == []
    assert await objects.usage(ALICE, 0) == (1, 10)
    assert await objects.settle("b", 0, Cause.COMPUTED) is None


async def test_what_is_over_is_kept_while_there_is_room(storage: Storage) -> None:
    objects = Objects(storage, kept_max=3)
    await objects.insert(an_object("b1", BOB, expires_at=1))
    for object_id, expires_at in (("a", 30), ("b", 20), ("c", 500)):
        await objects.insert(an_object(object_id, created_at=10, expires_at=expires_at), (object_id,))
    await objects.insert(an_object("d", created_at=40, expires_at=500))
    assert await ids(objects) == "dcba", "their leases are not given back before they are said to have expired"
    await objects.expire(40, 10)
    await objects.insert(an_object("e", created_at=40, expires_at=500))
    assert await ids(objects) == "edc"
    assert [tag.tag for tag in await objects.tags(ALICE, Page())] == ["c"]
    await objects.insert(an_object("f", created_at=40, expires_at=500))
    assert await ids(objects) == "fedc", "what lives is bounded elsewhere"
    assert await objects.get(BOB, "b1") is not None


async def test_a_tenant_has_so_many_tags(storage: Storage) -> None:
    objects = Objects(storage, tags_max=2)
    await objects.insert(an_object("b1", BOB), ("t",))
    await objects.insert(an_object("a"), ("t", "u"))
    for act in (objects.bind(Tag("v", ALICE, "a", 1)), objects.insert(an_object("b"), ("t", "v"))):
        with pytest.raises(ApiError, match="you have 2 tags, limit 2") as caught:
            await act
        assert caught.value.kind is ErrorKind.QUOTA_EXCEEDED
    assert await objects.get(ALICE, "b") is None
    await objects.bind(Tag("u", ALICE, "a", 1))
    await objects.unbind(ALICE, "t")
    await objects.bind(Tag("v", ALICE, "a", 1))


async def test_tags_move_and_go_with_their_object(objects: Objects) -> None:
    await objects.insert(an_object("a", created_at=1), ("t", "u"))
    await objects.insert(an_object("b", created_at=2), ("u", "v"))
    assert await objects.tag(ALICE, "u") == Tag("u", ALICE, "b", 1), "moved, and as old as it was"
    assert await objects.bind(Tag("t", ALICE, "b", 9)) == Tag("t", ALICE, "b", 1)
    assert await objects.bind(Tag("w", ALICE, "a", 9)) == Tag("w", ALICE, "a", 9)
    assert [tag.tag for tag in await objects.tags(ALICE, Page())] == ["w", "v", "u", "t"]
    assert [tag.tag for tag in await objects.tags(ALICE, Page(after="v", limit=1))] == ["u"]
    assert await objects.delete(ALICE, "b")
    assert not await objects.delete(ALICE, "b")
    assert [tag.tag for tag in await objects.tags(ALICE, Page())] == ["w"]
    await objects.unbind(ALICE, "w")
    await objects.unbind(ALICE, "w")
    assert await objects.by_tag(ALICE, "w") is None


async def test_an_insert_that_fails_leaves_no_tag(storage: Storage, objects: Objects) -> None:
    await objects.insert(an_object("a"), ("t",))
    with pytest.raises(sa.exc.IntegrityError):
        await objects.insert(an_object("a"), ("t", "u"))
    assert [tag.tag for tag in await objects.tags(ALICE, Page())] == ["t"]
    count = sa.select(sa.func.count()).select_from(cache_objects)
    assert await storage.run(lambda connection: connection.execute(count).scalar_one()) == 1


async def test_the_operator_sees_everyones(objects: Objects) -> None:
    await objects.insert(an_object("a", created_at=2))
    await objects.insert(an_object("b", BOB, created_at=1))
    assert [obj.id for obj in await objects.everyones()] == ["b", "a"]
    assert [obj.id for obj in await objects.everyones(ALICE)] == ["a"]
    assert await objects.find("b") == an_object("b", BOB, created_at=1)
    assert await objects.find("c") is None


def a_content(object_id: str, tenant: str = ALICE, **values: int) -> CacheObject:
    return msgspec.structs.replace(an_object(object_id, tenant, **values), dialect="gemini")


async def test_another_dialects_object_is_not_there_for_who_names_one(objects: Objects) -> None:
    kimi, gemini = an_object("k"), a_content("g")
    await objects.insert(kimi, ("t",))
    await objects.insert(gemini)
    assert await objects.get(ALICE, "g", "kimi") is None
    assert await objects.get(ALICE, "k", "gemini") is None
    assert await objects.by_tag(ALICE, "t", "gemini") is None
    assert await objects.list(ALICE, Page(), "kimi") == [kimi]
    assert [obj.id for obj in await objects.walk(ALICE, "gemini", Walk(9), 0)] == ["g"]
    assert await objects.update(ALICE, "g", now=1, expires_at=5, dialect="kimi") is None
    assert await objects.renew(ALICE, "g", now=1, expires_at=5, dialect="kimi") is None
    assert await objects.delete(ALICE, "g", "kimi") is False
    for call in (
        objects.bind(Tag("u", ALICE, "g", 1), "kimi"),
        objects.list(ALICE, Page(after="g"), "kimi"),
    ):
        with pytest.raises(ApiError):
            await call
    assert await objects.get(ALICE, "g", "gemini") == await objects.get(ALICE, "g") == gemini
    assert await objects.by_tag(ALICE, "t", "kimi") == kimi
    assert await objects.usage(ALICE, 0) == (2, 20), "but both count"
    assert await objects.live_ids(0) == {"k", "g"}


async def test_a_walk_goes_on_from_a_place_and_without_contents(objects: Objects) -> None:
    for at, object_id in enumerate("cabedf"):
        await objects.insert(a_content(object_id, created_at=100 + at // 3))  # three share a second
    await objects.insert(a_content("x", BOB))

    async def walked(limit: int, after: tuple[int, str] | None = None, now: float = 0) -> str:
        return "".join(obj.id for obj in await objects.walk(ALICE, "gemini", Walk(limit, after), now))

    assert await walked(9) == "fedcba"
    assert await walked(2, (101, "e")) == "dc"
    assert await objects.delete(ALICE, "d")
    assert await walked(2, (101, "d")) == "cb", "the place stays though the object is gone"
    assert await walked(2, (100, "a")) == ""
    assert await walked(9, now=1000) == ""
    (light,) = await objects.walk(ALICE, "gemini", Walk(1), 0)
    assert light == msgspec.structs.replace(a_content("f", created_at=101), messages=(), tools=())


async def test_a_walk_ends_each_lifetime_to_the_nanosecond(objects: Objects) -> None:
    await objects.insert(msgspec.structs.replace(a_content("a", expires_at=1000), early_ns=250_000_000))
    await objects.insert(a_content("b", expires_at=1000))
    for now, ids in ((999.7, ["b", "a"]), (999.75, ["b"]), (999.99, ["b"]), (1000, [])):
        assert [obj.id for obj in await objects.walk(ALICE, "gemini", Walk(9), now)] == ids
        found = await objects.get(ALICE, "a")
        assert found is not None
        assert found.is_over(now) == ("a" not in ids)
        assert (found.effective_status(now) is ObjectStatus.INACTIVE) == ("a" not in ids)


async def test_a_dialect_that_forgets_keeps_no_object_whose_time_is_over(objects: Objects) -> None:
    for object_id, cause in (("p", None), ("r", Cause.COMPUTED), ("e", Cause.FAILED)):
        await objects.insert(a_content(object_id, expires_at=30))
        await objects.insert(an_object(f"k{object_id}", expires_at=30))
        if cause is not None:
            await objects.settle(object_id, 0, cause)
            await objects.settle(f"k{object_id}", 0, cause)
    assert await objects.expire(29.9, 9) == []
    assert await objects.expire(30, 9) == ["p", "kp", "r", "kr", "e"]
    assert await objects.expire(30, 9) == []
    assert {obj.id: obj.status for obj in await objects.everyones()} == {
        "kp": ObjectStatus.INACTIVE,
        "kr": ObjectStatus.INACTIVE,
        "ke": ObjectStatus.ERROR,
    }


async def test_a_change_notes_when_and_a_new_end_its_nanoseconds(objects: Objects) -> None:
    await objects.insert(msgspec.structs.replace(a_content("a"), early_ns=5))
    renewed = await objects.renew(ALICE, "a", now=200.7, expires_at=2000, early_ns=7, dialect="gemini")
    assert renewed == msgspec.structs.replace(a_content("a"), expires_at=2000, early_ns=7, updated_at=200)
    updated = await objects.update(ALICE, "a", now=300, metadata=())
    assert updated is not None
    assert (updated.expires_at, updated.early_ns, updated.updated_at) == (2000, 7, 300)
    assert await objects.get(ALICE, "a") == updated
