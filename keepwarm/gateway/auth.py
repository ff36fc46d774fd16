"""Who is calling: an API key is looked up, or with --dev taken at its word.

Keys are random (206 bits), so a plain digest of them is enough to store, and finding it by index gives nothing away: who
can choose what to hash cannot aim at a digest. Every request asks the database, so a key that is revoked, an organisation
that is disabled and a project that is archived are refused from the next request on, also when another process did it. No
error repeats the key it got.

Keys are made in identities.py.
"""

from datetime import UTC, datetime
from hashlib import blake2b
from hmac import compare_digest
from typing import Any, Protocol

import msgspec
import sqlalchemy as sa

from keepwarm.core.clock import Clock
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.identity import DEFAULT_PROJECT, tenant_of
from keepwarm.core.principal import Principal, Role
from keepwarm.storage import Storage
from keepwarm.tables import api_keys, organisations, projects

DIGEST_BYTES = 32
DEV_TENANT_CHARS = 16

# Everything a request must know of its key, in one statement. An organisation or project that is not there keeps its keys
# out, as one that is disabled does.
_KNOWN = (
    sa.select(
        api_keys,
        organisations.c.tier,
        organisations.c.limits,
        organisations.c.is_prepaid,
        organisations.c.cache_scope,
        organisations.c.disabled_at,
        projects.c.archived_at,
    )
    .join(organisations, organisations.c.id == api_keys.c.organisation)
    .join(projects, sa.and_(projects.c.organisation == api_keys.c.organisation, projects.c.name == api_keys.c.project))
    .where(api_keys.c.digest == sa.bindparam("wanted"))
)


class Auth(Protocol):
    """Decides who is calling."""

    async def principal(self, authorization: str | None) -> Principal:
        """The caller by the Authorization header's value.

        Raises ApiError: UNAUTHENTICATED for a key that does not count, PERMISSION_DENIED when its organisation is disabled
        or its project archived.
        """
        ...


class DevAuth:
    """Any key will do, and each distinct key is a tenant of its own. For loopback only (`config.load` sees to it)."""

    async def principal(self, authorization: str | None) -> Principal:
        key = bearer(authorization)
        tenant = "dev-" + digest(key).hex()[:DEV_TENANT_CHARS]
        return Principal(tenant, tenant, DEFAULT_PROJECT, None, "dev", Role.OPERATOR)


class KeyAuth:
    """Keys made by `Identities`."""

    def __init__(self, storage: Storage, clock: Clock) -> None:
        self._storage = storage
        self._clock = clock

    async def principal(self, authorization: str | None) -> Principal:
        wanted = digest(bearer(authorization))
        row = await self._storage.read(lambda connection: connection.execute(_KNOWN, {"wanted": wanted}).one_or_none())
        if row is None or not compare_digest(row.digest, wanted) or row.revoked_at is not None:
            raise ApiError(ErrorKind.UNAUTHENTICATED, "this API key is unknown or was revoked")
        if row.expires_at is not None and row.expires_at <= self._clock.now():
            ended = datetime.fromtimestamp(row.expires_at, UTC).isoformat(sep=" ", timespec="seconds")
            raise ApiError(ErrorKind.UNAUTHENTICATED, f"this API key expired at {ended}")
        if row.disabled_at is not None:
            message = f"organisation {row.organisation!r} is disabled; whoever runs this server can enable it"
            raise ApiError(ErrorKind.PERMISSION_DENIED, message)
        if row.archived_at is not None:
            raise ApiError(ErrorKind.PERMISSION_DENIED, f"project {row.project!r} of this API key is archived")
        return _principal(row)


def _principal(row: sa.Row[Any]) -> Principal:
    return Principal(
        tenant=tenant_of(row.organisation, row.project, row.cache_scope),
        organisation=row.organisation,
        project=row.project,
        key_id=row.seq,
        key_name=row.name,
        role=Role(row.role),
        models=None if row.models is None else msgspec.json.decode(row.models, type=tuple[str, ...]),
        is_prepaid=row.is_prepaid,
        tier=row.tier,
        limits=row.limits,
        expires_at=row.expires_at,
    )


def bearer(authorization: str | None) -> str:
    """The key in an Authorization header's value. Raises ApiError(UNAUTHENTICATED)."""
    scheme, _, key = (authorization or "").strip().partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not key:
        raise ApiError(ErrorKind.UNAUTHENTICATED, "an API key is needed: send the header Authorization: Bearer KEY")
    return key


def digest(key: str) -> bytes:
    """What is stored in place of a key: blake2b, 32 bytes."""
    return blake2b(key.encode("utf-8", errors="surrogatepass"), digest_size=DIGEST_BYTES).digest()
