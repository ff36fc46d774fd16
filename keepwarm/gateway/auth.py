"""Who is calling: an API key is looked up, or with --dev taken at its word.

Keys are random (206 bits), so a plain digest of them is enough to store, and finding it by index gives nothing away: who
can choose what to hash cannot aim at a digest. The last four characters are kept for people to tell keys apart. A revoked
key is refused from the next request on, also when another process revoked it, since every request asks the database. No
error repeats the key it got.
"""

import re
from hashlib import blake2b
from hmac import compare_digest
from typing import Protocol

import sqlalchemy as sa
from msgspec import Struct

from keepwarm.core.clock import Ids
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.principal import Principal, Role
from keepwarm.storage import Storage
from keepwarm.tables import api_keys

KEY_PREFIX = "sk-kw-"
DIGEST_BYTES = 32
DEV_TENANT_CHARS = 16
DEFAULT_PROJECT = "default"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}")


class KeyInfo(Struct, frozen=True):
    """What is known of a key; times in unix seconds."""

    name: str
    tenant: str
    last4: str
    created_at: int
    revoked_at: int | None


class KeyNameError(Exception):
    """The name or tenant given for a key cannot be used; the message is one line that says what to do."""


class Auth(Protocol):
    """Decides who is calling."""

    async def principal(self, authorization: str | None) -> Principal:
        """The caller by the Authorization header's value. Raises ApiError(UNAUTHENTICATED)."""
        ...


class DevAuth:
    """Any key will do, and each distinct key is a tenant of its own. For loopback only (`config.load` sees to it)."""

    async def principal(self, authorization: str | None) -> Principal:
        key = bearer(authorization)
        tenant = "dev-" + digest(key).hex()[:DEV_TENANT_CHARS]
        return Principal(tenant, tenant, DEFAULT_PROJECT, None, "dev", Role.OPERATOR)


class KeyAuth:
    """Keys made by `Keys`."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    async def principal(self, authorization: str | None) -> Principal:
        wanted = digest(bearer(authorization))
        query = sa.select(api_keys).where(api_keys.c.digest == wanted, api_keys.c.revoked_at.is_(None))
        row = await self._storage.run(lambda connection: connection.execute(query).one_or_none())
        if row is None or not compare_digest(row.digest, wanted):
            raise ApiError(ErrorKind.UNAUTHENTICATED, "this API key is unknown or was revoked")
        return Principal(row.organisation, row.organisation, row.project, row.seq, row.name, Role(row.role))


class Keys:
    """Makes and revokes keys. For the operator's command line."""

    def __init__(self, storage: Storage, ids: Ids) -> None:
        self._storage = storage
        self._ids = ids

    async def create(self, name: str, tenant: str | None, now: float) -> str:
        """Make a key for `tenant` (None: `name` is the tenant too) and return it; it cannot be read again.

        Raises KeyNameError when a live key has this name or when a name cannot be used.
        """
        owner = name if tenant is None else tenant
        for what, text in (("key name", name), ("tenant", owner)):
            if not NAME.fullmatch(text):
                raise KeyNameError(
                    f"{what} {text!r} cannot be used: take 1 to 64 letters, digits and _ . @ -, first a letter or digit"
                )
        key = KEY_PREFIX + self._ids.new("") + self._ids.new("")
        values = {
            "name": name,
            "organisation": owner,
            "digest": digest(key),
            "last4": key[-4:],
            "created_at": int(now),
        }

        def add(connection: sa.Connection) -> None:
            if connection.execute(sa.select(api_keys.c.seq).where(_live(name))).first() is not None:
                raise KeyNameError(f"there is a key {name!r} already; revoke it first, or choose another name")
            connection.execute(sa.insert(api_keys).values(values))

        await self._storage.run(add)
        return key

    async def revoke(self, name: str, now: float) -> bool:
        """Revoke the live key of this name; False when there is none."""
        statement = sa.update(api_keys).where(_live(name)).values(revoked_at=int(now))
        return await self._storage.run(lambda connection: connection.execute(statement).rowcount == 1)

    async def list(self) -> list[KeyInfo]:
        """All keys ever made, oldest first."""
        query = sa.select(api_keys).order_by(api_keys.c.seq)

        def read(connection: sa.Connection) -> list[KeyInfo]:
            return [
                KeyInfo(row.name, row.organisation, row.last4, row.created_at, row.revoked_at)
                for row in connection.execute(query)
            ]

        return await self._storage.run(read)


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


def _live(name: str) -> sa.ColumnElement[bool]:
    return sa.and_(api_keys.c.name == name, api_keys.c.revoked_at.is_(None))
