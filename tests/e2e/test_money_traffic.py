"""Random traffic of all dialects on the real server: the engine's counts, the vendors' words and the ledger are the same."""

import json
import random
import threading
import urllib.request
from collections import Counter
from decimal import Decimal

import pytest
import redis

from tests.e2e.money import Books, until
from tests.e2e.traffic import DIALECTS, TEXTS, Traffic

pytestmark = pytest.mark.e2e
N_ASKS = 90  # of each client
CLIENTS = (("acme", 0), ("acme", 1), ("umbra", 2))
VOUCHER_USD = "0.05"  # is used up on the way, so that cash follows
NANO = 10**9
LIMITS = '{"concurrency": 100, "rpm": 100000, "tpm": 100000000, "tpd": 1000000000}'  # none of them is reached


def call(url, key, body=None, method=None):
    data = None if body is None else json.dumps(body).encode()
    headers = {"authorization": f"Bearer {key}", "x-goog-api-key": key, "content-type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method), timeout=60) as answer:
        return json.load(answer)


def make_objects(url, key):
    """One of each dialect that has them, ready; paths to delete them by, too."""
    text = TEXTS[2] * 60
    kimi = call(f"{url}/v1/caching", key, {"model": "scripted", "messages": [{"role": "system", "content": text}]})
    until(lambda: call(f"{url}/v1/caching/{kimi['id']}", key)["status"] == "ready")
    said = {"parts": [{"text": text}]}
    gemini = call(f"{url}/v1beta/cachedContents", key, {"model": "models/scripted", "systemInstruction": said})
    return {"kimi": kimi["id"], "gemini": gemini["name"]}


def check_turn(answer, row, record):
    """One answer against its row of the ledger and what the operator's call says of it."""
    counts = {name: row[f"n_{name}"] for name in ("fresh", "read", "write", "write_long", "output")}
    told = answer.told
    assert row["status"] == "finished" and row["dialect"] == told.dialect
    assert counts["fresh"] + counts["read"] + counts["write"] == told.prompt
    assert counts["read"] == told.read and counts["output"] == told.output
    assert told.written in (None, counts["write"])
    assert told.written_long in (None, counts["write_long"])
    assert record["usage"] == {
        "fresh": counts["fresh"],
        "cache_read": counts["read"],
        "cache_write": counts["write"],
        "cache_write_long": counts["write_long"],
        "output": counts["output"],
    }


def check_balance(books, key, url, organisation, granted):
    """What the server says there is, is what came in less what the rows took."""
    (told,) = json.loads(books.run("ledger", "balance", organisation, "--json"))
    rows = [row for row in books.rows("settle", "creation", "storage") if row["organisation"] == organisation]
    taken = -sum(row["cash_nano"] + row["voucher_nano"] for row in rows)
    assert int(Decimal(told["available"]) * NANO) == granted - taken
    balance = call(f"{url}/v1/users/me/balance", key)["data"]
    assert balance["available_balance"] == pytest.approx((granted - taken) / NANO)


def check_repeats(rows, answers):
    """A request that was sent again costs what its dearest attempt does, and no more."""
    by_key = {}
    for answer in answers:
        name = answer.ask.headers.get("idempotency-key")
        if name is not None and answer.turn_id in rows:
            by_key.setdefault(name, []).append(rows[answer.turn_id])
    several = [attempts for attempts in by_key.values() if len(attempts) > 1]
    for attempts in several:
        paid = [-(row["cash_nano"] + row["voucher_nano"]) for row in attempts]
        whole = [cost - (row["repeated_nano"] or 0) for cost, row in zip(paid, attempts, strict=True)]
        assert sum(paid) == max(whole)
    return len(several)


@pytest.mark.parametrize("seed", range(3))
def test_counts_are_the_same_everywhere_and_everything_adds_up(start, tmp_path, seed):
    check_traffic(start, Books(tmp_path), seed)


def test_the_same_with_postgresql_and_redis(start, tmp_path, postgresql_url, redis_url):
    check_traffic(start, Books(tmp_path, postgresql_url, redis_url), 3)
    with redis.Redis.from_url(redis_url) as client:
        assert client.keys("*rpm*umbra*"), "no limit was counted there"


def check_traffic(start, books, seed):
    server = start(books.config, dev=False, data_dir=books.data_dir, database_url=books.database_url)
    port = int(server.url.rpartition(":")[2])
    keys = {name: books.new_key(name, "--limits", LIMITS) for name in ("acme", "umbra")}
    for name in keys:
        books.run("ledger", "voucher", name, VOUCHER_USD, "USD")
    granted = int(Decimal(VOUCHER_USD) * NANO)
    objects = {name: make_objects(server.url, key) for name, key in keys.items()}
    answers = {client: [] for _, client in CLIENTS}

    def ask_on(organisation, client):
        traffic = Traffic(port, keys[organisation], random.Random(f"{seed}/{client}"), objects[organisation])
        for _ in range(N_ASKS):
            answers[client].append(traffic.send(traffic.next()))

    threads = [threading.Thread(target=ask_on, args=one) for one in CLIENTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.wait_idle()
    until(lambda: not books.read("SELECT * FROM holds"))
    settled = {row["turn_id"]: row for row in books.rows("settle")}
    seen, n_repeated = Counter(), 0
    for organisation, client in CLIENTS:
        assert len(answers[client]) == N_ASKS, "a client broke off"
        for answer in answers[client]:
            if answer.told is not None:
                row = settled[answer.turn_id]
                assert row["organisation"] == organisation
                check_turn(answer, row, call(f"{server.url}/admin/turns/{answer.turn_id}", keys[organisation]))
                seen[answer.told.dialect] += 1
                seen["read"] += row["n_read"] > 0
                seen["written"] += row["n_write"] > 0
                seen["object"] += row["n_object"] > 0
            elif answer.ask.leave_after is None:
                assert answer.status == 400 and answer.turn_id not in settled
                seen["refused"] += 1
        n_repeated += check_repeats(settled, answers[client])
    seen["released"] = len(books.rows("release"))
    seen["left"] = sum(row["status"] == "client_closed" for row in settled.values())
    known = {answer.turn_id for each in answers.values() for answer in each}
    n_unknown = sum(answer.turn_id is None for each in answers.values() for answer in each)
    assert len(settled.keys() - known) <= n_unknown, "a turn nobody asked for"
    for name in (*DIALECTS, "read", "written", "object", "refused", "released", "left"):
        assert seen[name], f"the traffic had none: {name}"
    assert n_repeated
    for name, key in keys.items():
        call(f"{server.url}/v1/caching/{objects[name]['kimi']}", key, method="DELETE")
        call(f"{server.url}/v1beta/{objects[name]['gemini']}", key, method="DELETE")
        check_balance(books, key, server.url, name, granted)
    assert len(books.check_storage()) == len(books.rows("creation")) == 2 * len(keys)
    books.check()
