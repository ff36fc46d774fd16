"""Money over kill -9 of the real server: what was used is in the ledger once, and what was held is not held for ever."""

import http.client
import random
import threading
import time
from collections import Counter

import httpx
import openai
import pytest

from tests.e2e.money import Books, until
from tests.e2e.texts import context
from tests.e2e.traffic import Ask, Traffic

pytestmark = pytest.mark.e2e
SHORT = {"model": "scripted", "messages": [{"role": "user", "content": "Hello."}], "max_tokens": 4}
LONG = {"model": "scripted", "messages": [{"role": "user", "content": "Tell me. " * 30}], "max_tokens": 700}
ONCE = Ask("kimi", "/v1/chat/completions", LONG, "whole", {"idempotency-key": "the same one"})
SEED = 20_264
N_CLIENTS = 4
N_ROUNDS = 4
LOAD_S_MAX = 0.8
N_OBJECTS = 6  # begun in each round
CREATE_S_MAX = 0.06
DOWN_S = 2.0  # longer than the second that storage is counted in
BROKEN = (openai.APIError, httpx.TransportError, http.client.HTTPException, OSError)


@pytest.fixture
def books(tmp_path):
    return Books(tmp_path)


@pytest.fixture
def begin(start, books):
    """Start the server, again and again on the same data."""
    return lambda: start(books.config, dev=False, data_dir=books.data_dir)


def port_of(server):
    return int(server.url.rpartition(":")[2])


def stopped_in_the_middle(books, server, blocker, client):
    """A stream whose turn ran to its end while nobody but `blocker` may write: not settled. None: it was too quick."""
    stream = client.chat.completions.create(**LONG, stream=True)
    assert any(chunk.choices and chunk.choices[0].delta.content for chunk in stream)  # the engine has begun
    blocker.execute("BEGIN IMMEDIATE")
    if blocker.execute("SELECT * FROM holds").fetchall():
        until(lambda: server.health()["engine"]["n_running"] == 0)
        return stream
    blocker.execute("ROLLBACK")
    stream.close()
    return None


def test_killed_between_the_engines_end_and_the_settling_a_hold_expires_once(begin, books):
    server = begin()
    key = books.new_key("acme")
    client = server.client(key)
    with books.open() as blocker:
        stream = until(lambda: stopped_in_the_middle(books, server, blocker, client))
        (hold,) = blocker.execute("SELECT * FROM holds").fetchall()
        server.kill()
        blocker.execute("ROLLBACK")
    with pytest.raises(BROKEN):
        list(stream)
    server = begin()
    assert [row["turn_id"] for row in books.read("SELECT * FROM holds")] == [hold["turn_id"]]  # it is not yet its time
    server.kill()
    books.let_holds_end()
    for _ in range(2):
        server = begin()
        mine = [row for row in books.rows() if row["turn_id"] == hold["turn_id"]]
        assert [row["kind"] for row in mine] == ["hold", "expire"]
        server.kill()
    server = begin()
    assert server.client(key).chat.completions.create(**SHORT).choices
    books.check()


def load(traffic, answers):
    """Until the server is gone."""
    while True:
        try:
            answers.append(traffic.send(traffic.next()))
        except BROKEN:
            return


def test_every_answer_that_was_read_is_in_the_ledger_whenever_the_server_is_killed(begin, books):
    chance, answers, repeated = random.Random(SEED), [], []
    server = begin()
    key = books.new_key("acme")
    for number in range(N_ROUNDS):
        port = port_of(server)
        repeated.append(Traffic(port, key, chance).send(ONCE))
        several = [Traffic(port, key, random.Random(f"{SEED}/{number}/{i}")) for i in range(N_CLIENTS)]
        threads = [threading.Thread(target=load, args=(one, answers)) for one in several]
        n_before = len(answers)
        for thread in threads:
            thread.start()
        until(lambda n_before=n_before: len(answers) > n_before)
        time.sleep(chance.uniform(0, LOAD_S_MAX))
        server.kill()
        for thread in threads:
            thread.join()
        server = begin()
    server.kill()
    n_cut = len(books.read("SELECT * FROM holds"))
    assert n_cut, "no turn was under way at any kill"
    books.let_holds_end()
    begin()
    books.check()
    n_settled = Counter(row["turn_id"] for row in books.rows("settle"))
    settled = {row["turn_id"]: row for row in books.rows("settle")}
    told = [answer for answer in answers if answer.told is not None]
    assert len(told) > N_ROUNDS * N_CLIENTS
    for answer in told:
        row = settled[answer.turn_id]
        assert n_settled[answer.turn_id] == 1 and row["status"] == "finished"
        assert row["n_fresh"] + row["n_read"] + row["n_write"] == answer.told.prompt
        assert (row["n_read"], row["n_output"]) == (answer.told.read, answer.told.output)
    paid = [settled[answer.turn_id] for answer in repeated]
    whole = [-(row["cash_nano"] + row["voucher_nano"]) - (row["repeated_nano"] or 0) for row in paid]
    assert -sum(row["cash_nano"] + row["voucher_nano"] for row in paid) == max(
        whole
    )  # sent again after a kill, paid once


def stopped_before_ready(books, client, blocker):
    """An object whose making is charged and which nobody but `blocker` can write is ready. None: that was too quick."""
    body = {"model": "scripted", "messages": [{"role": "system", "content": context(SEED, 20)}]}
    cache_id = client.post("/caching", body=body, cast_to=object)["id"]
    mine = (cache_id,)
    charged = "SELECT 1 FROM ledger_rows WHERE kind = 'creation' AND object_id = ?"
    until(lambda: blocker.execute(charged, mine).fetchone(), every_s=0)
    blocker.execute("BEGIN IMMEDIATE")
    (status,) = blocker.execute("SELECT status FROM cache_objects WHERE id = ?", mine).fetchone()
    if status == "pending":
        return cache_id
    blocker.execute("ROLLBACK")
    return None


def test_killed_between_an_objects_charge_and_its_being_ready_it_is_paid_once(begin, books):
    server = begin()
    key = books.new_key("acme")
    client = server.client(key)
    with books.open() as blocker:
        cache_id = until(lambda: stopped_before_ready(books, client, blocker))
        server.kill()
        blocker.execute("ROLLBACK")
    client = begin().client(key)
    until(lambda: all_ready(client, [cache_id]))
    listed = [one["id"] for one in client.get("/caching?limit=1000", cast_to=object)["data"]]
    for each in listed:
        client.delete(f"/caching/{each}", cast_to=object)
    assert Counter(row["object_id"] for row in books.rows("creation")) == Counter(listed)
    assert Counter(meter["object_id"] for meter in books.check_storage()) == Counter(listed)
    books.check()


def create_on(client, seed, made):
    """Objects, until the server is gone; `made` are those that were acknowledged."""
    for i in range(N_OBJECTS):
        body = {"model": "scripted", "messages": [{"role": "system", "content": context(f"{seed}/{i}", 300)}]}
        try:
            made.append(client.post("/caching", body=body, cast_to=object)["id"])
        except BROKEN:
            return


def all_ready(client, ids):
    return all(client.get(f"/caching/{cache_id}", cast_to=object)["status"] == "ready" for cache_id in ids)


def test_an_object_is_paid_once_and_its_storage_without_a_gap_over_kills(begin, books):
    chance, made = random.Random(SEED), []
    server = begin()
    key = books.new_key("acme")
    for number in range(N_ROUNDS):
        creating = threading.Thread(target=create_on, args=(server.client(key), f"{SEED}/{number}", made))
        creating.start()
        time.sleep(chance.uniform(0, CREATE_S_MAX))
        server.kill()
        creating.join()
        server = begin()
    create_on(server.client(key), SEED, made)
    listed = [one["id"] for one in server.client(key).get("/caching?limit=100", cast_to=object)["data"]]
    assert set(made) <= set(listed)
    until(lambda: all_ready(server.client(key), listed))
    ready_at = time.time()
    until(lambda: {row["object_id"] for row in books.rows("storage")} == set(listed))  # the ticker has been by
    server.kill()
    time.sleep(DOWN_S)
    server = begin()
    client, deleted_at = server.client(key), time.time()
    for cache_id in listed:
        client.delete(f"/caching/{cache_id}", cast_to=object)
    server.kill()
    books.let_holds_end()
    begin()
    assert Counter(row["object_id"] for row in books.rows("creation")) == Counter(listed)
    meters = books.check_storage()
    assert Counter(meter["object_id"] for meter in meters) == Counter(listed)  # each had one life
    for meter in meters:
        assert meter["began_at"] <= ready_at and deleted_at <= meter["ends_at"] <= time.time()
    assert len(books.rows("storage")) >= 2 * len(listed)  # before the kill, and after it
    books.check()
