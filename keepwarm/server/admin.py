"""The calls under /admin/orgs: organisations, their projects and their keys.

An operator's key may name any organisation, an admin's only its own: another's looks like none. The text of a key is in the
answer to the call that made it and nowhere else.
"""

import msgspec
from msgspec import Struct

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.identity import (
    KEY_ID_MAX,
    KeyChange,
    KeyInfo,
    NewKey,
    NewOrganisation,
    Organisation,
    OrganisationChange,
    Project,
    key_id_of,
)
from keepwarm.core.principal import Access, check_sees
from keepwarm.dialects.body import JsonBody
from keepwarm.dialects.openai_error import ErrorBody
from keepwarm.dialects.openapi import Param, Route
from keepwarm.gateway.identities import Identities
from keepwarm.server.endpoints import Entry, Services, fields_of
from keepwarm.server.exchange import Exchange

TAG = "administration"
ORGS, ORG = "/admin/orgs", "/admin/orgs/{org}"
PROJECTS, PROJECT = ORG + "/projects", ORG + "/projects/{name}"
KEYS, KEY = ORG + "/keys", ORG + "/keys/{key_id}"
KEYS_PAGE, KEYS_PAGE_MAX = 100, 1000


KEYS_PARAMS = (
    Param("after", "begin behind the key with this id", int),
    Param("limit", f"at most so many, {KEYS_PAGE} by default, {KEYS_PAGE_MAX:,} at most", int),
)


class OrganisationList(Struct):
    """Oldest first."""

    data: list[Organisation]


class ProjectList(Struct):
    """Oldest first."""

    data: list[Project]


class KeyList(Struct):
    """Oldest first, revoked ones too. `has_more`: the next ones come with `after`, the id of the last."""

    data: list[KeyInfo]
    has_more: bool


class NewProject(Struct, frozen=True, forbid_unknown_fields=True):
    """One to be made."""

    name: str


class MadeKey(Struct):
    """A new key: `key` is its text, which cannot be read again."""

    key: str
    info: KeyInfo


class AdminCalls:
    """Organisations, projects and keys."""

    def __init__(self, identities: Identities) -> None:
        self._identities = identities
        self._encoder = msgspec.json.Encoder()
        self._new_organisation = JsonBody(NewOrganisation)
        self._change = JsonBody(OrganisationChange)
        self._new_project = JsonBody(NewProject)
        self._new_key = JsonBody(NewKey)
        self._key_change = JsonBody(KeyChange)

    async def organisations(self, exchange: Exchange) -> None:
        """GET /admin/orgs."""
        await self._reply(exchange, OrganisationList(await self._identities.organisations()))

    async def create_organisation(self, exchange: Exchange) -> None:
        """POST /admin/orgs."""
        new = self._new_organisation.decode(await exchange.body())
        await self._reply(exchange, await self._identities.create_organisation(new))

    async def organisation(self, exchange: Exchange) -> None:
        """GET /admin/orgs/{org}."""
        await self._reply(exchange, await self._identities.organisation(organisation_of(exchange)))

    async def change_organisation(self, exchange: Exchange) -> None:
        """PATCH /admin/orgs/{org}."""
        change = self._change.decode(await exchange.body())
        await self._reply(exchange, await self._identities.change_organisation(organisation_of(exchange), change))

    async def projects(self, exchange: Exchange) -> None:
        """GET /admin/orgs/{org}/projects."""
        await self._reply(exchange, ProjectList(await self._identities.projects(organisation_of(exchange))))

    async def create_project(self, exchange: Exchange) -> None:
        """POST /admin/orgs/{org}/projects."""
        org = organisation_of(exchange)
        new = self._new_project.decode(await exchange.body())
        await self._reply(exchange, await self._identities.create_project(org, new.name))

    async def project(self, exchange: Exchange) -> None:
        """GET /admin/orgs/{org}/projects/{name}."""
        org, name = organisation_of(exchange), exchange.path_params["name"]
        await self._reply(exchange, await self._identities.project(org, name))

    async def archive_project(self, exchange: Exchange) -> None:
        """DELETE /admin/orgs/{org}/projects/{name}."""
        org, name = organisation_of(exchange), exchange.path_params["name"]
        await self._reply(exchange, await self._identities.archive_project(org, name, by=exchange.principal))

    async def keys(self, exchange: Exchange) -> None:
        """GET /admin/orgs/{org}/keys."""
        given = fields_of(exchange, {"after", "limit"})
        after, limit = (_number(given, name, default) for name, default in (("after", 0), ("limit", KEYS_PAGE)))
        limit = min(max(limit, 1), KEYS_PAGE_MAX)
        found = await self._identities.keys(organisation_of(exchange), after=after, limit=limit + 1)
        await self._reply(exchange, KeyList(found[:limit], len(found) > limit))

    async def create_key(self, exchange: Exchange) -> None:
        """POST /admin/orgs/{org}/keys."""
        org = organisation_of(exchange)
        new = self._new_key.decode(await exchange.body())
        key, info = await self._identities.create_key(org, new, by=exchange.principal)
        await self._reply(exchange, MadeKey(key, info))

    async def key(self, exchange: Exchange) -> None:
        """GET /admin/orgs/{org}/keys/{key_id}."""
        org = organisation_of(exchange)
        await self._reply(exchange, await self._identities.key(org, _key_id(exchange)))

    async def change_key(self, exchange: Exchange) -> None:
        """PATCH /admin/orgs/{org}/keys/{key_id}."""
        org, key_id = organisation_of(exchange), _key_id(exchange)
        change = self._key_change.decode(await exchange.body())
        await self._reply(exchange, await self._identities.change_key(org, key_id, change, by=exchange.principal))

    async def revoke_key(self, exchange: Exchange) -> None:
        """DELETE /admin/orgs/{org}/keys/{key_id}."""
        org = organisation_of(exchange)
        await self._reply(exchange, await self._identities.revoke_key(org, _key_id(exchange), by=exchange.principal))

    async def _reply(self, exchange: Exchange, told: Struct) -> None:
        await exchange.reply(self._encoder.encode(told))


def organisation_of(exchange: Exchange) -> str:
    """The organisation in the path. Raises ApiError(UNKNOWN_ROUTE) when it is not the caller's, who is no operator."""
    org: str = exchange.path_params["org"]
    check_sees(exchange.principal, org)
    return org


def _number(given: dict[str, str], name: str, default: int) -> int:
    """Raises ApiError(INVALID_REQUEST)."""
    found = key_id_of(given[name]) if name in given else default
    if found is None:
        raise ApiError(
            ErrorKind.INVALID_REQUEST, f"{name}: {given[name][:40]!r} is no number up to {KEY_ID_MAX:,}", param=name
        )
    return found


def _key_id(exchange: Exchange) -> int:
    """Raises ApiError(UNKNOWN_ROUTE)."""
    text = exchange.path_params["key_id"]
    found = key_id_of(text)
    if found is None:
        raise ApiError(ErrorKind.UNKNOWN_ROUTE, f"{text[:100]!r} is no key's id; those are numbers")
    return found


def admin_entries(services: Services) -> list[Entry]:
    """All of them, at the root."""
    calls = AdminCalls(services.identities)
    admin, operator = Access.ADMIN, Access.OPERATOR
    table: list[Entry] = [
        (Route("GET", ORGS, operator, "List organisations", response=OrganisationList), calls.organisations),
        (
            Route("POST", ORGS, operator, "Make one", request=NewOrganisation, response=Organisation),
            calls.create_organisation,
        ),
        (Route("GET", ORG, admin, "One organisation", response=Organisation), calls.organisation),
        (
            Route("PATCH", ORG, operator, "Change or disable it", request=OrganisationChange, response=Organisation),
            calls.change_organisation,
        ),
        (Route("GET", PROJECTS, admin, "List its projects", response=ProjectList), calls.projects),
        (
            Route("POST", PROJECTS, admin, "Make a project, or open it again", request=NewProject, response=Project),
            calls.create_project,
        ),
        (Route("GET", PROJECT, admin, "One project", response=Project), calls.project),
        (Route("DELETE", PROJECT, admin, "Archive it: its keys are refused", response=Project), calls.archive_project),
        (Route("GET", KEYS, admin, "List its keys", response=KeyList, params=KEYS_PARAMS), calls.keys),
        (
            Route("POST", KEYS, admin, "Make a key; its text is shown this once", request=NewKey, response=MadeKey),
            calls.create_key,
        ),
        (Route("GET", KEY, admin, "One key", response=KeyInfo), calls.key),
        (
            Route("PATCH", KEY, admin, "Change its name, end or models", request=KeyChange, response=KeyInfo),
            calls.change_key,
        ),
        (Route("DELETE", KEY, admin, "Revoke it", response=KeyInfo), calls.revoke_key),
    ]
    return [(route.tagged(TAG, ErrorBody), call) for route, call in table]
