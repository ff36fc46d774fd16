"""What a request that names a cache object turns into, in both forms and all statuses."""

import pytest
from msgspec.structs import replace

from keepwarm.core.cache_lookup import MissCause
from keepwarm.core.cache_object import CacheObject, ObjectStatus
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.request import CacheUse, ChatRequest, Message, TextPart, Tool, ToolChoice, ToolMode
from keepwarm.gateway.object_use import ObjectUse, use_object

NOW = 1000.0
KNOWLEDGE = Message("system", (TextPart("the whole manual"),))
QUESTION = Message("user", (TextPart("how?"),))
TOOL = Tool("look", "looks", "{}")
OBJECT = CacheObject(
    id="cache-1",
    tenant="t",
    model="moonshot-v1",
    status=ObjectStatus.READY,
    created_at=900,
    expires_at=2000,
    messages=(KNOWLEDGE,),
    tools=(TOOL,),
    n_tokens=7,
)
EXPIRED = replace(OBJECT, expires_at=1000)
BY_ROLE = CacheUse(object_id="cache-1")
BY_TAG = CacheUse(tag="manual")
BY_HEADER = CacheUse(object_id="cache-1", resent=True)
SHORT = ChatRequest("m", (QUESTION,))
RESENT = ChatRequest("m", (KNOWLEDGE, QUESTION), tools=(TOOL,))


def use(request: ChatRequest, cache: CacheUse, found: CacheObject | None, *, same_model: bool = True) -> ObjectUse:
    return use_object(request, cache, found, same_model=same_model, now=NOW)


@pytest.mark.parametrize("status", [ObjectStatus.READY, ObjectStatus.PENDING, ObjectStatus.ERROR])
def test_the_role_form_puts_the_objects_messages_and_tools_in(status: ObjectStatus) -> None:
    found = replace(OBJECT, status=status)
    used = use(SHORT, BY_ROLE, found)
    assert used.request.messages == (KNOWLEDGE, QUESTION)
    assert used.request.tools == (TOOL,)
    assert (used.object, used.status) == (found, status)


@pytest.mark.parametrize("cache", [BY_ROLE, BY_TAG])
def test_an_unknown_object_has_no_content_to_fall_back_on(cache: CacheUse) -> None:
    with pytest.raises(ApiError, match="not found") as raised:
        use(SHORT, cache, None)
    assert raised.value.kind is ErrorKind.UNKNOWN_CACHE


def test_expiry_is_decided_by_the_clock_and_named_with_the_remedy() -> None:
    with pytest.raises(ApiError, match=r"1970-01-01T00:16:40\+00:00; use reset_ttl") as raised:
        use(SHORT, BY_ROLE, EXPIRED)
    assert raised.value.kind is ErrorKind.EXPIRED_CACHE


def test_reset_ttl_brings_an_expired_object_back() -> None:
    used = use(SHORT, replace(BY_ROLE, reset_ttl_s=60), EXPIRED)
    assert used.request.messages == (KNOWLEDGE, QUESTION)
    assert used.status is ObjectStatus.INACTIVE
    used = use(RESENT, replace(BY_HEADER, reset_ttl_s=60), EXPIRED)
    assert used.object == EXPIRED


def test_another_models_object_is_an_error_in_the_role_form_only() -> None:
    with pytest.raises(ApiError, match="'moonshot-v1', not for 'm'") as raised:
        use(SHORT, BY_ROLE, OBJECT, same_model=False)
    assert raised.value.kind is ErrorKind.INVALID_REQUEST
    assert use(RESENT, BY_HEADER, OBJECT, same_model=False) == ObjectUse(RESENT)


def test_the_header_form_applies_when_messages_and_tools_are_the_same() -> None:
    assert use(RESENT, BY_HEADER, OBJECT) == ObjectUse(RESENT, OBJECT, ObjectStatus.READY)


@pytest.mark.parametrize(
    "request_",
    [
        SHORT,
        replace(RESENT, tools=()),
        replace(RESENT, messages=(QUESTION, KNOWLEDGE)),
        replace(RESENT, messages=(replace(KNOWLEDGE, name="x"), QUESTION)),
    ],
)
def test_any_difference_makes_the_header_form_an_ordinary_call(request_: ChatRequest) -> None:
    assert use(request_, BY_HEADER, OBJECT) == ObjectUse(request_)


@pytest.mark.parametrize("found, lost", [(None, MissCause.DELETED), (EXPIRED, MissCause.EXPIRED)])
def test_the_header_form_is_never_an_error_and_tells_why_it_runs_without(
    found: CacheObject | None, lost: MissCause
) -> None:
    assert use(RESENT, BY_HEADER, found) == ObjectUse(RESENT, lost=lost)


CONTENT = replace(OBJECT, dialect="gemini", model="m", tool_choice=ToolChoice(ToolMode.REQUIRED))
BY_CONTENT = CacheUse(object_id="cache-1", dialect="gemini")


@pytest.mark.parametrize("status", [ObjectStatus.READY, ObjectStatus.PENDING, ObjectStatus.ERROR])
def test_a_cached_content_puts_its_messages_tools_and_choice_in(status: ObjectStatus) -> None:
    found = replace(CONTENT, status=status)
    used = use(SHORT, BY_CONTENT, found)
    assert used == ObjectUse(
        replace(SHORT, messages=(KNOWLEDGE, QUESTION), tools=(TOOL,), tool_choice=ToolChoice(ToolMode.REQUIRED)),
        found,
        status,
    )


def test_a_cached_content_may_be_sent_again_and_is_then_there_twice() -> None:
    assert use(replace(RESENT, tools=()), BY_CONTENT, CONTENT).request.messages == (KNOWLEDGE, KNOWLEDGE, QUESTION)


@pytest.mark.parametrize(
    "found",
    [
        None,
        replace(CONTENT, expires_at=1000),
        replace(CONTENT, expires_at=1001, early_ns=999_999_999 + 1),
        replace(CONTENT, expires_at=1000, status=ObjectStatus.ERROR),
    ],
)
def test_a_cached_content_whose_time_is_over_looks_like_none(found: CacheObject | None) -> None:
    with pytest.raises(ApiError, match=r"^CachedContent not found \(or permission denied\)$") as raised:
        use(SHORT, BY_CONTENT, found)
    assert raised.value.kind is ErrorKind.UNKNOWN_CACHE


def test_a_cached_content_goes_by_the_models_name_alone() -> None:
    assert use(SHORT, BY_CONTENT, replace(CONTENT, expires_at=1001, early_ns=999_999_999), same_model=False).object
    with pytest.raises(
        ApiError, match=r"\(models/m\) and CachedContent \(models/other\) has to be the same\.$"
    ) as raised:
        use(SHORT, BY_CONTENT, replace(CONTENT, model="other"))
    assert raised.value.kind is ErrorKind.INVALID_REQUEST
