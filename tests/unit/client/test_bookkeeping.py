"""The story of one request's cache, call by call, with a real file and a clock that stands still."""

import logging
import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from keepwarm.client.bookkeeping import MARK, Bookkeeping, Call, Reply, advance, end, marked_object
from keepwarm.client.decision import CLAIM_S, Policy, Step
from keepwarm.client.knowledge import Form, Knowledge, Sending
from keepwarm.client.rows import Rows
from tests.world import CountingIds, FakeClock

POLICY = Policy(ttl_s=400)
KNOWN, OTHER = (Knowledge([{"role": "system", "content": text}], [{"type": "function"}]) for text in ("one", "two"))
FULL = Sending("k", KNOWN, (), 0.0)


def object_reply(status, cache_id="cache-1"):
    return Reply(200, {"id": cache_id, "status": status})


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def rows(tmp_path):
    return Rows(tmp_path / "book", "http://server/v1/")


@pytest.fixture
def book(rows, clock):
    return Bookkeeping(rows, "m", POLICY, clock, CountingIds())


def begun(book, known=KNOWN, form=Form.MESSAGE):
    steps = book.prepare("k", known, (), form)
    return steps, advance(steps, None, FULL)


def told(book, *replies, known=KNOWN, form=Form.MESSAGE):
    """The calls that were made for these replies, and what came of it."""
    steps, step = begun(book, known, form)
    calls = []
    for reply in replies:
        assert isinstance(step, Call), step
        calls.append((step.method, step.path))
        step = advance(steps, reply, FULL)
    assert isinstance(step, Sending), step
    end(steps)
    return calls, step


@pytest.fixture
def ready(book, clock):
    """A ready object, used now."""
    told(book, object_reply("pending"))
    clock.advance(1)
    return told(book, object_reply("ready"))[1]


def test_a_creation_names_everything(book):
    steps, step = begun(book)
    assert (step.method, step.path) == ("POST", "/caching")
    assert step.body["metadata"].keys() == {MARK}
    del step.body["metadata"]
    assert step.body == {"model": "m", "messages": list(KNOWN.messages), "tools": list(KNOWN.tools), "ttl": 400}
    end(steps)


def test_an_object_is_created_looked_at_and_used(book, clock):
    assert told(book, object_reply("pending")) == ([("POST", "/caching")], Sending("k", KNOWN, (), clock.now()))
    assert told(book)[1].cache_id is None  # looked at once a second
    clock.advance(1)
    assert told(book, object_reply("pending"))[1].cache_id is None
    clock.advance(1)
    calls, sending = told(book, object_reply("ready"))
    assert calls == [("GET", "/caching/cache-1")]
    assert sending.cache_id == "cache-1"
    assert told(book)[1].cache_id == "cache-1"


def test_a_server_that_is_ready_at_once_is_used_at_once(book):
    assert told(book, object_reply("ready"))[1].cache_id == "cache-1"


def test_who_comes_during_a_creation_sends_in_full(book):
    steps, _ = begun(book)
    assert told(book)[1].cache_id is None
    end(steps)


def test_an_abandoned_creation_is_looked_for(book):
    steps, _ = begun(book)
    end(steps)  # cancelled: the claim is given back, but the call may have been carried out
    steps, step = begun(book)
    assert (step.method, step.path, step.query["limit"]) == ("GET", "/caching", 1)
    (mark,) = (value for name, value in step.query.items() if name == f"metadata[{MARK}]")
    found = Reply(200, {"data": [{"id": "cache-9", "status": "inactive", "metadata": {MARK: mark}}]})
    step = advance(steps, found, FULL)
    assert (step.method, step.path) == ("PUT", "/caching/cache-9")  # nobody knows how long it lives
    assert advance(steps, object_reply("pending", "cache-9"), FULL).cache_id is None
    end(steps)


@pytest.mark.parametrize("listed", [Reply(None), Reply(500), Reply(429)])
def test_nothing_is_created_while_nobody_can_tell(book, clock, listed):
    end(begun(book)[0])
    assert told(book, listed)[0] == [("GET", "/caching")]
    assert told(book)[0] == []
    clock.advance(POLICY.retry_s)
    calls, _ = told(book, Reply(200, {"data": []}), object_reply("pending"))
    assert calls == [("GET", "/caching"), ("POST", "/caching")]


def test_a_server_without_such_a_list_gets_a_new_object(book):
    end(begun(book)[0])
    assert told(book, Reply(404), object_reply("pending"))[0] == [("GET", "/caching"), ("POST", "/caching")]


@pytest.mark.parametrize(
    "data", [None, [], [{"id": "c", "metadata": None}], [{"id": "c", "metadata": {MARK: "other"}}],
             [{"id": "c", "status": "error", "metadata": {MARK: "mark"}}]],
)  # fmt: skip
def test_an_object_without_our_mark_is_not_ours(data):
    assert marked_object(Reply(200, {"data": data}), "mark") is None
    assert marked_object(Reply(200, "nonsense"), "mark") is None


def test_a_refused_creation_is_tried_again_later(book, clock, caplog):
    refusal = Reply(400, error="invalid_request_error")
    assert told(book, refusal)[1].cache_id is None
    assert "400 invalid_request_error" in caplog.text
    assert told(book)[0] == []
    clock.advance(POLICY.retry_s)
    assert told(book, object_reply("pending"))[0] == [("POST", "/caching")]  # it was a no: nothing to look for


@pytest.mark.parametrize("lost", [Reply(None), Reply(502), Reply(200, "nonsense")])
def test_a_creation_without_a_clear_answer_is_looked_for(book, clock, lost):
    told(book, lost)
    clock.advance(POLICY.retry_s)
    calls, _ = told(book, Reply(200, {"data": []}), object_reply("pending"))
    assert calls == [("GET", "/caching"), ("POST", "/caching")]


def test_who_is_later_than_its_claim_deletes_what_it_made(book, clock):
    late, _ = begun(book)
    clock.advance(CLAIM_S)
    told(book, Reply(200, {"data": []}), object_reply("ready", "cache-2"))
    step = advance(late, object_reply("pending"), FULL)
    assert (step.method, step.path) == ("DELETE", "/caching/cache-1")
    assert advance(late, Reply(200, {}), FULL).cache_id == "cache-2"
    end(late)


def test_changed_knowledge_replaces_the_object_and_does_not_swing_back(book, ready, clock):
    calls, _ = told(book, Reply(200, {}), object_reply("ready", "cache-2"), known=OTHER)
    assert calls == [("DELETE", "/caching/cache-1"), ("POST", "/caching")]
    assert told(book)[1].cache_id is None
    clock.advance(POLICY.return_s)
    assert told(book, Reply(404), object_reply("ready", "cache-3"))[1].cache_id == "cache-3"


@pytest.mark.parametrize(
    "status, again", [(404, True), (400, True), (401, False), (413, False), (429, False), (500, False), (503, False)]
)
def test_which_refusals_may_be_the_caches(book, ready, status, again):
    instead = book.again(ready, status, None)
    assert (instead is not None) == again
    if again:
        assert instead == Sending("k", KNOWN, (), ready.prepared_at)
        assert book.again(instead, status, None) is None


def test_an_unknown_model_is_not_the_caches_fault(book, ready):
    assert book.again(ready, 404, "model_not_found") is None
    assert told(book)[1].cache_id == "cache-1"


def test_a_vanished_object_is_looked_at_and_made_anew(book, ready):
    book.again(ready, 404, "cache_not_found")
    calls, sending = told(book, Reply(404), object_reply("ready", "cache-2"))
    assert calls == [("GET", "/caching/cache-1"), ("POST", "/caching")]
    assert sending.cache_id == "cache-2"


def test_an_object_of_another_model_is_not_made_anew_with_every_question(book, ready, clock):
    book.again(ready, 400, None)
    assert told(book)[0] == []
    clock.advance(POLICY.retry_s)
    assert told(book, object_reply("ready"))[0] == [("GET", "/caching/cache-1")]


def test_in_the_header_form_only_the_answer_tells(book, ready, clock):
    sending = told(book, form=Form.HEADERS)[1]
    book.answered(sending, {"Msh-Context-Cache-Id": "cache-1"})
    assert told(book)[1].cache_id == "cache-1"
    book.answered(sending, {})
    clock.advance(POLICY.check_s)
    assert told(book, object_reply("ready"))[0] == [("GET", "/caching/cache-1")]


def test_use_prolongs_and_idle_objects_are_renewed_in_time(book, ready, clock):
    for _ in range(3):
        clock.advance(250)
        book.answered(told(book)[1], {})
    clock.advance(310)
    calls, sending = told(book, object_reply("pending"))
    assert calls == [("PUT", "/caching/cache-1")]
    assert sending.cache_id == "cache-1"  # what was computed is there
    clock.advance(300)
    assert told(book)[1].cache_id == "cache-1"


def test_an_expired_object_is_renewed_and_waited_for(book, ready, clock):
    clock.advance(400)
    calls, sending = told(book, object_reply("pending"))
    assert (calls, sending.cache_id) == ([("PUT", "/caching/cache-1")], None)
    clock.advance(1)
    assert told(book, object_reply("ready"))[1].cache_id == "cache-1"


@pytest.mark.parametrize("refusal", [404, 400])
def test_an_expired_object_that_cannot_be_renewed_is_made_anew(book, ready, clock, refusal):
    clock.advance(400)
    calls, sending = told(book, Reply(refusal), object_reply("ready", "cache-2"))
    assert calls == [("PUT", "/caching/cache-1"), ("POST", "/caching")]
    assert sending.cache_id == "cache-2"


def test_a_failed_renewal_does_not_stop_a_live_object(book, ready, clock):
    clock.advance(310)
    assert told(book, Reply(None))[1].cache_id == "cache-1"
    assert told(book)[0] == []
    clock.advance(POLICY.retry_s)
    assert told(book, Reply(400))[1].cache_id == "cache-1"


def test_an_object_that_failed_is_deleted_and_tried_again_later(book, clock):
    told(book, object_reply("pending"))
    clock.advance(1)
    calls, sending = told(book, object_reply("error"), Reply(200, {}))
    assert calls == [("GET", "/caching/cache-1"), ("DELETE", "/caching/cache-1")]
    assert sending.cache_id is None
    assert told(book)[0] == []
    clock.advance(POLICY.retry_s)
    assert told(book, object_reply("pending"))[0] == [("POST", "/caching")]


def test_an_object_found_expired_is_renewed_at_once(book, ready):
    book.again(ready, 404, None)
    calls, _ = told(book, object_reply("inactive"), object_reply("pending"))
    assert calls == [("GET", "/caching/cache-1"), ("PUT", "/caching/cache-1")]


def test_rows_belong_to_a_server(tmp_path, book, ready, clock):
    other = Bookkeeping(Rows(tmp_path / "book", "http://other/v1/"), "m", POLICY, clock, CountingIds())
    assert told(other, object_reply("ready", "cache-7"))[1].cache_id == "cache-7"
    assert told(book)[1].cache_id == "cache-1"


def test_of_many_that_claim_at_once_one_gets_it(rows):
    def claim(number):
        return rows.claim("k", "d", f"claim-{number}", 0.0, POLICY)[1]

    with ThreadPoolExecutor(16) as pool:
        steps = list(pool.map(claim, range(64)))
    assert steps.count(Step.CREATE) == 1
    assert steps.count(Step.FULL) == 63


def test_neither_knowledge_nor_anything_secret_is_in_the_file(tmp_path, book, ready):
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"cache-1" in content
    assert b"one" not in content.replace(b"NOT NULL", b"")


def test_a_file_that_fails_costs_the_cache_only(tmp_path, book, ready, caplog):
    caplog.set_level(logging.WARNING)
    with closing(sqlite3.connect(tmp_path / "book")) as connection, connection:
        connection.execute("DROP TABLE objects")
    assert told(book) == ([], FULL)
    book.answered(ready, {})
    assert book.again(ready, 404, None).cache_id is None
    assert "no such table" in caplog.text


def test_what_cannot_be_a_book_is_told_at_once(tmp_path):
    (tmp_path / "text").write_text("no database " * 1000)
    with pytest.raises(sqlite3.Error):
        Rows(tmp_path / "text", "s")
    with pytest.raises(sqlite3.Error):
        Rows(tmp_path / "missing" / "book", "s")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_book_opened_before_a_fork_is_the_childs_too(rows):
    rows.claim("k", "d", "claim-1", 0.0, POLICY)
    child = os.fork()
    if child == 0:
        os._exit(0 if rows.read("k").claim == "claim-1" and rows.claim("l", "d", "c", 0.0, POLICY)[0] is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert rows.read("l").claim == "c"
