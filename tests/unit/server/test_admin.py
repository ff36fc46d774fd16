"""Organisations, projects and keys over HTTP, with keys of every rank."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from keepwarm.core.clock import RandomIds
from keepwarm.core.identity import NewKey, NewOrganisation
from keepwarm.core.principal import Role
from keepwarm.gateway.identities import Identities
from tests.world import CONFIG, World, world

pytestmark = pytest.mark.anyio


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path, config=replace(CONFIG, dev=False)) as running:
        yield running


@pytest.fixture
def identities(server: World) -> Identities:
    return Identities(server.storage, server.clock, RandomIds(), tiers={}, default_tier=None)


@pytest.fixture
async def operator(identities: Identities) -> str:
    new = NewKey("root", role=Role.OPERATOR)
    return (await identities.create_key(None, new, by=None))[0]


@pytest.fixture
async def admin(identities: Identities) -> str:
    await identities.create_organisation(NewOrganisation("acme"))
    new = NewKey("boss", role=Role.ADMIN)
    return (await identities.create_key("acme", new, by=None))[0]


async def done(server: World, key: str, method: str, path: str, body: object = None, status: int = 200) -> Any:
    answer = await server.request(method, path, body, key=key)
    assert answer.status == status, answer.body
    return answer.json() if status == 200 else answer.json()["error"]


async def test_an_operator_makes_an_organisation_and_its_first_admin(server: World, operator: str) -> None:
    asked = {"id": "acme", "tier": "tier1", "limits": {"rpm": 5, "tpd": None}, "is_prepaid": True}
    made = await done(server, operator, "POST", "/admin/orgs", asked)
    now = int(server.clock.now())
    assert made == {**asked, "cache_scope": "organisation", "created_at": now, "disabled_at": None}
    listed = (await done(server, operator, "GET", "/admin/orgs"))["data"]
    assert [org["id"] for org in listed] == ["default", "acme"]
    key = (await done(server, operator, "POST", "/admin/orgs/acme/keys", {"name": "boss", "role": "admin"}))["key"]
    assert await done(server, key, "GET", "/admin/orgs/acme") == made


async def test_an_admin_makes_projects_and_keys_that_work_at_once(server: World, admin: str) -> None:
    made = await done(server, admin, "POST", "/admin/orgs/acme/projects", {"name": "search"})
    assert made == {
        "organisation": "acme",
        "name": "search",
        "created_at": int(server.clock.now()),
        "archived_at": None,
    }
    ends = int(server.clock.now()) + 60
    asked = {"name": "ci", "project": "search", "expires_at": ends, "models": ["small"]}
    reply = await done(server, admin, "POST", "/admin/orgs/acme/keys", asked)
    info = {
        "id": 2,  # the admin's own is the first
        **asked,
        "organisation": "acme",
        "role": "member",
        "last4": reply["key"][-4:],
        "created_at": int(server.clock.now()),
        "revoked_at": None,
    }
    assert reply["info"] == info
    assert (await server.chat(key=reply["key"])).status == 200
    assert await done(server, admin, "GET", f"/admin/orgs/acme/keys/{info['id']}") == info
    assert (await done(server, admin, "GET", "/admin/orgs/acme/keys"))["data"][-1] == info
    revoked = await done(server, admin, "DELETE", f"/admin/orgs/acme/keys/{info['id']}")
    assert revoked == {**info, "revoked_at": int(server.clock.now())}
    assert (await server.chat(key=reply["key"])).status == 401


async def test_an_admin_changes_a_key_and_the_next_request_goes_by_it(server: World, admin: str) -> None:
    made = await done(server, admin, "POST", "/admin/orgs/acme/keys", {"name": "ci", "models": ["small"]})
    path, key, ends = f"/admin/orgs/acme/keys/{made['info']['id']}", made["key"], int(server.clock.now()) + 60
    told = await done(server, admin, "PATCH", path, {"models": ["other"], "name": "robot"})
    assert told == {**made["info"], "models": ["other"], "name": "robot"}
    assert (await server.chat(key=key)).status == 403
    assert (await done(server, admin, "PATCH", path, {"models": None, "expires_at": ends}))["name"] == "robot"
    assert (await server.chat(key=key)).status == 200
    server.clock.advance(60)
    assert (await server.chat(key=key)).status == 401
    told = await done(server, admin, "PATCH", path, {"name": "ci"})
    assert told == {**made["info"], "models": None, "expires_at": ends} == await done(server, admin, "GET", path)
    await done(server, admin, "PATCH", path, {"expires_at": None})
    assert (await server.chat(key=key)).status == 200
    await done(server, admin, "DELETE", path)
    assert "was revoked" in (await done(server, admin, "PATCH", path, {"name": "x"}, status=400))["message"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"name": "boss"}, "already"),
        ({"name": "a b"}, "cannot be used as a name"),
        ({"expires_at": 1}, "is not after now"),
        ({"models": []}, "0 names"),
        ({"role": "operator"}, "unknown field role"),
        ({"project": "default"}, "unknown field project"),
    ],
)
async def test_a_key_that_is_changed_wrongly_stays(
    server: World, admin: str, change: dict[str, object], words: str
) -> None:
    info = (await done(server, admin, "POST", "/admin/orgs/acme/keys", {"name": "ci"}))["info"]
    path = f"/admin/orgs/acme/keys/{info['id']}"
    assert words in (await done(server, admin, "PATCH", path, change, status=400))["message"]
    assert await done(server, admin, "GET", path) == info


async def test_archiving_a_project_shuts_its_keys_out(server: World, admin: str) -> None:
    await done(server, admin, "POST", "/admin/orgs/acme/projects", {"name": "search"})
    asked = {"name": "ci", "project": "search"}
    key = (await done(server, admin, "POST", "/admin/orgs/acme/keys", asked))["key"]
    archived = await done(server, admin, "DELETE", "/admin/orgs/acme/projects/search")
    assert archived["archived_at"] == int(server.clock.now())
    assert await done(server, admin, "GET", "/admin/orgs/acme/projects/search") == archived
    assert (await server.chat(key=key)).status == 403
    await done(server, admin, "POST", "/admin/orgs/acme/projects", {"name": "search"})
    assert (await server.chat(key=key)).status == 200


async def test_disabling_an_organisation_shuts_it_out_and_nobody_else(server: World, operator: str, admin: str) -> None:
    told = await done(server, operator, "PATCH", "/admin/orgs/acme", {"is_disabled": True})
    assert told["disabled_at"] == int(server.clock.now())
    assert "'acme' is disabled" in (await done(server, admin, "GET", "/admin/orgs/acme", status=403))["message"]
    await done(server, operator, "GET", "/admin/orgs/acme")
    await done(server, operator, "PATCH", "/admin/orgs/acme", {"is_disabled": False})
    await done(server, admin, "GET", "/admin/orgs/acme")


async def test_an_admin_sees_no_other_organisation(server: World, operator: str, admin: str) -> None:
    for path in ("/admin/orgs/{}", "/admin/orgs/{}/keys", "/admin/orgs/{}/keys/1", "/admin/orgs/{}/projects/default"):
        errors = [await done(server, admin, "GET", path.format(org), status=404) for org in ("default", "nobody")]
        assert errors[0] == errors[1], "whether it is there cannot be told"
    await done(server, admin, "POST", "/admin/orgs/default/keys", {"name": "spy"}, status=404)
    assert [key["name"] for key in (await done(server, operator, "GET", "/admin/orgs/default/keys"))["data"]] == [
        "root"
    ]


async def test_an_admin_cannot_rise(server: World, identities: Identities, operator: str, admin: str) -> None:
    asked = {"name": "root2", "role": "operator"}
    refused = await done(server, admin, "POST", "/admin/orgs/acme/keys", asked, status=403)
    assert "operator" in refused["message"]
    await done(server, admin, "PATCH", "/admin/orgs/acme", {"tier": "tier5"}, status=403)
    new = NewKey("root", role=Role.OPERATOR)
    _, theirs = await identities.create_key("acme", new, by=None)
    await done(server, admin, "DELETE", f"/admin/orgs/acme/keys/{theirs.id}", status=403)
    await done(server, admin, "PATCH", f"/admin/orgs/acme/keys/{theirs.id}", {"name": "x"}, status=403)
    await done(server, operator, "DELETE", f"/admin/orgs/acme/keys/{theirs.id}")


async def test_an_admin_cannot_shut_the_operator_out(server: World, operator: str, identities: Identities) -> None:
    """The operator's first key is in the organisation "default", which may have an admin."""
    admin, _ = await identities.create_key("default", NewKey("boss", role=Role.ADMIN), by=None)
    await done(server, admin, "DELETE", "/admin/orgs/default/projects/default", status=403)
    budget = {"key": 1, "currency": "USD", "period": "total", "hard": "0"}
    await done(server, admin, "PUT", "/admin/budgets", budget, status=403)
    await done(server, operator, "GET", "/admin/orgs")
    await done(server, operator, "PUT", "/admin/budgets", budget)


async def test_budgets_of_an_organisation_are_the_operators(server: World, operator: str, admin: str) -> None:
    whole = {"organisation": "acme", "currency": "USD", "period": "month", "hard": "1"}
    await done(server, admin, "PUT", "/admin/budgets", whole, status=403)
    await done(server, operator, "PUT", "/admin/budgets", whole)
    await done(server, admin, "DELETE", "/admin/budgets?currency=USD&period=month", status=403)
    told = await done(server, admin, "PUT", "/admin/budgets", {**whole, "project": "default"})
    assert [one["project"] for one in told["data"]] == [None, "default"]
    await done(server, admin, "DELETE", "/admin/budgets?currency=USD&period=month&project=default")


async def test_keys_are_listed_in_pages(server: World, admin: str) -> None:
    for name in ("a", "b", "c"):
        await done(server, admin, "POST", "/admin/orgs/acme/keys", {"name": name})
    first = await done(server, admin, "GET", "/admin/orgs/acme/keys?limit=3")
    assert ([key["name"] for key in first["data"]], first["has_more"]) == (["boss", "a", "b"], True)
    after = first["data"][-1]["id"]
    rest = await done(server, admin, "GET", f"/admin/orgs/acme/keys?after={after}")
    assert ([key["name"] for key in rest["data"]], rest["has_more"]) == (["c"], False)
    for wrong in ("after=x", "limit=99999999999", "before=1", "limit=1&limit=2"):
        await done(server, admin, "GET", f"/admin/orgs/acme/keys?{wrong}", status=400)


@pytest.mark.parametrize("kind", ["cash", "voucher"])
async def test_a_grant_that_is_sent_again_is_given_once(server: World, operator: str, admin: str, kind: str) -> None:
    async def available(headers: dict[str, str], amount: str = "10") -> str:
        body = {"organisation": "acme", "currency": "USD", "amount": amount, "kind": kind}
        answer = await server.request("POST", "/admin/grants", body, key=operator, headers=headers)
        assert answer.status == 200, answer.body
        return str(answer.json()["data"][0]["available"])

    key = {"idempotency-key": "march"}
    assert [await available(key), await available(key)] == ["10", "10"]
    assert await available(key, amount="5") == "15"  # another body is another grant
    assert await available({"idempotency-key": "april"}) == "25"
    assert [await available({}), await available({})] == ["35", "45"]


async def test_a_browser_may_only_show_an_invoice(server: World, admin: str) -> None:
    answer = await server.request("GET", "/admin/invoice?month=2023-11", key=admin)
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/html")
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert b"<script" not in answer.body and b"src=" not in answer.body


async def test_a_narrow_admin_makes_narrow_keys(server: World, identities: Identities, admin: str) -> None:
    narrow, _ = await identities.create_key("acme", NewKey("few", role=Role.ADMIN, models=("small",)), by=None)
    await done(server, narrow, "POST", "/admin/orgs/acme/keys", {"name": "all", "role": "admin"}, status=403)
    await done(server, narrow, "POST", "/admin/orgs/acme/keys", {"name": "few2", "models": ["small"]})


@pytest.mark.parametrize("key_id", [0, -1, 2**31, 2**63, 2**100])
async def test_a_budget_for_what_can_be_no_key_is_a_400(server: World, admin: str, key_id: int) -> None:
    body = {"key": key_id, "currency": "USD", "period": "total", "hard": "1"}
    error = await done(server, admin, "PUT", "/admin/budgets", body, status=400)
    assert "key" in error["message"]


async def test_credit_that_cannot_be_counted_is_refused_with_the_numbers(
    server: World, operator: str, admin: str
) -> None:
    grant = {"organisation": "acme", "currency": "USD", "amount": "999999999"}
    await done(server, operator, "POST", "/admin/grants", grant)
    error = await done(server, operator, "POST", "/admin/grants", grant, status=400)
    assert "999999999 USD and 999999999 USD are together beyond what can be counted, 1000000000" in error["message"]
    await done(server, operator, "POST", "/admin/grants", {**grant, "kind": "voucher"})
    await done(server, operator, "POST", "/admin/grants", {**grant, "kind": "voucher"}, status=400)
    await done(server, operator, "POST", "/admin/grants", {**grant, "amount": "1", "note": "x" * 1001}, status=400)


@pytest.mark.parametrize(
    "method, path, body, words",
    [
        ("POST", "/admin/orgs", {}, "id: is required"),
        ("POST", "/admin/orgs", {"id": "a b"}, "cannot be used as a name"),
        ("POST", "/admin/orgs", {"id": "a", "tier": "gold"}, "no tier 'gold'"),
        ("POST", "/admin/orgs", {"id": "a", "limits": {"rpm": 0}}, "limits.rpm"),
        ("POST", "/admin/orgs", {"id": "a", "cache_scope": "key"}, "cache_scope"),
        ("POST", "/admin/orgs", {"id": "a", "prepaid": True}, "unknown field prepaid"),
        ("PATCH", "/admin/orgs/acme", {"id": "b"}, "unknown field id"),
        ("POST", "/admin/orgs/acme/projects", {"name": "default"}, "already"),
        ("POST", "/admin/orgs/acme/keys", {"name": "boss"}, "already"),
        ("POST", "/admin/orgs/acme/keys", {"name": "x", "role": "root"}, "role"),
        ("POST", "/admin/orgs/acme/keys", {"name": "x", "expires_at": 1}, "expires_at"),
        ("POST", "/admin/orgs/acme/keys", {"name": "x", "project": "none"}, "no project 'none'"),
    ],
)
async def test_a_wrong_body_is_a_400_that_says_what(
    server: World, operator: str, admin: str, method: str, path: str, body: object, words: str
) -> None:
    assert words in (await done(server, operator, method, path, body, status=400))["message"]


@pytest.mark.parametrize("key_id", ["0", "x", "-1", "9" * 30, "1x"])
async def test_what_is_no_keys_id_is_not_found(server: World, operator: str, key_id: str) -> None:
    await done(server, operator, "GET", f"/admin/orgs/default/keys/{key_id}", status=404)
