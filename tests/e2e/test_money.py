"""Money over kill -9 of the real server, and through the vendors' SDKs: what was used is in the ledger, once."""

import json
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import closing

import anthropic
import openai
import pytest

from tests.e2e.conftest import SCRIPTED

pytestmark = pytest.mark.e2e
PRICED = SCRIPTED + '\n[billing.models]\nscripted = "kimi@2024-07-01/moonshot-v1-8k"\n'
NANO_PER_TOKEN = 12_000
LONG = {"model": "scripted", "messages": [{"role": "user", "content": "Tell me. " * 30}], "max_tokens": 700}
SHORT = {"model": "scripted", "messages": [{"role": "user", "content": "Hello."}], "max_tokens": 4}
WAIT_S = 60.0


def keepwarm(data_dir, *words, check=True):
    command = [sys.executable, "-m", "keepwarm", *words, "--data-dir", str(data_dir)]
    return subprocess.run(command, capture_output=True, text=True, check=check)


def new_key(data_dir, *options):
    keepwarm(data_dir, "orgs", "create", "acme", *options)
    return keepwarm(data_dir, "keys", "create", "ci", "--org", "acme").stdout.strip()


def read(data_dir, query):
    with closing(sqlite3.connect(data_dir / "keepwarm.db", timeout=WAIT_S)) as connection:
        connection.row_factory = sqlite3.Row
        return connection.execute(query).fetchall()


def has_blocked(blocker):
    """Whether a turn holds money now; if so nobody but `blocker` writes from here on."""
    blocker.execute("BEGIN IMMEDIATE")
    if blocker.execute("SELECT * FROM holds").fetchall():
        return True
    blocker.execute("ROLLBACK")
    return False


def until(found):
    end = time.monotonic() + WAIT_S
    while not (value := found()):
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.002)
    return value


def check_books(data_dir):
    """Sums are those of the rows, every hold is closed once, and every amount follows from what was used."""
    rows = read(data_dir, "SELECT * FROM ledger_rows")
    (account,) = read(data_dir, "SELECT * FROM accounts")
    for name in ("cash_nano", "voucher_nano", "held_nano"):
        assert account[name] == sum(row[name] for row in rows)
    assert account["held_nano"] == 0
    assert read(data_dir, "SELECT * FROM holds") == []
    held = {row["turn_id"]: row["held_nano"] for row in rows if row["kind"] == "hold"}
    for turn_id, amount in held.items():
        assert [-row["held_nano"] for row in rows if row["turn_id"] == turn_id and row["held_nano"] < 0] == [amount]
    for row in rows:
        if row["kind"] == "settle":
            assert (
                row["cash_nano"] + row["voucher_nano"]
                == -(row["n_fresh"] + row["n_output"]) * NANO_PER_TOKEN - row["read_nano"]
            )
    verified = keepwarm(data_dir, "ledger", "verify")
    assert "adds up" in verified.stdout + verified.stderr


def test_killed_between_the_engines_end_and_the_settling_a_hold_expires_once(start, tmp_path):
    data_dir = tmp_path / "data"
    server = start(PRICED, dev=False, data_dir=data_dir)
    key = new_key(data_dir)
    assert server.client(key).chat.completions.create(**SHORT).choices
    answers = []

    def ask():
        """Again and again, until one turn is caught in the middle."""
        client = server.client(key)
        while None not in answers:
            try:
                answers.append(client.chat.completions.create(**LONG))
            except openai.APIError:
                answers.append(None)

    with closing(sqlite3.connect(data_dir / "keepwarm.db", timeout=WAIT_S, isolation_level=None)) as blocker:
        asking = threading.Thread(target=ask)
        asking.start()
        until(lambda: has_blocked(blocker))
        until(lambda: server.health()["engine"]["n_running"] == 0)
        server.process.kill()
        server.process.wait()
        blocker.execute("ROLLBACK")
    asking.join()
    assert answers[-1] is None
    with closing(sqlite3.connect(data_dir / "keepwarm.db", timeout=WAIT_S)) as connection, connection:
        connection.execute("UPDATE holds SET expires_at = 0")  # its time passes
    again = start(PRICED, dev=False, data_dir=data_dir)
    until(lambda: not read(data_dir, "SELECT * FROM holds"))
    kinds = [row["kind"] for row in read(data_dir, "SELECT kind FROM ledger_rows ORDER BY seq")]
    assert kinds == ["hold", "settle"] * len(answers) + ["hold", "expire"]
    assert again.client(key).chat.completions.create(**SHORT).choices
    check_books(data_dir)


def test_what_was_answered_before_a_kill_is_in_the_ledger(start, tmp_path):
    data_dir = tmp_path / "data"
    server = start(PRICED, dev=False, data_dir=data_dir)
    key, answered = new_key(data_dir), []

    def ask_on(client):
        while True:
            try:
                told = client.chat.completions.create(**{**LONG, "max_tokens": 20})
            except openai.APIError:
                return
            answered.append((told.id, told.usage))

    for _ in range(2):
        asking = [threading.Thread(target=ask_on, args=(server.client(key),)) for _ in range(4)]
        for thread in asking:
            thread.start()
        n_before = len(answered)
        until(lambda n_before=n_before: len(answered) > n_before + 8)
        server.process.kill()
        for thread in asking:
            thread.join()
        server = start(PRICED, dev=False, data_dir=data_dir)
    server.stop()
    with closing(sqlite3.connect(data_dir / "keepwarm.db", timeout=WAIT_S)) as connection, connection:
        connection.execute("UPDATE holds SET expires_at = 0")
    start(PRICED, dev=False, data_dir=data_dir)
    until(lambda: not read(data_dir, "SELECT * FROM holds"))
    settled = {row["turn_id"]: row for row in read(data_dir, "SELECT * FROM ledger_rows WHERE kind = 'settle'")}
    for turn_id, usage in answered:
        row = settled[turn_id]
        assert row["n_fresh"] + row["n_read"] + row["n_write"] == usage.prompt_tokens
        assert row["n_output"] == usage.completion_tokens
    check_books(data_dir)


def test_limits_and_budgets_reach_the_sdks_in_their_own_words(start, tmp_path):
    data_dir = tmp_path / "data"
    server = start(PRICED, dev=False, data_dir=data_dir)
    key = new_key(data_dir, "--tier", "free")  # three requests a minute, one at a time
    raw = server.client(key, "/openai/v1").chat.completions.with_raw_response.create(**SHORT)
    assert raw.headers["x-ratelimit-limit-requests"] == "3"
    claude = anthropic.Anthropic(api_key=key, base_url=f"{server.url}/anthropic", max_retries=0)
    told = claude.messages.with_raw_response.create(**SHORT)
    assert told.headers["anthropic-ratelimit-requests-limit"] == "3"
    assert told.headers["anthropic-organization-id"] == "acme"
    window = int(time.time() // 60)
    caught = None
    for _ in range(5):
        try:
            server.client(key).chat.completions.create(**SHORT)
        except openai.RateLimitError as error:
            caught = error
            break
    if int(time.time() // 60) == window:  # else the minute has begun anew on the way
        assert caught.body["type"] == "rate_limit_reached_error"
        assert int(caught.response.headers["retry-after"]) <= 60
    keepwarm(data_dir, "budgets", "set", "acme", "CNY", "total", "--hard", "0.0000001")
    keepwarm(data_dir, "orgs", "create", "rich")
    keepwarm(data_dir, "budgets", "set", "rich", "CNY", "total", "--hard", "0.0000001")
    poor = keepwarm(data_dir, "keys", "create", "poor", "--org", "rich").stdout.strip()
    with pytest.raises(openai.APIStatusError) as refused:
        server.client(poor).chat.completions.create(**SHORT)
    assert refused.value.body["type"] == "exceeded_current_quota_error"
    with pytest.raises(openai.RateLimitError) as refused:
        server.client(poor, "/openai/v1").chat.completions.create(**SHORT)
    assert refused.value.body["code"] == "insufficient_quota"
    claude = anthropic.Anthropic(api_key=poor, base_url=f"{server.url}/anthropic", max_retries=0)
    with pytest.raises(anthropic.APIStatusError) as refused:
        claude.messages.create(**SHORT)
    assert refused.value.status_code == 402
    url = f"{server.url}/v1beta/models/scripted:generateContent?key={poor}"
    body = json.dumps({"contents": [{"role": "user", "parts": [{"text": "Hello."}]}]}).encode()
    with pytest.raises(urllib.error.HTTPError) as http:
        urllib.request.urlopen(urllib.request.Request(url, body, {"content-type": "application/json"}))
    assert json.loads(http.value.read())["error"]["status"] == "RESOURCE_EXHAUSTED"


def test_kimis_balance_follows_vouchers_and_use(start, tmp_path):
    data_dir = tmp_path / "data"
    server = start(PRICED, dev=False, data_dir=data_dir)
    key = new_key(data_dir)
    keepwarm(data_dir, "ledger", "voucher", "acme", "1", "CNY")
    keepwarm(data_dir, "ledger", "grant", "acme", "2", "CNY")
    told = server.client(key).chat.completions.create(**SHORT)
    balance = server.client(key).get("/users/me/balance", cast_to=object)["data"]
    cost = told.usage.total_tokens * NANO_PER_TOKEN / 1e9
    assert balance["cash_balance"] == 2
    assert balance["voucher_balance"] == pytest.approx(1 - cost)
    assert balance["available_balance"] == pytest.approx(3 - cost)
    check_books(data_dir)
