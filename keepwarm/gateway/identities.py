"""Organisations, their projects and their API keys: made, listed, changed and ended. How a key opens a call is in auth.py.

Nothing is ever deleted, since the ledger speaks of it: an organisation is disabled, a project archived, a key revoked. Names
are the operator's and never changed; those of organisations and projects make up the namespace of what is cached.
"""

from collections.abc import Mapping
from typing import Any

import msgspec
import sqlalchemy as sa
from msgspec import UNSET
from msgspec.structs import replace

from keepwarm.core.clock import Clock, Ids
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.identity import (
    DEFAULT_ORGANISATION,
    DEFAULT_PROJECT,
    LIVE_KEYS_MAX,
    PROJECTS_MAX,
    KeyChange,
    KeyInfo,
    NewKey,
    NewOrganisation,
    Organisation,
    OrganisationChange,
    Project,
    check_granted,
    check_new_key,
    require_name,
)
from keepwarm.core.principal import Principal, Role
from keepwarm.core.rate_limit import LimitOverrides, OrgLimits, parse_overrides, resolved_limits
from keepwarm.gateway.auth import digest
from keepwarm.storage import Storage, count
from keepwarm.tables import api_keys, organisations, projects

KEY_PREFIX = "sk-kw-"


class Identities:
    """Keeps them. `tiers` and `default_tier` are the configuration's, so that no organisation is given one it has not."""

    def __init__(
        self, storage: Storage, clock: Clock, ids: Ids, *, tiers: Mapping[str, OrgLimits], default_tier: str | None
    ) -> None:
        self._storage = storage
        self._clock = clock
        self._ids = ids
        self._tiers = tiers
        self._default_tier = default_tier

    async def create_organisation(self, new: NewOrganisation) -> Organisation:
        """Make one, with a project "default". Raises ApiError(INVALID_REQUEST)."""
        require_name("organisation", new.id, "id")
        self._check_limits(new.tier, new.limits)
        made = Organisation(new.id, new.tier, new.limits, new.is_prepaid, new.cache_scope, int(self._clock.now()), None)

        def add(connection: sa.Connection) -> Organisation:
            if _organisation(connection, new.id) is not None:
                raise ApiError(ErrorKind.INVALID_REQUEST, f"there is an organisation {new.id!r} already", param="id")
            _add_organisation(connection, made)
            return made

        return await self._storage.run(add)

    async def organisations(self) -> list[Organisation]:
        """All, oldest first."""
        query = sa.select(organisations).order_by(organisations.c.seq)
        return await self._storage.run(
            lambda connection: [_organisation_of(row) for row in connection.execute(query)],
        )

    async def organisation(self, org: str) -> Organisation:
        """Raises ApiError(UNKNOWN_ROUTE)."""
        return await self._storage.run(lambda connection: _required_organisation(connection, org))

    async def change_organisation(self, org: str, change: OrganisationChange) -> Organisation:
        """Raises ApiError: UNKNOWN_ROUTE, INVALID_REQUEST."""
        now = int(self._clock.now())

        def write(connection: sa.Connection) -> Organisation:
            old = _required_organisation(connection, org)
            given = {name: value for name, value in msgspec.structs.asdict(change).items() if value is not UNSET}
            disabled = given.pop("is_disabled", old.disabled_at is not None)
            changed = replace(old, **given, disabled_at=(old.disabled_at or now) if disabled else None)
            self._check_limits(changed.tier, changed.limits)
            connection.execute(sa.update(organisations).where(organisations.c.id == org).values(_values(changed)))
            return changed

        return await self._storage.run(write)

    async def create_project(self, org: str, name: str) -> Project:
        """Make a project, or take an archived one into use again. Raises ApiError: UNKNOWN_ROUTE, INVALID_REQUEST."""
        require_name("project", name, "name")
        now = int(self._clock.now())

        def add(connection: sa.Connection) -> Project:
            _required_organisation(connection, org)
            found = _project(connection, org, name)
            if found is None:
                _check_room(connection, projects, projects.c.organisation == org, PROJECTS_MAX, "projects")
                connection.execute(sa.insert(projects).values(organisation=org, name=name, created_at=now))
                return Project(org, name, now, None)
            if found.archived_at is None:
                message = f"organisation {org!r} has a project {name!r} already"
                raise ApiError(ErrorKind.INVALID_REQUEST, message, param="name")
            connection.execute(sa.update(projects).where(_is_project(org, name)).values(archived_at=None))
            return replace(found, archived_at=None)

        return await self._storage.run(add)

    async def projects(self, org: str) -> list[Project]:
        """All of an organisation, oldest first. Raises ApiError(UNKNOWN_ROUTE)."""
        query = sa.select(projects).where(projects.c.organisation == org).order_by(projects.c.seq)

        def read(connection: sa.Connection) -> list[Project]:
            _required_organisation(connection, org)
            return [_project_of(row) for row in connection.execute(query)]

        return await self._storage.run(read)

    async def project(self, org: str, name: str) -> Project:
        """Raises ApiError(UNKNOWN_ROUTE)."""
        return await self._storage.run(lambda connection: _required_project(connection, org, name))

    async def archive_project(self, org: str, name: str, *, by: Principal | None) -> Project:
        """Its keys are refused from now on. Archiving it again changes nothing. `by` None is the command line.

        Raises ApiError: UNKNOWN_ROUTE, PERMISSION_DENIED where it would end an operator's key.
        """
        now = int(self._clock.now())

        def write(connection: sa.Connection) -> Project:
            found = _required_project(connection, org, name)
            if not _may_end_operators(by) and _has_operators(connection, org, name):
                message = f"project {name!r} has a live key with the role operator, so only operators may archive it"
                raise ApiError(ErrorKind.PERMISSION_DENIED, message)
            archived = replace(found, archived_at=found.archived_at or now)
            statement = sa.update(projects).where(_is_project(org, name))
            connection.execute(statement.values(archived_at=archived.archived_at))
            return archived

        return await self._storage.run(write)

    async def create_key(self, org: str | None, new: NewKey, *, by: Principal | None) -> tuple[str, KeyInfo]:
        """The key, which cannot be read again, and what is known of it. `by` None is the command line.

        `org` None is the organisation "default", which is made if need be. Raises ApiError: UNKNOWN_ROUTE for the
        organisation, INVALID_REQUEST, PERMISSION_DENIED.
        """
        now = int(self._clock.now())
        check_new_key(new, now)
        check_granted(new, by)
        owner = DEFAULT_ORGANISATION if org is None else org
        key = KEY_PREFIX + self._ids.new("") + self._ids.new("")

        def add(connection: sa.Connection) -> KeyInfo:
            if org is None and _organisation(connection, owner) is None:
                made = NewOrganisation(owner)
                _add_organisation(
                    connection, Organisation(owner, None, made.limits, made.is_prepaid, made.cache_scope, now, None)
                )
            _check_place(connection, owner, new)
            values = {
                "name": new.name,
                "organisation": owner,
                "project": new.project,
                "role": new.role.value,
                "digest": digest(key),
                "last4": key[-4:],
                "created_at": now,
                "expires_at": new.expires_at,
                "models": None if new.models is None else msgspec.json.encode(new.models),
            }
            connection.execute(sa.insert(api_keys).values(values))
            return _key_of(connection.execute(sa.select(api_keys).where(api_keys.c.digest == digest(key))).one())

        return key, await self._storage.run(add)

    async def keys(self, org: str | None = None, *, after: int = 0, limit: int | None = None) -> list[KeyInfo]:
        """Keys ever made for an organisation, None: for all of them; oldest first, with ids above `after`.

        Raises ApiError(UNKNOWN_ROUTE).
        """
        query = sa.select(api_keys).where(api_keys.c.seq > after).order_by(api_keys.c.seq).limit(limit)

        def read(connection: sa.Connection) -> list[KeyInfo]:
            if org is not None:
                _required_organisation(connection, org)
            found = query if org is None else query.where(api_keys.c.organisation == org)
            return [_key_of(row) for row in connection.execute(found)]

        return await self._storage.run(read)

    async def key(self, org: str, key_id: int) -> KeyInfo:
        """Raises ApiError(UNKNOWN_ROUTE)."""
        return await self._storage.run(lambda connection: _required_key(connection, org, key_id))

    async def change_key(self, org: str, key_id: int, change: KeyChange, *, by: Principal | None) -> KeyInfo:
        """The next request with it goes by what it is then. `by` None is the command line.

        Raises ApiError: UNKNOWN_ROUTE, INVALID_REQUEST, PERMISSION_DENIED.
        """
        given = {name: value for name, value in msgspec.structs.asdict(change).items() if value is not UNSET}
        now = int(self._clock.now())

        def write(connection: sa.Connection) -> KeyInfo:
            found = _required_key(connection, org, key_id)
            return _changed(connection, found, replace(found, **given), now, by)

        return await self._storage.run(write)

    async def revoke_key(self, org: str, key_id: int, *, by: Principal | None) -> KeyInfo:
        """The next request with it is refused. Revoking it again changes nothing. `by` None is the command line.

        Raises ApiError: UNKNOWN_ROUTE, PERMISSION_DENIED.
        """
        now = int(self._clock.now())

        def write(connection: sa.Connection) -> KeyInfo:
            found = _required_key(connection, org, key_id)
            if found.role is Role.OPERATOR and not _may_end_operators(by):
                raise ApiError(ErrorKind.PERMISSION_DENIED, "a key with the role operator is revoked by operators only")
            return _revoked(connection, found, now)

        return await self._storage.run(write)

    async def revoke_named(self, org: str | None, name: str) -> KeyInfo:
        """Revoke the live key of this name, which without an organisation must be one of its kind.

        Raises ApiError: UNKNOWN_ROUTE when there is none, INVALID_REQUEST when there are several.
        """
        now = int(self._clock.now())
        query = sa.select(api_keys).where(api_keys.c.name == name, api_keys.c.revoked_at.is_(None))
        if org is not None:
            query = query.where(api_keys.c.organisation == org)

        def write(connection: sa.Connection) -> KeyInfo:
            found = [_key_of(row) for row in connection.execute(query)]
            if not found:
                there = "" if org is None else f" in organisation {org!r}"
                message = f"there is no live key {name!r}{there}; keepwarm keys list shows them"
                raise ApiError(ErrorKind.UNKNOWN_ROUTE, message)
            if len(found) > 1:
                owners = ", ".join(key.organisation for key in found)
                raise ApiError(
                    ErrorKind.INVALID_REQUEST, f"several organisations have a key {name!r}: {owners}; say which"
                )
            return _revoked(connection, found[0], now)

        return await self._storage.run(write)

    def _check_limits(self, tier: str | None, limits: LimitOverrides) -> None:
        """Raises ApiError(INVALID_REQUEST)."""
        resolved_limits(tier, limits, tiers=self._tiers, default_tier=self._default_tier)


def _check_place(connection: sa.Connection, org: str, new: NewKey) -> None:
    """Whether the organisation has room for the key. Raises ApiError: UNKNOWN_ROUTE, INVALID_REQUEST."""
    _required_organisation(connection, org)
    project = _project(connection, org, new.project)
    if project is None or project.archived_at is not None:
        state = "no project" if project is None else "archived the project"
        message = (
            f"organisation {org!r} has {state} {new.project!r}; "
            f"keepwarm projects create {new.project} --org {org} makes it, or opens it again"
        )
        raise ApiError(ErrorKind.INVALID_REQUEST, message, param="project")
    is_live = sa.and_(api_keys.c.organisation == org, api_keys.c.revoked_at.is_(None))
    _check_room(connection, api_keys, is_live, LIVE_KEYS_MAX, "live keys; revoke one first")
    _check_free(connection, org, new.name)


def _check_free(connection: sa.Connection, org: str, name: str) -> None:
    """Raises ApiError(INVALID_REQUEST) when a live key of the organisation has the name."""
    taken = sa.select(api_keys.c.seq).where(
        api_keys.c.organisation == org, api_keys.c.name == name, api_keys.c.revoked_at.is_(None)
    )
    if connection.execute(taken).first() is not None:
        message = f"there is a key {name!r} in organisation {org!r} already; revoke it first, or choose another name"
        raise ApiError(ErrorKind.INVALID_REQUEST, message, param="name")


def _check_room(
    connection: sa.Connection, table: sa.Table, which: sa.ColumnElement[bool], n_max: int, what: str
) -> None:  # fmt: skip
    """Raises ApiError(INVALID_REQUEST) where an organisation has as many as it may have."""
    n = count(connection, table, which)
    if n >= n_max:
        raise ApiError(ErrorKind.INVALID_REQUEST, f"the organisation has {n:,} of at most {n_max:,} {what}")


def _may_end_operators(by: Principal | None) -> bool:
    return by is None or by.is_operator


def _has_operators(connection: sa.Connection, org: str, project: str) -> bool:
    """Whether a live key of an operator's is of this project."""
    query = sa.select(api_keys.c.seq).where(
        api_keys.c.organisation == org,
        api_keys.c.project == project,
        api_keys.c.role == Role.OPERATOR.value,
        api_keys.c.revoked_at.is_(None),
    )
    return connection.execute(query).first() is not None


def _add_organisation(connection: sa.Connection, made: Organisation) -> None:
    connection.execute(sa.insert(organisations).values(id=made.id, created_at=made.created_at, **_values(made)))
    values = {"organisation": made.id, "name": DEFAULT_PROJECT, "created_at": made.created_at}
    connection.execute(sa.insert(projects).values(values))


def _values(made: Organisation) -> dict[str, Any]:
    """The columns that may change."""
    return {
        "tier": made.tier,
        "limits": None if made.limits == LimitOverrides() else msgspec.json.encode(made.limits),
        "is_prepaid": made.is_prepaid,
        "cache_scope": made.cache_scope,
        "disabled_at": made.disabled_at,
    }


def _organisation(connection: sa.Connection, org: str) -> Organisation | None:
    row = connection.execute(sa.select(organisations).where(organisations.c.id == org)).one_or_none()
    return None if row is None else _organisation_of(row)


def _required_organisation(connection: sa.Connection, org: str) -> Organisation:
    found = _organisation(connection, org)
    if found is None:
        message = (
            f"there is no organisation {org[:100]!r}; whoever runs this server makes them: keepwarm orgs create NAME"
        )
        raise ApiError(ErrorKind.UNKNOWN_ROUTE, message)
    return found


def _is_project(org: str, name: str) -> sa.ColumnElement[bool]:
    return sa.and_(projects.c.organisation == org, projects.c.name == name)


def _project(connection: sa.Connection, org: str, name: str) -> Project | None:
    row = connection.execute(sa.select(projects).where(_is_project(org, name))).one_or_none()
    return None if row is None else _project_of(row)


def _required_project(connection: sa.Connection, org: str, name: str) -> Project:
    _required_organisation(connection, org)
    found = _project(connection, org, name)
    if found is None:
        raise ApiError(ErrorKind.UNKNOWN_ROUTE, f"organisation {org!r} has no project {name[:100]!r}")
    return found


def _required_key(connection: sa.Connection, org: str, key_id: int) -> KeyInfo:
    _required_organisation(connection, org)
    query = sa.select(api_keys).where(api_keys.c.organisation == org, api_keys.c.seq == key_id)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise ApiError(ErrorKind.UNKNOWN_ROUTE, f"organisation {org!r} has no key with the id {key_id}")
    return _key_of(row)


def _changed(connection: sa.Connection, old: KeyInfo, key: KeyInfo, now: int, by: Principal | None) -> KeyInfo:
    """Raises ApiError as `Identities.change_key`."""
    if old.role is Role.OPERATOR and not _may_end_operators(by):
        raise ApiError(ErrorKind.PERMISSION_DENIED, "a key with the role operator is changed by operators only")
    if old.revoked_at is not None:
        raise ApiError(ErrorKind.INVALID_REQUEST, f"key {old.id} was revoked at {old.revoked_at}; make a new one")
    wanted = NewKey(key.name, key.project, key.role, key.expires_at, key.models)
    # An expiry that is over may stay where the change is of something else.
    check_new_key(wanted if key.expires_at != old.expires_at else replace(wanted, expires_at=None), now)
    if (key.expires_at, key.models) != (old.expires_at, old.models):
        check_granted(wanted, by)
    if key.name != old.name:
        _check_free(connection, old.organisation, key.name)
    models = None if key.models is None else msgspec.json.encode(key.models)
    values = {"name": key.name, "expires_at": key.expires_at, "models": models}
    connection.execute(sa.update(api_keys).where(api_keys.c.seq == key.id).values(values))
    return key


def _revoked(connection: sa.Connection, key: KeyInfo, now: int) -> KeyInfo:
    revoked = replace(key, revoked_at=key.revoked_at or now)
    connection.execute(sa.update(api_keys).where(api_keys.c.seq == key.id).values(revoked_at=revoked.revoked_at))
    return revoked


def _organisation_of(row: sa.Row[Any]) -> Organisation:
    limits = parse_overrides(row.limits)
    return Organisation(row.id, row.tier, limits, row.is_prepaid, row.cache_scope, row.created_at, row.disabled_at)


def _project_of(row: sa.Row[Any]) -> Project:
    return Project(row.organisation, row.name, row.created_at, row.archived_at)


def _key_of(row: sa.Row[Any]) -> KeyInfo:
    return KeyInfo(
        id=row.seq,
        name=row.name,
        organisation=row.organisation,
        project=row.project,
        role=Role(row.role),
        last4=row.last4,
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        models=None if row.models is None else msgspec.json.decode(row.models, type=tuple[str, ...]),
    )
