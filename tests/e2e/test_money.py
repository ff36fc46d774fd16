"""Keys with roles, limits, budgets and balances through the vendors' SDKs: each client is refused in its vendor's own words."""

import json
import urllib.error
import urllib.request

import anthropic
import openai
import pytest

from tests.e2e.money import FRESH, OUTPUT, READ, Books
from tests.gemini_sdks import genai

pytestmark = pytest.mark.e2e
SHORT = {"model": "scripted", "messages": [{"role": "user", "content": "Hello."}], "max_tokens": 4}
TEXT = "The tide tables of the harbour, page by page. " * 20
NANO = 10**9
CALLS_OF_A_MINUTE = 3
CALLS = 2 * CALLS_OF_A_MINUTE + 1  # however they fall into two minutes, one is too much


@pytest.fixture
def books(tmp_path):
    return Books(tmp_path)


@pytest.fixture
def server(start, books):
    return start(books.config, dev=False, data_dir=books.data_dir)


class Callers:
    """The same short turn by each vendor's client; the old names of Gemini's errors are in the body."""

    def __init__(self, server, key):
        self._key = key
        self._url = server.url
        self._kimi = server.client(key)
        self._openai = server.client(key, "/openai/v1")
        self._minimax = server.client(key, "/minimax/v1")
        self._anthropic = anthropic.Anthropic(api_key=key, base_url=f"{server.url}/anthropic", max_retries=0)
        self._google = genai.Client(api_key=key, http_options=genai.types.HttpOptions(base_url=server.url))
        server.clients.append(self._anthropic)

    def kimi(self):
        return self._kimi.chat.completions.create(**SHORT)

    def openai(self):
        return self._openai.chat.completions.with_raw_response.create(**SHORT)

    def minimax(self):
        return self._minimax.chat.completions.create(**SHORT)

    def anthropic(self):
        return self._anthropic.messages.with_raw_response.create(**SHORT)

    def gemini(self):
        return self._google.models.generate_content(
            model="scripted", contents="Hello.", config={"max_output_tokens": 4}
        )

    def raw(self, path, body):
        """Without an SDK: status and body."""
        headers = {"authorization": f"Bearer {self._key}", "content-type": "application/json"}
        wanted = urllib.request.Request(self._url + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(wanted, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as refused:
            with refused:
                return refused.code, json.load(refused)


def several(ask, times):
    for _ in range(times):
        ask()


def refused(kind, ask, times=1):
    """The error that one of so many calls ends with."""
    with pytest.raises(kind) as caught:
        several(ask, times)
    return caught.value


def test_a_minutes_requests_are_told_in_headers_and_refused_in_each_vendors_words(server, books):
    limits = json.dumps({"rpm": CALLS_OF_A_MINUTE, "tpd": 100_000})
    callers = Callers(server, books.new_key("acme", "--limits", limits))
    told = callers.openai().headers
    assert told["x-ratelimit-limit-requests"] == str(CALLS_OF_A_MINUTE)
    assert told["x-ratelimit-limit-tokens"] == "100000"
    assert 0 <= int(told["x-ratelimit-remaining-requests"]) < CALLS_OF_A_MINUTE
    assert told["x-ratelimit-reset-requests"].endswith("s")
    told = refused(anthropic.RateLimitError, callers.anthropic, CALLS)
    assert told.body["error"]["type"] == "rate_limit_error" and "RPM: 3" in told.body["error"]["message"]
    headers = told.response.headers
    assert 0 < int(headers["retry-after"]) <= 60
    assert headers["anthropic-ratelimit-requests-limit"] == str(CALLS_OF_A_MINUTE)
    assert headers["anthropic-ratelimit-requests-reset"].endswith("Z")
    assert headers["anthropic-organization-id"] == "acme"
    told = refused(openai.RateLimitError, callers.kimi, CALLS)
    assert told.body["type"] == "rate_limit_reached_error"
    assert told.body["message"].startswith("Your account acme<of-acme> request reached max organization RPM: 3")
    assert 0 < int(told.response.headers["retry-after"]) <= 60
    told = refused(openai.RateLimitError, callers.openai, CALLS)
    assert (told.body["type"], told.body["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    told = refused(genai.errors.ClientError, callers.gemini, CALLS)
    assert (told.code, told.status) == (429, "RESOURCE_EXHAUSTED")
    (retry,) = [one for one in told.details["error"]["details"] if one["@type"].endswith("google.rpc.RetryInfo")]
    assert retry["retryDelay"].endswith("s")
    books.check()


def test_tokens_that_no_wait_would_help_with_are_an_error_and_not_a_limit(server, books):
    key = books.new_key("acme", "--limits", '{"tpm": 20}')
    told = refused(openai.BadRequestError, Callers(server, key).kimi)
    assert "20" in told.body["message"]
    assert books.rows() == []


def empty_balance(books):
    return books.new_key("acme", "--prepaid")


def small_budget(books):
    key = books.new_key("acme")
    books.run("budgets", "set", "acme", "USD", "total", "--hard", "0.000001")
    return key


@pytest.mark.parametrize("poor", [empty_balance, small_budget])
def test_without_money_each_vendors_client_is_told_so_in_its_own_words(server, books, poor):
    callers = Callers(server, poor(books))
    told = refused(openai.RateLimitError, callers.kimi)
    assert told.body["type"] == "exceeded_current_quota_error"
    for ask in (callers.openai, callers.minimax):
        told = refused(openai.RateLimitError, ask)
        assert (told.body["type"], told.body["code"]) == ("insufficient_quota", "insufficient_quota")
    told = refused(anthropic.APIStatusError, callers.anthropic)
    assert (told.status_code, told.body["error"]["type"]) == (402, "billing_error")
    told = refused(genai.errors.ClientError, callers.gemini)
    assert (told.code, told.status) == (429, "RESOURCE_EXHAUSTED")
    status, told = callers.raw("/v1/chat/completions", SHORT | {"stream": True})
    assert (status, told["error"]["type"]) == (429, "exceeded_current_quota_error")
    assert books.rows() == []  # nothing ran, and nothing is held
    if poor is empty_balance:
        books.run("ledger", "grant", "acme", "1", "USD")
        assert callers.kimi().choices
        books.check()


def test_a_budget_of_one_key_stops_that_key_alone(server, books):
    first = books.new_key("acme")
    second = books.run("keys", "create", "second", "--org", "acme")
    key_id = str(json.loads(books.run("keys", "list", "--org", "acme", "--json"))[0]["id"])
    books.run("budgets", "set", "acme", "USD", "day", "--key", key_id, "--hard", "0.000001")
    assert refused(openai.RateLimitError, Callers(server, first).kimi).body["type"] == "exceeded_current_quota_error"
    assert Callers(server, second).kimi().choices
    books.check()


def test_a_read_only_key_may_look_and_runs_nothing(server, books):
    books.new_key("acme")
    looking = books.run("keys", "create", "looks", "--org", "acme", "--role", "read-only")
    callers = Callers(server, looking)
    assert server.client(looking).models.list().data
    for ask, kind in ((callers.kimi, openai.PermissionDeniedError), (callers.openai, openai.PermissionDeniedError)):
        refused(kind, ask)
    refused(anthropic.PermissionDeniedError, callers.anthropic)
    assert refused(genai.errors.ClientError, callers.gemini).code == 403
    assert books.rows() == []


def ledger_of(books, turn_id):
    (row,) = [row for row in books.rows("settle") if row["turn_id"] == turn_id]
    return row


def test_each_sdk_is_told_what_the_ledger_has(server, books):
    callers = Callers(server, books.new_key("acme"))
    for ask in (callers.kimi, callers.minimax):
        answer = ask()
        row = ledger_of(books, answer._request_id)
        assert answer.usage.prompt_tokens == row["n_fresh"] + row["n_read"] + row["n_write"]
        assert answer.usage.completion_tokens == row["n_output"]
        assert answer.usage.prompt_tokens_details.cached_tokens == row["n_read"]
    answer = callers.anthropic()
    usage, row = answer.parse().usage, ledger_of(books, answer.headers["x-request-id"])
    assert (usage.input_tokens, usage.output_tokens) == (row["n_fresh"], row["n_output"])
    assert (usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (row["n_read"], row["n_write"])
    answer = callers.gemini()
    row = ledger_of(books, books.rows("settle")[-1]["turn_id"])
    assert row["dialect"] == "gemini"
    assert answer.usage_metadata.prompt_token_count == row["n_fresh"] + row["n_read"] + row["n_write"]
    assert answer.usage_metadata.candidates_token_count == row["n_output"]
    books.check()


def test_kimis_balance_follows_vouchers_cash_and_use(server, books):
    key = books.new_key("acme")
    client = server.client(key)
    voucher_nano = 2_000_000
    books.run("ledger", "voucher", "acme", str(voucher_nano / NANO), "USD")
    books.run("ledger", "grant", "acme", "2", "USD")
    taken = 0
    for _ in range(3):
        body = {"model": "scripted", "messages": [{"role": "system", "content": TEXT}], "max_tokens": 4}
        usage = client.chat.completions.create(**body).usage
        taken += (usage.prompt_tokens - usage.cached_tokens) * FRESH + usage.cached_tokens * READ
        taken += usage.completion_tokens * OUTPUT
        balance = client.get("/users/me/balance", cast_to=object)["data"]
        assert round(balance["voucher_balance"] * NANO) == max(0, voucher_nano - taken)
        assert round(balance["cash_balance"] * NANO) == 2 * NANO - max(0, taken - voucher_nano)
        assert round(balance["available_balance"] * NANO) == 2 * NANO + voucher_nano - taken
    assert taken > voucher_nano, "the voucher was to be used up"
    books.check()
