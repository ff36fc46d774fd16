"""prompt_cache_diagnostics: asked for by an id, told once in OpenAI's words, by the three dialects in its shape."""

import json
from typing import Any, get_args

import pytest
from openai.types.responses.response import PromptCacheDiagnostics
from pydantic import TypeAdapter

from keepwarm.core.cache_lookup import CacheLookup, MissCause, Place
from keepwarm.core.errors import ApiError
from keepwarm.core.event import ChoiceFinished, Event, Finished, Started, TextDelta, Usage
from keepwarm.dialects import ChatDialect, Identity
from keepwarm.dialects.kimi import KimiChat
from keepwarm.dialects.minimax import MiniMaxChat
from keepwarm.dialects.openai import OpenAIChat
from keepwarm.dialects.openai_diagnostics import (
    REASONS,
    ComparisonResponseNotFound,
    PromptCacheHit,
    PromptCacheMiss,
    PromptCacheUnavailable,
    Reason,
    cache_diagnostics,
)
from tests.golden.transcripts import BOUNDS

ALL: tuple[ChatDialect, ...] = (OpenAIChat(BOUNDS), KimiChat(BOUNDS), MiniMaxChat(BOUNDS))
IDENTITY = Identity("chatcmpl-1", 1)
OPTIONS = {"comparison_response_id": "chatcmpl-0"}
PLACE = Place(640, "messages[2]", "before", "here", "there")
CHANGED = CacheLookup("partial", 600, "host", MissCause.MESSAGES_CHANGED, 900, "chatcmpl-0", PLACE, True)
HIT = CacheLookup("hit", 1000, "host", compared_with="chatcmpl-0", compare_found=True)

every = pytest.mark.parametrize("dialect", ALL, ids=lambda dialect: dialect.name)
SDK: TypeAdapter[Any] = TypeAdapter(PromptCacheDiagnostics)


def chat(**members: Any) -> bytes:
    return json.dumps(
        {"model": "m", "messages": [{"role": "user", "content": "q"}], "temperature": 1} | members
    ).encode()


def events(lookup: CacheLookup | None) -> list[Event]:
    end = [TextDelta("Hi"), ChoiceFinished("stop", 2), Finished(Usage(400, 600, 0, 2))]
    return [Started(1000, 600, "host", lookup=lookup), *end]


def whole(dialect: ChatDialect, lookup: CacheLookup | None, **members: Any) -> dict[str, Any]:
    renderer = dialect.renderer(dialect.parse_chat({}, chat(**members)), IDENTITY)
    for event in events(lookup):
        renderer.feed(event)
    return dict(json.loads(renderer.whole()))


def streamed(dialect: ChatDialect, lookup: CacheLookup | None, **members: Any) -> list[dict[str, Any]]:
    renderer = dialect.renderer(dialect.parse_chat({}, chat(stream=True, **members)), IDENTITY)
    frames = [frame.data for event in events(lookup) for frame in renderer.feed(event)]
    assert frames.pop() == b"[DONE]"
    return [json.loads(frame) for frame in frames]


def test_the_table_of_reasons_is_total() -> None:
    assert set(REASONS) == set(MissCause)
    assert {reason for reason in REASONS.values() if reason is not None} == set(get_args(Reason))


@pytest.mark.parametrize("cause", list(MissCause))
def test_every_cause_is_told_in_words_the_sdk_knows(cause: MissCause) -> None:
    told = cache_diagnostics(CacheLookup("miss", 0, cause=cause, n_missed=5, place=PLACE, compare_found=True))
    assert isinstance(told, PromptCacheMiss) == (REASONS[cause] is not None)
    (document,) = json.loads(
        json.dumps([whole(ALL[0], CacheLookup("miss", 0, cause=cause), prompt_cache_options=OPTIONS)])
    )
    SDK.validate_python(document["prompt_cache_diagnostics"])


def test_what_a_lookup_came_to() -> None:
    assert cache_diagnostics(HIT) == PromptCacheHit()
    assert cache_diagnostics(None) == PromptCacheUnavailable()
    assert (
        cache_diagnostics(CacheLookup("miss", 0, cause=MissCause.EVICTED, compare_found=True))
        == PromptCacheUnavailable()
    )
    assert cache_diagnostics(CHANGED) == PromptCacheMiss("input_changed", 900, 640)
    unknown = CacheLookup("partial", 600, "host", MissCause.TOOLS_CHANGED, 5, "chatcmpl-9", PLACE, False)
    assert cache_diagnostics(unknown) == ComparisonResponseNotFound()


@every
def test_not_told_unless_asked(dialect: ChatDialect) -> None:
    for members in ({}, {"prompt_cache_options": {"mode": "explicit", "ttl": "30m"}}, {"prompt_cache_options": None}):
        assert dialect.parse_chat({}, chat(**members)).request.compare_with is None
        assert "prompt_cache_diagnostics" not in whole(dialect, CHANGED, **members)
        assert all("prompt_cache_diagnostics" not in chunk for chunk in streamed(dialect, CHANGED, **members))


@every
def test_whole(dialect: ChatDialect) -> None:
    assert whole(dialect, CHANGED, prompt_cache_options=OPTIONS)["prompt_cache_diagnostics"] == {
        "type": "cache_miss",
        "reason": "input_changed",
        "cache_missed_tokens": 900,
        "comparison_reusable_tokens": 640,
    }
    assert whole(dialect, HIT, prompt_cache_options=OPTIONS)["prompt_cache_diagnostics"] == {"type": "cache_hit"}
    assert whole(dialect, None, prompt_cache_options=OPTIONS)["prompt_cache_diagnostics"] == {"type": "unavailable"}


@every
def test_nothing_of_the_texts_is_told(dialect: ChatDialect) -> None:
    told = json.dumps(whole(dialect, CHANGED, prompt_cache_options=OPTIONS)["prompt_cache_diagnostics"])
    assert not any(text in told for text in ("before", "here", "messages[2]"))


@every
def test_streamed_with_the_usage_where_that_is_asked_for(dialect: ChatDialect) -> None:
    options = {"prompt_cache_options": OPTIONS, "stream_options": {"include_usage": True}}
    *chunks, last = streamed(dialect, HIT, **options)
    assert last["prompt_cache_diagnostics"] == {"type": "cache_hit"}
    assert last["choices"] == []
    assert all("prompt_cache_diagnostics" not in chunk for chunk in chunks)


@every
def test_streamed_with_the_finishing_chunk_otherwise(dialect: ChatDialect) -> None:
    *chunks, last = streamed(dialect, HIT, prompt_cache_options=OPTIONS)
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["prompt_cache_diagnostics"] == {"type": "cache_hit"}
    assert all("prompt_cache_diagnostics" not in chunk for chunk in chunks)


@every
def test_the_id_is_the_turn_to_compare_with(dialect: ChatDialect) -> None:
    assert dialect.parse_chat({}, chat(prompt_cache_options=OPTIONS)).request.compare_with == "chatcmpl-0"
    assert dialect.parse_chat({}, chat(prompt_cache_options={"comparison_response_id": ""})).request.compare_with == ""


@every
@pytest.mark.parametrize(
    "options,param",
    [
        ({"mode": "always"}, "prompt_cache_options.mode"),
        ({"ttl": 30}, "prompt_cache_options.ttl"),
        ({"comparison_response_id": 1}, "prompt_cache_options.comparison_response_id"),
        ({"comparison_response_id": "x" * 257}, "prompt_cache_options.comparison_response_id"),
        ("explicit", "prompt_cache_options"),
    ],
)
def test_refused_with_its_path(dialect: ChatDialect, options: Any, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        dialect.parse_chat({}, chat(prompt_cache_options=options))
    assert caught.value.param == param
