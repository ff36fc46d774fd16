import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from keepwarm.billing.ledger import Ledger
from keepwarm.billing.report import UsageQuery, UsageReport
from keepwarm.config import Limits
from keepwarm.core.clock import RandomIds
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.principal import Access, Principal, Role
from keepwarm.gateway.identities import Identities
from keepwarm.gateway.phases import Phases
from keepwarm.server.billing import REPORTS_MAX, BillingCalls, billing_entries, kimi_balance_entries
from keepwarm.server.exchange import Exchange
from tests import used
from tests.world import CountingIds, FakeClock

ADMIN = Principal("acme", "acme", "web", 7, "ci", Role.ADMIN)
OPERATOR = Principal("default", "default", "default", 1, "root", Role.OPERATOR)

Ask = Callable[..., Any]


@pytest.fixture
def ask(tmp_path: Path) -> Iterator[Ask]:
    """What a call answers: JSON where it is JSON, else text."""
    clock = FakeClock()
    storage = used.make(tmp_path, clock)

    async def run(method: str, path: str, query: str, body: object, caller: Principal) -> Any:
        ledger = Ledger(storage, clock, RandomIds(), hold_s=1.0)
        identities = Identities(storage, clock, CountingIds(), tiers={}, default_tier=None)
        entries = billing_entries(storage, ledger, identities, clock)
        entries += kimi_balance_entries(storage, ledger, identities, clock)
        [(route, call)] = [(route, call) for route, call in entries if (route.method, route.path) == (method, path)]
        assert route.access.allows(caller.role)
        sent: list[Any] = []

        async def receive() -> dict[str, object]:
            return {"type": "http.request", "body": json.dumps(body).encode()}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"headers": [], "method": method, "scheme": "http", "path": path, "query_string": query.encode()}
        exchange = Exchange(scope, receive, send, "turn", Phases(clock), Limits())
        exchange.identify(caller)
        await call(exchange)
        text = sent[1]["body"].decode()
        is_json = (b"content-type", b"application/json") in sent[0]["headers"]
        return json.loads(text) if is_json else text

    def asked(method: str, path: str, query: str = "", body: object = None, caller: Principal = ADMIN) -> Any:
        return asyncio.run(run(method, path, query, body, caller))

    yield asked
    storage.close()


def test_who_may_call_what() -> None:
    absent: Any = None
    table = {(route.method, route.path): route.access for route, _ in billing_entries(absent, absent, absent, absent)}
    assert table == {
        ("GET", "/admin/usage"): Access.READ,
        ("GET", "/admin/invoice"): Access.ADMIN,
        ("GET", "/admin/balance"): Access.READ,
        ("GET", "/admin/budgets"): Access.READ,
        ("PUT", "/admin/budgets"): Access.ADMIN,
        ("DELETE", "/admin/budgets"): Access.ADMIN,
        ("POST", "/admin/grants"): Access.OPERATOR,
    }


def test_usage_is_of_the_callers_organisation_and_an_operators_of_all(ask: Ask) -> None:
    mine = ask("GET", "/admin/usage", "by=organisation")
    assert {item["organisation"] for item in mine["data"]} == {"acme"}
    every = ask("GET", "/admin/usage", "by=organisation&from=2023-11-01&to=2023-11-30", caller=OPERATOR)
    assert {item["organisation"] for item in every["data"]} == {"acme", "umbra"}
    one = ask("GET", "/admin/usage", "by=organisation&organisation=umbra", caller=OPERATOR)
    assert {item["organisation"] for item in one["data"]} == {"umbra"}
    assert ask("GET", "/admin/usage", "by=day&format=csv").startswith("day,currency,n_calls,")
    assert ask("GET", "/admin/usage", "key=8")["totals"][0]["n_calls"] == 1


@pytest.mark.parametrize(
    "method, path, query, body",
    [
        ("GET", "/admin/usage", "organisation=umbra", None),
        ("GET", "/admin/invoice", "organisation=umbra&month=2023-11", None),
        ("GET", "/admin/balance", "organisation=umbra", None),
        ("GET", "/admin/budgets", "organisation=umbra", None),
        ("PUT", "/admin/budgets", "", {"organisation": "umbra", "currency": "CNY", "period": "day", "hard": "1"}),
        ("DELETE", "/admin/budgets", "organisation=umbra&currency=CNY&period=day", None),
    ],
)
def test_another_organisation_looks_like_none(ask: Ask, method: str, path: str, query: str, body: object) -> None:
    with pytest.raises(ApiError) as caught:
        ask(method, path, query, body)
    assert caught.value.kind is ErrorKind.UNKNOWN_ROUTE
    assert "it sees no other" in caught.value.message


@pytest.mark.parametrize(
    "query, words",
    [
        ("by=colour", "'colour' is none of"),
        ("from=yesterday", "is not a day"),
        ("kee=7", "is no parameter of this call"),
        ("key=7&key=8", "is given twice"),
        ("key=x", "is no key's id"),
        ("format=xml", "neither json nor csv"),
    ],
)
def test_a_query_that_is_wrong_is_refused(ask: Ask, query: str, words: str) -> None:
    with pytest.raises(ApiError, match=words):
        ask("GET", "/admin/usage", query)


def test_an_invoice_is_a_page(ask: Ask) -> None:
    assert "<h1>acme</h1>" in ask("GET", "/admin/invoice", "month=2023-11")
    with pytest.raises(ApiError, match="month: is required"):
        ask("GET", "/admin/invoice")


def test_credit_comes_in_and_kimi_shows_it(ask: Ask) -> None:
    before = {one["currency"]: one for one in ask("GET", "/admin/balance")["data"]}["CNY"]
    told = ask("GET", "/users/me/balance")["data"]
    assert f"{told['cash_balance']:.9f}".rstrip("0") == before["cash"]
    grant = {"organisation": "acme", "currency": "CNY", "amount": "1000000"}
    after = {one["currency"]: one for one in ask("POST", "/admin/grants", "", grant, OPERATOR)["data"]}["CNY"]
    assert float(after["cash"]) == pytest.approx(float(before["cash"]) + 10**6)
    voucher = {**grant, "kind": "voucher", "expires_at": 1_900_000_000}
    assert float(ask("POST", "/admin/grants", "", voucher, OPERATOR)["data"][0]["voucher"]) >= 10**6
    assert ask("GET", "/users/me/balance")["data"]["voucher_balance"] >= 10**6
    with pytest.raises(ApiError, match="cash does not expire"):
        ask("POST", "/admin/grants", "", {**grant, "expires_at": 1_900_000_000}, OPERATOR)
    with pytest.raises(ApiError):
        ask("POST", "/admin/grants", "", {**grant, "organisation": "nobody"}, OPERATOR)


def test_an_organisation_without_an_account_has_zeros(ask: Ask) -> None:
    assert ask("GET", "/users/me/balance", caller=OPERATOR)["data"] == {
        "available_balance": 0, "voucher_balance": 0, "cash_balance": 0,
    }  # fmt: skip


def test_budgets_are_set_and_removed(ask: Ask) -> None:
    n_before = len(ask("GET", "/admin/budgets")["data"])
    budget = {"organisation": "acme", "currency": "CNY", "period": "month", "soft": "1", "hard": "2.5"}
    told = ask("PUT", "/admin/budgets", "", budget, OPERATOR)
    [mine] = [one for one in told["data"] if one["period"] == "month"]
    assert (mine["organisation"], mine["soft"], mine["hard"], mine["held"]) == ("acme", "1", "2.5", "0")
    assert float(mine["spent"]) > 2
    told = ask("DELETE", "/admin/budgets", "organisation=acme&currency=CNY&period=month", caller=OPERATOR)
    assert len(told["data"]) == n_before
    with pytest.raises(ApiError, match="there is no budget org:acme in CNY for the period month"):
        ask("DELETE", "/admin/budgets", "organisation=acme&currency=CNY&period=month", caller=OPERATOR)
    with pytest.raises(ApiError):
        ask("PUT", "/admin/budgets", "", {"currency": "CNY", "period": "day", "hard": "1", "project": "none"})


def test_reports_are_made_one_after_another_and_only_so_many_wait(tmp_path: Path) -> None:
    clock = FakeClock()
    storage = used.make(tmp_path, clock)
    ledger = Ledger(storage, clock, RandomIds(), hold_s=1.0)
    calls = BillingCalls(storage, ledger, Identities(storage, clock, CountingIds(), tiers={}, default_tier=None), clock)

    async def ask_twice() -> list[list[Any]]:
        asked = [calls._report(UsageQuery()) for _ in range(2 * (REPORTS_MAX + 1))]
        half = len(asked) // 2  # places come back
        return [await asyncio.gather(*several, return_exceptions=True) for several in (asked[:half], asked[half:])]

    for *made, refused in asyncio.run(ask_twice()):
        assert len(set(map(repr, made))) == 1 and isinstance(made[0], UsageReport)
        assert isinstance(refused, ApiError) and refused.kind is ErrorKind.OVERLOADED
        assert f"limit {REPORTS_MAX}" in refused.message
    storage.close()
