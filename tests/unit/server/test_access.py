"""Every call of the application, by every kind of caller. A route that is added and has no rule here fails."""

import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from starlette.routing import BaseRoute, Mount
from starlette.routing import Route as StarlettePath

from keepwarm.core.clock import RandomIds
from keepwarm.core.identity import NewKey, NewOrganisation, OrganisationChange
from keepwarm.core.principal import Access, Role
from keepwarm.dialects.gemini_files import STATUS_HEADER
from keepwarm.dialects.openapi import Route
from keepwarm.gateway.auth import digest
from keepwarm.gateway.identities import Identities
from keepwarm.server.routes import ByClient, PathCalls
from tests.world import CONFIG, Answer, World, world

pytestmark = pytest.mark.anyio

WITH_KEYS = replace(CONFIG, dev=False)
PUBLIC, READ, USE, ADMIN, OPERATOR = Access

# Who may do what, written down a second time: method and path below the mount.
RULES: Mapping[str, Access] = {
    "GET /health": PUBLIC,
    "GET /docs": PUBLIC,
    "GET /openapi.json": PUBLIC,
    "GET /$discovery/rest": PUBLIC,
    "GET /gemini/$discovery/rest": PUBLIC,
    "GET /models": READ,
    "GET /models/{model}": READ,
    "POST /chat/completions": USE,
    "POST /messages": USE,
    "POST /messages/count_tokens": READ,
    "POST /tokenizers/estimate-token-count": READ,
    "POST /models/{model}:generateContent": USE,
    "POST /models/{model}:streamGenerateContent": USE,
    "POST /models/{model}:countTokens": READ,
    "GET /caching": READ,
    "POST /caching": USE,
    "GET /caching/{cache_id}": READ,
    "PUT /caching/{cache_id}": USE,
    "DELETE /caching/{cache_id}": USE,
    "GET /caching/refs/tags": READ,
    "POST /caching/refs/tags": USE,
    "GET /caching/refs/tags/{tag}": READ,
    "GET /caching/refs/tags/{tag}/content": READ,
    "DELETE /caching/refs/tags/{tag}": USE,
    "GET /cachedContents": READ,
    "POST /cachedContents": USE,
    "GET /cachedContents/{cache_id}": READ,
    "PATCH /cachedContents/{cache_id}": USE,
    "DELETE /cachedContents/{cache_id}": USE,
    "GET /files": READ,
    "POST /files": USE,
    "PUT /files": USE,
    "GET /files/{file_id}": READ,
    "GET /files/{file_id}/content": READ,
    "DELETE /files/{file_id}": USE,
    "GET /admin/store": OPERATOR,
    "GET /admin/turns/{turn_id}": READ,
    "POST /admin/engine/restart": OPERATOR,
    "GET /admin/usage": READ,
    "GET /admin/balance": READ,
    "GET /users/me/balance": READ,
    "GET /admin/invoice": ADMIN,
    "GET /admin/budgets": READ,
    "PUT /admin/budgets": ADMIN,
    "DELETE /admin/budgets": ADMIN,
    "POST /admin/grants": OPERATOR,
    "GET /admin/orgs": OPERATOR,
    "POST /admin/orgs": OPERATOR,
    "GET /admin/orgs/{org}": ADMIN,
    "PATCH /admin/orgs/{org}": OPERATOR,
    "GET /admin/orgs/{org}/projects": ADMIN,
    "POST /admin/orgs/{org}/projects": ADMIN,
    "GET /admin/orgs/{org}/projects/{name}": ADMIN,
    "DELETE /admin/orgs/{org}/projects/{name}": ADMIN,
    "GET /admin/orgs/{org}/keys": ADMIN,
    "POST /admin/orgs/{org}/keys": ADMIN,
    "GET /admin/orgs/{org}/keys/{key_id}": ADMIN,
    "PATCH /admin/orgs/{org}/keys/{key_id}": ADMIN,
    "DELETE /admin/orgs/{org}/keys/{key_id}": ADMIN,
}
DEV_ONLY = {"POST /admin/engine/restart"}
BEARER_PARAMS = {"POST /files": {None, "upload_id"}, "PUT /files": {"upload_id"}}  # of whoever has begun an upload

MIGHT: Mapping[str, frozenset[Access]] = {  # by caller, what he may
    "nobody": frozenset({PUBLIC}),
    "wrong": frozenset({PUBLIC}),
    "revoked": frozenset({PUBLIC}),
    "expired": frozenset({PUBLIC}),
    "disabled": frozenset({PUBLIC}),
    "archived": frozenset({PUBLIC}),
    "read-only": frozenset({PUBLIC, READ}),
    "member": frozenset({PUBLIC, READ, USE}),
    "admin": frozenset({PUBLIC, READ, USE, ADMIN}),
    "other": frozenset({PUBLIC, READ, USE, ADMIN}),  # an admin, too, of another organisation
    "operator": frozenset(Access),
}
UNKNOWN = {"nobody", "wrong", "revoked", "expired"}
OUTSIDE = {"disabled", "archived"}
VALUES = {"{org}": "acme", "{key_id}": "999", "{model}": "small", "{model:path}": "small"}


@dataclass(frozen=True)
class Served:
    """One method of one path of the application, as a client reaches it."""

    path: str  # whole
    route: Route  # without the mount
    client: str  # whose form of key: "other", "anthropic" or "gemini"

    @property
    def rule(self) -> str:
        return f"{self.route.method} {self.route.path}"


def served(routes: list[BaseRoute], mount: str = "") -> Iterator[Served]:
    """The application's route table, walked."""
    for route in routes:
        if isinstance(route, Mount):
            yield from served(list(route.routes), mount + route.path)
            continue
        assert isinstance(route, StarlettePath), f"{route}: what is served at it is not known"
        endpoint = route.endpoint
        told_apart = endpoint.applications if isinstance(endpoint, ByClient) else {"": endpoint}
        for client, calls in told_apart.items():
            assert isinstance(calls, PathCalls), f"{mount}{route.path} looks at no key"
            is_google = "v1beta" in mount or mount.startswith(("/gemini", "/upload"))
            for operation in calls.operations.values():
                yield Served(mount + route.path, operation.route, client or ("gemini" if is_google else "other"))


def filled(path: str) -> str:
    for name, value in VALUES.items():
        path = path.replace(name, value)
    return "/".join("none" if part.startswith("{") else part for part in path.split("/"))


def headers(client: str, key: str | None) -> dict[str, str]:
    if key is None:
        return {}
    if client == "gemini":
        return {"x-goog-api-key": key}
    return {"x-api-key": key, "anthropic-version": "2023-06-01"} if client == "anthropic" else {
        "authorization": f"Bearer {key}"
    }  # fmt: skip


def verdict(answer: Answer) -> str:
    """What came of it: "unknown" caller, "outside" whoever is let in, "denied", "elsewhere" (of another), or "through"."""
    text = answer.body.decode(errors="replace")
    if answer.status == 401 or "API_KEY_INVALID" in text or "unregistered callers" in text:
        return "unknown"
    if answer.status == 403 and ("is disabled" in text or "is archived" in text):
        return "outside"
    if answer.status == 403 and "this key's role is" in text:
        return "denied"
    if answer.status == 404 and "it sees no other" in text:
        return "elsewhere"
    is_googles_not_found = "not found (or permission denied)" in text or "permission to access the File" in text
    assert answer.status not in (401, 403) or is_googles_not_found, text
    assert answer.status < 500, text
    return "through"


def expected(caller: str, call: Served) -> str:
    access = RULES[call.rule]
    if access in MIGHT[caller]:
        return "elsewhere" if caller == "other" and "{org}" in call.route.path else "through"
    if caller in UNKNOWN:
        return "unknown"
    return "outside" if caller in OUTSIDE else "denied"


@dataclass(frozen=True)
class Town:
    """A server, and a key of every kind."""

    server: World
    keys: Mapping[str, str | None]

    @property
    def calls(self) -> list[Served]:
        return list(served(list(self.server.running.app.routes)))

    async def ask(self, caller: str, call: Served) -> Answer:
        body = None if call.route.method == "GET" else {}
        fields = headers(call.client, self.keys[caller])
        return await self.server.request(call.route.method, filled(call.path), body, key=None, headers=fields)


@asynccontextmanager
async def town(data_dir: Path) -> AsyncIterator[Town]:
    async with world(data_dir, config=WITH_KEYS) as server:
        identities = Identities(server.storage, server.clock, RandomIds(), tiers={}, default_tier=None)

        async def made(name: str, role: Role, org: str = "acme", **more: Any) -> str:
            key, _ = await identities.create_key(org, NewKey(name, role=role, **more), by=None)
            return key

        for org in ("acme", "other", "closed"):
            await identities.create_organisation(NewOrganisation(org))
        await identities.create_project("acme", "old")
        keys: dict[str, str | None] = {
            "nobody": None,
            "wrong": "sk-kw-" + "x" * 40,
            "revoked": await made("revoked", Role.OPERATOR),
            "expired": await made("expired", Role.OPERATOR, expires_at=int(server.clock.now()) + 1),
            "disabled": await made("disabled", Role.OPERATOR, "closed"),
            "archived": await made("archived", Role.OPERATOR, project="old"),
            "read-only": await made("read-only", Role.READ_ONLY),
            "member": await made("member", Role.MEMBER),
            "admin": await made("admin", Role.ADMIN),
            "other": await made("other", Role.ADMIN, "other"),
            "operator": await made("operator", Role.OPERATOR),
        }
        await identities.revoke_named("acme", "revoked")
        await identities.change_organisation("closed", OrganisationChange(is_disabled=True))
        await identities.archive_project("acme", "old", by=None)
        server.clock.advance(2)
        yield Town(server, keys)


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Town]:
    async with town(tmp_path) as made:
        yield made


@pytest.mark.parametrize("dev", [False, True], ids=["keys", "dev"])
async def test_every_route_has_the_rule_that_is_written_here(tmp_path: Path, dev: bool) -> None:
    async with world(tmp_path, config=replace(CONFIG, dev=dev)) as server:
        found = list(served(list(server.running.app.routes)))
    assert len(found) > 100
    wrong = {call.path: call.rule for call in found if RULES.get(call.rule) is not call.route.access}
    assert not wrong, f"routes without a rule here, or with another one: {wrong}"
    assert {call.rule for call in found} == set(RULES) - (set() if dev else DEV_ONLY)
    for call in found:
        assert call.route.bearer_param in BEARER_PARAMS.get(call.rule, {None}), call


def test_a_route_without_access_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="summary"):
        Route("GET", "/anything", "What it does")  # type: ignore[arg-type, call-arg]


@pytest.mark.parametrize("caller", MIGHT)
async def test_every_call_by_every_caller_comes_out_as_its_rule_says(here: Town, caller: str) -> None:
    told = {(call, verdict(await here.ask(caller, call))) for call in here.calls}
    assert {(call.rule, call.path, result) for call, result in told} == {
        (call.rule, call.path, expected(caller, call)) for call, _ in told
    }


async def test_no_log_and_no_answer_has_a_key_or_its_digest(here: Town, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    told: list[bytes] = []
    for caller, key in here.keys.items():
        told += [(await here.ask(caller, call)).body for call in here.calls]
        paths = [f"{path}?key={key}" for path in ("/v1beta/models", "/v1/chat/completions", "/nowhere")]
        told += [(await here.server.request("GET", path, key=None)).body for path in paths]
        await here.server.request("GET", f"/v1/models/{key}", key=here.keys["member"])  # says what it was asked for
    written = repr(here.server.logged) + caplog.text
    assert "request" in written
    for key in filter(None, here.keys.values()):
        for secret in (key, key.removeprefix("sk-kw-"), digest(key).hex(), repr(digest(key))):
            assert secret not in written
            assert not any(secret.encode() in body for body in told)


async def test_an_uploads_url_stands_for_the_key_that_began_it_and_for_no_other_call(here: Town) -> None:
    begun = await here.server.request(
        "POST",
        "/upload/v1beta/files",
        {"file": {"displayName": "a"}},
        key=None,
        headers={
            "x-goog-api-key": here.keys["member"] or "",
            "x-goog-upload-protocol": "resumable",
            "x-goog-upload-command": "start",
            "x-goog-upload-header-content-length": "3",
            "x-goog-upload-header-content-type": "text/plain",
        },
    )
    assert begun.status == 200, begun.body
    upload_id = begun.headers["X-Goog-Upload-URL"].rpartition("upload_id=")[2]
    step = {"x-goog-upload-command": "query"}
    going_on = await here.server.request("POST", f"/upload/v1beta/files?upload_id={upload_id}", key=None, headers=step)
    assert (going_on.status, going_on.headers[STATUS_HEADER]) == (200, "active")
    for path in ("/v1beta/files", "/v1beta/models"):
        assert verdict(await here.server.request("GET", f"{path}?upload_id={upload_id}", key=None)) == "unknown"
    empty = await here.server.request("POST", "/upload/v1beta/files?upload_id=", key=None, headers=step)
    assert verdict(empty) == "unknown"


async def test_what_one_organisation_has_looks_like_nothing_to_another(here: Town) -> None:
    server, member, other = here.server, here.keys["member"], here.keys["other"]
    cache = await server.ready_cache(key=member)
    turn = (await server.chat(key=member)).headers["x-request-id"]
    for path in (f"/v1/caching/{cache['id']}", f"/admin/turns/{turn}"):
        assert (await server.request("GET", path, key=member)).status == 200
        for key in (other, here.keys["operator"]):  # an operator's is of acme, too
            assert (await server.request("GET", path, key=key)).status == (404 if key == other else 200)
    assert (await server.request("DELETE", f"/v1/caching/{cache['id']}", key=other)).status == 404
    assert (await server.request("GET", "/v1/caching", key=other)).json()["data"] == []
