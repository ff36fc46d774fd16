"""The calls under /admin/orgs: organisations, their projects and their keys.

An operator's key may name any organisation, an admin's only its own: another's looks like none. The text of a key is in the
answer to the call that made it and nowhere else. Other calls on an organisation check the name in their path with
`organisation_of`, too.
"""

import msgspec
from msgspec import Struct

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.identity import KeyInfo, NewKey, NewOrganisation, Organisation, OrganisationChange, Project
from keepwarm.core.principal import Access, Role
from keepwarm.dialects.body import JsonBody
from keepwarm.dialects.openai_error import ErrorBody
from keepwarm.dialects.openapi import Route
from keepwarm.gateway.identities import Identities
from keepwarm.server.endpoints import Entry, Services
from keepwarm.server.exchange import Exchange

TAG = "administration"
ORGS, ORG = "/admin/orgs", "/admin/orgs/{org}"
PROJECTS, PROJECT = ORG + "/projects", ORG + "/projects/{name}"
KEYS, KEY = ORG + "/keys", ORG + "/keys/{key_id}"
KEY_ID_DIGITS_MAX = 9  # the column has 32 bits


class OrganisationList(Struct):
    """Oldest first."""

    data: list[Organisation]


class ProjectList(Struct):
    """Oldest first."""

    data: list[Project]


class KeyList(Struct):
    """Oldest first, revoked ones too."""

    data: list[KeyInfo]


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
        await self._reply(exchange, await self._identities.archive_project(org, name))

    async def keys(self, exchange: Exchange) -> None:
        """GET /admin/orgs/{org}/keys."""
        await self._reply(exchange, KeyList(await self._identities.keys(organisation_of(exchange))))

    async def create_key(self, exchange: Exchange) -> None:
        """POST /admin/orgs/{org}/keys."""
        org = organisation_of(exchange)
        new = self._new_key.decode(await exchange.body())
        key, info = await self._identities.create_key(org, new, may_make_operators=_is_operator(exchange))
        await self._reply(exchange, MadeKey(key, info))

    async def key(self, exchange: Exchange) -> None:
        """GET /admin/orgs/{org}/keys/{key_id}."""
        org = organisation_of(exchange)
        await self._reply(exchange, await self._identities.key(org, _key_id(exchange)))

    async def revoke_key(self, exchange: Exchange) -> None:
        """DELETE /admin/orgs/{org}/keys/{key_id}."""
        org, may = organisation_of(exchange), _is_operator(exchange)
        await self._reply(exchange, await self._identities.revoke_key(org, _key_id(exchange), may_end_operators=may))

    async def _reply(self, exchange: Exchange, told: Struct) -> None:
        await exchange.reply(self._encoder.encode(told))


def organisation_of(exchange: Exchange) -> str:
    """The organisation in the path. Raises ApiError(UNKNOWN_ROUTE) when it is not the caller's, who is no operator."""
    org, caller = exchange.path_params["org"], exchange.principal
    if org != caller.organisation and caller.role is not Role.OPERATOR:
        raise ApiError(ErrorKind.UNKNOWN_ROUTE, f"this key's organisation is {caller.organisation!r}, it sees no other")
    return org


def _is_operator(exchange: Exchange) -> bool:
    return exchange.principal.role is Role.OPERATOR


def _key_id(exchange: Exchange) -> int:
    """Raises ApiError(UNKNOWN_ROUTE)."""
    text = exchange.path_params["key_id"]
    if not (text.isascii() and text.isdecimal() and len(text) <= KEY_ID_DIGITS_MAX):
        raise ApiError(ErrorKind.UNKNOWN_ROUTE, f"{text[:100]!r} is no key's id; those are numbers")
    return int(text)


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
        (Route("GET", KEYS, admin, "List its keys", response=KeyList), calls.keys),
        (
            Route("POST", KEYS, admin, "Make a key; its text is shown this once", request=NewKey, response=MadeKey),
            calls.create_key,
        ),
        (Route("GET", KEY, admin, "One key", response=KeyInfo), calls.key),
        (Route("DELETE", KEY, admin, "Revoke it", response=KeyInfo), calls.revoke_key),
    ]
    return [(route.tagged(TAG, ErrorBody), call) for route, call in table]
