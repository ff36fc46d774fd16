"""The three ways of sending one prompt, and when knowledge is the same."""

import pytest

from keepwarm.client.book import merged
from keepwarm.client.knowledge import Form, Knowledge, Sending

SYSTEM = {"role": "system", "content": "The manual."}
TOOL = {"type": "function", "function": {"name": "look"}}
USER = {"role": "user", "content": "How?"}
BY_CACHE = Sending("k", Knowledge([SYSTEM], [TOOL]), (USER,), 0.0, cache_id="cache-1", reset_ttl_s=60)


def test_in_full():
    assert BY_CACHE.in_full().arguments == {"messages": [SYSTEM, USER], "tools": [TOOL]}


def test_without_tools_none_are_sent_not_even_an_empty_list():
    assert Sending("k", Knowledge([SYSTEM]), (USER,), 0.0).arguments == {"messages": [SYSTEM, USER]}


def test_by_message_without_tools():
    content = "cache_id=cache-1;reset_ttl=60"
    assert BY_CACHE.arguments == {"messages": [{"role": "cache", "content": content}, USER]}


def test_by_headers_everything_is_sent_again():
    sending = Sending("k", BY_CACHE.knowledge, (USER,), 0.0, form=Form.HEADERS, cache_id="cache-1", reset_ttl_s=60)
    headers = {"X-Msh-Context-Cache": "cache-1", "X-Msh-Context-Cache-Reset-TTL": "60"}
    assert sending.arguments == {"messages": [SYSTEM, USER], "tools": [TOOL], "extra_headers": headers}
    assert merged({"extra_headers": {"X-Own": "1"}, "n": 1}, sending)["extra_headers"] == {"X-Own": "1", **headers}


def test_headers_of_the_application_stay_where_the_cache_needs_none():
    assert merged({"extra_headers": {"X-Own": "1"}}, BY_CACHE)["extra_headers"] == {"X-Own": "1"}


def test_a_digest_changes_with_anything_the_prompt_depends_on():
    other_order = {"content": "The manual.", "role": "system"}
    digests = [
        Knowledge([SYSTEM]).digest("m"),
        Knowledge([SYSTEM]).digest("n"),
        Knowledge([SYSTEM, SYSTEM]).digest("m"),
        Knowledge([SYSTEM], [TOOL]).digest("m"),
        Knowledge([other_order]).digest("m"),
        Knowledge([{"role": "system", "content": "The manual. \ud800"}]).digest("m"),
    ]
    assert len(set(digests)) == len(digests)
    assert Knowledge([dict(SYSTEM)], ()).digest("m") == digests[0]


def test_knowledge_is_json_and_not_empty():
    with pytest.raises(ValueError):
        Knowledge([])
    with pytest.raises(TypeError):
        Knowledge([{"role": "system", "content": b"bytes"}])
